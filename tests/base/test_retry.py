"""The back-off: growing, jittered, bounded, with a patience that begins anew."""

from __future__ import annotations

from services.base.retry import Backoff


def test_pauses_double_up_to_the_longest_and_begin_anew() -> None:
    backoff = Backoff(0.5, longest_seconds=3.0)
    for expected in (0.5, 1.0, 2.0, 3.0, 3.0):
        assert 0.5 * expected <= backoff.next_pause() <= 1.5 * expected
    backoff.reset()
    assert backoff.next_pause() <= 0.75


def test_pauses_of_many_clients_spread() -> None:
    first = [Backoff(1.0).next_pause() for _ in range(1000)]
    assert min(first) < 0.6
    assert max(first) > 1.4
    assert 0.95 < sum(first) / 1000 < 1.05


def test_patience_runs_from_the_last_success() -> None:
    assert not Backoff(patience_seconds=60.0).exhausted
    impatient = Backoff(patience_seconds=-1.0)
    assert impatient.exhausted
    impatient.reset()
    assert impatient.exhausted
    assert not Backoff().exhausted
