"""A conditional reward model: a causal language model with a scalar head, read at the last token of a conversation.

The folder is one of transformers (`AutoModelForSequenceClassification`, one label), with the model's tokenizer and
template, so that transformers and TRL open it too. `reward.json` beside the weights has the domains' system prompts.

Shape legend: B conversations, L tokens of the longest.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.arrays import Float64, Int32
from fusion_core.vocabulary.tokenizer_files import load_tokenizer
from services.base.atomic import write_whole
from services.models.chat_template import MODEL, PLAIN, ChatTemplate
from services.models.chat_tokenizer import ChatTokenizer
from services.models.pretrained import check_own_code
from services.models.weights import quiet, write_errors_named
from services.wire.messages import Message, Messages

CARD = "reward.json"


@dataclass(frozen=True, slots=True)
class RewardCard:
    """The content of `reward.json`.

    Attributes:
        domains: system prompt by domain.
        max_tokens: most tokens of a conversation in training.
        gamma, barrier: settings of the loss that the model was trained with.
    """

    domains: dict[str, str]
    max_tokens: int
    gamma: float
    barrier: float


class RewardTokenizer:
    """The tokenizer of a reward model, which puts a domain's system prompt in front of a conversation."""

    def __init__(self, folder: Path, domains: Mapping[str, str], chosen: str = MODEL) -> None:
        """Open the tokenizer of a model folder with its template, or the plain one; raises ValueError."""
        try:
            self._chat = ChatTokenizer.from_pretrained(folder, chosen)
        except ValueError as error:
            raise ValueError(f"chat_template: {error}") from error
        self._domains = dict(domains)
        self.tokenizer = copy.deepcopy(load_tokenizer(folder).tokenizer)  # others share the loaded one
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or next(
                iter(self._chat.vocabulary.special_tokens), None
            )
        if self.tokenizer.pad_token_id is None:
            raise ValueError("start: the tokenizer has no special token to pad with")
        if chosen == PLAIN:
            self.tokenizer.chat_template = ChatTemplate.plain_text()

    @property
    def pad_id(self) -> int:
        """The id behind the shorter conversations of a batch; the model reads the last token that is another one."""
        return int(self.tokenizer.pad_token_id)

    def encode(self, messages: Sequence[Message], answer: str, domain: str) -> Int32:
        """Return the ids of a conversation that ends with an answer.

        A system message of its own follows the domain's prompt. Raises ValueError for an unknown domain,
        TurnRefusedError where the template refuses the conversation.
        """
        if domain not in self._domains:
            raise ValueError(f"domain: {domain!r} is none of {', '.join(self._domains)}")
        system, rest = self._domains[domain], list(messages)
        if rest and rest[0].get("role") == "system":
            system = f"{system}\n\n{rest.pop(0).get('content') or ''}"
        conversation = [{"role": "system", "content": system}, *rest, {"role": "assistant", "content": answer}]
        return self._chat.encode_messages(Messages(conversation), add_generation_prompt=False)


class RewardModel:
    """A reward model that scores.

    Attributes:
        card: the domains, and what the model was trained with.
        tokens: the tokenizer.
    """

    def __init__(self, model: Any, tokens: RewardTokenizer, card: RewardCard) -> None:
        self._model, self.tokens, self.card = model.eval(), tokens, card

    @classmethod
    def open(cls, folder: Path | str, *, device: str = "auto") -> RewardModel:
        """Load the model of a folder that training left; raises ValueError when it holds none."""
        import torch

        folder = Path(folder)
        card = read_card(folder)
        tokens = RewardTokenizer(folder, card.domains)
        chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        return cls(load_scorer(folder, tokens.pad_id).to(chosen), tokens, card)

    def score(self, conversations: Sequence[Int32], *, batch_tokens: int = 8192) -> Float64:
        """Return the scores of conversations in tokens, float64 [B], in their order.

        Those of like length go through the model together, padded; a score depends on its neighbours only in the last
        digits of float32.
        """
        import torch

        scores_B = np.empty(len(conversations))
        order = sorted(range(len(conversations)), key=lambda index: len(conversations[index]))
        while order:
            longest = len(conversations[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // longest)))]
            inputs = pad([conversations[index] for index in batch], self.tokens.pad_id)
            with torch.inference_mode():
                logits_B1 = self._model(**{key: value.to(self._model.device) for key, value in inputs.items()}).logits
            scores_B[batch] = logits_B1[:, 0].double().cpu().numpy()
        return scores_B


def pad(conversations: Sequence[Int32], pad_id: int) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask` of a batch, int64 [B, L], padded behind the tokens."""
    import torch

    lengths_B = np.array([len(ids) for ids in conversations])
    mask_BL = np.arange(lengths_B.max())[None] < lengths_B[:, None]
    ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
    ids_BL[mask_BL] = np.concatenate(conversations)
    return {"input_ids": torch.from_numpy(ids_BL), "attention_mask": torch.from_numpy(mask_BL.astype(np.int64))}


def load_scorer(folder: Path, pad_id: int) -> Any:
    """Return the model of a folder with a scalar head, in float32.

    A causal language model gets a head of zeros: its first scores lie in the middle of the barrier. Raises ValueError
    when the folder holds no such model, no safetensors, or needs code of its own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    check_own_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        trained = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        if trained and config.num_labels != 1:
            raise ValueError(f"it is a classifier with {config.num_labels} labels")
        config.num_labels, config.pad_token_id = 1, pad_id
        with quiet(), _without_report():
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {folder} cannot be loaded as a reward model: {error}") from error
    if not trained:
        torch.nn.init.zeros_(model.score.weight)
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from reporting at length that the head is new."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def save_reward_model(model: Any, tokens: RewardTokenizer, card: RewardCard, folder: Path) -> None:
    """Write weights, tokenizer with its template, and the card."""
    with quiet(), write_errors_named(folder):
        model.save_pretrained(folder)
        tokens.tokenizer.save_pretrained(folder)
    write_whole(folder / CARD, json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n")


def read_card(folder: Path) -> RewardCard:
    """Return the card of a reward model's folder; raises ValueError where there is none."""
    try:
        return RewardCard(**json.loads((folder / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"model: {folder} is no reward model: {CARD} is missing or cannot be read ({error})"
        ) from error
