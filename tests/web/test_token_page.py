"""The page as a parser reads it: text is text, whatever it says, and the figures are those of the rows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.fusion.attribution import attribute
from services.web.shown import label_of_bytes, shown_tokens
from services.web.token_page import token_page
from services.web.token_view import ScoredText, Strategy, token_view
from tests.fakes.tokenizers import vocabulary
from tests.fusion_core.fusion.test_attribution import block_of

HOSTILE = (
    "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> & &lt; ]]> --> {{data}}\n"
    "مرحبا שלום \u202eevil\u202c \x00\x07\x1b[31m\x85 🎉👩‍👩‍👧 e\u0301\t12 * 12\r\n</span></div></script>"
)


def page_of(
    text: bytes, *, title: str = "a title", names: tuple[str, ...] = ("byte_level", "gemma")
) -> tuple[str, dict[str, Any]]:
    target = vocabulary("llama3")
    encoding = target.encode(text).with_end(target.eos_id or 0)
    sources = {name: vocabulary(name) for name in names}
    blocks: dict[str, Block] = {
        name: block_of(source, text, seed) for seed, (name, source) in enumerate(sources.items())
    }
    rows = {name: ByteProjection(sources[name], target).project(block, encoding) for name, block in blocks.items()}
    strategies = []
    for config in (FusionConfig(), FusionConfig(strategy="min_ce")):
        fused = fuse(text, encoding, rows, config, target.fingerprint)
        strategies.append(Strategy(config.strategy, fused, attribute(blocks, rows, encoding, fused, config)))
    view = token_view(ScoredText(encoding, blocks, rows, sources, target), strategies, 4)
    return token_page(view, title=title, before="<b>before</b>"), view


class Reader(HTMLParser):
    """Tags with their attributes, and the text inside each token."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.data = self.title = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._inside = attributes.get("id") or tag
        if attributes.get("role") == "option":
            self.tokens.append("")
            self._inside = "token"

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "token":
            self.tokens[-1] += data
        elif self._inside == "data":
            self.data += data
        elif self._inside == "title":
            self.title += data


def test_markup_in_a_text_is_text() -> None:
    page, view = page_of(HOSTILE.encode(), title="</title><script>1</script>")
    read = Reader(page)
    tags = [tag for tag, _ in read.tags]
    assert tags.count("script") == 2 and "img" not in tags and "b" not in tags
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert read.title == "</title><script>1</script>"
    assert read.tokens == view["tokens"] and json.loads(read.data) == view
    whole = "".join(read.tokens)
    assert "<script>document.title='run'</script>" in whole and "{{data}}" in whole and "🎉" in whole
    for sign in ("[U+202E]", "␀", "␇", "␛[31m", "[U+0085]", "⇥", "␍⏎"):
        assert sign in whole
    assert not set("\u202e\u202c\x00\x1b\x85\r") & set(page)


def test_the_policy_of_the_page_lets_its_own_program_and_style_alone_run() -> None:
    page, _ = page_of(b"The cat")
    policy = next(a for t, a in Reader(page).tags if "http-equiv" in a)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (*styles, *scripts)]
    assert policy["content"] == f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    assert not re.findall(r"(?:src|href)\s*=", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))


def test_figures_are_those_of_the_rows() -> None:
    text = b"The cat sat on the mat."
    _, view = page_of(text)
    target = vocabulary("llama3")
    encoding = target.encode(text).with_end(target.eos_id or 0)
    for place, name in enumerate(("byte_level", "gemma")):
        block = block_of(vocabulary(name), text, place)
        rows = ByteProjection(vocabulary(name), target).project(block, encoding)
        of_source = view["sources"][place]
        for t in range(encoding.num_tokens):
            flat, tail = of_source["rows"][t]
            best = sorted((p for i, p in zip(rows.ids_TM[t], rows.probs_TM[t], strict=True) if i >= 0), reverse=True)[
                :4
            ]
            assert flat[1::2] == pytest.approx(best, rel=1e-3) and tail == pytest.approx(
                rows.tail_T[t], rel=1e-3, abs=1e-6
            )
            opens, own, _ = of_source["own"][t]
            row = int(np.searchsorted(block.byte_ends_T[: block.num_text_tokens], opens, side="right"))
            assert own[1::3] == pytest.approx(np.exp(block.topk_logprobs_TK[row, :4]), rel=1e-3)
    for strategy in view["strategies"]:
        assert np.array(strategy["weights"]).sum(axis=0) == pytest.approx(np.ones(encoding.num_tokens), abs=1e-3)


def test_candidates_are_written_in_the_target_s_tokens() -> None:
    text = b"The cat"
    _, view = page_of(text)
    target, labels = vocabulary("llama3"), view["labels"]
    opens, own, _ = view["sources"][0]["own"][0]
    assert opens == 0
    source = vocabulary("byte_level")
    block = block_of(source, text, 0)
    for token, mapped in zip(block.topk_ids_TK[0, :4].tolist(), own[2::3], strict=True):
        data = source.token_bytes(token)
        if data:
            first = int(target.first_tokens([data])[0])
            assert labels[mapped].split(" · ")[0] == label_of_bytes(target.token_bytes(first))


@given(st.text(max_size=30), st.integers(1, 5))
def test_tokens_that_cut_characters_show_each_character_once(text: str, size: int) -> None:
    data = text.encode()
    tokens = [data[start : start + size] for start in range(0, len(data), size)]
    shown = shown_tokens(tokens)
    assert len(shown) == len(tokens) and all(shown)
    visible = "".join(re.sub("‹[0-9A-F]{2}›", "", token) for token in shown)
    expected = "".join(shown_tokens([data]))
    assert visible == re.sub("‹[0-9A-F]{2}›", "", expected)


def test_behind_the_middle_of_a_token_candidates_that_fit_the_text_come_first() -> None:
    text = "The theatre, 日本語 and 144".encode()
    _, view = page_of(text, names=("llama", "unigram"))
    labels, starts = view["labels"], [0, *vocabulary("llama3").encode(text).byte_ends_T.tolist()]
    inside = 0
    for source in view["sources"]:
        for (opens, own, _), start in zip(source["own"], starts, strict=False):
            ruled_out = [labels[mapped] == "not what the text before says" for mapped in own[2::3]]
            assert ruled_out == sorted(ruled_out)
            if opens < start:
                inside += 1
                assert not ruled_out[0]  # the realised token is a candidate of every row, and fits
    assert inside
