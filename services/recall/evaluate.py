"""Ways to find blocks, and what their choice is worth: both-hop recall, exact match and F1 of answers.

Every way returns at most `count` blocks. The baselines are what MemRecall has to beat; Park et al. (ACL 2022) found
that simple ones often win on long texts.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fusion_core.recall.labels import bm25
from fusion_core.recall.memory import MemoryConfig, recall
from services.recall.judge import Document, Judge

Find = Callable[[str, Document, int], list[int]]
"""A function of question, document and the number of blocks, that returns the blocks it takes for relevant."""


def head(question: str, document: Document, count: int) -> list[int]:
    """Return the first blocks: truncation."""
    return list(range(min(count, len(document.spans))))


def at_random(question: str, document: Document, count: int) -> list[int]:
    """Return blocks that question and text draw."""
    draw = random.Random(question + document.text)
    return sorted(draw.sample(range(len(document.spans)), min(count, len(document.spans))))


def by_bm25(question: str, document: Document, count: int) -> list[int]:
    """Return the best blocks by BM25."""
    return _best(bm25(question, document.blocks), count)


def sliding_window(question: str, document: Document, count: int) -> list[int]:
    """Return the run of neighbouring blocks of which BM25 makes most."""
    runs = max(1, len(document.spans) - count + 1)
    ends = [document.spans[min(first + count, len(document.spans)) - 1].end for first in range(runs)]
    texts = [document.text[document.spans[first].start : end] for first, end in enumerate(ends)]
    first = int(np.argmax(bm25(question, texts)))
    return list(range(first, min(first + count, len(document.spans))))


def by_bm25_twice(question: str, document: Document, count: int) -> list[int]:
    """Return the best two blocks by BM25, and those that are best for question and these two together."""
    first = _best(bm25(question, document.blocks), min(2, count))
    score_B = bm25(" ".join([question, *(document.blocks[block] for block in first)]), document.blocks)
    score_B[first] = np.inf
    return _best(score_B, count)


def dense(encoder: Judge) -> Find:
    """Return retrieval by the cosine of mean-pooled embeddings, with the encoder of a judge as it is."""

    def find(question: str, document: Document, count: int) -> list[int]:
        vectors_BD = _embeddings(encoder, [encoder.read(question, 510).token_ids_B[0], *document.token_ids_B])
        return _best(vectors_BD[1:] @ vectors_BD[0], count)

    return find


def by_memory(judge: Judge, config: MemoryConfig) -> Find:
    """Return MemRecall with a judge: the blocks that memory holds after the last hop, and others up to the count."""

    def find(question: str, document: Document, count: int) -> list[int]:
        start = judge.question(question)
        generous = config.model_copy(update={"budget_tokens": 10**9})
        found = recall(len(start), document.tokens_in_window, judge.scorer(start, document), generous)
        ranked = sorted(found, key=lambda block: (block.hop == 0, -block.score))
        return sorted(block.block for block in ranked[:count])

    return find


def both_found(gold: Sequence[int], found: Sequence[int]) -> bool:
    """Return whether every relevant block was found."""
    return set(gold) <= set(found)


def exact_match(answer: str, expected: str) -> bool:
    """Return whether two answers are the same without case, punctuation and articles (SQuAD, Rajpurkar et al. 2016)."""
    return _words(answer) == _words(expected)


def f1(answer: str, expected: str) -> float:
    """Return the F1 of the words of two answers, as SQuAD counts it."""
    given, wanted = _words(answer), _words(expected)
    shared = sum((Counter(given) & Counter(wanted)).values())
    if not shared:
        return float(given == wanted)
    precision, found = shared / len(given), shared / len(wanted)
    return 2 * precision * found / (precision + found)


def interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of values with its 95 % interval, by a bootstrap over them."""
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(sample), size=(draws, len(sample)))
    low, high = np.percentile(sample[picks].mean(axis=1), (2.5, 97.5))
    return float(sample.mean()), float(low), float(high)


def _best(score_B: NDArray[np.floating], count: int) -> list[int]:
    return sorted(np.argsort(-score_B, kind="stable")[:count].tolist())


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


@torch.inference_mode()
def _embeddings(encoder: Judge, token_ids: Sequence[list[int]]) -> NDArray[np.float32]:
    """Return unit vectors [B, D], the mean of the encoder's last states over all tokens."""
    vectors = []
    for first in range(0, len(token_ids), 32):
        chunk = token_ids[first : first + 32]
        start = encoder.question("")
        batch = encoder.batch([(start[:1], [ids]) for ids in chunk])
        body = getattr(encoder.model, encoder.model.base_model_prefix)
        states_WTD = body(input_ids=batch.input_ids_WT, attention_mask=batch.attention_mask_WT).last_hidden_state
        mask_WT = batch.attention_mask_WT[..., None].float()
        mean_WD = (states_WTD * mask_WT).sum(1) / mask_WT.sum(1)
        vectors.append(torch.nn.functional.normalize(mean_WD, dim=-1).cpu().numpy())
    return np.concatenate(vectors)
