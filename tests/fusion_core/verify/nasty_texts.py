"""Long texts that make careless patterns backtrack for ever: quadratic time on one of them takes many seconds."""

from __future__ import annotations

_REPEATED = (
    *(
        "1",
        "1,",
        "1 ",
        "1/",
        "a",
        "a-",
        "A ",
        ".",
        ". ",
        "mr.",
        "- \n",
        "\n \n",
        " ",
        "* ",
        "**",
        "*a",
        "[",
        "[[a",
        "{",
    ),
    *('"', "<<", "<<a", "```", "```\n", "~~~\n", "answer is ", "answer to ", "the answer: ", "\\boxed{", "\\boxed"),
    *("\\frac", "####", "P.S.", "SECTION ", "******", "(", "(1,", "^2", "10^", "%", '{"a":', "[1,", "é", "\ud800"),
)
_STARTED = ("<<", "```", "[", "*", "\\boxed{", "answer ", "answer to ", "####", "P.S.", '"', "{")


def nasty_texts(size: int = 10**5) -> list[str]:
    """Return texts of about `size` characters, and the empty one."""
    repeated = ["", *(part * (size // len(part)) for part in _REPEATED)]
    ended = [part * size + end for part in (".", " ", "a", "`") for end in ("!x", "x")]
    return [*repeated, *ended, *(start + part * size + "\u00b7`" for start in _STARTED for part in ("a", " "))]
