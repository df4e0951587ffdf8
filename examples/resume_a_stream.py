"""Stream a few windows of a data set, keep the cursor, and go on from there the next time.

    fusion up quickstart
    python examples/resume_a_stream.py            # windows 1 to 5 of the epoch's order
    python examples/resume_a_stream.py            # windows 6 to 10

Every window arrives with the cursor after it. Store the cursor together with what you made of the window: after a crash
the stream goes on with the next window, none is lost and none comes twice. The trainer keeps it in its checkpoints.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from services.fusion.client import FusionClient, SkippedWindow, StreamRequest
from services.wire.cursor import Cursor


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream some windows, and resume behind them when run again.")
    parser.add_argument("--address", default="127.0.0.1:9000", help="host:port of the fusion service")
    parser.add_argument("--dataset", default="lee-news", help="corpus.name of the recipe")
    parser.add_argument("--windows", type=int, default=5, help="windows to take this time")
    parser.add_argument("--cursor", type=Path, default=Path("cursor.json"), help="file that keeps the position")
    options = parser.parse_args()

    cursor = Cursor.from_json(json.loads(options.cursor.read_text())) if options.cursor.exists() else None
    request = StreamRequest(dataset=options.dataset, split="train", seed=0, cursor=cursor)
    # The client grants `prefetch_windows` credits: no more than that is ever on its way.
    stream = FusionClient(options.address).stream(request, prefetch_windows=options.windows)
    for window in islice(stream, options.windows):
        if isinstance(window, SkippedWindow):  # too few sources, or a text of which a tokenizer keeps nothing
            print(f"window {window.index}: skipped, {window.reason}")
        else:
            block = window.block
            print(f"window {window.index}: {block.num_tokens} tokens, {block.nats_per_byte:.3f} nats per byte")
        options.cursor.write_text(json.dumps(window.cursor.to_json()))


if __name__ == "__main__":
    main()
