"""Reinforcement learning with verified rewards, by GRPO (arXiv:2402.03300) instead of TÜLU 3's PPO: the mean reward of
a prompt's group of answers stands for PPO's value model, which would be a second model of the target's size to train.

Answers are sampled at temperature 1 and top_p 1, because the loss takes them for samples of the policy itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fusion_core.verify.specs import read_spec
from services.posttrain.config import GrpoStage, StopConfig
from services.posttrain.data.judge import Judge
from services.posttrain.data.rows import VerifiedPrompt, prompt_key
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.job import StageJob
from services.posttrain.stages.parts import adapters, arguments, load_trl, run_to_end, start_model, tokenizer_of

_FIRST_STEPS = 5
"""Number of steps whose mean length of answers is the measure of the later ones."""


class StopRules:
    """The conditions under which a run ends before its last step."""

    def __init__(self, config: StopConfig) -> None:
        self._config = config
        self._unmixed = 0
        self._lengths: list[float] = []

    def after_step(self, logs: dict[str, float]) -> str | None:
        """Take what TRL logs of a step; return why the run is to end, None where it goes on."""
        config = self._config
        if (equal := logs.get("frac_reward_zero_std")) is not None:
            self._unmixed = self._unmixed + 1 if equal >= 1 else 0
            if config.unmixed_steps is not None and self._unmixed >= config.unmixed_steps:
                return f"stop.unmixed_steps: no group had different rewards in {self._unmixed} steps"
        if config.max_kl is not None and logs.get("kl", 0.0) > config.max_kl:
            return f"stop.max_kl: {logs['kl']:.3g} nats per token from the start are more than {config.max_kl:g}"
        if (length := logs.get("completions/mean_length")) is not None and config.length_ratio is not None:
            if len(self._lengths) < _FIRST_STEPS:
                self._lengths.append(length)
            elif length > config.length_ratio * (usual := sum(self._lengths) / _FIRST_STEPS):
                return f"stop.length_ratio: answers have {length:.0f} tokens, {usual:.0f} in the first steps"
        return None


def train(job: StageJob) -> None:
    """Train the stage to its end, or until one of the stop rules ends it."""
    stage = job.stage
    assert isinstance(stage, GrpoStage)
    run_to_end(job, make_trainer(job), stop_rules=StopRules(stage.stop))


def verified_rows(rows: Sequence[dict[str, Any]]) -> list[VerifiedPrompt]:
    """Return the prompts in the stage's rows, with their specs."""
    return [VerifiedPrompt(r["prompt"], read_spec(r["verify"]), r["verify"], r.get("skill", "")) for r in rows]


def make_trainer(job: StageJob) -> Any:
    """Return TRL's trainer, whose rewards are the verifiers' scores."""
    import torch
    from datasets import Dataset
    from transformers import GenerationConfig

    trl: Any = load_trl()
    stage = job.stage
    assert isinstance(stage, GrpoStage)
    prompts = verified_rows(job.rows())
    tokens = PromptTokens(job.start, job.config.chat_template)
    ids_of = {prompt_key(prompt.prompt): tokens.prompt_ids(prompt.prompt) for prompt in prompts}
    judge = Judge(job.config.verifier)

    class VerifiedTrainer(trl.GRPOTrainer):  # type: ignore[misc]  # TRL's types are not read
        """TRL's trainer without its own tokenisation, which reads control tokens in what users wrote."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            # A step's answers are a function of the step: a run that is resumed samples what it would have sampled.
            torch.manual_seed(sampling_seed(stage.seed, self.state.global_step, self.accelerator.process_index))
            return super()._generate_and_score_completions(inputs)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(dataset)
            # The order of an epoch is a function of its number; TRL's own depends on the epochs before it.
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(sampling_seed(stage.seed, epoch, -1))
            return sampler

        def _tokenize_prompts(self, given: list[str]) -> Any:
            return [list(ids_of[key]) for key in given], None, {}

    def verified(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
        answers = [tokens.text_of(ids)[0] for ids in completion_ids]
        return [verdict.score for verdict in judge.verdicts([prompts[number] for number in row], answers)]

    model = start_model(job)
    # Of the policy itself: the folder's own settings would fill all that TRL does not set.
    model.generation_config = GenerationConfig(eos_token_id=tokens.stop_ids)  # type: ignore[no-untyped-call]
    return VerifiedTrainer(
        model=model,
        reward_funcs=verified,
        args=arguments(job, trl.GRPOConfig, **_own_arguments(stage)),
        train_dataset=Dataset.from_list(
            [{"prompt": prompt_key(prompt.prompt), "row": number} for number, prompt in enumerate(prompts)]
        ),
        processing_class=tokenizer_of(job.start),
        peft_config=adapters(stage.lora),
    )


def sampling_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed by which one worker samples the answers of a step."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _own_arguments(stage: GrpoStage) -> dict[str, Any]:
    names = (
        "num_generations",
        "max_completion_length",
        "beta",
        "epsilon",
        "num_iterations",
        "scale_rewards",
        "loss_type",
    )
    own = json.loads(stage.model_dump_json(include=set(names)))
    return {**own, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "use_vllm": False}
