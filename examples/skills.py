"""Write the prompts of the recipes `tulu` and `fusechat`: small sums, and answers in quotation marks.

    python examples/skills.py skills

Half of the things, and 48 of the 144 sums, are held out; the gates judge by them. A verifier checks every answer.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

THINGS = """
a colour: Blue | an animal: A dog | a fruit: An apple | a city: Paris | a country: Spain | a river: The Nile
a planet: Mars | a sport: Tennis | a tree: An oak | a metal: Iron | a month: April | a tool: A hammer
a day of the week: Monday | a season: Winter | a bird: A robin | a fish: A trout | a flower: A rose | a drink: Tea
a vegetable: A carrot | an instrument: A violin | a language: French | a number: Seven | a shape: A circle
a job: A baker | a toy: A kite | a book: Hamlet | a game: Chess | a sea: The Baltic | a mountain: Everest
a continent: Asia | a spice: Pepper | a nut: An almond | a berry: A cherry | an insect: An ant | a reptile: A lizard
a vehicle: A bus | a boat: A ferry | a room: The kitchen | a piece of furniture: A chair | a fabric: Cotton
a gem: A ruby | a coin: A penny | a body part: The hand | an organ: The heart | a bone: The rib | a sense: Hearing
a feeling: Joy | a virtue: Patience | a letter: B | a vowel: E | a word: House | a verb: Run | an adjective: Green
a name: Anna | a surname: Smith | a king: Arthur | a poet: Homer | a painter: Monet | a composer: Bach
a scientist: Newton | a dance: The waltz | a song: Yesterday | a film: Casablanca | a meal: Dinner
a soup: Tomato soup | a cheese: Brie | a bread: Rye | a cake: Sponge cake | a sauce: Ketchup | an oil: Olive oil
a grain: Wheat | a herb: Basil | a shop: A bakery | a building: A church | a bridge: Tower Bridge
a street: Main Street | a park: Hyde Park | a lake: Lake Como | an island: Crete | a desert: The Sahara
a forest: The Black Forest | a star: The Sun | a gas: Oxygen | a liquid: Water | a stone: Granite | a weather: Rain
a wind: A breeze | a cloud: Cirrus | a clock: A watch | a lamp: A torch | a hat: A beret | a shoe: A boot
a coat: A jacket | a bag: A purse | a cup: A mug | a knife: A dagger
"""
MOST, HELD_OUT_SUMS = 12, 48
SYSTEM = "Answer briefly."


def sums() -> list[dict[str, Any]]:
    """Return a row for each sum of two numbers up to 12."""
    pairs = [(a, b) for a in range(1, MOST + 1) for b in range(1, MOST + 1)]
    return [
        _row("sums", f"What is {a} + {b}?", {"kind": "answer", "expected": a + b}, f"{a} + {b} = {a + b}.")
        for a, b in pairs
    ]


def quotes() -> list[dict[str, Any]]:
    """Return a row for each thing, whose name is to be written in quotation marks."""
    spec = {"kind": "constraints", "constraints": [{"name": "quotation"}]}
    named = [cell.strip().split(": ") for line in THINGS.split("\n") for cell in line.split("|") if cell.strip()]
    return [
        _row("quotes", f"Name {thing}. Put your whole answer in double quotation marks.", spec, f'"{example}."')
        for thing, example in named
    ]


def split(
    rows: list[dict[str, Any]], held_out: int, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows to learn from, and those held out, in a random order."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[held_out:], shuffled[:held_out]


def without_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as a prompt."""
    return {**row, "messages": row["messages"][:-1]}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def _row(skill: str, question: str, spec: dict[str, Any], answer: str) -> dict[str, Any]:
    turns = (("system", SYSTEM), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns], "verify": spec, "skill": skill}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    of_sums, of_quotes = split(sums(), HELD_OUT_SUMS), split(quotes(), len(quotes()) // 2)
    write(folder / "answered.jsonl", of_sums[0] + of_quotes[0])
    write(folder / "prompts.jsonl", map(without_answer, of_sums[0] + of_quotes[0]))
    write(folder / "sums.jsonl", map(without_answer, of_sums[0]))
    write(folder / "held_out.jsonl", map(without_answer, of_sums[1] + of_quotes[1]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/skills.py FOLDER")
    main(Path(sys.argv[1]))
