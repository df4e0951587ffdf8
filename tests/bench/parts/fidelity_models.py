"""A source model as the fidelity benchmark asks it: full rows of a text, and what follows any continuation of it.

Shape legend: T tokens of a text, V ids of the model's output layer, N prefixes of one call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary

_BATCH = 16


class Model:
    """A causal language model with its vocabulary, in float32."""

    def __init__(self, name: str, folder: Path, start_token: str) -> None:
        self.name = name
        self.vocabulary = Vocabulary.from_pretrained(folder)
        self._start_id = self.vocabulary.special_tokens[start_token]
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def read(self, text: bytes) -> Reading:
        """Reads a text once; row t predicts token t."""
        encoding = self.vocabulary.encode(text)
        ids = torch.tensor([[self._start_id, *encoding.token_ids_T.tolist()]])
        memory = DynamicCache(config=self._model.config)
        memory.activate_past_recording()  # or what left a sliding window could not be gone back to
        logits_TV = self._model(ids, past_key_values=memory, use_cache=True).logits[0, :-1]
        logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1).numpy()
        return Reading(self._model, self.vocabulary, text, encoding, logprobs_TV, memory)


class Reading:
    """A text that a model has read: its rows, and the model's memory of it to go on from anywhere."""

    def __init__(
        self,
        model: torch.nn.Module,
        vocabulary: Vocabulary,
        text: bytes,
        encoding: Encoding,
        logprobs_TV: np.ndarray,
        memory: DynamicCache,
    ) -> None:
        self._model, self._memory = model, memory
        self.vocabulary, self.text, self.encoding = vocabulary, text, encoding
        self.logprobs_TV = logprobs_TV

    def block(self, k: int) -> Block:
        """Return the block that a source service would answer with."""
        top = torch.topk(torch.from_numpy(self.logprobs_TV), k, dim=-1)
        tail_T = np.log(np.clip(1.0 - np.exp(top.values.double().numpy()).sum(axis=1), 1e-12, 1.0))
        block = Block(
            text_bytes=self.text,
            token_ids_T=self.encoding.token_ids_T,
            byte_ends_T=self.encoding.byte_ends_T,
            topk_ids_TK=top.indices.int().numpy(),
            topk_logprobs_TK=top.values.numpy(),
            tail_T=tail_T.astype(np.float32),
            gold_T=self.logprobs_TV[np.arange(self.encoding.num_tokens), self.encoding.token_ids_T],
            vocabulary=self.vocabulary.fingerprint,
            mask_T=self.encoding.lossless_T,
        )
        block.validate()
        return block

    @torch.inference_mode()
    def next_token(self, num_realised: int, continuations: Sequence[tuple[int, ...]]) -> np.ndarray:
        """float64 [N, V] probabilities after the first `num_realised` tokens of the text and each continuation."""
        probs_NV = np.empty((len(continuations), self.logprobs_TV.shape[1]))
        of_length: dict[int, list[int]] = {}
        for index, continuation in enumerate(continuations):
            of_length.setdefault(len(continuation), []).append(index)
        for length, indices in of_length.items():
            if length == 0 and num_realised < len(self.logprobs_TV):
                probs_NV[indices] = np.exp(self.logprobs_TV[num_realised].astype(np.float64))
                continue
            for first in range(0, len(indices), _BATCH):
                part = indices[first : first + _BATCH]
                memory = copy.deepcopy(self._memory)
                memory.crop(num_realised - len(self.logprobs_TV))  # keeps the start token and the realised ones
                memory.batch_repeat_interleave(len(part))
                ids = torch.tensor([continuations[index] for index in part])
                logits = self._model(ids, past_key_values=memory, use_cache=True, logits_to_keep=1).logits[:, -1]
                probs_NV[part] = torch.softmax(logits.double(), dim=-1).numpy()
        return probs_NV
