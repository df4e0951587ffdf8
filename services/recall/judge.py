"""The judge: an encoder that reads a question and some blocks of a text, and scores every token.

A window is `[CLS] question [SEP] block [SEP] block [SEP] ...`; a block's score is the highest of its tokens, the
sigmoid of their logits. CogLTX takes the mean; but what matters is a sentence among others of its block, and only its
tokens are labelled where passages are marked. The encoder is any of Hugging Face's with a head for tokens, so that a
folder holds it whole.

Shapes: W windows, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.recall.memory import MemoryConfig, Recalled, Scorer, recall, windows
from fusion_core.recall.split import Span, split
from services.models.catalogue import resolve_model
from services.models.weights import quiet

Precision = Literal["auto", "float32", "bfloat16"]
"""The numbers that the encoder multiplies; auto: bfloat16 where the device computes with it, else float32."""

BLOCK_TOKENS = 63
"""Tokens of a block at most; with its separator it takes up 64 of a window."""
_BATCH_TOKENS = 2048
"""Tokens of a batch, padding included, that the judge scores at once on a CPU; eight times as many on a GPU. That
bounds its memory, and more are no faster on a CPU."""


@dataclass(frozen=True)
class Document:
    """A text in blocks. `token_ids_B` holds the judge's ids of every block, without separators."""

    text: str
    spans: list[Span]
    token_ids_B: list[list[int]]

    @cached_property
    def blocks(self) -> list[str]:
        """The blocks' texts."""
        return [self.text[span.start : span.end] for span in self.spans]

    @cached_property
    def tokens_in_window(self) -> list[int]:
        """Tokens that every block takes up in a window, its separator included."""
        return [len(ids) + 1 for ids in self.token_ids_B]


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows as the encoder takes them. `block_WT` is the place of a token's block in its window, -1 elsewhere."""

    input_ids_WT: Tensor
    attention_mask_WT: Tensor
    token_type_ids_WT: Tensor
    block_WT: Tensor


class Judge:
    """A judge on one device. It may be called from several threads, unless it is trained at the same time."""

    def __init__(
        self, model: Any, tokenizer: Any, device: str | torch.device = "cpu", precision: Precision = "float32"
    ) -> None:
        self.model = model.to(device).eval()
        self.device = torch.device(device)
        self._bfloat16 = precision == "bfloat16" or (precision == "auto" and _computes_bfloat16(self.device))
        self._tokenizer = tokenizer
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()  # a folder's own limits are those of its first use
        self._fast.no_padding()
        self._first, self._separator = _ids(tokenizer, "cls", "bos"), _ids(tokenizer, "sep", "eos")
        self._padding = tokenizer.pad_token_id or 0
        self._has_types = getattr(model.config, "type_vocab_size", 1) > 1
        self.window_tokens: int = min(512, getattr(model.config, "max_position_embeddings", 512))
        self.block_tokens: int = getattr(model.config, "block_tokens", BLOCK_TOKENS)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        fresh: bool = False,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
    ) -> Judge:
        """Return the judge of a folder or a catalogue model.

        Args:
            model: folder, catalogue name or URL of a model.
            fresh: give an encoder that is no judge yet a random head, by torch's seed; else it is refused.
            device: place of the model.
            precision: of the products of matrices; weights are float32.

        Raises ValueError when there is no such model, when it is no encoder, or no judge and not `fresh`.
        """
        from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

        folder = resolve_model(str(model))
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            trained = any(name.endswith("ForTokenClassification") for name in config.architectures or ())
            if not (trained and config.num_labels == 1) and not fresh:
                raise ValueError("it was not trained as a judge; `fusion recall train` makes one of it")
            config.num_labels = 1
            with quiet():
                encoder = AutoModelForTokenClassification.from_pretrained(
                    folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32
                )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            return cls(encoder, tokenizer, device, precision)
        except (OSError, ValueError) as error:
            raise ValueError(f"judge: {model} cannot be used: {error}") from error

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder that `load` reads."""
        self.model.config.block_tokens = self.block_tokens
        with quiet():
            self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def read(self, text: str, block_tokens: int = BLOCK_TOKENS) -> Document:
        """Return a text in blocks of at most `block_tokens` tokens."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        spans = split(
            text, np.maximum.accumulate([end for _, end in encoding.offsets] or [0])[: len(encoding)], block_tokens
        )
        bounds = np.cumsum([0, *(span.tokens for span in spans)]).tolist()
        ids = encoding.ids
        return Document(text, spans, [ids[first:last] for first, last in pairwise(bounds)])

    def marked(self, document: Document, passages: Sequence[tuple[int, int]]) -> list[NDArray[np.bool_]]:
        """Return for every block which of its tokens lie in one of the passages, offsets in characters."""
        offsets_T2 = np.array(self._fast.encode(document.text, add_special_tokens=False).offsets).reshape(-1, 2)
        within_T = np.zeros(len(offsets_T2), dtype=np.bool_)
        for start, end in passages:
            within_T |= (offsets_T2[:, 0] < end) & (offsets_T2[:, 1] > start)
        return np.split(within_T, np.cumsum([span.tokens for span in document.spans])[:-1])

    def question(self, question: str) -> list[int]:
        """Return the beginning of every window: the question between its special tokens."""
        ids = self._fast.encode(question, add_special_tokens=False).ids
        return [self._first, *ids, self._separator]

    def recall(self, question: str, document: Document, config: MemoryConfig) -> list[Recalled]:
        """Return the key blocks of a document in its order; see `fusion_core.recall.memory.recall`."""
        if config.window_tokens > self.window_tokens:
            raise ValueError(f"window_tokens: must be at most {self.window_tokens} with this judge")
        start = self.question(question)
        return recall(len(start), document.tokens_in_window, self.scorer(start, document), config)

    def score(self, question: str, document: Document) -> NDArray[np.float32]:
        """Return a score for every block by one competition, without memory."""
        start = self.question(question)
        room = self.window_tokens - len(start)
        packed = windows((), range(len(document.spans)), document.tokens_in_window, room)
        scores = self.scorer(start, document)(packed)
        return np.concatenate([np.zeros(0, np.float32), *scores])

    def scorer(self, start: list[int], document: Document) -> Scorer:
        """Return the function that scores windows of a document's blocks behind a question's tokens."""

        def score(packed: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
            scores: list[NDArray[np.float32]] = []
            for chunk in self._chunks(packed, len(start), document.tokens_in_window):
                scores += self._scores(
                    self.batch([(start, [document.token_ids_B[b] for b in w]) for w in chunk]), chunk
                )
            return scores

        return score

    def batch(self, packed: Sequence[tuple[list[int], Sequence[list[int]]]]) -> Batch:
        """Return windows, each a question's tokens and the ids of its blocks, padded to the longest."""
        rows, places, firsts = [], [], []
        for start, blocks in packed:
            row, place = list(start), [-1] * len(start)
            for number, ids in enumerate(blocks):
                row += [*ids, self._separator]
                place += [*([number] * len(ids)), -1]
            rows.append(row)
            places.append(place)
            firsts.append(len(start))
        longest = max(map(len, rows))
        ids_WT = torch.tensor([row + [self._padding] * (longest - len(row)) for row in rows])
        mask_WT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        block_WT = torch.tensor([place + [-1] * (longest - len(place)) for place in places])
        behind_WT = torch.arange(longest)[None, :] >= torch.tensor(firsts)[:, None]
        types_WT = (behind_WT & (mask_WT > 0)).long() if self._has_types else torch.zeros_like(ids_WT)
        return Batch(*(tensor.to(self.device) for tensor in (ids_WT, mask_WT, types_WT, block_WT)))

    def logits(self, batch: Batch) -> Tensor:
        """Return a logit for every token, [W, T], float32."""
        types = {"token_type_ids": batch.token_type_ids_WT} if self._has_types else {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            output = self.model(input_ids=batch.input_ids_WT, attention_mask=batch.attention_mask_WT, **types)
        logits: Tensor = output.logits[..., 0].float()
        return logits

    def _chunks(
        self, packed: Sequence[Sequence[int]], start: int, block_tokens: Sequence[int]
    ) -> Iterator[list[Sequence[int]]]:
        """Yield windows, in their order, as many at once as a batch may hold."""
        chunk: list[Sequence[int]] = []
        longest = 0
        most = _BATCH_TOKENS if self.device.type == "cpu" else 8 * _BATCH_TOKENS
        for window in packed:
            length = start + sum(block_tokens[block] for block in window)
            if chunk and max(longest, length) * (len(chunk) + 1) > most:
                yield chunk
                chunk, longest = [], 0
            chunk.append(window)
            longest = max(longest, length)
        if chunk:
            yield chunk

    @torch.inference_mode()
    def _scores(self, batch: Batch, chunk: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        relevance_WT = torch.sigmoid(self.logits(batch))
        most = max(map(len, chunk))
        highest = torch.zeros(len(chunk), most + 1, device=self.device)
        highest.scatter_reduce_(1, batch.block_WT + 1, relevance_WT, "amax")  # 0: no block
        scores = highest[:, 1:].cpu().numpy()
        return [scores[number, : len(window)] for number, window in enumerate(chunk)]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Put the model into training mode for the length of the block."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()


def _computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies in bfloat16, instead of only storing it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def _ids(tokenizer: Any, *names: str) -> int:
    """Return the first special id that the tokenizer has."""
    for name in names:
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            return int(number)
    raise ValueError(f"its tokenizer has no {' or '.join(names)} token")
