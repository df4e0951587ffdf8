"""lm-evaluation-harness on task files that lie on this machine: nothing is downloaded.

The harness is the extra `lm-eval`; task files are its own YAML, whose `dataset_path: json` with
`dataset_kwargs: {data_files: {test: /path/to/file.jsonl}}` names local data.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal


def evaluate_tasks(
    folder: Path, tasks: Path, *, device: Literal["auto", "cpu", "cuda"] = "auto", batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """Run every task of the folder `tasks` on the model in `folder`; return the numbers of each, by the harness' names.

    Raises ValueError when the harness is not installed, or naming the folder that has no tasks, or the task that fails.
    """
    if not list(tasks.glob("**/*.yaml")):
        raise ValueError(f"--tasks: no *.yaml in {tasks}")
    # The harness reads these when it is imported: data that a task names must lie here, nothing is fetched.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks: needs the extra lm-eval (pip install 'llm-fusion[lm-eval]'): {error}") from error
    import torch

    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = sorted(manager.all_tasks)
    try:
        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32"},
            tasks=names,
            task_manager=manager,
            device=where,
            batch_size=batch_size,
        )
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"--tasks: {', '.join(names)} on {folder}: {error}") from error
    return {
        task: {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
        for task, scores in found["results"].items()
    }
