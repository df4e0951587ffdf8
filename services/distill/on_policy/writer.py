"""The writing of a round: the target as it is now answers the round's prompts, every worker its part of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from fusion_core.vocabulary import Vocabulary
from services.base.errors import FailedPreconditionError, SettingError
from services.distill.config import DistillConfig
from services.distill.on_policy.config import OnPolicyConfig
from services.distill.on_policy.ledger import OwnAnswer
from services.distill.on_policy.prompts import KEY, PromptFiles
from services.distill.on_policy.sampling import sample_ids
from services.distill.on_policy.whole_target import WholeTarget
from services.distill.workers.world import World
from services.models.chat_template import TurnRefusedError
from services.models.chat_tokenizer import open_chat
from services.wire.answer import AnswerPrompt
from services.wire.messages import read_messages


class AnswerWriter:
    """Makes the answers of a round from the weights that the workers train: nothing is loaded anew between rounds."""

    def __init__(
        self,
        target: WholeTarget,
        target_folder: Path,
        chat_template: str | None,
        config: DistillConfig,
        world: World,
        *,
        bos: int,
    ) -> None:
        """Take the target, its folder with the tokenizer, and the template by which it reads messages.

        Raises SettingError for prompts that cannot be read, and for a target whose answers could not end.
        """
        assert config.on_policy is not None
        self._target, self._config, self._world = target, config, world
        self._on_policy: OnPolicyConfig = config.on_policy
        self._prompts = PromptFiles.read(config.on_policy.prompts)
        self._prompts.check_template(chat_template)
        plain = Vocabulary.from_pretrained(target_folder)
        eos_token = next((name for name, i in plain.special_tokens.items() if i == plain.eos_id), None)
        self._chat = open_chat(target_folder, chat_template, eos_token)
        self._vocabulary, self._bos = plain, bos
        if plain.eos_id is None:
            raise SettingError("distill.on_policy", "the target's tokenizer has no EOS, so that no answer could end")
        self._stop_id = plain.eos_id
        lengths_V = np.diff(plain.byte_table.offsets_V1)
        self._allowed_V = torch.zeros(int(target.model.get_output_embeddings().weight.shape[0]), dtype=torch.bool)
        size = min(plain.size, len(self._allowed_V))
        self._allowed_V[:size] = torch.from_numpy(lengths_V[:size] > 0)
        self._allowed_V[self._stop_id] = True

    def check_prompts(self, fingerprint: str) -> None:
        """Raise FailedPreconditionError when the prompts are not those that the run was planned with."""
        self._prompts.check_same(fingerprint)

    @property
    def num_answers(self) -> int:
        """The number of answers that a round asks for: as many as its steps have room for."""
        return self._config.own_windows * self._on_policy.round_steps

    def write(self, number: int) -> tuple[list[OwnAnswer], dict[str, int]]:
        """Return the answers of a round, alike on all workers, and the numbers of those left out by reason.

        An answer without text cannot be scored, and a prompt that leaves no room for an answer gets none. Raises
        FailedPreconditionError when too few answers are left.
        """
        num_prompts = -(-self.num_answers // self._on_policy.answers)
        prompts = self._prompts.drawn(number * num_prompts, num_prompts, self._config.seed)
        ids = [self._ids(prompt) for prompt in prompts]
        # The first answers to all prompts, then the second ones: the prompts of a step differ.
        wanted = [divmod(place, num_prompts) for place in range(self.num_answers)]
        fitting = [(n, index) for n, index in wanted if len(ids[index]) + self._on_policy.max_new_tokens <= self._room]
        answering = self._target.num_answering
        own = fitting[self._world.rank :: answering] if self._world.rank < answering else []
        sampled = sample_ids(
            self._target.model,
            [ids[index] for _, index in own],
            [self._seed(number, number * num_prompts + index, prompts[index], n) for n, index in own],
            allowed_V=self._allowed_V,
            stop_id=self._stop_id,
            temperature=self._on_policy.temperature,
            max_new_tokens=self._on_policy.max_new_tokens,
            at_once=self._on_policy.answers_at_once,
            dtype=torch.bfloat16 if self._config.dtype == "bfloat16" else None,
        )
        made = [
            self._answer(number * num_prompts + i, n, prompts[i], s) for (n, i), s in zip(own, sampled, strict=True)
        ]
        gathered = self._world.gather(made)
        answers = [gathered[place % answering][place // answering] for place in range(len(fitting))]
        kept = [answer for answer in answers if answer.text]
        left_out = Counter({"too_long": len(wanted) - len(fitting), "empty": len(answers) - len(kept)})
        if len(kept) < self._fewest_answers:
            raise FailedPreconditionError(
                f"distill.on_policy: round {number} has {len(kept)} answers with text, and needs "
                f"{self._fewest_answers}: {left_out['empty']} are empty, and {left_out['too_long']} were not asked "
                "for, because their prompts leave no room for max_new_tokens"
            )
        return kept, dict(left_out)

    @property
    def _fewest_answers(self) -> int:
        """The number of answers without which a step of a round would have no window at all."""
        return 1 if self._config.stream_windows else self._on_policy.round_steps

    @property
    def _room(self) -> int:
        positions = getattr(self._target.model.config.get_text_config(), "max_position_embeddings", None)
        return int(positions) if positions else 2**31

    def _ids(self, prompt: AnswerPrompt) -> list[int]:
        """Return the ids that the target reads before its answer, the same as in training."""
        if not prompt.is_messages:
            ids: list[int] = self._vocabulary.encode(prompt.content).token_ids_T.tolist()
            return [self._bos, *ids]
        assert self._chat is not None, "checked at the start"
        try:
            written: list[int] = self._chat.encode_messages(read_messages(prompt.content)).tolist()
        except TurnRefusedError as error:
            raise SettingError(KEY, f"the target's chat template refuses messages: {error}") from error
        return written

    def _answer(self, draw: int, number: int, prompt: AnswerPrompt, ids: list[int]) -> OwnAnswer:
        ends = ids[-1:] == [self._stop_id]
        data = b"".join(self._vocabulary.token_bytes(i) for i in ids if i != self._stop_id)
        text = _valid(data)
        return OwnAnswer(
            draw=draw,
            number=number,
            prompt=prompt.content,
            is_messages=prompt.is_messages,
            text=text,
            ends=ends and text == data,
            num_tokens=len(ids),
        )

    def _seed(self, number: int, draw: int, prompt: AnswerPrompt, answer: int) -> int:
        """Return the seed of an answer, of run, round, prompt and the answer's number alone."""
        key = f"llm-fusion round:{self._config.seed}:{number}:{draw}:{answer}:".encode()
        return int.from_bytes(hashlib.sha256(key + prompt.identity).digest()[:8], "little") >> 1


def _valid(data: bytes) -> bytes:
    """Return the bytes up to the first that are no UTF-8: the target may cut a character, or write none."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start]
    return data
