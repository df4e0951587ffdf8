"""A real source on a plain gRPC server whose engine says what a test has written down."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fusion.v1 import source_pb2_grpc
from services.source.config import SourceConfig
from services.source.engines.base import SampledTokens, TokenSampling
from services.source.servicer import SourceServicer
from tests.fakes.services.on_thread import served


@dataclass
class Script:
    """What the engine says, the last line again and again, and the prompts that it was given, in text and in tokens."""

    address: str
    tokenizer: Tokenizer
    lines: list[str]
    prompts: list[list[int]] = field(default_factory=list)

    def asked(self, number: int) -> str:
        """A prompt, with the names of control tokens."""
        return str(self.tokenizer.decode(self.prompts[number], skip_special_tokens=False))

    async def generate(self, prompt_ids: Sequence[int], how: TokenSampling) -> AsyncGenerator[SampledTokens, None]:
        line = self.lines[min(len(self.prompts), len(self.lines) - 1)]
        self.prompts.append(list(prompt_ids))
        ids = [*self.tokenizer.encode(line, add_special_tokens=False).ids, how.stop_ids[0]]
        ids = ids[: how.max_new_tokens]
        yield SampledTokens(ids, [-1.0] * len(ids))


@contextmanager
def scripted_source(model: Path, *lines: str, **settings: Any) -> Iterator[Script]:
    """Serves as long as the block takes."""
    values = {"name": "tiny", "model": str(model), "engine": "synthetic", "top_k": 16, "max_tokens": 6000}
    script = Script("", Tokenizer.from_file(str(model / "tokenizer.json")), list(lines))

    def follow(servicer: Any) -> None:
        servicer._scorer.engine.generate = script.generate

    add = source_pb2_grpc.add_SourceServiceServicer_to_server
    with served(SourceServicer, add, SourceConfig.model_validate(values | settings), change=follow) as running:
        script.address = running.address
        yield script
