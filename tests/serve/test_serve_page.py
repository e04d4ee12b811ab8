"""The page in a real browser: a conversation, a comparison, the keyboard alone, a phone, nothing from elsewhere."""

from __future__ import annotations

import json

import pytest
from chromium import BROWSER, Chromium

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")

IDLE = "!stopping && document.querySelectorAll('.answer').length >= {n}"


@pytest.fixture(scope="module")
def browser(server):
    with Chromium() as made:
        made.open(server.url)
        made.wait_until("models.length === 2")
        yield made


@pytest.fixture
def page(browser, server):
    """The page at a desk, with nothing said and settings that make short texts that can be repeated."""
    made = json.dumps({"max_tokens": 24, "seed": "7", "system": ""})
    browser.evaluate(f"localStorage.clear(); localStorage.setItem('ggtool.settings', JSON.stringify({made}))")
    browser.open(server.url)
    browser.wait_until("models.length === 2 && document.activeElement.id === 'entry'")
    yield browser
    errors = [event for event in browser.said("Runtime.consoleAPICalled") if event["type"] == "error"]
    assert errors == browser.said("Runtime.exceptionThrown") == browser.said("Log.entryAdded") == []
    urls = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert len(urls) > 4
    assert all(url.startswith((server.url, "blob:")) for url in urls)


def say(page: Chromium, text: str, answers: int) -> None:
    page.type(text)
    page.press("Enter", 13, text="\r")
    page.wait_until(IDLE.format(n=answers))


def test_a_conversation(page, server) -> None:
    say(page, "Where is Paris?", 1)
    first = page.evaluate("turns[0].answers[0].text")
    assert first
    assert page.evaluate("document.querySelector('.answer .text').textContent") == first
    assert "tokens/s" in page.evaluate("document.querySelector('.answer .cost').textContent")
    say(page, "And Rome?", 2)
    assert page.evaluate("document.querySelectorAll('.turn').length") == 2
    # The first turn is what the API gives for the same request, and the second knows of it.
    body = {
        "model": "demo", "messages": [{"role": "user", "content": "Where is Paris?"}], "seed": 7, "max_tokens": 24,
        "repeat_penalty": 1.1,
    }  # fmt: skip
    assert server.request("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == first
    assert "cached" in page.evaluate("document.querySelectorAll('.answer .cost')[1].textContent")
    # It survives a reload.
    page.open(server.url)
    page.wait_until("document.querySelectorAll('.turn').length === 2")


def test_an_answer_without_a_token_says_so(page) -> None:
    end = {"usage": {"completion_tokens": 0, "prompt_tokens": 9}, "timings": {"cache_n": 3}}
    said = page.evaluate(
        f"(() => {{ const answer = {{}}; take(answer, {json.dumps(end)}, {{first: 0}}); return answer.cost; }})()"
    )
    assert said == "0 tokens · the model ended its answer at once · prompt 9 tokens, 3 cached"


def test_what_an_answer_waits_for_is_said(page) -> None:
    page.evaluate(
        "window.fetch = (_, options) => new Promise((_, no) => options.signal.addEventListener('abort', () => no(new Error())))"
    )
    page.evaluate("models[0].meta.is_loaded = false")
    page.type("The river")
    page.press("Enter", 13, text="\r")
    page.wait_until("document.querySelector('.answer .cost').textContent === 'loading the model…'")
    page.press("Escape", 27)
    page.wait_until(
        "!stopping && document.querySelector('.answer .cost').textContent === '0 tokens · stopped'"
    )


@pytest.mark.slow
def test_regenerate_edit_export_and_new(page) -> None:
    say(page, "Where is Paris?", 1)
    before = page.evaluate("turns[0].answers[0].text")
    page.evaluate("document.getElementById('again').click()")
    page.wait_until("!stopping && turns[0].answers[0].text !== ''")
    assert page.evaluate("turns[0].answers[0].text") == before  # the same seed
    page.evaluate("document.querySelector('.user button').click()")
    assert page.evaluate("document.getElementById('entry').value") == "Where is Paris?"
    page.evaluate("document.getElementById('entry').value = ''")
    say(page, "Where is Rome?", 1)
    assert page.evaluate("turns.map((turn) => turn.user)") == ["Where is Rome?"]
    assert "**You:** Where is Rome?" in page.evaluate("asMarkdown()")
    assert json.loads(page.evaluate("asJson()"))["turns"][0]["seed"] == 7
    page.evaluate("document.getElementById('clear').click()")
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0


def test_two_formats_side_by_side(page) -> None:
    page.evaluate("document.getElementById('compare').click()")
    page.evaluate("settings.max_tokens = 60")
    say(page, "The history of the city", 2)
    left, right = page.evaluate("turns[0].answers.map((answer) => answer.tokens.map((token) => token.text))")
    models = page.evaluate("turns[0].answers.map((answer) => answer.model)")
    assert models == ["demo", "fp32"]
    assert page.evaluate(
        "turns[0].answers.map((answer) => answer.tokens.map((token) => token.text).join(''))"
    ) == (page.evaluate("turns[0].answers.map((answer) => answer.text)"))
    same = next((at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
    marked = page.evaluate(
        "[...document.querySelectorAll('.answer')[0].querySelectorAll('.token.differs')].length"
    )
    # With one seed the two begin alike and part where the rounding of weights tips a choice.
    assert left[0] == right[0]
    assert marked == (0 if same is None else len(left) - same)
    assert "surprise" in page.evaluate("document.querySelector('.token').title")


def test_the_keyboard_alone(page) -> None:
    say(page, "The river", 1)
    names = []
    for _ in range(40):
        page.press("Tab", 9)
        names.append(
            page.evaluate(
                "(() => { const e = document.activeElement; return e.getAttribute('aria-label') || e.textContent.trim() "
                "|| (e.labels && e.labels[0] && e.labels[0].textContent.trim()) || ''; })()"
            )
        )
        if names[-1] == "Settings":
            break
    assert names[-1] == "Settings"
    assert {"Regenerate", "New"} <= set(names)
    assert all(names), names  # everything that can be reached says what it is
    page.press("Enter", 13, text="\r")
    page.wait_until("document.getElementById('settings').open")
    page.press("Escape", 27)
    page.wait_until("!document.getElementById('settings').open")
    assert page.evaluate("document.activeElement.id") == "open-settings"


ESCAPE_AT_THE_FOURTH_TOKEN = """(() => {
  const timer = setInterval(() => {
    if (!stopping || !turns[0] || turns[0].answers[0].tokens.length < 4) return;
    clearInterval(timer);
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
  }, 1);
})()"""


def test_escape_stops_an_answer(page, server) -> None:
    """The key is pressed inside the page: from here it would come when the answer is over."""
    page.evaluate("settings.max_tokens = 480")
    page.evaluate(ESCAPE_AT_THE_FOURTH_TOKEN)
    page.type("The river")
    page.press("Enter", 13, text="\r")
    page.wait_until("!stopping && turns.length === 1 && turns[0].answers[0].tokens.length > 3")
    assert "stopped" in page.evaluate("turns[0].answers[0].cost")
    assert page.evaluate("turns[0].answers[0].tokens.length") < 480


def test_what_a_model_writes_is_text(page) -> None:
    page.evaluate(
        "turns = [{user: '<b>x</b>', seed: 1, answers: [{model: 'demo', text: '<img src=x onerror=\"boom()\"> **bold** "
        "`code`\\n```js\\n<script>1</script>\\n```\\n', tokens: [], cost: ''}]}]; drawAll()"
    )
    assert page.evaluate("document.querySelectorAll('#talk img, #talk script, #talk b').length") == 0
    assert page.evaluate("document.querySelector('#talk strong').textContent") == "bold"
    assert page.evaluate("document.querySelector('#talk pre').textContent") == "<script>1</script>"


@pytest.mark.slow
def test_an_error_is_said(page) -> None:
    page.evaluate("settings.max_tokens = 10")
    page.evaluate("document.getElementById('entry').value = 'x '.repeat(3000)")
    page.press("Enter", 13, text="\r")
    page.wait_until("!stopping && turns.length === 1 && turns[0].answers[0].error")
    assert "the context holds 512" in page.evaluate("document.querySelector('.wrong').textContent")
    page.events[:] = [event for event in page.events if event["method"] != "Log.entryAdded"]  # the 400 itself


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone(page, server, dark) -> None:
    page.open(server.url, 390, height=800, dark=dark)
    page.wait_until("models.length === 2")
    page.evaluate("document.getElementById('compare').click(); document.getElementById('entry').focus()")
    say(page, "The city of Paris is known for " + "x" * 80, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = page.evaluate(
        "[...document.querySelectorAll('button')].map((b) => b.getBoundingClientRect().right)"
    )
    assert max(boxes) <= 390
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper.removeprefix("rgb(").split(",")[0]) < 60) == dark
