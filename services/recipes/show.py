"""`fusion fetch`: the fused distribution of a text as a table."""

from __future__ import annotations

import math

import numpy as np
from rich.console import Console
from rich.table import Table

from fusion_core.blocks import Block
from services.fusion.client import FusionClient


def show_fused(text: str, address: str, application: str, top: int, sources: list[str], console: Console) -> None:
    """Prints, for every token of the text, the likeliest tokens before it was seen; then the sources' weights."""
    client = FusionClient(address, application=application)
    [block] = client.fuse([text.encode()], sources=sources)
    names = _token_texts(block)
    table = Table(title=f"{block.num_tokens} target tokens, vocabulary {block.vocabulary}", title_justify="left")
    table.add_column("token")
    table.add_column("probability", justify="right")
    for rank in range(min(top, block.k)):
        table.add_column(f"{rank + 1}.", overflow="fold")
    table.add_column("tail", justify="right")
    start = 0
    for row in range(block.num_tokens):
        end = int(block.byte_ends_T[row])
        cells = [_quote(block.text_bytes[start:end]), f"{math.exp(block.gold_T[row]):.3f}"]
        if block.mask_T[row]:
            cells += [
                f"{names[int(block.topk_ids_TK[row, rank])]} {math.exp(block.topk_logprobs_TK[row, rank]):.3f}"
                if block.topk_ids_TK[row, rank] >= 0
                else ""
                for rank in range(min(top, block.k))
            ]
            cells.append(f"{math.exp(block.tail_T[row]):.3f}")
        else:
            cells += ["(masked)"]
        table.add_row(*cells)
        start = end
    console.print(table)
    for share in block.shares:
        state = f"weight {share.weight:.3f}, {share.nats_per_byte:.3f} nats/byte" if share.present else "did not answer"
        console.print(f"source {share.name}: {state}", highlight=False)
    masked = 1.0 - float(np.mean(block.mask_T))
    console.print(
        f"fused: {block.nats_per_byte:.3f} nats/byte, covered mass {block.covered_mass:.3f}, masked {masked:.1%}",
        highlight=False,
    )


def _token_texts(block: Block) -> dict[int, str]:
    """Readable tokens of all candidates, from the vocabulary of the deployment that answered."""
    from services.recipes.prepare import target_vocabulary

    vocabulary = target_vocabulary(block.vocabulary)
    ids = {int(i) for i in np.unique(block.topk_ids_TK) if i >= 0}
    if vocabulary is None:
        return {i: f"#{i}" for i in ids}
    control = {token_id: name for name, token_id in vocabulary.special_tokens.items()}
    return {i: control.get(i) or _quote(vocabulary.token_bytes(i)) for i in ids}


def _quote(data: bytes) -> str:
    """Spaces made visible; rich's markup characters made harmless."""
    text = data.decode("utf-8", errors="backslashreplace").replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return text.replace("[", "\\[")
