"""A block of next-token distributions: the one structure that flows between all parts.

Shape legend: T rows (tokens of the window), K candidates per row, S sources, C tokens of the context.
Convention: **row t predicts token t** from the text before it. A special token that the model is given in front
(BOS) is context, never a row, and so are tokens of the text before the window. Where a text ends its document, an
**end row** may follow: the prediction after the last token. Its realised token is EOS, and it covers no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fusion_core.arrays import Bool, Float32, Int32

PADDING_ID = -1
_MASS_TOLERANCE = 1e-3
"""Slack on "a row's mass is at most one": float16 log-probabilities on the wire are rounded, by 2^-11 at most."""


@dataclass(frozen=True, slots=True)
class SourceShare:
    """One source's contribution to a fused window.

    `weight` is its share of the mixture (0 when it took no part), averaged over the rows of the window;
    `nats_per_byte` its own loss on the window (NaN when `present` is false, and when it has no usable row).
    """

    name: str
    present: bool
    weight: float
    nats_per_byte: float


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Next-token distributions over one document window in one vocabulary.

    Attributes:
        text_bytes: the window, UTF-8, exactly as read.
        token_ids_T: int32, the realised tokens.
        byte_ends_T: int32, end offset of every token in `text_bytes`; token t covers [byte_ends[t-1], byte_ends[t]).
        topk_ids_TK: int32, candidate ids in order of falling log-probability, -1 where padded.
        topk_logprobs_TK: float32 nats, -inf where padded.
        tail_T: float32, log of the mass outside the K candidates (-inf when there is none).
        gold_T: float32, log-probability of the realised token, exact even when it is outside the K candidates.
        vocabulary: fingerprint of the vocabulary that all ids belong to.
        mask_T: bool, False where the row must not be trained on (text not represented losslessly, not alignable).
        shares: per source, for fused blocks; empty for a source's own block.
        covered_mass: mean mass that reached the candidates before the cut to K, for fused blocks; 1 - mean tail else.
        ends_document: whether the last row is the end row.
        context_ids_C: int32, tokens before the rows that the target reads behind its first token and learns nothing
            about; none in a source's own block.
        first_id: the token that the target reads in front of all others; None for its BOS.
    """

    text_bytes: bytes
    token_ids_T: Int32
    byte_ends_T: Int32
    topk_ids_TK: Int32
    topk_logprobs_TK: Float32
    tail_T: Float32
    gold_T: Float32
    vocabulary: str
    mask_T: Bool
    shares: tuple[SourceShare, ...] = field(default=())
    covered_mass: float = float("nan")
    ends_document: bool = False
    context_ids_C: Int32 = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    first_id: int | None = None

    @property
    def num_tokens(self) -> int:
        """The number of rows, T, with the end row."""
        return int(self.token_ids_T.shape[0])

    @property
    def num_text_tokens(self) -> int:
        """The number of rows that cover the text: all but the end row."""
        return self.num_tokens - self.ends_document

    @property
    def num_inputs(self) -> int:
        """The number of tokens read to predict all rows, C + T: a first one, the context, all but the last row's."""
        return int(self.context_ids_C.size) + self.num_tokens

    @property
    def k(self) -> int:
        return int(self.topk_ids_TK.shape[1])

    @property
    def nats_per_byte(self) -> float:
        """Loss of the text's tokens in nats per byte, which compares across tokenizers; the end row does not count."""
        return float(-self.gold_T[: self.num_text_tokens].sum(dtype=np.float64)) / max(1, len(self.text_bytes))

    def without_end(self) -> Block:
        """Return the block without its end row; itself when it has none."""
        if not self.ends_document:
            return self
        return replace(
            self,
            token_ids_T=self.token_ids_T[:-1],
            byte_ends_T=self.byte_ends_T[:-1],
            topk_ids_TK=self.topk_ids_TK[:-1],
            topk_logprobs_TK=self.topk_logprobs_TK[:-1],
            tail_T=self.tail_T[:-1],
            gold_T=self.gold_T[:-1],
            mask_T=self.mask_T[:-1],
            ends_document=False,
        )

    def validate(self) -> None:
        """Raise ValueError naming the column that breaks the contract."""
        num_tokens, k = self.topk_ids_TK.shape if self.topk_ids_TK.ndim == 2 else (-1, -1)
        expected = {
            "token_ids": (self.token_ids_T, np.int32, (num_tokens,)),
            "byte_ends": (self.byte_ends_T, np.int32, (num_tokens,)),
            "topk_ids": (self.topk_ids_TK, np.int32, (num_tokens, k)),
            "topk_logprobs": (self.topk_logprobs_TK, np.float32, (num_tokens, k)),
            "tail": (self.tail_T, np.float32, (num_tokens,)),
            "gold": (self.gold_T, np.float32, (num_tokens,)),
            "mask": (self.mask_T, np.bool_, (num_tokens,)),
            "context_ids": (self.context_ids_C, np.int32, (self.context_ids_C.size,)),
        }
        for name, (column, dtype, shape) in expected.items():
            if column.shape != shape or column.dtype != dtype:
                raise ValueError(
                    f"{name}: expected shape {shape} of {np.dtype(dtype).name}, got {column.shape} of {column.dtype}"
                )
        if not self.vocabulary:
            raise ValueError("vocabulary: the fingerprint is missing")
        self._check_byte_ends()
        if self.context_ids_C.min(initial=0) < 0:
            raise ValueError("context_ids: ids must not be negative")
        if num_tokens == 0:
            return
        if self.token_ids_T.min() < 0:
            raise ValueError("token_ids: ids must not be negative")
        if self.topk_ids_TK.min(initial=PADDING_ID) < PADDING_ID:
            raise ValueError("topk_ids: ids must be -1 (padding) or more")
        for name, column in (("topk_logprobs", self.topk_logprobs_TK), ("tail", self.tail_T), ("gold", self.gold_T)):
            largest = column.max(initial=-np.inf)
            if np.isnan(largest):
                raise ValueError(f"{name}: contains NaN")
            if largest > _MASS_TOLERANCE:
                raise ValueError(f"{name}: log-probabilities must not exceed 0")
        mass_T = np.exp(self.topk_logprobs_TK).sum(axis=1, dtype=np.float64) + np.exp(self.tail_T)
        if np.any(np.abs(mass_T - 1.0) > 5 * _MASS_TOLERANCE):
            row = int(np.argmax(np.abs(mass_T - 1.0)))
            raise ValueError(f"topk_logprobs: row {row} and its tail sum to {mass_T[row]:.4f}, not to 1")

    def _check_byte_ends(self) -> None:
        num_text, num_bytes = self.num_text_tokens, len(self.text_bytes)
        if num_text < 0:
            raise ValueError("byte_ends: the end row is announced, and there is none")
        if num_text == 0 and num_bytes:
            raise ValueError("byte_ends: no rows for a text that is not empty")
        ends_T = self.byte_ends_T
        if np.any(np.diff(ends_T, prepend=0) < 0) or np.any(ends_T[-1:] != num_bytes):
            raise ValueError(f"byte_ends: must rise from 0 to the text's {num_bytes} bytes")
        if num_text and ends_T[num_text - 1] != num_bytes:
            raise ValueError(f"byte_ends: the end row must cover no bytes, it covers {num_bytes - ends_T[-2]}")
