"""Malformed input, the short version of `python -m tests.fuzz`."""

from __future__ import annotations

import pytest

from tests.fuzz.decoder import fuzz_decoder
from tests.fuzz.live import fuzz_live
from tests.security.deployment import SECOND_TOKEN, TOKEN, Guarded

pytestmark = pytest.mark.timeout(900)


def test_the_decoder_refuses_or_is_right() -> None:
    counts, violations = fuzz_decoder(20_000, seed=1)
    assert not violations, violations[:10]
    assert counts["refused as INVALID_ARGUMENT"] > 8_000
    assert counts["valid all the same"] > 500


def test_a_live_service_survives_malformed_input(guarded: Guarded) -> None:
    report = fuzz_live(
        2_000,
        seed=1,
        address=guarded.address,
        token=TOKEN,
        good=guarded.client(SECOND_TOKEN),
        resident_bytes=guarded.resident_bytes,
    )
    assert not report.violations, report.violations[:10]
    assert sum(report.counts.values()) == 2_000
    assert len({outcome for _, outcome in report.counts}) > 5
    assert report.good_calls > 10
