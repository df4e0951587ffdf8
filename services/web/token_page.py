"""The page as one HTML file: style and program are inside it. With its figures too a browser loads nothing else;
without, it asks the server that it comes from, see `served_page`.

A policy in the page lets the browser run this program only. All text reaches the page as text: escaped here, or as a
string that the program puts into text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

_SLOT = re.compile(r"\{\{(\w+)\}\}")


def token_page(view: dict[str, Any], *, title: str, before: str = "") -> str:
    """Return the HTML of a page.

    Args:
        view: as `token_view` gives it.
        title: heading of the page.
        before: text before the one that was scored, as it is to be shown.
    """
    tokens = "".join(
        f'<span role="option" id="t{place}" aria-selected="false">{html.escape(token)}</span>'
        for place, token in enumerate(view["tokens"])
    )
    return _page(_part("page.js"), "", title=title, before=before, tokens=tokens, data=view)


def asking_page(choices: dict[str, Any], *, title: str) -> str:
    """Return the HTML of a page without a text that asks its server for one, at `view`.

    Args:
        choices: `splits` with their numbers of windows, `strategies`, `recipe_strategy` (the name of the recipe's), and
            `first`, what is asked for when the page opens.
        title: heading of the page until there is a text.
    """
    form = _SLOT.sub(lambda _: _as_data(choices), _part("asking.html"))
    program = _part("page.js") + _part("asking.js")
    return _page(program, "; connect-src 'self'", title=title, asking=form)


def _page(
    program: str, policy: str, *, title: str, asking: str = "", before: str = "", tokens: str = "", data: Any = None
) -> str:
    style = _part("page.css")
    slots = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(program)}'{policy}",
        "style": style,
        "asking": asking,
        "before": html.escape(before),
        "before_hidden": "" if before else " hidden",
        "tokens": tokens,
        "data": _as_data(data),
        "program": program,
    }
    return _SLOT.sub(lambda slot: slots[slot[1]], _part("page.html"))


def _part(name: str) -> str:
    return (files("services.web") / "page" / name).read_text(encoding="utf-8")


def _as_data(view: Any) -> str:
    """Return JSON that cannot end the element that it stands in."""
    text = json.dumps(view, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
