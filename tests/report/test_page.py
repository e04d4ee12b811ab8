"""The page in a real browser: nothing asked of a network, nothing wrong, plots in pixels, tables that sort."""

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from chromium import BROWSER, Chromium
from made_facts import FACTS
from made_records import RECORDS, failed

from ggtool.report.build import build_report
from ggtool.report.families import BNB, GGUF_K, SCRATCH
from ggtool.report.html import to_html
from ggtool.report.subject import choose_subject

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(build_report(choose_subject([*RECORDS, failed("bnb-fp4", "no")]), FACTS)))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as started:
        yield started


@pytest.fixture
def at_desk(browser: Chromium, page: Path) -> Chromium:
    browser.open(page, 1400)
    return browser


def pixels(png: bytes) -> np.ndarray:
    return np.rint(255 * matplotlib.image.imread(io.BytesIO(png))[..., :3]).astype(int)


def share_of(picture: np.ndarray, colour: str) -> float:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(picture - wanted).max(axis=2) <= 12).mean())


def clip(browser: Chromium, selector: str) -> dict[str, float]:
    return browser.evaluate(
        f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
        "return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}; })()"
    )


def column(browser: Chromium, table: str, number: int) -> list[str]:
    return browser.evaluate(
        f"[...document.querySelectorAll('#{table} tbody tr')].map((row) => row.cells[{number}].textContent.trim())"
    )


def test_nothing_is_asked_of_a_network_and_nothing_goes_wrong(at_desk: Chromium, page: Path) -> None:
    at_desk.evaluate("document.querySelectorAll('button').forEach((button) => button.click())")
    at_desk.screenshot()
    urls = {event["request"]["url"] for event in at_desk.said("Network.requestWillBeSent")}
    assert {url for url in urls if not url.startswith("data:")} == {page.resolve().as_uri()}
    assert at_desk.said("Runtime.exceptionThrown") == []
    assert at_desk.said("Runtime.consoleAPICalled") == []
    assert at_desk.said("Log.entryAdded") == []


def test_plots_are_drawn(at_desk: Chromium) -> None:
    bars = pixels(at_desk.screenshot(clip(at_desk, "#figure-memory svg")))
    for family in (SCRATCH, BNB, GGUF_K):
        assert share_of(bars, family.colour) > 0.01
    front = pixels(at_desk.screenshot(clip(at_desk, "#figure-pareto-divergence svg")))
    for family in (SCRATCH, BNB, GGUF_K):
        assert share_of(front, family.colour) > 0.0001
    for name in ("latency", "quality", "pareto-speed", "parts", "levels", "gguf-file"):
        picture = pixels(at_desk.screenshot(clip(at_desk, f"#figure-{name} svg")))
        assert len(np.unique(picture @ [1, 256, 65536])) > 20, name


def test_tables_sort_by_number_both_ways_with_what_is_missing_last(at_desk: Chromium) -> None:
    click = "document.querySelectorAll('#table-formats thead button')[1].click()"
    at_desk.evaluate(click)
    rising = column(at_desk, "table-formats", 1)
    assert rising[-1] == "–"
    assert [float(cell) for cell in rising[:-1]] == sorted(
        round(found.model_size / 2**20, 2) for found in RECORDS
    )
    assert column(at_desk, "table-formats", 0)[0] == "gguf-q2_k"
    at_desk.evaluate(click)
    falling = column(at_desk, "table-formats", 1)
    assert falling == [*reversed(rising[:-1]), "–"]
    heading = "document.querySelectorAll('#table-formats th')[1].getAttribute('aria-sort')"
    assert at_desk.evaluate(heading) == "descending"


def test_formats_are_found_in_tables_and_plots(at_desk: Chromium) -> None:
    at_desk.evaluate(
        "(() => { const s = document.getElementById('search'); s.value = 'gguf q4_k';"
        "s.dispatchEvent(new Event('input')); })()"
    )
    shown = "[...document.querySelectorAll('#table-formats tbody tr:not([hidden])')].map((row) => row.dataset.format)"
    assert at_desk.evaluate(shown) == ["gguf-q4_k_m"]
    bright = (
        "[...document.querySelectorAll('#figure-memory .mark:not(.dim)')].map((mark) => mark.dataset.format)"
    )
    assert set(at_desk.evaluate(bright)) == {"gguf-q4_k_m"}
    assert at_desk.evaluate("document.getElementById('found').textContent") == "1 of 14 formats"


def test_a_family_can_be_put_aside(at_desk: Chromium) -> None:
    at_desk.evaluate("document.querySelector('.chip[data-toggle=bnb]').click()")
    hidden = (
        "[...document.querySelectorAll('#table-formats tbody tr[hidden]')].map((row) => row.dataset.format)"
    )
    assert at_desk.evaluate(hidden) == ["bnb-int8", "bnb-nf4", "bnb-fp4"]


def test_a_mark_says_what_it_is(at_desk: Chromium) -> None:
    at_desk.evaluate("document.querySelector('#pareto').scrollIntoView({behavior: 'instant'})")
    at_desk.evaluate("new Promise((done) => setTimeout(done, 200))")  # a scroll hides the words
    at = at_desk.evaluate(
        "(() => { const b = document.querySelector('#figure-pareto-divergence [data-format=\"gguf-q2_k\"]')"
        ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    at_desk.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
    assert at_desk.evaluate("document.getElementById('tip').textContent") == (
        "gguf-q2_k4.00 MiB, KLD 0.3000 ± 0.0040 nats"
    )
    assert at_desk.evaluate("document.getElementById('tip').hidden") is False


def test_a_phone_scrolls_one_way_only(browser: Chromium, page: Path) -> None:
    browser.open(page, 390, height=844)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    small = (
        "[...document.querySelectorAll('p, li, td, figcaption')].filter((e) => e.textContent.trim() && "
        "parseFloat(getComputedStyle(e).fontSize) < 11).length"
    )
    assert browser.evaluate(small) == 0


def test_the_page_is_dark_where_the_reader_wants_it(browser: Chromium, page: Path) -> None:
    browser.open(page, 1400, dark=True)
    assert pixels(browser.screenshot()).mean() < 80
    bars = pixels(browser.screenshot(clip(browser, "#figure-memory svg")))
    assert bars.mean() < 120
    assert share_of(bars, BNB.dark) > 0.01
    black = "[...document.querySelectorAll('.plot text')].filter((e) => getComputedStyle(e).fill === 'rgb(0, 0, 0)').length"
    assert browser.evaluate(black) == 0
    browser.evaluate("document.getElementById('theme').click()")
    assert pixels(browser.screenshot()).mean() > 200


def test_it_can_be_printed(browser: Chromium, page: Path) -> None:
    browser.open(page, 1400, dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.querySelector('.tools')).display") == "none"
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.call("Emulation.setEmulatedMedia", media="")
