"""Tokens as bytes: what every id of a tokenizer stands for, and how a text splits into ids."""

from fusion_core.vocabulary.vocabulary import Encoding, Vocabulary

__all__ = ["Encoding", "Vocabulary"]
