"""Values that one section of a recipe gives another one that leaves them out."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.base.settings import Settings
from services.corpus.config import CorpusConfig
from services.distill.target.config import TargetConfig
from services.models.chat_template import MODEL, PLAIN


def curated_files(run_folder: Path) -> str:
    """Return the glob of the documents that `fusion corpus` leaves in a run's folder."""
    return f"{glob.escape(str(run_folder.absolute()))}/curate/documents/*.parquet"


def read_curated(values: Any) -> Any:
    """Return a recipe whose corpus reads what `fusion corpus` makes of section `curate`, if it has no other origin.

    Raises ValueError for a setting of the corpus that curated documents cannot have.
    """
    if not isinstance(values, Mapping) or values.get("curate") is None:
        return values
    corpus = values.get("corpus", {})
    if not isinstance(corpus, Mapping) or "files" in corpus or "package" in corpus:
        return values
    for key, fixed in (("format", "parquet"), ("text_field", "text")):
        if corpus.get(key, fixed) != fixed:
            raise ValueError(f"corpus.{key}: curated documents have {fixed}; leave it out, or give corpus.files")
    files = curated_files(Path(str(values.get("output_dir", "runs"))) / str(values.get("name")))
    return {**values, "corpus": {"domain_field": "domain", **corpus, "files": [files]}}


def need_judge(values: Any) -> Any:
    """Return a recipe; raises ValueError where its corpus is one of key blocks and nobody selects them."""
    corpus, recall = (values.get(key) for key in ("corpus", "recall")) if isinstance(values, Mapping) else (None, None)
    if isinstance(corpus, Mapping) and corpus.get("recall") is not None:
        named = recall if isinstance(recall, Mapping) else {}
        if not isinstance(recall, Settings) and named.get("judge") is None and named.get("address") is None:
            raise ValueError("corpus.recall: needs a section `recall` with `judge`, or `address`")
    return values


def give_chat_templates(values: Any) -> Any:
    """Return a recipe with the chat templates of sources and target that name none, if its corpus is conversations."""
    if not isinstance(values, Mapping) or not _has_conversations(values.get("corpus")):
        return values
    filled = dict(values)
    if isinstance(sources := values.get("sources"), list | tuple):
        filled["sources"] = [_with_template(source, MODEL) for source in sources]
    if isinstance(target := values.get("target"), Mapping | TargetConfig):
        pretrained = target.model if isinstance(target, TargetConfig) else target.get("model")
        filled["target"] = _with_template(target, MODEL if pretrained else PLAIN)
    return filled


def _has_conversations(corpus: Any) -> bool:
    if isinstance(corpus, CorpusConfig):
        return corpus.is_conversations
    return isinstance(corpus, Mapping) and (corpus.get("format") == "conversations" or bool(corpus.get("recall")))


def _with_template(model: Any, chosen: str) -> Any:
    """Return the settings of a source or a target with a chat template, if they have none."""
    if isinstance(model, Settings) and getattr(model, "chat_template", None) is None:
        return model.model_copy(update={"chat_template": chosen})
    if isinstance(model, Mapping) and model.get("chat_template") is None:
        return {**model, "chat_template": chosen}
    return model
