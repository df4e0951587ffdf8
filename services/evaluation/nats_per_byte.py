"""Nats per byte of any causal language model in a Hugging Face folder: the measure that compares across tokenizers.

Every window is read behind the model's own BOS and its context, where it has one; all its bytes are predicted, and none
of the context's.

Shape legend: W windows, B windows of a batch, L positions, V vocabulary, T tokens of a window; for a mixture of experts
H layers with experts, E experts of a layer, K of them for a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fusion_core.arrays import Bool, Float64, Int32, Int64
from fusion_core.moe.routing import RouterRecorder
from fusion_core.vocabulary import Encoding, Vocabulary
from services.models.chat_tokenizer import open_chat
from services.models.pretrained import load_causal_lm
from services.models.prompt import Prompt, encode_passages
from services.models.weights import quiet
from services.wire.passage import Passage

_MAX_LOGITS = 1 << 27
"""Most logits of a batch: 512 MiB of float32, unless a single window needs more."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores of W windows.

    Attributes:
        nats_W: float64, -log probability of the window's tokens.
        bytes_W: int64, length of the window's text.
        tokens_W: int64, number of tokens.
        token_starts_W: per window int32, the byte at which each token starts.
        hits_W: per window bool, whether the model's likeliest next token is the real one.
        lossless_W: bool, False where the tokenizer does not spell the text byte for byte (unknown characters,
            normalisation): the model then scored another text, and its nats are no bound for this one.
        experts_WHE: int32, how often each expert was chosen where a token of the window is predicted; None for a model
            without experts, and for one whose routers are not known (see `RouterRecorder`).
        layers: numbers of the layers with experts.
    """

    nats_W: Float64
    bytes_W: Int64
    tokens_W: Int64
    token_starts_W: tuple[Int32, ...]
    hits_W: tuple[Bool, ...]
    lossless_W: Bool
    experts_WHE: Int32 | None = None
    layers: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """The nats per byte over all windows together."""
        return float(self.nats_W.sum() / self.bytes_W.sum())


def nats_per_byte(
    folder: Path | str,
    texts: Sequence[bytes | str | Passage],
    *,
    bos: int | None = None,
    chat_template: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    torch_threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Score windows of text with a model.

    Args:
        folder: Hugging Face folder with weights and a fast tokenizer.
        texts: the windows, UTF-8, none empty; passages where a context is read. Ends of documents do not count.
        bos: token in front of every window; the tokenizer's BOS when not set, or its EOS where it has no BOS.
        chat_template: how the messages before a turn are written, as a source's; passages with messages need one.
        device: `auto` takes CUDA where there is one.
        dtype: of weights and computation; the softmax is in float32 always.
        torch_threads: threads during the call; torch's own number when not set.
        progress: called with the number of windows done.

    Raises ValueError naming the window that is empty, not UTF-8 or longer than the model's context, or the folder that
    cannot be loaded.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is asked for, but this machine has none; allowed here: auto, cpu")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    chat = open_chat(folder, chat_template)
    vocabulary = chat.vocabulary if chat else Vocabulary.from_pretrained(folder)
    passages = [_passage(text) for text in texts]
    if empty := [index for index, passage in enumerate(passages) if not passage.text]:
        raise ValueError(f"text {empty[0]}: must not be empty")
    prompts = encode_passages(vocabulary, passages, chat)
    first = next((token for token in (bos, vocabulary.bos_id, vocabulary.eos_id) if token is not None), None)
    if first is None:
        raise ValueError(f"bos: the tokenizer in {folder} has neither BOS nor EOS; name a token")
    nats_W = np.zeros(len(prompts), dtype=np.float64)
    hits_W = [np.zeros(0, dtype=np.bool_)] * len(prompts)
    threads = torch.get_num_threads()
    torch.set_num_threads(torch_threads or threads)
    try:
        model = _load(folder, dtype).to(where).eval()
        _check_lengths(model, prompts)
        recorder = RouterRecorder(model)
        experts_WHE = np.zeros((len(prompts), len(recorder.layers), recorder.num_experts), dtype=np.int32)
        done = 0
        for batch in _batches(prompts, int(model.get_output_embeddings().weight.shape[0])):
            of_batch = [prompts[i] for i in batch]
            with recorder.recording() as outputs:
                scored = _score(model, of_batch, first, vocabulary.size, where)
            for index, (nats, hits_T) in zip(batch, scored, strict=True):
                nats_W[index], hits_W[index] = nats, hits_T
            experts_WHE[batch] = _expert_counts([indices for _, indices in outputs], of_batch, recorder.num_experts)
            done += len(batch)
            progress(done)
    finally:
        torch.set_num_threads(threads)
    return Scores(
        nats_W=nats_W,
        bytes_W=np.array([len(prompt.text) for prompt in prompts], dtype=np.int64),
        tokens_W=np.array([prompt.encoding.num_tokens for prompt in prompts], dtype=np.int64),
        token_starts_W=tuple(_starts(prompt.encoding) for prompt in prompts),
        hits_W=tuple(hits_W),
        lossless_W=np.array([bool(prompt.encoding.lossless_T.all()) for prompt in prompts], dtype=np.bool_),
        experts_WHE=experts_WHE if recorder.layers else None,
        layers=tuple(recorder.layers),
    )


def _passage(text: bytes | str | Passage) -> Passage:
    if isinstance(text, Passage):
        return replace(text, ends_document=False)
    return Passage(text.encode() if isinstance(text, str) else text)


def _load(folder: Path | str, dtype: str) -> Any:
    with quiet():
        return load_causal_lm(folder, dtype=getattr(torch, dtype))


def _check_lengths(model: Any, prompts: Sequence[Prompt]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if limit is not None and prompt.num_tokens > limit:
            parts = " with their context" if prompt.context_ids.size else ""
            raise ValueError(f"text {index}: {prompt.num_tokens} tokens{parts}, the model takes at most {limit}")


def _batches(prompts: Sequence[Prompt], head_rows: int) -> Iterator[list[int]]:
    """Yield batches of windows of similar length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].num_tokens)
    batch: list[int] = []
    for index in order:
        longest = max(1, prompts[index].num_tokens)
        if batch and (len(batch) + 1) * longest * head_rows > _MAX_LOGITS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score(
    model: Any, prompts: Sequence[Prompt], bos: int, vocabulary_size: int, device: torch.device
) -> list[tuple[float, Bool]]:
    """Return per window the -log probability, and the tokens that were the likeliest.

    Right padding needs no mask: causal attention does not look ahead.
    """
    length = max(prompt.num_tokens for prompt in prompts)
    inputs_BL = torch.full((len(prompts), length), bos, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids = np.concatenate([prompt.context_ids, prompt.encoding.token_ids_T])[:-1].astype(np.int64)
        if prompt.first_id is not None:
            inputs_BL[row, 0] = prompt.first_id
        inputs_BL[row, 1 : 1 + len(ids)] = torch.from_numpy(ids)
    first = min(prompt.context_ids.size for prompt in prompts)
    with torch.inference_mode():
        logits_BLV = _logits(model, inputs_BL.to(device), length - first)[..., :vocabulary_size]
        scores = []
        for row, prompt in enumerate(prompts):
            start, num_tokens = prompt.context_ids.size - first, prompt.encoding.num_tokens
            tokens_T = torch.from_numpy(prompt.encoding.token_ids_T.astype(np.int64)).to(device)
            logits_TV = logits_BLV[row, start : start + num_tokens].float()
            nats_T = torch.nn.functional.cross_entropy(logits_TV, tokens_T, reduction="none")
            hits_T = (logits_TV.argmax(dim=-1) == tokens_T).cpu().numpy()
            scores.append((float(nats_T.sum(dtype=torch.float64)), hits_T))
    return scores


def _expert_counts(indices: Sequence[torch.Tensor], prompts: Sequence[Prompt], num_experts: int) -> Int32:
    """Return how often each expert of each layer was chosen where a token of the window is predicted, [B, H, E].

    `indices` has the K experts of all B x L positions, for each layer; the rest of contexts and padding do not count.
    """
    counts_BHE = np.zeros((len(prompts), len(indices), num_experts), dtype=np.int32)
    for layer, indices_NK in enumerate(indices):
        indices_BLK = indices_NK.view(len(prompts), -1, indices_NK.shape[-1]).cpu().numpy()
        for row, prompt in enumerate(prompts):
            start = prompt.context_ids.size
            chosen_TK = indices_BLK[row, start : start + prompt.encoding.num_tokens]
            counts_BHE[row, layer] = np.bincount(chosen_TK.ravel(), minlength=num_experts)
    return counts_BHE


def _logits(model: Any, inputs_BL: torch.Tensor, num_last: int) -> torch.Tensor:
    """Return the logits of the last `num_last` positions; where the model can, only these are computed."""
    kept: dict[str, int] = {}
    if num_last < inputs_BL.shape[1] and "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = {"logits_to_keep": num_last}
    logits: torch.Tensor = model(input_ids=inputs_BL, use_cache=False, **kept).logits[:, -num_last:]
    return logits


def _starts(encoding: Encoding) -> Int32:
    return np.concatenate([np.zeros(1, dtype=np.int32), encoding.byte_ends_T[:-1]])
