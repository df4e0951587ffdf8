"""The page as one HTML file: style, program and figures are inside it, and a browser loads nothing else.

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
    folder = files("services.web") / "page"
    style, program = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    slots = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(program)}'",
        "style": style,
        "summary": _summary(view),
        "before": f'<p class="before" dir="auto">{html.escape(before)}</p>' if before else "",
        "tokens": "".join(
            f'<span role="option" id="t{place}" aria-selected="false">{html.escape(token)}</span>'
            for place, token in enumerate(view["tokens"])
        ),
        "data": _as_data(view),
        "program": program,
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return _SLOT.sub(lambda slot: slots[slot[1]], page)


def _summary(view: dict[str, Any]) -> str:
    """Return the table of the whole text's scores."""
    rows = [("fused, " + strategy["name"], strategy["nats_per_byte"]) for strategy in view["strategies"]]
    rows += [("source " + source["name"], source["nats_per_byte"]) for source in view["sources"]]
    return "".join(
        f'<tr><th scope="row"><bdi>{html.escape(name)}</bdi></th><td>{"-" if nats is None else f"{nats:.3f}"}</td></tr>'
        for name, nats in rows
    )


def _as_data(view: dict[str, Any]) -> str:
    """Return JSON that cannot end the element that it stands in."""
    text = json.dumps(view, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
