"""The information between experts and kinds of text, against values known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fusion_core.moe.specialisation import mutual_information, specialisation


def test_an_expert_for_each_kind_tells_all_and_even_use_tells_nothing() -> None:
    layers = np.array(
        [
            [[5.0, 0.0], [0.0, 5.0]],
            [[2.0, 6.0], [1.0, 3.0]],
            [[2.0, 1.0], [0.0, 1.0]],
        ]
    )
    by_hand = 0.5 * math.log(0.5 / (0.75 * 0.5)) + 0.25 * math.log(0.25 / (0.75 * 0.5)) + 0.25 * math.log(2)
    assert mutual_information(layers) == pytest.approx([math.log(2), 0.0, by_hand], abs=1e-12)


def test_what_chance_gives_is_told_from_what_experts_know() -> None:
    """Layer 0 sends a kind to experts of its own, layer 1 every document somewhere, whatever its kind."""
    rng = np.random.default_rng(1)
    kinds = ["code", "prose"] * 40
    counts = np.zeros((80, 2, 4))
    for document, kind in enumerate(kinds):
        preferred = np.array([0.4, 0.4, 0.1, 0.1] if kind == "code" else [0.1, 0.1, 0.4, 0.4])
        counts[document, 0] = rng.multinomial(50, preferred)
        counts[document, 1] = rng.multinomial(50, rng.dirichlet(np.ones(4)))
    found = specialisation(counts, kinds)
    assert found.kinds == ("code", "prose")
    assert found.information_L[0] > 5 * found.shuffled_high_L[0]
    assert found.information_L[1] < 2 * found.shuffled_high_L[1]
    assert (found.shuffled_L > 0).all() and (found.shuffled_L < found.shuffled_high_L).all()
    assert found.load_LKE[0, 0, :2] == pytest.approx([1.6, 1.6], abs=0.2)
    assert found.load_LKE.mean(axis=2) == pytest.approx(np.ones((2, 2)))
