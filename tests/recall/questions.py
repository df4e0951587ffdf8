"""Small two-step questions that a tiny encoder learns."""

from __future__ import annotations

import random

from services.recall.examples import Example

_PEOPLE, _PLACES = ["anna", "boris", "carla", "dora"], ["city", "river"]


def example(seed: int) -> Example:
    """Return a question about a person among filler, `spans` at the sentence about the person."""
    draw = random.Random(seed)
    person = draw.choice(_PEOPLE)
    fact = f"{person} lives in the {draw.choice(_PLACES)} ."
    filler = [f"the {draw.choice(['red', 'blue'])} founder was a founder ." for _ in range(12)]
    filler.insert(draw.randrange(13), fact)
    text = "\n".join(filler)
    start = text.index(fact)
    return Example(text=text, question=f"where is {person} ?", answer="city", spans=((start, start + len(fact)),))
