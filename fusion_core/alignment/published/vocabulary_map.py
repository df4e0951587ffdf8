"""The vocabulary map of FuseLLM (ICLR 2024, section 3.2), from source ids to target ids, one to one.

The map compares the decoded bytes that ids stand for (see `pieces`); the space in front of a word is one
symbol like any other. The reference compares the tokenizers' own spellings ("Ċ" against "<0x0A>") instead.
Roles come first: EOS maps to EOS, BOS to BOS, PAD to PAD. Other control tokens and holes have no bytes and map nowhere.
Of several target ids with the same bytes ("a" and "<0x61>") the one that the tokenizer produces is meant.

Shape legend: V ids of the source vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fusion_core.alignment.published.co_occurrence import CoOccurrence, most_similar
from fusion_core.alignment.published.edit_distance import NearestPieces
from fusion_core.alignment.published.pieces import Pieces, common_alphabet, decode_pieces
from fusion_core.arrays import Int32, Int64
from fusion_core.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Strategy = Literal["exact", "min_edit", "co_occurrence"]

UNMAPPED = -1
_FORMAT = 1
"""Number in the name of cached maps: raise it when the same vocabularies would give another map."""


def _default_cache_dir() -> Path:
    if home := os.environ.get("FUSION_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-fusion"


class VocabularyMapConfig(BaseModel):
    """The settings of the map from source ids to target ids.

    Attributes:
        strategy: `exact`: the target id with the same bytes, else none. `min_edit`: else the piece at minimum edit
            distance, the first id of equals. `co_occurrence`: else the one of equals with the most similar contexts.
        window: for `co_occurrence`, the largest distance of two tokens that co-occur, in tokens.
        corpus: for `co_occurrence`, a UTF-8 text file, one document a line.
        cache_dir: folder in which finished maps are kept; null keeps none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    strategy: Strategy = "min_edit"
    window: int = Field(default=5, ge=1)
    corpus: Path | None = None
    cache_dir: Path | None = Field(default_factory=_default_cache_dir)

    @model_validator(mode="after")
    def _corpus_when_needed(self) -> VocabularyMapConfig:
        if (self.corpus is None) == (self.strategy == "co_occurrence"):
            raise ValueError("corpus: required with strategy co_occurrence, and allowed with no other")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyMap:
    """A finished map.

    Attributes:
        target_ids_V: int32, the target id of every source id; -1 where there is none.
        source, target: fingerprints of the two vocabularies.
    """

    target_ids_V: Int32
    source: str
    target: str

    @classmethod
    def load_or_build(
        cls, source: Vocabulary, target: Vocabulary, config: VocabularyMapConfig | None = None
    ) -> VocabularyMap:
        """Return the map from the cache, or build it and put it there.

        Raises:
            ValueError: the corpus of `co_occurrence` cannot be read.
        """
        config = config or VocabularyMapConfig()
        corpus = _read_corpus(config.corpus) if config.corpus is not None else None
        if config.cache_dir is None:
            return cls.build(source, target, config, corpus)
        name = f"vocabulary-map-{_FORMAT}-{source.fingerprint}-{target.fingerprint}-{config.strategy}"
        if corpus is not None:
            digest = hashlib.sha256(b"\n".join(corpus)).hexdigest()[:16]
            name += f"-{config.window}-{digest}"
        path = config.cache_dir / f"{name}.npy"
        cached = _load(path, source.size, target.size)
        if cached is not None:
            return cls(cached, source.fingerprint, target.fingerprint)
        built = cls.build(source, target, config, corpus)
        _save(path, built.target_ids_V)
        return built

    @classmethod
    def build(
        cls, source: Vocabulary, target: Vocabulary, config: VocabularyMapConfig, corpus: list[bytes] | None = None
    ) -> VocabularyMap:
        """Build the map without the cache; `corpus`, the documents, is needed for `co_occurrence` only."""
        if source.fingerprint == target.fingerprint:
            return cls(np.arange(source.size, dtype=np.int32), source.fingerprint, target.fingerprint)
        canonical = _canonical_ids(target)
        pieces = [source.token_bytes(i) for i in range(source.size)]
        target_ids_V = np.array([canonical.get(piece, UNMAPPED) for piece in pieces], np.int32)
        missing = np.array([i for i, p in enumerate(pieces) if p and target_ids_V[i] == UNMAPPED], np.int64)
        if config.strategy != "exact" and len(missing) and canonical:
            candidates = np.array(sorted(canonical.values()), np.int64)
            (texts, patterns), alphabet_size = common_alphabet(
                _pieces([target.token_bytes(int(i)) for i in candidates]), _pieces([pieces[i] for i in missing])
            )
            search = NearestPieces(texts, alphabet_size)
            nearest, distances = search.first(patterns)
            if config.strategy == "co_occurrence":
                assert corpus is not None, "co_occurrence needs documents"
                company = _Company(source, target, target_ids_V, corpus, config.window)
                for place in np.flatnonzero([company.has(int(i)) for i in missing]):
                    pattern = patterns.symbols[patterns.offsets[place] : patterns.offsets[place + 1]]
                    tied = search.all_at(pattern, int(distances[place]))
                    nearest[place] = tied[company.most_similar(int(missing[place]), candidates[tied])]
            target_ids_V[missing] = candidates[nearest]
        for role in ("pad_id", "bos_id", "eos_id"):  # EOS last: a token that is EOS and another role maps to EOS
            source_id, target_id = getattr(source, role), getattr(target, role)
            if source_id is None or source.token_bytes(source_id):
                continue  # a piece of text that also plays a role (padding by "!") is mapped as text
            mapped = target_id is not None and not target.token_bytes(target_id)
            target_ids_V[source_id] = target_id if mapped else UNMAPPED
        return cls(target_ids_V, source.fingerprint, target.fingerprint)


class _Company:
    """Co-occurrence counts of the tokens of two vocabularies in a corpus, over contexts that both have: target ids."""

    def __init__(
        self, source: Vocabulary, target: Vocabulary, exact_V: Int32, corpus: list[bytes], window: int
    ) -> None:
        shared = np.full(target.size, UNMAPPED, np.int32)
        shared[exact_V[exact_V != UNMAPPED]] = exact_V[exact_V != UNMAPPED]
        self._source = CoOccurrence.count(_encode(source, corpus), exact_V, window)
        self._target = CoOccurrence.count(_encode(target, corpus), shared, window)

    def has(self, source_id: int) -> bool:
        return self._source.has(source_id)

    def most_similar(self, source_id: int, target_ids: Int64) -> int:
        return most_similar(self._source, source_id, self._target, target_ids)


def _canonical_ids(target: Vocabulary) -> dict[bytes, int]:
    """Return one id for every byte string of the vocabulary: the one its tokenizer produces, else the first."""
    canonical: dict[bytes, int] = {}
    repeated: set[bytes] = set()
    for token_id in range(target.size):
        piece = target.token_bytes(token_id)
        if piece in canonical:
            repeated.add(piece)
        elif piece:
            canonical[piece] = token_id
    ambiguous = sorted(repeated)
    for piece, produced in zip(ambiguous, target.first_tokens(ambiguous), strict=True):
        if produced != UNMAPPED and target.token_bytes(int(produced)) == piece:
            canonical[piece] = int(produced)
    return canonical


def _pieces(strings: list[bytes]) -> Pieces:
    offsets = np.concatenate([[0], np.cumsum([len(string) for string in strings])]).astype(np.int64)
    return decode_pieces(np.frombuffer(b"".join(strings), np.uint8), offsets)


def _encode(vocabulary: Vocabulary, corpus: list[bytes]) -> list[Int32]:
    return [encoding.token_ids_T for encoding in vocabulary.encode_batch(corpus)]


def _read_corpus(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"corpus: cannot read {path}: {error.strerror}") from error


def _load(path: Path, source_size: int, target_size: int) -> Int32 | None:
    try:
        target_ids_V = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("cached vocabulary map %s cannot be read and is built again: %s", path, error)
        return None
    if target_ids_V.shape != (source_size,) or target_ids_V.dtype != np.int32 or np.any(target_ids_V >= target_size):
        logger.warning("cached vocabulary map %s does not fit the vocabularies and is built again", path)
        return None
    return np.asarray(target_ids_V, np.int32)


def _save(path: Path, target_ids_V: Int32) -> None:
    """Write the file whole or not at all. A cache that cannot be written costs time, not the run."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            temporary = file.name
            np.save(file, target_ids_V)
        Path(temporary).chmod(0o644)  # others who share the cache may read it
        Path(temporary).replace(path)
    except OSError as error:
        logger.warning("cache_dir: the vocabulary map cannot be kept in %s: %s", path.parent, error)
        if temporary:
            Path(temporary).unlink(missing_ok=True)
