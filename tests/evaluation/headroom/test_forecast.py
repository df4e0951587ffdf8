"""The forecast on made-up windows whose answer is known: complementary sources, a useless one, a rule that fails."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fusion_core.fusion.headroom import Segments
from services.evaluation.headroom.forecast import dispensable, forecast
from services.evaluation.headroom.measured import SIZES, Measured, mean_outside

Loss = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
SEGMENTS = 50


def complementary(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each source is far better at half of the segments, at random."""
    left_better = rng.random(SEGMENTS) < 0.5
    return np.where(left_better, -1.0, -5.0), np.where(left_better, -5.0, -1.0)


def one_better(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    good = -rng.uniform(1.0, 2.0, SEGMENTS)
    return good, good - 2.0


def window(document: str, domain: str, losses: tuple[np.ndarray, np.ndarray], fused_nats: float | None) -> Measured:
    logprobs_SN = np.stack(losses)
    even = -np.logaddexp.reduce(logprobs_SN + np.log(0.5), axis=0).sum()
    return Measured(
        document=document,
        domain=domain,
        num_bytes=4 * SEGMENTS,
        segments=Segments(logprobs_SN, np.full(SEGMENTS, 4)),
        fused_nats=float(even if fused_nats is None else fused_nats),
        num_rows=SEGMENTS,
        num_masked=0,
        num_shared=SEGMENTS,
        num_differ=10,
        best_S=np.array([30, 20]),
        weight_S=np.array([0.5, 0.5]),
        outside={"a": np.linspace(0.9, 0.1, len(SIZES))},
    )


def windows(kind: Loss, domain: str = "", number: int = 20, fused_nats: float | None = None) -> list[Measured]:
    rng = np.random.default_rng(number)
    return [window(f"{domain}/{place}", domain, kind(rng), fused_nats) for place in range(number)]


def test_sources_that_complement_each_other_help_and_both_are_needed() -> None:
    found = forecast(["a", "b"], windows(complementary), strategy="avg_ce")
    verdict, everything = found["verdict"], found["domains"]["all"]
    assert verdict["answer"] == "yes" and verdict["leave_out"] == {}
    # A half of e^-1 and a half of e^-5 beside the mean of 1 and 5 nats, in four bytes.
    expected = (-np.log(0.5 * np.exp(-1) + 0.5 * np.exp(-5)) - 3.0) / 4
    best = min(("source a", "source b"), key=lambda name: everything["models"][name]["nats_per_byte"]["value"])
    assert everything["models"]["fused"]["difference_from"][best]["value"] == pytest.approx(expected, abs=0.03)
    assert everything["disagree"] == pytest.approx(0.2) and everything["best_at"] == pytest.approx({"a": 0.6, "b": 0.4})
    assert everything["mixture"]["weights"]["a"] == pytest.approx(0.5, abs=0.05)


def test_a_source_that_is_worse_everywhere_is_left_out_everywhere() -> None:
    found = forecast(["a", "b"], windows(one_better), strategy="avg_ce")
    assert found["verdict"]["answer"] == "no"
    assert found["verdict"]["leave_out"] == {"all": ["b"]}
    assert "train on a alone; can be left out: b everywhere." in found["verdict"]["sentence"]


def test_a_source_that_one_domain_needs_is_left_out_in_the_other_only() -> None:
    both = windows(complementary, "code") + windows(one_better, "news")
    found = forecast(["a", "b"], both, strategy="avg_ce")
    assert set(found["domains"]) == {"all", "code", "news"}
    assert found["verdict"]["leave_out"] == {"news": ["b"]}
    assert found["domains"]["news"]["mixture"]["weights"]["b"] == pytest.approx(0.0, abs=1e-4)


def test_a_rule_that_spoils_what_a_mixture_would_gain_is_named() -> None:
    found = forecast(["a", "b"], windows(complementary, fused_nats=5.0 * SEGMENTS), strategy="min_ce")
    assert found["verdict"]["answer"] == "not as configured"
    assert "strategy min_ce does not" in found["verdict"]["sentence"]


def test_too_few_documents_give_no_verdict_and_leave_nothing_out() -> None:
    verdict = forecast(["a", "b"], windows(one_better, number=3), strategy="avg_ce")["verdict"]
    assert verdict["answer"] == "unclear" and verdict["leave_out"] == {}
    assert "(3, at least 8 are needed)" in verdict["sentence"]


def test_a_target_that_is_better_than_the_fused_rows_is_said_to_be() -> None:
    made = windows(complementary)
    found = forecast(["a", "b"], made, strategy="avg_ce", target_nats_W=np.full(len(made), 1.0))
    assert "the target itself is better than the fused rows by" in found["verdict"]["sentence"]
    assert found["domains"]["all"]["models"]["target"]["nats_per_byte"]["value"] == pytest.approx(1 / (4 * SEGMENTS))


def test_of_two_equal_sources_one_is_left_out_and_not_both() -> None:
    left, right = complementary(np.random.default_rng(0))
    gone = dispensable(Segments(np.stack([left, right, left]), np.full(SEGMENTS, 4)))
    assert len(gone) == 1 and gone[0] in {0, 2}


def test_the_mass_outside_is_reported_up_to_k() -> None:
    assert list(mean_outside(windows(one_better, number=2), {"a": 24})["a"]) == [1, 8, 16, 24]
