"""Bytes and numbers that are wrong in the ways that matter: cut, doubled, flipped, and at the edges of their types."""

from __future__ import annotations

import random

EDGES_32 = (0, 1, 2, 127, 128, 255, 65_535, 65_536, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def junk(rng: random.Random, longest: int = 300) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 2, 5, rng.randint(0, longest))))


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four changes: a bit, a byte, a piece removed, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(changed))
        match rng.randrange(6):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del changed[at : at + rng.randint(1, 16)]
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 16)]
            case 4:
                changed[at:at] = rng.randbytes(rng.randint(1, 16))
            case _:
                del changed[at:]
    return bytes(changed)
