"""A report as one HTML page: pictures are inside it, and a browser loads nothing else."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }}
th, td {{ padding: 0.3rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left; }}
td + td {{ font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; vertical-align: top; }}
p:has(> img + img) > img {{ width: 49%; }}
code {{ background: #f3f3f3; padding: 0.1rem 0.3rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
_IMAGE = re.compile(r'src="([^":]+\.png)"')


def write_page(markdown: str, title: str, path: Path) -> None:
    """Write `markdown` as HTML; its pictures are read from the folder of `path`. HTML in it is shown, not obeyed."""
    from markdown_it import MarkdownIt

    def embed(match: re.Match[str]) -> str:
        data = base64.b64encode((path.parent / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = _IMAGE.sub(embed, MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown))
    path.write_text(_PAGE.format(title=html.escape(title), body=body), encoding="utf-8")
