"""The page of `ggtool inspect --html` in a real browser: offline, both schemes, a phone's width, a stranger's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import tiny_gguf
from chromium import BROWSER, Chromium
from typer.testing import CliRunner

from ggtool.cli.app import app

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    tiny_gguf.gpt2(
        folder / "tiny.gguf", qtype=gguf.GGMLQuantizationType.Q4_0, chat_template="{{ '" + HOSTILE + "' }}"
    )
    done = CliRunner().invoke(
        app, ["inspect", str(folder / "tiny.gguf"), "--html", str(folder / "page.html"), "-q"]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as started:
        yield started


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_the_page_works_alone_at_any_width(browser: Chromium, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not browser.said("Runtime.exceptionThrown")
    assert not [entry for entry in browser.said("Log.entryAdded") if entry["entry"]["level"] == "error"]
    asked = {event["request"]["url"].partition(":")[0] for event in browser.said("Network.requestWillBeSent")}
    assert asked == {"file"}
    shade = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (shade == "rgb(20, 23, 27)") is dark


def test_a_stranger_s_text_stays_text(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert browser.evaluate("document.title") == "tiny.gguf – GGUF"
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.body.textContent.includes('owned')")


def test_the_map_the_list_and_the_block_belong_together(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('#drawing rect').length") >= 28
    assert browser.evaluate("document.querySelectorAll('#list tbody tr').length") == 28
    browser.evaluate(
        "(() => { const f = document.getElementById('filter'); f.value = 'ffn_up.w'; f.dispatchEvent(new Event('input')); })()"
    )
    assert browser.evaluate(
        "[...document.querySelectorAll('#list tbody button')].map((b) => b.textContent)"
    ) == [
        "blk.0.ffn_up.weight",
        "blk.1.ffn_up.weight",
    ]
    browser.evaluate("document.querySelectorAll('#list tbody tr')[1].click()")
    assert browser.evaluate("document.getElementById('which').value") == "blk.1.ffn_up.weight"
    assert browser.evaluate("document.querySelectorAll('.bytes button').length") == 18
    browser.evaluate("document.querySelectorAll('.bytes button')[0].focus()")
    assert "d: scale of the block" in browser.evaluate(
        "document.querySelector('#explorer .readout').textContent"
    )
    assert "Q4_0: 32 weights in 18 bytes" in browser.evaluate(
        "document.getElementById('explorer').textContent"
    )
