"""The name of a scored window: the identity of its source, and its key below that."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Self

from fusion.v1 import source_pb2
from services.base.settings import Settings
from services.wire.passage import Passage

KEY_BYTES = 16


class ModelIdentity(Settings):
    """The properties of a served model that decide what it says.

    `engine` is the name without its version: what is stored stays valid over an upgrade. `model` is a name for people
    only.
    """

    model: str
    revision: str
    vocabulary: str
    bos_token: str
    eos_token: str
    engine: str
    dtype: str
    chat_template: str = ""

    @classmethod
    def described(cls, info: source_pb2.GetSourceInfoResponse, **other: Any) -> Self:
        """Return the identity in a source's description; `other` are properties that it leaves open."""
        return cls(
            model=info.model,
            revision=info.revision,
            vocabulary=info.vocabulary,
            bos_token=info.bos_token,
            eos_token=info.eos_token,
            engine=re.sub(r" \d\S*", "", info.engine, count=1),
            dtype=info.dtype,
            **other,
        )

    @property
    def digest(self) -> str:
        """The name of the source's folder in a store."""
        # Sources that take documents alone keep the names that they had before there were chat templates.
        values = self.model_dump(exclude={"model"} if self.chat_template else {"model", "chat_template"})
        return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:32]


class SourceIdentity(ModelIdentity):
    """The properties that decide a source's distributions. Sources of one identity may read each other's windows."""

    top_k: int

    @classmethod
    def of(cls, info: source_pb2.GetSourceInfoResponse, top_k: int) -> Self:
        return cls.described(info, top_k=top_k, chat_template=info.chat_template)


def window_key(passage: Passage) -> bytes:
    """Return the content address of a window below its source."""
    return passage.identity[:KEY_BYTES]
