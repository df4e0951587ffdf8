"""The page in a real browser: opens fast, colours, is worked by mouse and keyboard, and runs nothing of a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.web.browser import Browser, chromium
from tests.web.test_token_page import HOSTILE, page_of

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: set FUSION_CHROMIUM, or install one")

_CONTRASTS = """
(() => {
  const level = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const span = document.querySelector("#text span"), before = span.className, found = {};
  for (const name of ["s0", "s1", "s2", "s3", "s4", "s5", "h1", "h2", "h3", "h4", "better", "worse"]) {
    span.className = name;
    const style = getComputedStyle(span), [a, b] = [level(style.color), level(style.backgroundColor)].sort();
    found[name] = [(b + 0.05) / (a + 0.05), style.borderBottomStyle + " " + style.borderBottomWidth];
  }
  span.className = before;
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium") / "profile") as running:
        yield running


def opened(browser: Browser, folder: Path, text: str, **options: str) -> dict[str, object]:
    page, view = page_of(text.encode(), **options)
    (folder / "page.html").write_text(page, encoding="utf-8")
    browser.open(folder / "page.html")
    return view


def test_a_hostile_text_is_shown_and_not_run(browser: Browser, tmp_path: Path) -> None:
    view = opened(browser, tmp_path, HOSTILE, title="<i>title</i>")
    assert browser.evaluate("document.title") == "<i>title</i>"
    assert browser.evaluate("document.images.length + document.querySelectorAll('script').length") == 2
    assert (
        browser.evaluate("Array.from(document.querySelectorAll('#text span'), (s) => s.textContent)") == view["tokens"]
    )
    for number in range(len(view["tokens"])):  # type: ignore[arg-type]
        browser.evaluate(f"select({number})")
    assert browser.evaluate("document.title") == "<i>title</i>" and browser.errors == []
    assert browser.requests == [(tmp_path / "page.html").as_uri()]


def test_mouse_and_keyboard_select_tokens(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, "The cat sat on the mat, and the other cat sat there too. " * 12)
    chosen = "Array.from(document.querySelectorAll('[aria-selected=true]'), (span) => span.id).join()"
    browser.click("#t3")
    assert browser.evaluate(chosen) == "t3"
    assert browser.evaluate("document.querySelector('#detail h2').textContent").startswith("Token 4 of ")
    for key, expected in (("ArrowRight", "t4"), ("ArrowLeft", "t3"), ("Home", "t0"), ("ArrowLeft", "t0")):
        browser.press(key)
        assert browser.evaluate(chosen) == expected
    assert browser.evaluate("document.activeElement.getAttribute('aria-activedescendant')") == "t0"
    browser.press("ArrowDown")
    below, first = (
        browser.evaluate(f"document.querySelector('{s}').getClientRects()[0].top")
        for s in ("[aria-selected=true]", "#t0")
    )
    assert below > first
    browser.press("ArrowUp")
    assert browser.evaluate("document.querySelector('[aria-selected=true]').getClientRects()[0].top") == first
    browser.press("End")
    assert browser.evaluate(chosen) == f"t{browser.evaluate('spans.length') - 1}"
    assert browser.errors == []


def test_every_way_of_colouring_says_it_without_colour_too(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, "The cat sat on the mat. Die Würde des Menschen ist unantastbar.")
    found = browser.evaluate(_CONTRASTS)
    assert min(contrast for contrast, _ in found.values()) >= 7  # WCAG 2.2, level AAA
    for group in ("s", "h"):
        lines = [line for name, (_, line) in found.items() if name.startswith(group)]
        assert len(set(lines)) == len(lines)
    assert found["better"][1] != found["worse"][1]
    for mode in ("entropy", "disagreement", "loss", "change", "winner"):
        browser.click(f"input[value={mode}]")
        assert browser.evaluate("mode") == mode
        assert browser.evaluate("document.querySelectorAll('#legend span').length") >= 2
        assert browser.evaluate("spans.some((s) => /s\\d|h\\d|better|worse/.test(s.className))")
    browser.click("input[name=strategy][value='1']")
    assert browser.evaluate("strategy") == 1
    assert browser.errors == []


def test_two_strategies_stand_side_by_side(browser: Browser, tmp_path: Path) -> None:
    view = opened(browser, tmp_path, "The cat sat on the mat. Die Würde des Menschen ist unantastbar.")
    assert browser.evaluate("document.getElementById('other').getClientRects().length") == 0
    browser.click("#side")
    left, right = (
        browser.evaluate(f"document.getElementById('{name}').getBoundingClientRect().left")
        for name in ("text", "other")
    )
    assert left < right and browser.evaluate("others.map((span) => span.textContent)") == view["tokens"]
    names = "Array.from(document.querySelectorAll('.by'), (each) => each.textContent)"
    assert browser.evaluate(names) == ["avg_ce", "min_ce"]
    browser.click("input[value=loss]")
    before = browser.evaluate("spans.map((span) => span.className)")
    browser.evaluate("view.strategies[1].loss = spans.map(() => 9); colour()")
    assert browser.evaluate("others.every((span) => span.className.startsWith('h4'))")
    assert browser.evaluate("spans.map((span) => span.className)") == before
    browser.click("#other span:nth-child(4)")
    assert browser.evaluate(
        "[selected, others[3].classList.contains('chosen'), spans[3].getAttribute('aria-selected')]"
    ) == [3, True, "true"]
    browser.click("#text")
    browser.press("End")
    chosen = "Array.from(document.querySelectorAll('#other .chosen'), (span) => others.indexOf(span))"
    assert browser.evaluate(chosen) == [len(view["tokens"]) - 1]  # type: ignore[arg-type]
    browser.click("input[name=strategy][value='1']")
    assert browser.evaluate(names) == ["min_ce", "avg_ce"]
    browser.click("#side")
    assert browser.evaluate("document.getElementById('other').getClientRects().length") == 0
    assert browser.errors == []


def test_two_thousand_tokens_open_within_a_second(browser: Browser, tmp_path: Path) -> None:
    view = opened(browser, tmp_path, "The cat sat on the mat, and 12 * 12 = 144; das Ende. " * 110)
    assert len(view["tokens"]) > 2000  # type: ignore[arg-type]
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert 0 < browser.evaluate(timing) < 1000
    took = "(() => { const start = performance.now(); %s; spans[0].offsetTop; return performance.now() - start; })()"
    assert browser.evaluate(took % "mode = 'loss'; colour()") < 1000
    assert browser.evaluate(took % "select(1500)") < 1000
    assert browser.evaluate(took % "side.checked = true; colour()") < 1000
    browser.evaluate("side.checked = false")
