"""The pilot before a GRPO stage: rewards that never differ within a group cannot teach, and the run is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from services.posttrain.config import GrpoStage, PosttrainConfig
from services.posttrain.data.judge import Judge
from services.posttrain.data.rows import VerifiedPrompt
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.generate import load_for_answers, sample_answers


def mixed_share(folder: Path, config: PosttrainConfig, stage: GrpoStage, prompts: list[VerifiedPrompt]) -> float:
    """Return the share of prompts whose group of answers has different rewards, as the stage would sample them."""
    tokens = PromptTokens(folder, config.chat_template)
    model = load_for_answers(folder, config.device)
    asked = [prompt for prompt in prompts[: stage.pilot_prompts] for _ in range(stage.num_generations)]
    sampled = sample_answers(
        model,
        tokens,
        [tokens.prompt_ids(prompt.prompt) for prompt in asked],
        max_new_tokens=stage.max_completion_length,
        temperature=1.0,
        batch_size=config.gate.batch_size,
        seed=stage.seed,
    )
    verdicts = Judge(config.verifier).verdicts(asked, [tokens.text_of(ids)[0] for ids in sampled])
    scores_PG = np.array([verdict.score for verdict in verdicts]).reshape(-1, stage.num_generations)
    return float((scores_PG.max(axis=1) > scores_PG.min(axis=1)).mean())
