"""The consumer, a process of its own: takes windows from the real client, looks at each and enters it into the ledger.

Run as `python -m tests.drill.consumer SETTINGS`, a JSON file of `ConsumerSettings`. Started again it goes on from the
ledger. Once the file `stop` is there it ends with the epoch that it is in. The end of its standard input ends it too,
so that it never outlives the drill.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fusion.v1 import block_pb2
from fusion_core.vocabulary import Vocabulary
from services.fusion.client import FusionClient, SkippedWindow, StreamRequest
from services.wire.block import encode_block
from tests.drill.blocks import wrong_with
from tests.drill.ledger import Entry, LedgerWriter, digest_of


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """What to stream, from where, and what the blocks must be."""

    address: str
    dataset: str
    num_windows: int
    documents: str
    target: str
    vocabulary: str
    sources: list[str]
    min_sources: int
    k: int
    seed: int
    prefetch_windows: int
    patience_seconds: float
    silence_seconds: float
    sample_every: int
    ledger: str
    stop: str


def consume(settings: ConsumerSettings) -> None:
    ledger, stop = LedgerWriter(Path(settings.ledger)), Path(settings.stop)
    target = Vocabulary.from_pretrained(Path(settings.target))
    documents = {path.name: path.read_bytes() for path in Path(settings.documents).iterdir()}
    client = FusionClient(
        settings.address, patience_seconds=settings.patience_seconds, silence_seconds=settings.silence_seconds
    )
    request = StreamRequest(
        settings.dataset,
        "train",
        seed=settings.seed,
        num_epochs=2**31,
        cursor=ledger.cursor,
        expected_vocabulary=settings.vocabulary,
    )

    def epoch_is_over() -> bool:
        return ledger.cursor is None or ledger.cursor.received == settings.num_windows

    if stop.exists() and epoch_is_over():
        return
    for window in client.stream(request, prefetch_windows=settings.prefetch_windows):
        if isinstance(window, SkippedWindow):
            raise RuntimeError(f"window {window.index} came without distributions, and nobody allowed that")
        block = window.block
        wrong = wrong_with(window, documents, target, settings.sources, settings.min_sources, settings.k)
        sampled = (window.index + window.cursor.epoch) % settings.sample_every == 0
        message = encode_block(block, block_pb2.LOGPROB_DTYPE_FLOAT32).SerializeToString() if sampled else b""
        ledger.append(
            Entry(
                epoch=window.cursor.epoch,
                index=window.index,
                digest=digest_of(block.text_bytes, block.token_ids_T),
                cursor=window.cursor.to_json(),
                at=time.time(),
                present=[share.name for share in block.shares if share.present],
                wrong=wrong,
                block=base64.b64encode(message).decode(),
            )
        )
        ledger.cursor = window.cursor
        if stop.exists() and epoch_is_over():
            return


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(3)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s")
    threading.Thread(target=_end_with_input, daemon=True).start()
    consume(ConsumerSettings(**json.loads(Path(sys.argv[1]).read_text())))
