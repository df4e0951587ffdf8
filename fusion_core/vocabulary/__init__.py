"""Tokens as bytes: the bytes of every id of a tokenizer, and the splitting of a text into ids."""

from fusion_core.vocabulary.encoding import Encoding
from fusion_core.vocabulary.vocabulary import Vocabulary

__all__ = ["Encoding", "Vocabulary"]
