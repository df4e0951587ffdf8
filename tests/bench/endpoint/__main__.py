"""CPU time and bytes of rows as a server's JSON beside the same rows as a block: `python -m tests.bench.endpoint`.

The JSON is read in the source's replica; the block is what leaves the replica in either case.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fusion.v1 import block_pb2
from fusion_core.arrays import Float32, Int32
from fusion_core.blocks import Block
from services.source.engines.endpoint.flavour import Flavour
from services.source.engines.endpoint.sglang_server import SglangServer
from services.source.engines.endpoint.vllm_server import VllmServer
from services.wire.block import decode_block, encode_block
from tests.bench.parts.report import Report, arguments, in_turn

_VOCABULARY_SIZE = 128_000
_TOP_K = 64


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    num_tokens, repetitions = (512, 5) if options.quick else (2048, 25)
    report = Report("endpoint")
    ids_T1, ids_TK, logprobs_TK = _rows(num_tokens)
    block = _block(ids_T1, ids_TK, logprobs_TK)
    flavours: dict[str, tuple[Flavour, bytes]] = {
        "vllm": (VllmServer(), json.dumps(_vllm(ids_T1, ids_TK, logprobs_TK)).encode()),
        "sglang": (SglangServer(), json.dumps(_sglang(ids_T1, ids_TK, logprobs_TK)).encode()),
    }
    message = encode_block(block, block_pb2.LOGPROB_DTYPE_FLOAT16)
    prompt = ids_T1.tolist()
    for _, (flavour, body) in flavours.items():
        np.testing.assert_array_equal(flavour.scores(json.loads(body), prompt, _TOP_K).topk_ids_TK, ids_TK)
    *seconds, block_seconds = in_turn(
        repetitions,
        *(lambda f=f, b=b: f.scores(json.loads(b), prompt, _TOP_K) for f, b in flavours.values()),  # type: ignore[misc]
        lambda: decode_block(encode_block(block, block_pb2.LOGPROB_DTYPE_FLOAT16)),
    )
    sizes = [len(body) for _, body in flavours.values()]
    for name, size, spent in zip(
        [*flavours, "block"], [*sizes, message.ByteSize()], [*seconds, block_seconds], strict=True
    ):
        report.row(
            form=name,
            candidates=_TOP_K,
            tokens=num_tokens,
            bytes_per_token=size / num_tokens,
            microseconds_per_token=1e6 * spent / num_tokens,
            tokens_per_second=num_tokens / spent,
            times_the_block=spent / block_seconds,
        )
        if name != "block":
            report.check(f"{name}: JSON read in a core's second", num_tokens / spent, "tokens", at_least=5_000)
    report.finish(options.json)


def _rows(num_tokens: int) -> tuple[Int32, Int32, Float32]:
    """Ids of a prompt, and candidates with falling log-probabilities; every second own token is the likeliest."""
    rng = np.random.default_rng(0)
    ids_TK = np.stack([rng.choice(_VOCABULARY_SIZE, _TOP_K, replace=False) for _ in range(num_tokens)]).astype(np.int32)
    logprobs_TK = np.log(np.sort(rng.dirichlet(np.full(_TOP_K, 0.2), num_tokens) + 1e-9)[:, ::-1] * 0.95)
    own_T = np.where(np.arange(num_tokens) % 2 == 0, ids_TK[:, 0], _VOCABULARY_SIZE)
    return np.append(np.int32(0), own_T).astype(np.int32), ids_TK, logprobs_TK.astype(np.float32)


def _own(ids_T1: Int32, ids_TK: Int32, logprobs_TK: Float32) -> list[float]:
    return np.where(ids_T1[1:] == ids_TK[:, 0], logprobs_TK[:, 0], -30.0).tolist()  # type: ignore[no-any-return]


def _vllm(ids_T1: Int32, ids_TK: Int32, logprobs_TK: Float32) -> Any:
    def entry(logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": " token"}

    rows: list[Any] = [None]
    for own, own_logprob, ids, logprobs in zip(
        ids_T1[1:].tolist(), _own(ids_T1, ids_TK, logprobs_TK), ids_TK.tolist(), logprobs_TK.tolist(), strict=True
    ):
        row = {str(own): entry(own_logprob, 0)}
        row |= {str(i): entry(p, n) for n, (i, p) in enumerate(zip(ids, logprobs, strict=True), 1)}
        rows.append(row)
    return {"choices": [{"text": "", "prompt_logprobs": rows}]}


def _sglang(ids_T1: Int32, ids_TK: Int32, logprobs_TK: Float32) -> Any:
    own = zip(_own(ids_T1, ids_TK, logprobs_TK), ids_T1[1:].tolist(), strict=True)
    top = zip(logprobs_TK.tolist(), ids_TK.tolist(), strict=True)
    meta = {
        "input_token_logprobs": [[None, 0, None], *([p, i, None] for p, i in own)],
        "input_top_logprobs": [None, *([[p, i, None] for p, i in zip(*row, strict=True)] for row in top)],
    }
    return {"text": "", "meta_info": meta}


def _block(ids_T1: Int32, ids_TK: Int32, logprobs_TK: Float32) -> Block:
    num_tokens = len(ids_TK)
    return Block(
        text_bytes=b"x" * num_tokens,
        token_ids_T=ids_T1[1:],
        byte_ends_T=np.arange(1, num_tokens + 1, dtype=np.int32),
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=logprobs_TK,
        tail_T=np.full(num_tokens, np.log(0.05), dtype=np.float32),
        gold_T=np.asarray(_own(ids_T1, ids_TK, logprobs_TK), dtype=np.float32),
        vocabulary="0" * 16,
        mask_T=np.ones(num_tokens, dtype=bool),
    )


if __name__ == "__main__":
    main()
