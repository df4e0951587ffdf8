"""Lambda over the steps and by the sources' reward, against the formulas written out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.losses import lambda_at, source_reward

shares = st.floats(0, 1)


@given(start=shares, end=shares, total=st.integers(1, 200), data=st.data())
def test_schedules_stay_between_their_ends(start, end, total, data):
    step = data.draw(st.integers(0, total - 1))
    assert lambda_at("constant", start, end, step, total) == start
    for schedule in ("linear", "cosine"):
        assert lambda_at(schedule, start, end, 0, total) == start
        assert lambda_at(schedule, start, end, total, total) == pytest.approx(end)
        value = lambda_at(schedule, start, end, step, total)
        assert min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9


def test_hard_and_decay_is_the_linear_schedule_to_one():
    for step in range(10):
        assert lambda_at("linear", 0.9, 1.0, step, 10) == pytest.approx(0.9 + (1 - 0.9) * step / 10)
    assert lambda_at("cosine", 0.2, 0.8, 5, 10) == pytest.approx(0.5)
    assert lambda_at("cosine", 0.2, 0.8, 1, 10) < lambda_at("linear", 0.2, 0.8, 1, 10)


def test_the_reward_is_the_best_source_s_probability_per_target_token():
    # Two sources with 0.5 and 2 nats per byte on 12 bytes that are 4 tokens of the target.
    assert source_reward([2.0, 0.5], 12, 4) == pytest.approx(math.exp(-0.5 * 12 / 4))
    assert source_reward([math.nan, 0.5], 12, 4) == source_reward([0.5], 12, 4)
    assert source_reward([math.nan], 12, 4) == source_reward([], 12, 4) == source_reward([0.1], 0, 0) == 0.0
