"""Write the data of examples/tulu.yaml: questions about capitals with orders on the form of the answer.

    python examples/tulu.py tulu

Two skills: `form` (lower case, the last word is "done") and `brief` (at most four words). Every third country is held
out. The answers are written here; `fusion sample` and `answers` in the recipe would take them from sources instead.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Russia": "Moscow",
    "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Morocco": "Rabat",
    "China": "Beijing", "Japan": "Tokyo", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Nepal": "Kathmandu",
    "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus", "Jordan": "Amman", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Bolivia": "Sucre", "Ecuador": "Quito", "Uruguay": "Montevideo", "Canada": "Ottawa",
    "Australia": "Canberra", "Belgium": "Brussels", "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade",
    "Croatia": "Zagreb", "Ukraine": "Kyiv", "Latvia": "Riga", "Estonia": "Tallinn",
}  # fmt: skip
ORDERS = {
    "form": "Write in lower case only and end with the word done.",
    "brief": "Answer in at most four words.",
}
SPECS = {
    "form": [{"name": "all_lowercase"}, {"name": "ends_with", "text": "done"}],
    "brief": [{"name": "words", "at_most": 4}],
}


def row(country: str, skill: str, **answers: str) -> dict[str, Any]:
    """Return a prompt with its spec, and with answers under their keys."""
    question = {"role": "user", "content": f"What is the capital of {country}? {ORDERS[skill]}"}
    spec = {"kind": "constraints", "constraints": SPECS[skill]}
    return {"prompt": [question], "verify": spec, "skill": skill, **answers}


def answer(country: str, skill: str) -> str:
    """Return an answer that fulfils the order."""
    capital = CAPITALS[country]
    return f"the capital of {country.lower()} is {capital.lower()}. done" if skill == "form" else f"{capital}."


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    countries = list(CAPITALS)
    train, held_out = [c for n, c in enumerate(countries) if n % 3], countries[::3]
    long = "The capital of {} is {}, a city that is known for its long history and its many sights."
    write(folder / "sft.jsonl", (row(c, skill, completion=answer(c, skill)) for c in train for skill in ORDERS))
    pairs = ((c, answer(c, "brief"), long.format(c, CAPITALS[c])) for c in train)
    write(folder / "pairs.jsonl", (row(c, "brief", chosen=better, rejected=worse) for c, better, worse in pairs))
    write(folder / "prompts.jsonl", (row(c, "form") for c in train))
    write(folder / "held_out.jsonl", (row(c, skill) for c in held_out for skill in ORDERS))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/tulu.py FOLDER")
    main(Path(sys.argv[1]))
