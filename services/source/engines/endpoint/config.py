"""Settings of engine `openai`: a model behind the completion endpoint of a server that runs already."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from services.base.credentials import refuse_credentials
from services.base.settings import Settings


class OpenAIConfig(Settings):
    """Engine `openai`: rows come over HTTP from vLLM or SGLang; the source's `model` names the tokenizer alone."""

    kind: Literal["openai"] = "openai"
    url: str = Field(description="The server, such as http://10.0.0.5:8000; a /v1 at its end may stay.")
    model: str = Field(min_length=1, description="Name under which the server has the model.")
    flavour: Literal["vllm", "sglang"] = Field("vllm", description="The interface that the server speaks.")
    revision: str = Field("", description="A name of your own for the served weights; change it when they change.")
    api_key_env: str | None = Field(None, min_length=1, description="Environment variable that holds the bearer token.")
    max_concurrent: int = Field(16, ge=1, description="Requests that a replica has under way at the server.")
    timeout_seconds: float = Field(300, gt=0, description="Longest time of a request, its waiting included.")
    retry_seconds: float = Field(
        10, ge=0, description="Time for which a server that is away or overloaded is tried again."
    )

    @field_validator("url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        refuse_credentials(value, "url")
        if not value.startswith(("http://", "https://")) or "?" in value or "#" in value:
            raise ValueError("expected http://HOST:PORT or https://HOST, with a path where the server has one")
        return value

    @property
    def base_url(self) -> str:
        """The URL below which the server's paths begin."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def counted(self) -> dict[str, Any]:
        """Settings that may change an answer. Where the server is does not."""
        return {"model": self.model, "flavour": self.flavour}
