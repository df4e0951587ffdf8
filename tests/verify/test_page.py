"""The program on the page about verifiers prints what the page says."""

from __future__ import annotations

import contextlib
import io

from fusion_core.verify.constraints import CONSTRAINTS
from fusion_core.verify.specs import KINDS
from tests.examples.pages import code_blocks, code_spans, text_of

PAGE = "docs/verify.md"


def test_the_program_prints_what_is_below_it() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code_blocks(PAGE, "python")[0], {})
    assert out.getvalue() == code_blocks(PAGE, "text")[0]


def test_every_kind_and_constraint_is_on_the_page() -> None:
    assert {*KINDS, *CONSTRAINTS} - set(code_spans(text_of(PAGE))) == set()
