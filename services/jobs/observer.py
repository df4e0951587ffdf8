"""A distillation's metrics while it goes on: for Prometheus through Ray, and as curves for trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from services.base.metrics import Meter

_GAUGES = {
    "loss": ("loss_nats_per_token", "Training loss of the last step."),
    "clm": ("clm_nats_per_token", "Causal language modelling loss of the last step."),
    "fusion": ("fusion_nats_per_token", "Fusion loss of the last step."),
    "lambda": ("lambda", "Share of causal language modelling in the last step's loss."),
    "learning_rate": ("learning_rate", "Learning rate of the last step."),
    "gradient_norm": ("gradient_norm", "Norm of the gradient before clipping, last step."),
    "masked_share": ("masked_share", "Share of the last step's tokens that the fusion loss left out."),
    "covered_mass": ("covered_mass", "Share of the sources' probability that reached the candidates, last step."),
    "step": ("step", "Steps taken since the start of the run."),
}
_COUNTERS = {
    "tokens": ("tokens_total", "Tokens trained on, all workers together."),
    "windows": ("windows_total", "Windows trained on, all workers together."),
    "step_seconds": ("step_seconds_total", "Time spent in steps, waiting for data included."),
    "data_wait_seconds": ("data_wait_seconds_total", "Time that the slowest worker of a step waited for the stream."),
}
_ROUTING = {
    "load_cv": ("expert_load_cv", "Standard deviation of the loads of a layer's experts over their mean, last step."),
    "dead_experts": ("dead_experts", "Experts of a layer that no token was sent to, last step."),
    "router_entropy": ("router_entropy_nats", "Mean entropy of a layer's router, last step."),
    "balance": ("expert_balance", "Expert-level balance loss of a layer, 1 when even, last step."),
}
_ON_POLICY = {
    "round": ("on_policy_round", "Round of the target's own answers, counted from 0."),
    "staleness": ("on_policy_staleness_steps", "Steps since the target wrote the last step's answers."),
    "share": ("on_policy_share", "Share of the last step's tokens that belong to the target's own answers."),
    "mean_length": ("on_policy_mean_length", "Tokens of an answer in the last step."),
    "ended_share": ("on_policy_ended_share", "Share of the last step's answers that the target ended itself."),
    "reverse_kl": ("on_policy_reverse_kl_nats", "Reverse KL to the fused rows on the last step's answers, per token."),
}


def curves_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the curves of a step's metrics, see services/jobs/tracking."""
    found = {key: row[key] for key in (*_GAUGES, "tokens_per_second") if row[key] is not None}
    del found["step"]
    found["data_wait_share"] = _wait_share(row)
    if "stage" in row:
        found["stage"] = row["epoch"]
    found |= {f"source_weight/{source}": value for source, value in row["source_weights"].items()}
    routing = row.get("routing", {})
    for number, layer in enumerate(routing.get("layers", ())):
        found |= {f"{key}/layer_{layer}": routing[key][number] for key in _ROUTING}
    answers = row.get("on_policy", {})
    found |= {f"on_policy/{key}": answers[key] for key in _ON_POLICY if answers.get(key) is not None}
    return found


def _wait_share(row: Mapping[str, Any]) -> float:
    """Return the share of a step that was spent waiting for the stream."""
    return float(row["data_wait_seconds"] / row["step_seconds"]) if row["step_seconds"] else 0.0


def observer(run_name: str) -> Callable[[dict[str, Any]], None]:
    """Return a function that takes the metrics of every step, on rank 0.

    The share of time that training waits for data is data_wait_seconds_total over step_seconds_total; for the last step
    alone it is data_wait_share.
    """
    meter = Meter("train", run=run_name)
    gauges = {key: meter.gauge(name, text) for key, (name, text) in _GAUGES.items()}
    counters = {key: meter.counter(name, text) for key, (name, text) in _COUNTERS.items()}
    wait_share = meter.gauge("data_wait_share", "Share of the last step that was spent waiting for the stream.")
    routing = {key: meter.gauge(name, text, labels=("layer",)) for key, (name, text) in _ROUTING.items()}
    own = {key: meter.gauge(name, text) for key, (name, text) in _ON_POLICY.items()}
    weight = meter.gauge("source_weight", "Mean share of a source in the last step's mixtures.", labels=("source",))

    def observe(row: dict[str, Any]) -> None:
        for key, gauge in gauges.items():
            if row[key] is not None:
                gauge.set(row[key])
        for key, counter in counters.items():
            if row[key] > 0:
                counter.inc(row[key])
        wait_share.set(_wait_share(row))
        for source, value in row["source_weights"].items():
            weight.set(value, {"source": source})
        for number, layer in enumerate(row.get("routing", {}).get("layers", ())):
            for key, gauge in routing.items():
                gauge.set(row["routing"][key][number], {"layer": str(layer)})
        for key, gauge in own.items():
            if (value := row.get("on_policy", {}).get(key)) is not None:
                gauge.set(value)

    return observe
