"""The information between experts and domains, against values known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.bench.moe.specialisation import mutual_information


def test_an_expert_for_each_domain_tells_all_and_even_use_tells_nothing() -> None:
    assert mutual_information(np.array([[5.0, 0.0], [0.0, 5.0]])) == pytest.approx(math.log(2))
    assert mutual_information(np.array([[2.0, 6.0], [1.0, 3.0]])) == pytest.approx(0, abs=1e-12)
    expected = 0.5 * math.log(0.5 / (0.75 * 0.5)) + 0.25 * math.log(0.25 / (0.75 * 0.5)) + 0.25 * math.log(2)
    assert mutual_information(np.array([[2.0, 1.0], [0.0, 1.0]])) == pytest.approx(expected)
