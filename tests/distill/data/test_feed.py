"""Batches from the stream."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice

import pytest

from services.base.errors import FailedPreconditionError
from services.distill.data.feed import WindowFeed
from services.fusion.client import StreamRequest
from tests.fakes.fusion_stream import FakeFusion, corpus


def _request(fusion: FakeFusion, **changes: object) -> StreamRequest:
    base = StreamRequest("toy", "train", seed=3, expected_vocabulary=fusion.vocabulary.fingerprint)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_batches_stop_at_the_end_of_an_epoch_and_cover_it(target):
    fusion = FakeFusion(target, corpus(11))
    feed = WindowFeed(fusion, _request(fusion, num_epochs=2), batch_windows=4)
    for epoch in range(2):
        batches = [[window.index for window in feed.take(epoch).windows] for _ in range(3)]
        assert [len(batch) for batch in batches] == [4, 4, 3]
        assert sorted(chain(*batches)) == list(range(11))
        assert len(feed.take(epoch)) == 0
    assert feed.wait_seconds > 0


def test_the_cursor_resumes_behind_what_was_taken_not_behind_what_was_read_ahead(target):
    fusion = FakeFusion(target, corpus(10))
    feed = WindowFeed(fusion, _request(fusion, num_epochs=2), batch_windows=4)
    taken = [window.index for epoch in (0, 0, 0, 1) for window in feed.take(epoch).windows]
    rest = [window.index for window in fusion.stream(_request(fusion, num_epochs=2, cursor=feed.cursor))]
    whole = [window.index for window in fusion.stream(_request(fusion, num_epochs=2))]
    assert taken + rest == whole
    feed.close()


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_together_take_the_windows_that_one_worker_takes(target, world_size):
    fusion = FakeFusion(target, corpus(14))
    alone = WindowFeed(fusion, _request(fusion), batch_windows=4)
    shards = [
        WindowFeed(fusion, _request(fusion, rank=rank, world_size=world_size), batch_windows=4 // world_size)
        for rank in range(world_size)
    ]
    for _ in range(4):
        together = {window.index for shard in shards for window in shard.take(0).windows}
        assert together == {window.index for window in alone.take(0).windows}


def test_skipped_windows_are_part_of_their_batch(target):
    fusion = FakeFusion(target, corpus(11), skipped=frozenset({2, 5, 7}))
    feed = WindowFeed(fusion, _request(fusion), batch_windows=4)
    batches = [feed.take(0) for _ in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert sorted(window.index for batch in batches for window in batch.skipped) == [2, 5, 7]
    assert sorted(window.index for batch in batches for window in batch.windows) == [0, 1, 3, 4, 6, 8, 9, 10]


def test_a_block_in_another_vocabulary_is_refused(target):
    fusion = FakeFusion(target, corpus(3))
    feed = WindowFeed(fusion, _request(fusion, expected_vocabulary="another"), batch_windows=2)
    with pytest.raises(FailedPreconditionError, match="the target's tokenizer is another"):
        feed.take(0)


def test_the_fake_keeps_the_contract_of_blocks(target):
    for ends in (False, True):
        fusion = FakeFusion(target, corpus(5), ends=ends)
        for window in islice(fusion.stream(_request(fusion)), 3):
            window.block.validate()
