"""The recipe and the rows on the page about reward models are valid."""

from __future__ import annotations

from pathlib import Path

import yaml

from services.reward.config import RewardConfig
from services.reward.pairs import read_pairs
from tests.examples.pages import code_blocks

PAGE = "docs/reward.md"


def test_recipe_and_rows_are_valid(tmp_path: Path) -> None:
    [section] = code_blocks(PAGE, "yaml")
    config = RewardConfig.model_validate(yaml.safe_load(section)["reward"])
    assert config.serve is not None
    (tmp_path / "pairs.jsonl").write_text(code_blocks(PAGE, "json")[0])
    assert [pair.domain for pair in read_pairs([str(tmp_path / "*.jsonl")], config.domains)] == ["code", "chat"]
