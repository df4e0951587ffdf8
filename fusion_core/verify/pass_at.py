"""pass@k: the chance that at least one of k answers to a prompt is right."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_core.arrays import Float64


def pass_at_k(num_right_P: npt.ArrayLike, num_samples: int, k: int) -> Float64:
    """Return the unbiased estimate of pass@k for P prompts with `num_samples` answers each (Chen et al. 2021, eq. 1).

    It is 1 - C(n - c, k) / C(n, k) with c right answers of n: the share of all draws of k that hold a right one.
    Raises ValueError unless 1 <= k <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} is not between 1 and the {num_samples} answers to a prompt")
    wrong_P = num_samples - np.asarray(num_right_P, dtype=np.float64)
    drawn = np.arange(k)
    all_wrong_Pk = np.maximum(wrong_P[:, None] - drawn, 0) / (num_samples - drawn)
    return np.asarray(1 - all_wrong_Pk.prod(axis=1), dtype=np.float64)
