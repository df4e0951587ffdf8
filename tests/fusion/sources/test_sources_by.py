"""`fusion.sources_by`: every document is scored by the sources of its domain, and by no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.corpus.ledger import Corpus
from services.fusion.client import FusedWindow, StreamRequest
from services.recipes.recipe import Recipe, RecipeError
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion
from tests.fakes.tiny_model import sentences

DOMAINS = ["code", "news", None]
RULE = {"code": ["source-1"], "news": ["source-0"], "default": "all"}
SCORED_BY = {"code": {"source-1"}, "news": {"source-0"}, "": {"source-0", "source-1"}}


def mixed(folder: Path) -> dict[str, Any]:
    """Records of two domains and of none, and the keys of section `corpus` that read them."""
    file = folder / "mixed.jsonl"
    rows = ({"text": sentences(400, seed=n), "topic": DOMAINS[n % 3]} for n in range(18))
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in rows), encoding="utf-8")
    return {"files": [str(file)], "domain_field": "topic"}


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainFusion]:
    folder = tmp_path_factory.mktemp("by-domain")
    with plain_fusion(folder, windows=mixed(folder), sources_by=RULE, min_sources=2, native=True) as running:
        yield running


def windows(fusion: PlainFusion) -> dict[int, FusedWindow]:
    found = list(fusion.client().stream(StreamRequest("words", "train", seed=1)))
    assert all(isinstance(window, FusedWindow) for window in found)
    return {window.index: window for window in found if isinstance(window, FusedWindow)}


def test_each_window_comes_from_the_sources_of_its_domain(fusion: PlainFusion) -> None:
    corpus, before = Corpus.open(fusion.recipe.corpus_folder), [source.scored for source in fusion.sources]
    found = windows(fusion)
    domains = {index: corpus.window("train", index).domain for index in found}
    assert set(domains.values()) == {"code", "news", ""} and len(found) == corpus.num_windows("train")
    assert [(corpus.window("train", n).document, domains[n]) for n in found] == [
        list(corpus.domains("train"))[n] for n in found
    ]
    for index, window in found.items():
        shares = {share.name: share for share in window.block.shares}
        assert set(shares) == SCORED_BY[domains[index]]
        assert all(share.present for share in shares.values())
        assert sum(share.weight for share in shares.values()) == pytest.approx(1, abs=1e-5)
    scored = [source.scored - n for source, n in zip(fusion.sources, before, strict=True)]
    assert scored == [sum(name in SCORED_BY[d] for d in domains.values()) for name in ("source-0", "source-1")]

    index = min(n for n, domain in domains.items() if domain == "code")
    [alone] = fusion.client().fuse([corpus.window("train", index).passage], sources=["source-1"])
    np.testing.assert_array_equal(found[index].block.topk_ids_TK, alone.topk_ids_TK)


def test_a_stream_of_one_source_leaves_out_what_that_one_does_not_score(fusion: PlainFusion) -> None:
    corpus = Corpus.open(fusion.recipe.corpus_folder)
    found = list(fusion.client().stream(StreamRequest("words", "train", seed=1, sources=("source-0",))))
    for window in found:
        domain = corpus.window("train", window.index).domain
        assert isinstance(window, FusedWindow) == (domain != "code")
    assert any("none of source-0 scores domain 'code'" in getattr(window, "reason", "") for window in found)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"code": "all", "news": "all"},
            "domain ''; there are code, news, and no `default`: document mixed",
        ),
        ({"code": "all", "default": ["other"]}, "fusion.sources_by.default: no source is called other; there are sou"),
        ({"code": "source-0"}, "code: expected a list of names, or all, got 'source-0'"),
        ({"code": [], "default": "all"}, "sources_by.code: name at least one source, or all"),
        ({"code": ["source-0", "source-0"]}, "sources_by.code: names a source twice"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule: dict[str, Any], message: str, tmp_path: Path) -> None:
    with (
        pytest.raises((RecipeError, ValueError)) as refused,
        plain_fusion(tmp_path, windows=mixed(tmp_path), sources_by=rule),
    ):
        pass
    assert message in str(refused.value)


def test_a_control_that_would_skip_a_domain_is_refused(fusion: PlainFusion) -> None:
    recipe = json.loads(fusion.recipe.model_dump_json(by_alias=True))
    recipe["distill"]["sources"] = ["source-0"]
    with pytest.raises(ValueError, match=r"distill\.sources: fusion\.sources_by\.code names none of them"):
        Recipe.model_validate(recipe)


def test_without_a_field_for_domains_it_is_refused(fusion: PlainFusion) -> None:
    recipe = json.loads(fusion.recipe.model_dump_json(by_alias=True))
    recipe["corpus"]["domain_field"] = None
    with pytest.raises(ValueError, match=r"fusion\.sources_by: needs corpus\.domain_field"):
        Recipe.model_validate(recipe)
