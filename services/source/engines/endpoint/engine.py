"""Engine `openai`: prompt log-probabilities and answers of a model that a server elsewhere has loaded.

The server is believed after it was looked at. At the start it must have the model and room for the longest text, give
`top_k` candidates for every token of a probe, hand the probe's own ids back, and mean by its ids what the tokenizer
here means. Every later answer must hand its ids back too, and goes through the checks of all sources.

Its identity is the name and the root that the server gives in `/v1/models`, and `engine.revision`. A hash of rows would
be another one after every restart, because rounding depends on the batch; the canary compares them with a tolerance
instead, so that other weights under the same name are refused. `max_model_len` changes no row.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress

from fusion_core.vocabulary import Vocabulary
from services.base.errors import ServiceError, SettingError
from services.source.canary import TEXTS
from services.source.config import SourceConfig
from services.source.engines.base import Engine, PromptScores, SampledTokens, TokenSampling
from services.source.engines.endpoint.config import OpenAIConfig
from services.source.engines.endpoint.connection import Connection, RefusedRequestError, ServedModel
from services.source.engines.endpoint.flavour import Flavour, MalformedAnswerError, field
from services.source.engines.endpoint.sglang_server import SglangServer
from services.source.engines.endpoint.vllm_server import VllmServer
from services.source.engines.identity import engine_name

_LEAST_SAME_TEXTS = 0.9
"""Share of ids whose texts must agree. Not all do: single ids are decoded with and without spaces and byte names."""


class EndpointEngine(Engine):
    """A served model. Its process is not ours: this replica stays while the server is away, and says so."""

    dtype = "served"
    path = "json"
    runs_here = False

    def __init__(self, connection: Connection, flavour: Flavour, settings: OpenAIConfig, revision: str) -> None:
        self._connection, self._flavour, self._settings = connection, flavour, settings
        self.revision = revision
        self.name_and_version = ""
        self.determinism = (
            f"the same text scores the same but for rounding, which depends on the server's batch; {flavour.seeds}"
        )

    @classmethod
    async def load(cls, config: SourceConfig, settings: OpenAIConfig, vocabulary: Vocabulary) -> EndpointEngine:
        """Connect and check; raises ValueError naming the key that does not fit, UnavailableError without a server."""
        flavour: Flavour = SglangServer() if settings.flavour == "sglang" else VllmServer()
        connection = Connection(settings, _key(settings))
        try:
            try:
                served = await connection.served()
            except RefusedRequestError as error:
                raise SettingError("engine.model", str(error)) from error
            _check_length(config, served)
            engine = cls(connection, flavour, settings, _revision(served, settings))
            await engine._check_rows(config, vocabulary)
            version = ""
            with suppress(ServiceError):
                version = str(field(await connection.get(flavour.version_path), "version") or "")
            engine.name_and_version = engine_name("openai", config.counted, version if version[:1].isdigit() else "0")
        except BaseException:
            connection.close()
            raise
        return engine

    async def score(self, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        request = self._flavour.score_request(self._settings.model, prompt_ids, top_k)
        answer = await self._connection.post(self._flavour.path, request)
        return await asyncio.to_thread(self._flavour.scores, answer, prompt_ids, top_k)

    async def generate(self, prompt_ids: Sequence[int], how: TokenSampling) -> AsyncGenerator[SampledTokens, None]:
        request = self._flavour.sample_request(self._settings.model, prompt_ids, how)
        ids = self._flavour.sampled_ids(await self._connection.post(self._flavour.path, request))
        # Servers differ in what they report of a sampled token (before or after temperature); a prompt's rows are the
        # model's own.
        scores = await self.score([*prompt_ids, *ids], 1)
        yield SampledTokens(ids, scores.gold_T[-len(ids) :].tolist())

    async def check_health(self) -> None:
        try:
            await self._connection.get("/health")
        except (RefusedRequestError, MalformedAnswerError):
            return  # it answers: some servers have no such path, and vLLM's answer is empty

    def close(self) -> None:
        self._connection.close()

    async def _check_rows(self, config: SourceConfig, vocabulary: Vocabulary) -> None:
        """Raise SettingError naming the key when the server does not give the rows of the probe."""
        top_k, url = config.largest_top_k, self._connection.url
        ids = vocabulary.encode(b"\n".join(TEXTS)).token_ids_T[: config.max_tokens].tolist()
        request = self._flavour.score_request(self._settings.model, ids, top_k, with_texts=True)
        try:
            answer = await self._connection.post(self._flavour.path, request)
            self._flavour.scores(answer, ids, top_k)
        except RefusedRequestError as error:
            if error.is_unknown:
                flavour = self._settings.flavour
                raise SettingError(
                    "engine.flavour", f"{error}; {flavour} has this path, is it another server?"
                ) from error
            hint = self._flavour.enough_candidates.format(top_k=top_k)
            raise SettingError("top_k", f"{error}; {top_k} candidates of a probe were asked for ({hint})") from error
        except MalformedAnswerError as error:
            raise SettingError("engine.url", f"{url}, flavour {self._settings.flavour}: {error}") from error
        same, compared = _same_texts(self._flavour.texts(answer), vocabulary)
        if same < _LEAST_SAME_TEXTS * compared:
            raise SettingError(
                "model",
                f"{config.model} is not the tokenizer of {self._settings.model} at {url}: of {compared} ids "
                f"{compared - same} stand for other texts there",
            )


def _same_texts(texts: Iterable[tuple[int, str | None]], vocabulary: Vocabulary) -> tuple[int, int]:
    """Return how many different ids mean the same text here as at the server, and how many were compared.

    White space is left out, since servers decode ids one by one; so are ids that are no whole characters.
    """
    same = compared = 0
    for token_id, there in dict(texts).items():
        here = vocabulary.token_bytes(token_id).decode("utf-8", errors="replace").strip()
        if here and there is not None and "�" not in here + there:
            compared += 1
            same += here == there.replace("▁", " ").strip()
    return same, compared


def _check_length(config: SourceConfig, served: ServedModel) -> None:
    needed = config.max_tokens + 2  # BOS in front, and the one token that servers insist on
    if served.max_tokens is not None and served.max_tokens < needed:
        raise SettingError(
            "max_tokens",
            f"{config.max_tokens} and two more are needed at the server, whose max_model_len is {served.max_tokens}",
        )


def _revision(served: ServedModel, settings: OpenAIConfig) -> str:
    return hashlib.sha256("\0".join((served.name, served.root, settings.revision)).encode()).hexdigest()[:32]


def _key(settings: OpenAIConfig) -> str | None:
    if settings.api_key_env is None:
        return None
    if not (key := os.environ.get(settings.api_key_env, "").strip()):
        raise SettingError("engine.api_key_env", "the environment variable that it names is not set in this replica")
    return key
