"""Experts of scored models: counts against transformers' own router logits, and their part in a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion_core.moe.upcycle import Upcycling
from fusion_core.vocabulary import Vocabulary
from services.distill.target.moe import upcycle
from services.evaluation.experts import describe_experts
from services.evaluation.nats_per_byte import Scores, nats_per_byte
from services.evaluation.report.report import write_report
from services.models.weights import load_model, save_model
from services.wire.passage import Passage
from tests.fakes.fusion_stream import corpus


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "model"
    upcycling = Upcycling(shards=6, shared=2, copies=2, dense_layers=1, router_std=0.5)
    save_model(upcycle(load_model(target), upcycling, seed=0), target, folder)
    return folder


def test_counted_are_the_tokens_of_the_text_alone(mixture: Path) -> None:
    texts = corpus(7, seed=2)
    passages = [Passage(text, context=b"what came before" if place % 2 else b"") for place, text in enumerate(texts)]
    scores = nats_per_byte(mixture, passages, device="cpu", torch_threads=1)
    assert scores.layers == (1,) and scores.experts_WHE is not None
    model, vocabulary = AutoModelForCausalLM.from_pretrained(mixture), Vocabulary.from_pretrained(mixture)
    for passage, counts_HE in zip(passages, scores.experts_WHE, strict=True):
        context = vocabulary.encode(passage.context).token_ids_T.tolist() if passage.context else []
        tokens = vocabulary.encode_batch([passage.text], continues=bool(context))[0].token_ids_T.tolist()
        with torch.no_grad():
            inputs = torch.tensor([[vocabulary.bos_id, *context, *tokens[:-1]]])
            [logits] = model(inputs, output_router_logits=True).router_logits
        chosen = logits.view(inputs.shape[1], 8)[len(context) :].topk(4).indices
        assert counts_HE[0].tolist() == torch.bincount(chosen.flatten(), minlength=8).tolist()


def test_a_dense_model_has_none(target: Path) -> None:
    scores = nats_per_byte(target, corpus(2), device="cpu")
    assert scores.experts_WHE is None and describe_experts({"dense": scores}, ["a", "b"], ["", ""]) == {}


def made(nats: list[float], experts: np.ndarray | None = None) -> Scores:
    ones = np.ones(len(nats), dtype=np.int64)
    starts = tuple(np.zeros(1, dtype=np.int32) for _ in nats)
    hits = tuple(np.ones(1, dtype=np.bool_) for _ in nats)
    layers = () if experts is None else (0,)
    return Scores(np.array(nats), ones, ones, starts, hits, ones.astype(np.bool_), experts, layers)


def test_domains_and_preferred_sources_are_told_apart(tmp_path: Path) -> None:
    """Expert 0 takes code and expert 1 prose; the sources' strengths lie across. A document has two windows."""
    num_documents = 24
    documents = [f"document {number}" for number in range(num_documents) for _ in range(2)]
    domains = [domain for _ in range(num_documents // 2) for domain in ("code", "code", "prose", "prose")]
    experts = np.array([[[9, 1, 0]] if domain == "code" else [[1, 9, 0]] for domain in domains], dtype=np.int32)
    left_is_better, left_is_worse = [1.0, 1.7], [2.0, 1.3]  # than 1.4 and 1.4, over both windows
    scores = {
        "mixture": made([1.0] * 2 * num_documents, experts),
        "source left": made((left_is_better + left_is_better + left_is_worse + left_is_worse) * (num_documents // 4)),
        "source right": made([1.4] * 2 * num_documents),
    }
    found = describe_experts(scores, documents, domains, sources=["source left", "source right"])
    assert list(found) == ["mixture"]
    mixture = found["mixture"]
    assert mixture["layers"] == [0] and mixture["dead_experts"] == [1]
    assert mixture["load"] == [[1.5, 1.5, 0.0]]
    assert mixture["load_cv"] == [pytest.approx(np.std([1.5, 1.5, 0.0]), abs=1e-4)]
    by_domain, by_source = mixture["domain"], mixture["source"]
    assert by_domain["kinds"] == ["code", "prose"]
    assert by_domain["load"] == [[[2.7, 0.3, 0.0], [0.3, 2.7, 0.0]]]
    expected = 0.9 * np.log(1.8) + 0.1 * np.log(0.2)
    assert by_domain["information_nats"] == [pytest.approx(expected, abs=1e-5)]
    assert by_domain["shuffled_95_percent"][0] < expected / 2
    assert by_source["information_nats"] == [pytest.approx(0.0, abs=1e-5)]
    evaluation = {"corpus": "toy", "split": "held_out", "domains": {}, "experts": found}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    report = write_report(tmp_path).read_text()
    assert "## Experts of mixture on held_out" in report and "nats between expert and preferred source" in report
    for picture in ("experts_mixture_by_domain.png", "experts_mixture_by_source.png"):
        assert f"({picture})" in report and (tmp_path / picture).stat().st_size > 1000


def test_a_source_that_does_not_spell_a_text_is_not_preferred_there() -> None:
    experts = np.ones((2, 1, 3), dtype=np.int32)
    left, right = made([1.0, 1.0]), made([2.0, 2.0])
    scores = {"mixture": made([1.0, 1.0], experts), "source left": left, "source right": right}
    names = ["source left", "source right"]
    assert "source" not in describe_experts(scores, ["a", "b"], ["x", "x"], sources=names)["mixture"]
    scores["source left"] = replace(left, lossless_W=np.array([True, False]))
    found = describe_experts(scores, ["a", "b"], ["x", "x"], sources=names)["mixture"]
    assert found["source"]["kinds"] == ["left", "right"]


def test_one_domain_and_one_source_tell_nothing() -> None:
    experts = np.ones((2, 1, 3), dtype=np.int32)
    scores = {"mixture": made([1.0, 1.0], experts), "source left": made([1.0, 1.0])}
    [found] = describe_experts(scores, ["a", "b"], ["x", "x"], sources=["source left"]).values()
    assert "domain" not in found and "source" not in found
