"""Bytes and speed of the formats that scored windows travel and are kept in, on real rows of real models.

Beside them what the same candidates take as plain float32 and int32 columns, and what zstd alone makes of those. The
loss of the store's rounding is the Kullback-Leibler divergence of a decoded row to the original.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusion.v1 import block_pb2
from fusion_core.blocks import Block
from services.base.files import Files
from services.corpus.ledger import TRAIN
from services.corpus.prepare import plan_corpus, read_text
from services.models.fetch import fetch
from services.recipes.load import load_recipe
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.store.identity import window_key
from services.store.rows import decode_row, encode_row
from services.store.shard import OpenShard, write_shard
from services.wire.block import decode_block, encode_block
from services.wire.passage import Passage
from tests.bench.parts.report import Report, arguments, in_turn

RECIPE, TOP_K = "quickstart", 64


def real_blocks(source: str, num_windows: int) -> list[Block]:
    """Windows of the quickstart's corpus as one of its sources scores them, float32, by plain forward passes."""
    recipe = load_recipe(RECIPE)
    [config] = [each for each in recipe.sources if each.name == source]
    plain = SourceConfig(
        name=source,
        model=config.model,
        engine="transformers",
        dtype="float32",
        top_k=TOP_K,
        bos_token=config.bos_token,
        max_tokens=config.max_tokens,
    )

    async def score() -> list[Block]:
        scorer = await Scorer.load(plain, fetch(config.model))
        with tempfile.TemporaryDirectory() as folder:
            corpus = plan_corpus(read_text(recipe.corpus, folder))
            windows = [corpus.window(TRAIN, index) for index in range(num_windows)]
        prompts = scorer.encode([Passage(window.text) for window in windows])
        return [await scorer.score(prompt, TOP_K) for prompt in prompts]

    return asyncio.run(score())


def divergence(original: Block, decoded: Block) -> np.ndarray:
    """Kullback-Leibler divergence of every decoded row to the original in nats, over the candidates and the tail."""
    logs = []
    for block in (original, decoded):
        order_TK = np.argsort(block.topk_ids_TK, axis=1)
        columns = [np.take_along_axis(block.topk_logprobs_TK, order_TK, axis=1), block.tail_T[:, None]]
        log_TK = np.concatenate(columns, axis=1).astype(np.float64)
        logs.append(log_TK - np.logaddexp.reduce(log_TK, axis=1, keepdims=True))
    p_TK, q_TK = logs
    with np.errstate(invalid="ignore"):
        return np.where(p_TK > -np.inf, np.exp(p_TK) * (p_TK - q_TK), 0.0).sum(axis=1)


def measure(report: Report, source: str, blocks: Sequence[Block], repetitions: int) -> None:
    """Adds the rows and checks of one source."""
    num_tokens = sum(block.num_tokens for block in blocks)
    ids_TK = np.concatenate([block.topk_ids_TK for block in blocks])
    logprobs_TK = np.concatenate([block.topk_logprobs_TK for block in blocks])
    plain = logprobs_TK.tobytes() + ids_TK.tobytes()
    zstd = pa.Codec("zstd", compression_level=3)
    wire = [encode_block(block).SerializeToString() for block in blocks]
    wide = [encode_block(block, block_pb2.LOGPROB_DTYPE_FLOAT32).SerializeToString() for block in blocks]
    keys = [window_key(Passage(block.text_bytes)) for block in blocks]
    with tempfile.TemporaryDirectory() as folder:
        files = Files(folder)

        def write() -> None:
            write_shard(files, "shard", [encode_row(key, block) for key, block in zip(keys, blocks, strict=True)])

        def read(order: Iterable[int] = range(len(blocks))) -> list[Block]:
            shard = OpenShard(files, "shard")
            return [decode_row(shard.row(row), 0, blocks[0].vocabulary) for row in order]

        write()
        shuffled = np.random.default_rng(0).permutation(len(blocks)).tolist()
        stored_bytes = (Path(folder) / "shard.parquet").stat().st_size
        kl_T = np.concatenate([divergence(*pair) for pair in zip(blocks, read(), strict=True)])
        seconds = in_turn(
            repetitions,
            lambda: [encode_block(block).SerializeToString() for block in blocks],
            lambda: [decode_block(block_pb2.TokenBlock.FromString(data)) for data in wire],
            write,
            read,
            lambda: read(shuffled),
        )
    speeds = [num_tokens / each for each in seconds]
    formats: list[tuple[str, float, float | None, float | None, float | None]] = [
        ("candidates, float32 + int32", len(plain), None, None, None),
        ("the same through zstd", zstd.compress(plain).size, None, None, None),
        ("wire, float32", sum(map(len, wide)), None, None, None),
        ("wire, float16", sum(map(len, wire)), None, speeds[0], speeds[1]),
        ("store", stored_bytes, float(kl_T.mean()), speeds[2], speeds[3]),
        ("store, windows in any order", stored_bytes, float(kl_T.mean()), speeds[2], speeds[4]),
    ]
    for name, num_bytes, kl, encode, decode in formats:
        report.row(
            source=source,
            tokens=num_tokens,
            format=name,
            bytes_per_token=num_bytes / num_tokens,
            mean_kl_nats=kl,
            encoded_tokens_per_second=encode,
            decoded_tokens_per_second=decode,
        )
    report.check(f"{source}: wire at k = 64", formats[3][1] / num_tokens, "bytes/token", at_most=400)
    report.check(f"{source}: stored at k = 64", stored_bytes / num_tokens, "bytes/token", at_most=160)
    report.check(f"{source}: largest KL of a stored row", float(kl_T.max()), "nats", at_most=1e-3)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("store_formats")
    for source in ("smollm2", "gemma3"):
        measure(report, source, real_blocks(source, 4 if options.quick else 24), 1 if options.quick else 5)
    report.finish(options.json)


if __name__ == "__main__":
    main()
