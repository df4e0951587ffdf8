"""Constraints on the form of an answer, in the manner of IFEval (arXiv:2311.07911), without a language's models.

A constraint is an object with `name` and its parameters; `CONSTRAINTS` has all names. Words are runs of letters and
digits with hyphens and apostrophes inside; comparison of words ignores case. An empty answer fulfils none of them.
Time is linear in the answer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Parameters: TypeAlias = Mapping[str, Any]

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
# A lookbehind and possessive quantifiers: a long run of full stops costs its length once.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|[。！？]+")
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "jr", "sr", "no", "inc", "ltd", "fig", "al")
)
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n|^[ \t]*(?:\*{3,}|-{3,})[ \t]*$", re.MULTILINE)
_BULLET = re.compile(r"^[ \t]*(?:[*\-+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_TITLE = re.compile(r"<<([^<>\n]+)>>")
_HIGHLIGHT = re.compile(r"\*\*[^*\n]+\*\*|\*[^*\n]+\*")
_FENCE = re.compile(r"^```\w*[ \t]*\n(.*)\n```$", re.DOTALL)
_SCRIPT_SHARE = 0.9
_SCRIPT_NAMES = {
    "latin": ("LATIN",), "cyrillic": ("CYRILLIC",), "greek": ("GREEK",), "arabic": ("ARABIC",), "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",), "bengali": ("BENGALI",), "tamil": ("TAMIL",), "thai": ("THAI",),
    "georgian": ("GEORGIAN",), "armenian": ("ARMENIAN",), "hangul": ("HANGUL",), "han": ("CJK",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
}  # fmt: skip
"""Scripts by name, with the first words of the names that Unicode gives their letters."""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, in order."""
    return _WORD.findall(text.casefold())


def num_sentences(text: str) -> int:
    """Return the number of sentences: ends by punctuation that no common abbreviation explains, and an open rest."""
    count, end = 0, 0
    for found in _SENTENCE_END.finditer(text):
        before = text[max(end, found.start() - 12) : found.start()].split()
        if found.group() == "." and before and before[-1].casefold().lstrip("(\"'“") in _ABBREVIATIONS:
            continue
        if _WORD.search(text, end, found.start()):
            count += 1
        end = found.end()
    return count + (_WORD.search(text, end) is not None)


def paragraphs_of(text: str) -> list[str]:
    """Return the paragraphs: parts between blank lines, or between lines of three or more `*` or `-`."""
    return [part.strip() for part in _PARAGRAPH_BREAK.split(text) if part.strip()]


def without_fence(text: str) -> str:
    """Return the inside of the code block when the answer is one code block, else the answer."""
    text = text.strip()
    found = _FENCE.match(text)
    return found[1] if found else text


def read_json(text: str) -> Any:
    """Return the value of an answer that is JSON, in a code block or not; raises ValueError for anything else."""
    try:
        return json.loads(without_fence(text), parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _phrase_count(text: str, phrase: str) -> int:
    """Return how often the words of a phrase stand in the text one behind the other."""
    wanted, words = words_of(phrase), words_of(text)
    if len(wanted) == 1:
        return words.count(wanted[0])
    joined = f" {' '.join(words)} ".replace(" ", "  ")
    return joined.count(f" {'  '.join(wanted)} ")


def _has_all(text: str, p: Parameters) -> bool:
    return all(_phrase_count(text, word) for word in p["words"])


def _has_none(text: str, p: Parameters) -> bool:
    return not any(_phrase_count(text, word) for word in p["words"])


def _is_json(text: str, p: Parameters) -> bool:
    try:
        read_json(text)
    except ValueError:
        return False
    return True


def _sections(text: str, p: Parameters) -> int:
    return len(re.findall(rf"^[ \t#*]*{re.escape(p['splitter'])}[ \t]+\w+", text, re.MULTILINE))


def _script(text: str, p: Parameters) -> bool:
    """Return whether nearly all letters belong to the script. Names are looked up once per different letter."""
    of_script = all_letters = 0
    for character, count in Counter(text).items():
        if character.isalpha():
            all_letters += count
            name = unicodedata.name(character, "")
            of_script += count if name.startswith(_SCRIPT_NAMES[p["script"]]) else 0
    return all_letters > 0 and of_script >= _SCRIPT_SHARE * all_letters


def _quoted(text: str, p: Parameters) -> bool:
    text = text.strip()
    return len(text) > 2 and (text[0], text[-1]) in {('"', '"'), ("“", "”"), ("„", "“"), ("«", "»")}


def _postscript(text: str, p: Parameters) -> bool:
    return re.search(rf"^[ \t*]*{re.escape(p['marker'])}[ \t*]*\S", text, re.MULTILINE) is not None


def _repeats_prompt(text: str, p: Parameters) -> bool:
    prompt, answer = " ".join(p["prompt"].split()), " ".join(text.split())
    return answer.startswith(prompt) and len(answer) > len(prompt)


def _two_responses(text: str, p: Parameters) -> bool:
    parts = [" ".join(part.split()) for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _first_word(text: str, p: Parameters) -> bool:
    paragraphs = paragraphs_of(text)
    return len(paragraphs) >= p["paragraph"] and words_of(paragraphs[p["paragraph"] - 1])[:1] == words_of(p["word"])


def _one_of(text: str, p: Parameters) -> bool:
    return " ".join(text.split()).rstrip(".").casefold() in {option.rstrip(".").casefold() for option in p["options"]}


def _begins(text: str, p: Parameters) -> bool:
    return text.strip().casefold().startswith(p["text"].strip().casefold())


def _ends(text: str, p: Parameters) -> bool:
    return text.strip().strip("\"'”*").casefold().endswith(p["text"].strip().strip("\"'”*").casefold())


@dataclass(frozen=True, slots=True)
class Constraint:
    """One kind of constraint.

    Attributes:
        test: whether an answer fulfils it; a number is held against `at_least` and `at_most`.
        needs: required parameters with their types; `str` means a string with a word or sign in it.
        counted: whether `at_least` and `at_most` are parameters, of which one is required.
    """

    test: Callable[[str, Parameters], bool | int]
    needs: Mapping[str, type]
    counted: bool = False


CONSTRAINTS: dict[str, Constraint] = {
    "words": Constraint(lambda text, p: len(_WORD.findall(text)), {}, counted=True),
    "sentences": Constraint(lambda text, p: num_sentences(text), {}, counted=True),
    "paragraphs": Constraint(lambda text, p: len(paragraphs_of(text)), {}, counted=True),
    "bullets": Constraint(lambda text, p: len(_BULLET.findall(text)), {}, counted=True),
    "keywords": Constraint(_has_all, {"words": list}),
    "forbidden_words": Constraint(_has_none, {"words": list}),
    "keyword_count": Constraint(lambda text, p: _phrase_count(text, p["word"]), {"word": str}, counted=True),
    "letter_count": Constraint(
        lambda text, p: text.casefold().count(p["letter"].casefold()), {"letter": str}, counted=True
    ),
    "capital_words": Constraint(
        lambda text, p: sum(word.isupper() and len(word) > 1 for word in _WORD.findall(text)), {}, counted=True
    ),
    "all_uppercase": Constraint(lambda text, p: text.isupper(), {}),
    "all_lowercase": Constraint(lambda text, p: text.islower(), {}),
    "no_commas": Constraint(lambda text, p: not any(comma in text for comma in ",，、،"), {}),
    "starts_with": Constraint(_begins, {"text": str}),
    "ends_with": Constraint(_ends, {"text": str}),
    "json": Constraint(_is_json, {}),
    "placeholders": Constraint(lambda text, p: len(_PLACEHOLDER.findall(text)), {}, counted=True),
    "title": Constraint(lambda text, p: any(map(_WORD.search, _TITLE.findall(text))), {}),
    "sections": Constraint(_sections, {"splitter": str}, counted=True),
    "highlights": Constraint(lambda text, p: len(_HIGHLIGHT.findall(text)), {}, counted=True),
    "script": Constraint(_script, {"script": str}),
    "quotation": Constraint(_quoted, {}),
    "postscript": Constraint(_postscript, {"marker": str}),
    "repeat_prompt": Constraint(_repeats_prompt, {"prompt": str}),
    "two_responses": Constraint(_two_responses, {}),
    "first_word": Constraint(_first_word, {"paragraph": int, "word": str}),
    "one_of": Constraint(_one_of, {"options": list}),
}
"""All constraints by name."""


def fulfils(text: str, name: str, parameters: Parameters) -> bool:
    """Return whether an answer fulfils a constraint that `check_constraint` has let pass."""
    if not text.strip():
        return False
    found = CONSTRAINTS[name].test(text, parameters)
    if not CONSTRAINTS[name].counted:
        return bool(found)
    return bool(parameters.get("at_least", 0) <= found <= parameters.get("at_most", len(text)))


def check_constraint(value: Any) -> tuple[str, dict[str, Any]]:
    """Return name and parameters of a constraint; raises ValueError naming what is wrong and what is allowed."""
    given = value.get("name") if isinstance(value, dict) else value
    if not isinstance(value, dict) or not isinstance(given, str) or given not in CONSTRAINTS:
        raise ValueError(f"name: {given!r:.80} is none of {', '.join(CONSTRAINTS)}")
    name, parameters = given, {key: part for key, part in value.items() if key != "name"}
    constraint = CONSTRAINTS[name]
    bounds = {"at_least", "at_most"} if constraint.counted else set()
    allowed = {*constraint.needs, *bounds}
    if unknown := sorted(set(parameters) - allowed):
        raise ValueError(f"{unknown[0]}: {name} has no such parameter; allowed: {', '.join(sorted(allowed)) or 'none'}")
    for key, kind in constraint.needs.items():
        _check_parameter(name, key, parameters.get(key), kind)
    if bounds and not bounds & set(parameters):
        raise ValueError(f"at_least, at_most: {name} needs one of them")
    for key in sorted(bounds & set(parameters)):
        _check_parameter(name, key, parameters[key], int)
    if name == "script" and parameters["script"] not in _SCRIPT_NAMES:
        raise ValueError(f"script: {parameters['script']!r:.80} is none of {', '.join(_SCRIPT_NAMES)}")
    return name, parameters


def _check_parameter(name: str, key: str, value: Any, kind: type) -> None:
    if kind is int:
        least = 1 if key == "paragraph" else 0
        good, wanted = type(value) is int and value >= least, f"an integer from {least}"
    elif kind is list:
        is_list = isinstance(value, list) and bool(value)
        good = is_list and all(isinstance(item, str) and bool(words_of(item)) for item in value)
        wanted = "a list of strings with words in them"
    else:
        needs_word = key == "word"
        good = isinstance(value, str) and bool(words_of(value) if needs_word else value.strip())
        wanted = "a string with a word in it" if needs_word else "a string that is not blank"
    if not good:
        raise ValueError(f"{key}: {name} needs {wanted}, got {value!r:.80}")
