"""A source outside of Ray that lies on command: the real servicer with what it says put wrong on the way out.

Run as `python -m tests.drill.bad_source PORT CONFIG`, CONFIG being a SourceConfig in JSON. It prints "ready", then
takes commands on its standard input, a line each: `sound`, `nan`, `fingerprint`, `other_text`, `delay SECONDS`,
`mutated` or `lie NAME` for one of tests/fakes/lies.py. The end of the input ends it.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from fusion.v1 import block_pb2, source_pb2, source_pb2_grpc
from services.base.errors import FailedPreconditionError
from services.models.prompt import Prompt
from services.source.config import SourceConfig
from services.source.servicer import SourceServicer
from tests.fakes.lies import LIES, mutation

WRONG_FINGERPRINT = "0123456789abcdef"


class BadSource(SourceServicer):
    """Answers as the real one does, as long as `mode` is `sound`."""

    mode = "sound"
    argument = ""
    mutation = staticmethod(mutation(random.Random(0)))

    async def GetSourceInfo(self, request: Any, grpc_context: Any) -> source_pb2.GetSourceInfoResponse:  # noqa: N802
        info: source_pb2.GetSourceInfoResponse = await super().GetSourceInfo(request, grpc_context)
        if self.mode == "fingerprint":
            info.vocabulary = WRONG_FINGERPRINT
        return info

    def _answer(self, request: source_pb2.ScoreRequest | source_pb2.StreamScoresOpen) -> Any:
        if self.mode == "fingerprint" and request.expected_vocabulary not in {"", WRONG_FINGERPRINT}:
            raise FailedPreconditionError(f"expected_vocabulary: this source has {WRONG_FINGERPRINT}")
        answer = super()._answer(request)
        before: list[block_pb2.TokenBlock] = []

        async def spoiled(prompt: Prompt) -> block_pb2.TokenBlock:
            mode = self.mode
            block: block_pb2.TokenBlock = await answer(prompt)
            if mode == "delay":
                await asyncio.sleep(float(self.argument))
            elif mode == "nan":
                itemsize = 2 if block.dtype == block_pb2.LOGPROB_DTYPE_FLOAT16 else 4
                block.topk_logprobs = np.full(block.num_tokens * block.k, np.nan, f"<f{itemsize}").tobytes()
            elif mode == "fingerprint":
                block.vocabulary = WRONG_FINGERPRINT
            elif mode == "other_text" and before:
                return before[-1]
            elif mode == "mutated":
                return self.mutation(block)
            elif mode == "lie":
                return LIES[self.argument][0](block)
            before[:] = [block]
            return block

        return spoiled


async def serve(port: int, config: SourceConfig) -> None:
    source = BadSource.__new__(BadSource)
    await source.__init__(config)  # type: ignore[misc]  # Serve awaits constructors
    server = grpc.aio.server()
    source_pb2_grpc.add_SourceServiceServicer_to_server(source, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while command := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        source.mode, _, source.argument = command.partition(" ")
    await server.stop(None)
    await source.close()


def main(arguments: Sequence[str]) -> None:
    port, config = arguments
    asyncio.run(serve(int(port), SourceConfig.model_validate_json(config)))


if __name__ == "__main__":
    main(sys.argv[1:])
