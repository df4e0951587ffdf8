"""Fuse two texts and print what the mixture expects behind each of them.

    fusion up quickstart
    python examples/fuse_two_texts.py

The fusion service asks its sources for their distributions over the texts, moves these into the target's vocabulary and
mixes them. One block comes back per text: row t of it predicts token t from the text before it.
"""

from __future__ import annotations

import argparse

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.fusion.client import FusionClient
from services.wire.passage import Passage

TEXTS = ("The capital of France is", "def add(a, b):\n    return a")


def likeliest(block: Block, target: Vocabulary, num_tokens: int = 3) -> list[tuple[bytes, float]]:
    """Return bytes and probability of the likeliest next tokens: the candidates of the block's last row."""
    ids, logprobs = block.topk_ids_TK[-1, :num_tokens], block.topk_logprobs_TK[-1, :num_tokens]
    return [(target.token_bytes(int(i)), float(np.exp(logprob))) for i, logprob in zip(ids, logprobs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuse two texts.")
    parser.add_argument("--address", default="127.0.0.1:9000", help="host:port of the fusion service")
    parser.add_argument("--target", default="runs/quickstart/target", help="folder of the target's tokenizer")
    options = parser.parse_args()

    target = Vocabulary.from_pretrained(options.target)
    client = FusionClient(options.address)
    # With `ends_document` a block has one row more than the text has tokens: the prediction of what follows.
    blocks = client.fuse([Passage(text.encode(), ends_document=True) for text in TEXTS])
    for text, block in zip(TEXTS, blocks, strict=True):
        # Ids mean something only in the vocabulary that they belong to.
        assert block.vocabulary == target.fingerprint, "the service fuses into another vocabulary than --target"
        print(repr(text))
        for share in block.shares:
            print(f"  {share.name}: weight {share.weight:.2f}, {share.nats_per_byte:.3f} nats per byte")
        for token, probability in likeliest(block, target):
            print(f"  next {token!r}: {probability:.3f}")


if __name__ == "__main__":
    main()
