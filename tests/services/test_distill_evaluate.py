"""Nats per byte against a loop written with transformers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion_core.vocabulary import Vocabulary
from services.distill import evaluate
from services.distill.evaluate import nats_per_byte
from tests.services.test_distill_feed import corpus, target  # noqa: F401


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
def test_scores_equal_the_plain_loop_for_any_batch(target, monkeypatch, max_logits):  # noqa: F811
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


def test_strings_are_their_utf8_and_bos_can_be_named(target):  # noqa: F811
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
def test_bad_windows_are_named(target, texts, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        nats_per_byte(target, texts)


def test_folders_and_devices_that_are_not_there_are_named(tmp_path, target):  # noqa: F811
    with pytest.raises(ValueError, match="no folder"):
        nats_per_byte(tmp_path / "missing", [b"text"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: cuda is asked for"):
            nats_per_byte(target, [b"text"], device="cuda")
