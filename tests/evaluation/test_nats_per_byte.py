"""Nats per byte against a loop written with transformers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion_core.vocabulary import Vocabulary
from services.evaluation import nats_per_byte as evaluate
from services.evaluation.intervals import compare, domain_of
from services.evaluation.nats_per_byte import Scores, nats_per_byte
from tests.fakes.fusion_stream import corpus


def plain_loop(folder, texts):
    """One window after the other, transformers' own mean loss times the number of predicted tokens."""
    model, vocabulary = AutoModelForCausalLM.from_pretrained(folder), Vocabulary.from_pretrained(folder)
    nats = []
    for text in texts:
        tokens = torch.tensor([[vocabulary.bos_id, *vocabulary.encode(text).token_ids_T.tolist()]])
        with torch.no_grad():
            nats.append(float(model(input_ids=tokens, labels=tokens).loss) * (tokens.shape[1] - 1))
    return np.array(nats)


@pytest.mark.parametrize("max_logits", [1, 300 * 100, 1 << 27])
def test_scores_equal_the_plain_loop_for_any_batch(target, monkeypatch, max_logits):
    monkeypatch.setattr(evaluate, "_MAX_LOGITS", max_logits)
    texts = corpus(13, seed=2)
    done: list[int] = []
    scores = nats_per_byte(target, texts, device="cpu", torch_threads=1, progress=done.append)
    expected = plain_loop(target, texts)
    assert scores.nats_W == pytest.approx(expected, rel=1e-5)
    assert scores.bytes_W.tolist() == [len(text) for text in texts]
    assert scores.mean == pytest.approx(expected.sum() / sum(map(len, texts)), rel=1e-5)
    assert scores.lossless_W.all()
    assert done[-1] == 13


def test_hits_are_the_likeliest_tokens_and_starts_their_first_bytes(target):
    text = corpus(1)[0]
    scores = nats_per_byte(target, [text])
    model, encoding = AutoModelForCausalLM.from_pretrained(target), Vocabulary.from_pretrained(target).encode(text)
    tokens = torch.tensor([[0, *encoding.token_ids_T.tolist()]])
    with torch.no_grad():
        likeliest = model(input_ids=tokens).logits[0, :-1].argmax(dim=-1)
    assert scores.hits_W[0].tolist() == (likeliest == tokens[0, 1:]).tolist()
    assert scores.token_starts_W[0].tolist() == [0, *encoding.byte_ends_T[:-1].tolist()]


def made(nats, starts, hits, num_bytes):
    count = len(nats)
    return Scores(
        nats_W=np.array(nats, dtype=np.float64),
        bytes_W=np.array(num_bytes),
        tokens_W=np.array([len(window) for window in starts]),
        token_starts_W=tuple(np.array(window, dtype=np.int32) for window in starts),
        hits_W=tuple(np.array(window, dtype=np.bool_) for window in hits),
        lossless_W=np.ones(count, dtype=np.bool_),
    )


def test_models_are_compared_where_tokens_of_all_start():
    fine = made([4.0, 6.0], [[0, 1, 2, 3], [0, 2]], [[1, 0, 1, 1], [1, 0]], [4, 4])
    coarse = made([2.0, 6.0], [[0, 2], [0, 1]], [[0, 1], [0, 1]], [4, 4])
    result = compare({"fine": fine, "coarse": coarse}, ["prose/a", "code/b"])
    assert list(result) == ["all", "code", "prose"]
    everything = result["all"]["models"]
    assert (result["all"]["bytes"], result["all"]["documents"]) == (8, 2)
    assert everything["fine"]["nats_per_byte"]["value"] == pytest.approx(10 / 8)
    assert everything["fine"]["difference_from"]["coarse"]["value"] == pytest.approx(2 / 8)
    # Shared starts: 0 and 2 in the first window, 0 in the second.
    assert everything["fine"]["accuracy"]["value"] == pytest.approx(3 / 3)
    assert everything["coarse"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert result["code"]["models"]["coarse"]["accuracy"]["value"] == 0.0
    named = compare({"fine": fine, "coarse": coarse}, ["prose/a", "code/b"], ["news", ""])
    assert list(named) == ["all", "code", "news"]
    assert (named["news"], named["code"]) == (result["prose"], result["code"])


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Documents drawn from a known distribution: about 95 of 100 intervals hold its mean, and paired differences of
    a constant have no width at all."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        sizes = generator.integers(50, 150, 60)
        nats = sizes * generator.normal(1.5, 0.2, 60)
        starts = [[0]] * 60
        hits = [[True]] * 60
        models = {"a": made(nats, starts, hits, sizes), "b": made(nats + 0.1 * sizes, starts, hits, sizes)}
        scores = compare(models, [f"file.txt#{i}" for i in range(60)], seed=trial)["all"]["models"]
        covered += scores["a"]["nats_per_byte"]["low"] <= 1.5 <= scores["a"]["nats_per_byte"]["high"]
        difference = scores["b"]["difference_from"]["a"]
        assert difference["low"] == pytest.approx(0.1) and difference["high"] == pytest.approx(0.1)
    assert 88 <= covered <= 99


@pytest.mark.parametrize(("num_documents", "has_interval"), [(1, False), (7, False), (8, True)])
def test_few_documents_give_values_without_intervals(num_documents, has_interval):
    """Every document in two windows: what counts is documents."""
    nats = np.linspace(1, 2, 2 * num_documents)
    windows = [[0]] * len(nats)
    models = {
        "a": made(nats, windows, windows, [1] * len(nats)),
        "b": made(nats[::-1], windows, windows, [1] * len(nats)),
    }
    result = compare(models, [f"file.txt#{i // 2}" for i in range(len(nats))])["all"]
    assert result["documents"] == num_documents
    scores = result["models"]["a"]
    for score in (scores["nats_per_byte"], scores["accuracy"], scores["difference_from"]["b"]):
        assert score["value"] is not None
        assert [score["low"] is not None, score["high"] is not None] == [has_interval] * 2


@pytest.mark.parametrize(
    ("document", "domain"),
    [("code/a/b.py", "code"), ("lee.cor#17", "lee"), ("notes.txt", "files"), ("prose/x.jsonl#3", "prose")],
)
def test_domains_are_top_folders_or_files(document, domain):
    assert domain_of(document) == domain


def test_strings_are_their_utf8_and_bos_can_be_named(target):
    texts = corpus(3)
    assert nats_per_byte(target, [text.decode() for text in texts]).mean == nats_per_byte(target, texts).mean
    assert nats_per_byte(target, texts, bos=5).mean != nats_per_byte(target, texts).mean


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([b"good", b""], "text 1: must not be empty"),
        ([b"\xff"], "text 0: not UTF-8"),
        ([b"\x01" * 300], "text 0: 300 tokens, the model takes at most 256"),
    ],
)
def test_bad_windows_are_named(target, texts, message):
    with pytest.raises(ValueError, match=message):
        nats_per_byte(target, texts)


def test_folders_and_devices_that_are_not_there_are_named(tmp_path, target):
    with pytest.raises(ValueError, match="no folder"):
        nats_per_byte(tmp_path / "missing", [b"text"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: cuda is asked for"):
            nats_per_byte(target, [b"text"], device="cuda")
