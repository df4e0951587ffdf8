"""The program on the page about verifiers prints what the page says."""

from __future__ import annotations

import contextlib
import io
import json

import yaml

from fusion_core.verify.constraints import CONSTRAINTS
from fusion_core.verify.specs import KINDS, read_spec
from services.verify.config import VerifyConfig
from tests.examples.pages import code_blocks, code_spans, text_of

PAGE = "docs/verify.md"


def test_the_program_prints_what_is_below_it() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code_blocks(PAGE, "python")[0], {})
    assert out.getvalue() == code_blocks(PAGE, "text")[0]


def test_every_kind_and_constraint_is_on_the_page() -> None:
    assert {*KINDS, *CONSTRAINTS} - set(code_spans(text_of(PAGE))) == set()


def test_rows_and_section_on_the_page_are_valid() -> None:
    rows = map(json.loads, code_blocks(PAGE, "json")[0].splitlines())
    assert [read_spec(row["verify"]).kind for row in rows] == ["answer", "constraints"]
    [section] = code_blocks(PAGE, "yaml")
    assert VerifyConfig.model_validate(yaml.safe_load(section)["verify"]).programs_at_once == 4
