"""Picture of the planted hack: the length of answers after each round, with patches and without.

python -m tests.bench.reward.picture tests/bench/results/reward.json docs/reward_hack.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_COLOURS = {"without patches": "tab:red", "patched": "tab:blue"}


def draw(rows: list[dict[str, Any]], path: Path, start_words: float) -> None:
    """Draw a line for each seed of both arms into an SVG file whose bytes depend on the rows alone."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    hack = [row for row in rows if row.get("table") == "planted hack"]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for arm, colour in _COLOURS.items():
        for seed in sorted({row["seed"] for row in hack}):
            line = sorted((row["round"], row["words"]) for row in hack if (row["arm"], row["seed"]) == (arm, seed))
            label = arm if seed == min(row["seed"] for row in hack) else None
            rounds, words = zip((0, start_words), *line, strict=True)
            axes.plot(rounds, words, color=colour, marker="o", markersize=4, linewidth=1.5, label=label)
    axes.set_xticks(range(1 + max(row["round"] for row in hack)))
    axes.set_xlabel("round")
    axes.set_ylabel("words of an answer")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "reward", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="file that `python -m tests.bench.reward --json` has written")
    parser.add_argument("picture", type=Path, help="SVG file")
    options = parser.parse_args()
    from tests.bench.reward.__main__ import START_WORDS

    draw(json.loads(options.results.read_text(encoding="utf-8"))["rows"], options.picture, START_WORDS)


if __name__ == "__main__":
    main()
