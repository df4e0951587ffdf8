"""What is given as top k never becomes dense: no path allocates anything of the size tokens x vocabulary."""

from __future__ import annotations

import copy
import itertools
import math
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.alignment.published.vocabulary_map import VocabularyMap, VocabularyMapConfig
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.vocabulary import Encoding, Vocabulary
from tests.fakes.tokenizers import CORPUS, description, wrap

SIZE, K = 40_000, 16


def large_vocabulary(salt: str) -> Vocabulary:
    """Byte-level BPE with many ids that no merge reaches, so that V is large without training."""
    described = copy.deepcopy(description("byte_level"))
    vocab = described["model"]["vocab"]
    words = ("".join(letters) for letters in itertools.product("abcdefghijklmnop", repeat=4))
    for word in itertools.islice(words, SIZE - len(vocab)):
        vocab[salt + word] = len(vocab)
    return wrap(described)


def block_of_anything(vocabulary: Vocabulary, text: bytes) -> tuple[Block, Encoding]:
    encoding = vocabulary.encode(text)
    num_tokens = encoding.num_tokens
    rng = np.random.default_rng(0)
    first = rng.integers(0, vocabulary.size, (num_tokens, 1))
    topk_ids = ((first + np.arange(K) * 997) % vocabulary.size).astype(np.int32)
    logprobs = np.full((num_tokens, K), math.log(0.5 / K), dtype=np.float32)
    half = np.full(num_tokens, math.log(0.5), dtype=np.float32)
    block = Block(
        text, encoding.token_ids_T, encoding.byte_ends_T, topk_ids, logprobs, half, half - 20, vocabulary.fingerprint,
        encoding.lossless_T,
    )  # fmt: skip
    return block, encoding


def growth_in_bytes(method: str) -> tuple[int, int]:
    """(growth of the process's peak memory by one window, size of a dense table of that window)."""
    source, target = large_vocabulary("x"), large_vocabulary("y")
    exact = VocabularyMap.build(source, target, VocabularyMapConfig(strategy="exact", cache_dir=None))
    project: Callable[[Block, Encoding, Block], ProjectedRows]
    if method == "byte":
        byte = ByteProjection(source, target)
        project = lambda block, encoding, _: byte.project(block, encoding)  # noqa: E731
    elif method == "min_edit":
        min_edit = MinEditProjection(source, target, MinEditConfig(match="hard"), exact)
        project = lambda block, encoding, _: min_edit.project(block, encoding)  # noqa: E731
    else:
        project = TransportProjection(source, target, TransportConfig(match="hard"), exact).project

    def run(text: bytes) -> int:
        block, _ = block_of_anything(source, text)
        of_target, encoding = block_of_anything(target, text)
        rows = project(block, encoding, of_target)
        fused = fuse(text, encoding, {"one": rows, "two": rows}, FusionConfig(k_out=K), target.fingerprint)
        assert rows.mask_T.any() and fused.num_tokens == encoding.num_tokens
        return encoding.num_tokens

    run(" ".join(CORPUS).encode())  # compiles, and fills what is cached
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_tokens = run((" ".join(CORPUS) * 12).encode())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * 1024, num_tokens * target.size * 4


@pytest.mark.parametrize("method", ["byte", "min_edit", "transport"])
def test_top_k_paths_allocate_nothing_of_tokens_times_vocabulary(method: str) -> None:
    # A process of its own, because a peak only ever grows, and compiled code allocates where tracemalloc cannot see.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        grown, dense = alone.submit(growth_in_bytes, method).result()
    assert dense > 4e8
    assert grown < dense / 10, f"{method} grew by {grown:,} bytes, a dense table has {dense:,}"
