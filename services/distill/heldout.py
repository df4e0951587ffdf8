"""The loss on a held-out split while training, from the stream of its tokens: no source is asked."""

from __future__ import annotations

from dataclasses import replace

import torch

from services.distill.data.batch import collate, pack
from services.distill.data.feed import FusionStream, WindowFeed
from services.distill.target.module import DistillModule
from services.distill.workers.world import World
from services.fusion.client import StreamRequest


def heldout_nats_per_byte(
    module: DistillModule, client: FusionStream, request: StreamRequest, world: World, *, bos: int, batch_windows: int
) -> float:
    """Return nats per byte over the whole split of `request`, all workers together.

    `module` is the bare one, without DDP around it.
    """
    feed = WindowFeed(client, replace(request, tokens_only=True), batch_windows=batch_windows)
    nats = num_bytes = 0.0
    module.eval()
    try:
        with torch.no_grad():
            while True:
                windows = feed.take(epoch=0).windows  # no source is asked, so none is skipped
                if world.max([len(windows)])[0] == 0:  # as many passes on every worker: shards are gathered in each
                    break
                # The end of a document has no bytes, so that nats per byte leave its row out.
                blocks = [window.block.without_end() for window in windows]
                batch = collate(pack(blocks, None), bos, vocabulary_size=module.vocabulary_size, tokens_only=True).to(
                    world.device
                )
                losses = module(batch, torch.zeros(batch.num_tokens, device=world.device), None)
                nats += float(losses.clm_N.sum(dtype=torch.float64))
                num_bytes += sum(len(block.text_bytes) for block in blocks)
    finally:
        module.train()
        feed.close()
    nats, num_bytes = world.sum([nats, num_bytes])
    return nats / max(1.0, num_bytes)
