"""Words of a text for datatrove's filters and signatures, by one expression, for every language and without a model.

Words are what stands between spaces, as in the rules' papers: punctuation belongs to the word before it. A letter of a
script that puts no spaces between words counts as a word.
"""

from __future__ import annotations

import regex
from datatrove.utils.text import TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WordTokenizer, simple_span_tokenize

UNSPACED = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz"})
"""Languages without spaces between words."""
_LONE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_LETTERS = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_LONE}]]"
_WORDS = regex.compile(rf"(?V1)[{_LONE}]|{_LETTERS}+(?:['’]{_LETTERS}+)*")
_SPACED = regex.compile(rf"[{_LONE}]|[^\s{_LONE}]+")
_ENDS = regex.escape("".join(sorted(TERMINAL_PUNCTUATION)), special_only=False)
_SENTENCES = regex.compile(rf"[^\n{_ENDS}]*[{_ENDS}]+[\"'”’)]*|[^\n{_ENDS}]+")


class Words(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
    """A tokenizer as datatrove's blocks take one."""

    def word_tokenize(self, text: str) -> list[str]:
        found: list[str] = _SPACED.findall(text)
        return found

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence.strip() for sentence in _SENTENCES.findall(text) if sentence.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return list(simple_span_tokenize(text, self.sent_tokenize(text)))


def plain_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    found: list[str] = _WORDS.findall(text.lower())
    return found
