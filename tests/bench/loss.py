"""Time and peak memory of a training step with the fused loss, against CLM only and against dense targets.

The model is a 5M-parameter decoder with a tied lm_head over 49,152 and 262,144 ids, the step is forward, backward,
clipping and AdamW in float32 on the same batch. The sides:

    fused     fusion_core.losses on K candidates and a tail
    clm       fusion_core.losses without rows: the same chunked lm_head
    clm_full  transformers as it comes: all logits, torch's own cross-entropy
    dense     as published (FuseLLM): all logits, one dense [N, V] target row per token, two cross-entropies

The fused loss is held against whichever of the two CLM sides is faster, and against whichever needs less memory. Times
are CPU seconds over all threads, the sides in turn. Memory is that of a process of its own per side, after a first
step: `step_mib` is what a step adds at its peak to weights and optimiser state, `process_mib` the whole process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusion_core.losses import SparseRows, fused_losses
from tests.bench.parts.report import Report, arguments, in_turn

VOCABULARIES = (49_152, 262_144)
SIDES = ("fused", "clm", "clm_full", "dense")
LAMBDA = 0.9
WINDOWS, LENGTH, CANDIDATES = 4, 256, 32


class Case:
    """A model, its optimiser and one batch of N = WINDOWS * LENGTH tokens; `step(side)` trains on it once."""

    def __init__(
        self,
        vocabulary_size: int,
        *,
        windows: int = WINDOWS,
        hidden_size: int = 256,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary_size, hidden_size=hidden_size, intermediate_size=688, num_hidden_layers=5,
                num_attention_heads=4, tie_word_embeddings=True,
            )
        ).to(device)  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.tokens_BL = torch.randint(vocabulary_size, (windows, LENGTH + 1)).to(device)
        self.num_tokens = num_tokens = windows * LENGTH
        ids_NK = torch.randint(vocabulary_size // CANDIDATES, (num_tokens, CANDIDATES)) * CANDIDATES
        ids_NK += torch.arange(CANDIDATES)  # so that the ids of a row differ
        logprobs_NJ = torch.log_softmax(2 * torch.randn(num_tokens, CANDIDATES + 1), dim=1)
        mask_N = torch.arange(num_tokens) % 50 != 0
        self.rows = SparseRows(
            ids_NK.to(device), logprobs_NJ[:, :-1].contiguous().to(device), logprobs_NJ[:, -1].contiguous().to(device),
            mask_N.to(device),
        )  # fmt: skip

    def step(self, side: str) -> float:
        loss: Tensor = getattr(self, f"_{side}")()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _fused(self) -> Tensor:
        clm_N = torch.full((self.num_tokens,), LAMBDA / self.num_tokens, device=self.tokens_BL.device)
        fusion_N = torch.full_like(clm_N, (1 - LAMBDA) / float(self.rows.mask_N.sum()))
        return self._chunked(self.rows, clm_N, fusion_N)

    def _clm(self) -> Tensor:
        clm_N = torch.full((self.num_tokens,), 1 / self.num_tokens, device=self.tokens_BL.device)
        return self._chunked(None, clm_N, None)

    def _chunked(self, rows: SparseRows | None, clm_N: Tensor, fusion_N: Tensor | None) -> Tensor:
        states_BLD = self.model.model(input_ids=self.tokens_BL[:, :-1], use_cache=False).last_hidden_state
        return fused_losses(
            states_BLD.flatten(0, 1),
            self.model.lm_head.weight,
            self.tokens_BL[:, 1:].reshape(-1),
            rows,
            clm_weights_N=clm_N,
            fusion_weights_N=fusion_N,
        ).total

    def _clm_full(self) -> Tensor:
        logits_NV = self.model(input_ids=self.tokens_BL[:, :-1], use_cache=False).logits.flatten(0, 1)
        return functional.cross_entropy(logits_NV, self.tokens_BL[:, 1:].reshape(-1))

    def _dense(self) -> Tensor:
        """The published form has one such target per source; one is enough to make the point."""
        logits_NV = self.model(input_ids=self.tokens_BL[:, :-1], use_cache=False).logits.flatten(0, 1)
        probs_NK = self.rows.logprobs_NK.exp()
        probs_NK = probs_NK / probs_NK.sum(dim=1, keepdim=True)  # the tail is lost, as published
        target_NV = torch.zeros_like(logits_NV).scatter_(1, self.rows.ids_NK, probs_NK)
        clm = functional.cross_entropy(logits_NV, self.tokens_BL[:, 1:].reshape(-1))
        fusion_N = functional.cross_entropy(logits_NV, target_NV, reduction="none")
        return LAMBDA * clm + (1 - LAMBDA) * (fusion_N * self.rows.mask_N).sum() / self.rows.mask_N.sum()


def measure(report: Report, vocabulary_size: int, *, quick: bool) -> None:
    """Adds a row per side and the checks of one vocabulary size."""
    memory = {side: _memory_in_own_process(side, vocabulary_size) for side in SIDES}
    case = Case(vocabulary_size)
    for side in SIDES:
        case.step(side)
    seconds = dict(zip(SIDES, in_turn(2 if quick else 5, *(lambda s=s: case.step(s) for s in SIDES)), strict=True))
    for side in SIDES:
        step_mib, process_mib = memory[side]
        report.row(
            vocabulary=vocabulary_size,
            side=side,
            tokens=case.num_tokens,
            k=CANDIDATES,
            cpu_seconds=seconds[side],
            step_mib=step_mib,
            process_mib=process_mib,
            times_fused_seconds=seconds[side] / seconds["fused"],
            times_fused_step_mib=step_mib / memory["fused"][0],
        )
    faster = min(seconds["clm"], seconds["clm_full"])
    smaller = min(memory["clm"][0], memory["clm_full"][0])
    of = f"V = {vocabulary_size:,}"
    report.check(f"time of a step, fused / best CLM only, {of}", seconds["fused"] / faster, "times", at_most=1.15)
    report.check(f"memory of a step, fused / best CLM only, {of}", memory["fused"][0] / smaller, "times", at_most=1.15)


def _memory_in_own_process(side: str, vocabulary_size: int) -> tuple[float, float]:
    """MiB that a step adds at its peak, and MiB of the whole process then."""
    command = [sys.executable, "-m", "tests.bench.loss", "--memory-of", side, str(vocabulary_size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    step_mib, process_mib = done.stdout.split()[-2:]
    return float(step_mib), float(process_mib)


def _peak_of_a_step(side: str, vocabulary_size: int) -> tuple[float, float]:
    case = Case(vocabulary_size)
    case.step(side)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    resting = _status_mib("VmRSS")
    case.step(side)
    peak = _status_mib("VmHWM")
    return peak - resting, peak


def _status_mib(field: str) -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "V"), help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.memory_of is not None:
        print(*_peak_of_a_step(options.memory_of[0], int(options.memory_of[1])))
        return
    report = Report("loss")
    for vocabulary_size in VOCABULARIES:
        measure(report, vocabulary_size, quick=options.quick)
    report.finish(options.json)


if __name__ == "__main__":
    main()
