"""The served page over HTTP: nothing without the token, one thing at a time, mistakes in words; then in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.web.browser import Browser, chromium
from tests.web.served import CHOICES, MAX_REQUEST_BYTES, TOKEN, served
from tests.web.test_token_page import HOSTILE, Reader

WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
IN_BROWSER = pytest.mark.skipif(chromium() is None, reason="no Chromium: set FUSION_CHROMIUM, or install one")
IDLE = "view !== null && document.querySelector('#ask [role=status]').textContent === ''"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as running:
        yield running


def test_nothing_is_shown_or_answered_without_the_token(address: str) -> None:
    for path in ("/", "/?token=", "/?token=wrong", "/?token=%C3%BC"):
        refused = httpx.get(address + path)
        assert refused.status_code == 401 and "recipe" not in refused.text
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"token={TOKEN}"}):
        asked = httpx.post(f"{address}/view?token={TOKEN}", json={"text": "the cat"}, headers=headers)
        assert asked.status_code == 401 and "token" in asked.json()["error"]
    assert httpx.get(f"{address}/view", headers=WITH_TOKEN).status_code == 405
    assert httpx.get(f"{address}/page.js", headers=WITH_TOKEN).status_code == 404


def test_the_page_is_one_file_that_no_other_page_may_frame(address: str) -> None:
    page = httpx.get(address, params={"token": TOKEN})
    read = Reader(page.text)
    assert page.status_code == 200 and read.title == "<b>recipe</b>"
    assert json.loads(read.data) is None and TOKEN not in page.text
    assert not re.findall(r"<[^>]*\s(?:src|href)\s*=", page.text)
    assert page.headers["cache-control"] == "no-store" and "frame-ancestors 'none'" in str(page.headers)
    policy = next(str(attributes["content"]) for _, attributes in read.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert policy.endswith("connect-src 'self'") and "set-cookie" not in page.headers


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "window, text, messages: give one of them"),
        ({"text": "a", "window": 1}, "window, text, messages: give one of them"),
        ({"text": "a", "strategies": []}, "strategies: Tuple should have at least 1 item"),
        ({"text": "a", "strategies": ["best"]}, "strategies.0: Input should be 'recipe', 'avg_ce'"),
        ({"text": "a", "top": 51}, "top: Input should be less than or equal to 50"),
        ({"window": -1}, "window: Input should be greater than or equal to 0"),
        ({"text": "a", "colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"text": "gone"}, "source <b>one</b> does not answer"),
    ],
)
def test_mistakes_name_the_key(address: str, asked: dict[str, object], message: str) -> None:
    answer = httpx.post(f"{address}/view", json=asked, headers=WITH_TOKEN)
    assert answer.status_code == 400 and message in answer.json()["error"]


def test_what_is_no_question_is_refused_and_the_page_lives_on(address: str) -> None:
    for content in (b"", b"{", b"[]", b"\xff\xfe"):
        answer = httpx.post(f"{address}/view", content=content, headers=WITH_TOKEN)
        assert answer.status_code == 400 and answer.json()["error"]
    large = httpx.post(f"{address}/view", json={"text": "x" * MAX_REQUEST_BYTES}, headers=WITH_TOKEN)
    assert large.status_code == 413 and str(MAX_REQUEST_BYTES) in large.json()["error"]
    assert httpx.post(f"{address}/view", json={"text": "the cat"}, headers=WITH_TOKEN).status_code == 200


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium") / "profile") as running:
        yield running


@pytest.fixture
def opened(browser: Browser, address: str) -> Browser:
    browser.open(f"{address}/?token={TOKEN}")
    browser.wait_for(IDLE)
    return browser


def shown(browser: Browser) -> str:
    return str(browser.evaluate("document.getElementById('text').textContent"))


def ask_for(browser: Browser, kind: str) -> None:
    browser.click(f"#ask input[value={kind}]")


def submit(browser: Browser) -> None:
    browser.click("#ask button[type=submit]")
    browser.wait_for(IDLE)


@IN_BROWSER
def test_it_opens_with_what_was_asked_first_and_shows_other_windows(opened: Browser, address: str) -> None:
    assert shown(opened).startswith("window 1 of held_out")
    assert opened.evaluate("document.querySelectorAll('#strategies input[type=radio]').length") == 2
    opened.click("#ask input[name=window]")
    opened.press("ArrowUp")
    submit(opened)
    assert shown(opened).startswith("window 2 of held_out")
    assert opened.evaluate("document.getElementById('last').textContent") == f"0 to {CHOICES['splits']['held_out'] - 1}"
    opened.evaluate("ask.elements.second.value = ''")
    submit(opened)
    assert opened.evaluate("document.getElementById('strategies').hidden && view.strategies.length === 1")
    assert {url.split("?")[0] for url in opened.requests} == {f"{address}/", f"{address}/view"}
    assert opened.errors == []


@IN_BROWSER
def test_a_text_is_typed_coloured_and_worked_by_keyboard(opened: Browser) -> None:
    ask_for(opened, "text")
    opened.click("#own")
    opened.type("The cat sat on the mat.")
    submit(opened)
    assert shown(opened).startswith("The cat sat on the mat.")
    assert opened.evaluate("spans.some((span) => /s\\d/.test(span.className))")
    opened.click("input[value=change]")
    opened.click("#t2")
    for key, expected in (("ArrowRight", "t3"), ("Home", "t0")):
        opened.press(key)
        assert opened.evaluate("document.querySelector('[aria-selected=true]').id") == expected
    assert opened.evaluate("document.querySelector('#detail h2').textContent").startswith("Token 1 of ")
    detail = opened.evaluate("document.getElementById('detail').textContent")
    assert all(f"{name}: loss" in detail and f" by {name}" in detail for name in ("avg_ce", "min_ce"))
    opened.evaluate("ask.elements.second.value = ''")
    submit(opened)
    assert opened.evaluate("mode") == "winner" and opened.evaluate("selected") == -1
    assert opened.errors == []


@IN_BROWSER
def test_a_window_that_is_not_there_does_not_keep_a_text_back(opened: Browser) -> None:
    opened.evaluate("ask.elements.window.value = '99'")
    ask_for(opened, "text")
    opened.click("#own")
    opened.type("The cat sat.")
    submit(opened)
    assert shown(opened).startswith("The cat sat.")
    ask_for(opened, "window")
    assert opened.evaluate("[ask.elements.window.disabled, ask.checkValidity()]") == [False, False]


@IN_BROWSER
def test_a_conversation_is_scored_behind_its_first_messages(opened: Browser) -> None:
    ask_for(opened, "messages")
    for number, words in ((1, "<b>Who</b> sat?"), (2, "The cat.")):
        opened.click(f"#messages .message:nth-child({number}) textarea")
        opened.type(words)
    submit(opened)
    assert shown(opened).startswith("The cat.")
    before = opened.evaluate("document.getElementById('before').textContent")
    assert "<b>Who</b> sat?" in before and not opened.evaluate("document.getElementById('before').hidden")
    opened.click("#add")
    assert opened.evaluate("document.querySelectorAll('#messages .message').length") == 3
    opened.click("#messages .message:nth-child(3) button")
    assert opened.evaluate("document.querySelectorAll('#messages .message').length") == 2
    assert opened.errors == []


@IN_BROWSER
def test_hostile_texts_and_errors_are_shown_and_not_run(opened: Browser) -> None:
    ask_for(opened, "text")
    for text in (HOSTILE, "gone"):
        opened.evaluate(f"document.getElementById('own').value = {json.dumps(text)}")
        opened.click("#ask button[type=submit]")
        opened.wait_for(IDLE if text == HOSTILE else "document.querySelector('#ask .wrong') !== null")
        assert opened.evaluate("document.images.length + document.querySelectorAll('script').length") == 3
        assert opened.evaluate("document.title").startswith("<i>")
    assert opened.evaluate("document.querySelector('#ask .wrong').textContent") == "source <b>one</b> does not answer"
    assert [error for error in opened.errors if "400" not in json.dumps(error)] == []


@IN_BROWSER
def test_a_colour_that_is_chosen_before_the_first_answer_is_that_of_the_answer(opened: Browser) -> None:
    opened.evaluate("view = null")
    opened.click("input[value=loss]")
    assert opened.evaluate("mode") == "loss"
    submit(opened)
    assert opened.evaluate("spans.some((span) => /h\\d/.test(span.className))")
    assert opened.errors == []


@IN_BROWSER
def test_two_thousand_tokens_are_shown_within_a_second(opened: Browser) -> None:
    text = "The cat sat on the mat, and 12 * 12 = 144; das Ende. " * 110
    opened.evaluate(
        "(async () => { const asked = await (await fetch('view', { method: 'POST', headers: { 'Content-Type': "
        f"'application/json', Authorization: 'Bearer {TOKEN}' }}, body: JSON.stringify({{ text: {json.dumps(text)},"
        " strategies: ['recipe', 'min_ce'] }) })).text(); const start = performance.now(); showView(JSON.parse(asked));"
        " spans[spans.length - 1].offsetTop; window.took = performance.now() - start; })()"
    )
    opened.wait_for("window.took > 0")
    took = opened.evaluate("window.took")
    assert opened.evaluate("spans.length") > 2000 and took < 1000
