"""Tokens as bytes: what every id of a tokenizer stands for, and how a text splits into ids."""

from fusion_core.vocabulary.encoding import Encoding
from fusion_core.vocabulary.vocabulary import Vocabulary

__all__ = ["Encoding", "Vocabulary"]
