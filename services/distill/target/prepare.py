"""The target before distillation: a Hugging Face folder that training starts from and the fusion service reads."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from fusion_core.vocabulary.tokenizer_files import load_tokenizer
from services.base.atomic import whole_folder, write_whole
from services.distill.target.config import DecoderConfig, TargetConfig
from services.distill.target.tokenizer import train_tokenizer
from services.models.catalogue import RECORD as FETCHED
from services.models.weights import CHAT_TEMPLATES, check_head, quiet, write_errors_named

_RECORD = "target.json"
_KEYS = {"target": "target", "seed": "distill.seed", "corpus": "corpus"}
"""Keys of a recipe by the part of the record that they decide."""
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja", f"{CHAT_TEMPLATES}/*.jinja")
"""Files that are taken from a pretrained folder; pickled weights and code are left behind."""
_RECORDS = {_RECORD, FETCHED}
"""Files that record the making of their own folder."""


def prepare_target(
    config: TargetConfig, corpus_texts: Iterable[str], folder: Path, seed: int, *, corpus_fingerprint: str = ""
) -> Path:
    """Make `folder` (tokenizer and weights at a fixed seed) unless it is there already; return it.

    Args:
        config: the target's.
        corpus_texts: the texts of the train split; read only when a tokenizer has to be trained.
        folder: appears complete or not at all.
        seed: of the random weights.
        corpus_fingerprint: identity of `corpus_texts`; a folder made from another corpus is then refused.

    Raises ValueError when the folder holds a target made otherwise, or naming the key that cannot be honoured.
    """
    # Later keys: earlier records lack the one, and the other decides neither tokenizer nor weights.
    unset = {"chat_template", *(["architecture"] if config.architecture is None else [])}
    record = {"target": config.model_dump(mode="json", exclude=unset), "seed": seed, "corpus": corpus_fingerprint}
    if config.tokenizer is None or config.tokenizer.train is None:
        record["corpus"] = ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            _check_same(record, folder)
            return folder
        with whole_folder(folder) as making:
            if config.model is not None:
                _link_pretrained(config.model, making)
            else:
                _initialise(config, corpus_texts, making, seed)
            write_whole(making / _RECORD, json.dumps(record, indent=2))
    return folder


def _check_same(record: dict[str, Any], folder: Path) -> None:
    try:
        found = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"target: {folder} exists and is no prepared target; remove it or rename the run") from error
    for key, value in record.items():
        if found.get(key) != value:
            raise ValueError(
                f"{_KEYS[key]}: {folder} was made with {json.dumps(found.get(key))}, now {json.dumps(value)} is asked "
                "for; remove the folder or rename the run"
            )


def _link_pretrained(model: str, folder: Path) -> None:
    """Put the files of a pretrained model into the folder: links where the file system can, copies elsewhere."""
    source = Path(model)
    if not source.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            source = Path(snapshot_download(model, allow_patterns=list(_FILES)))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"target.model: {model} is no folder, and the hub does not give it: {error}") from error
    if not (source / "config.json").is_file() or not list(source.glob("*.safetensors")):
        raise ValueError(f"target.model: {source} has no config.json or no *.safetensors")
    for pattern in _FILES:
        for file in source.glob(pattern):
            if file.name in _RECORDS:
                continue
            placed = folder / file.relative_to(source)
            placed.parent.mkdir(exist_ok=True)
            try:
                os.link(file.resolve(), placed)
            except OSError:
                shutil.copy2(file, placed)


def _initialise(config: TargetConfig, corpus_texts: Iterable[str], folder: Path, seed: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert config.tokenizer is not None
    shape = shape_of(config)
    if config.tokenizer.train is not None:
        max_tokens = getattr(shape, "max_position_embeddings", DecoderConfig().max_positions)
        train_tokenizer(corpus_texts, config.tokenizer.train.vocabulary_size, folder, max_tokens=max_tokens)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    else:
        assert config.tokenizer.folder is not None
        try:
            tokenizer = load_tokenizer(config.tokenizer.folder).tokenizer
        except ValueError as error:
            raise ValueError(f"target.tokenizer: cannot be loaded from {config.tokenizer.folder}: {error}") from error
        with write_errors_named(folder):
            tokenizer.save_pretrained(folder)
    shape.vocab_size = len(tokenizer)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(shape, role, getattr(tokenizer, role))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            from_config: Any = AutoModelForCausalLM.from_config
            model = from_config(shape, dtype=torch.float32)
        except ValueError as error:
            raise ValueError(f"target.architecture: {shape.model_type} is no causal language model here") from error
    check_head(model)
    with quiet(), write_errors_named(folder):
        model.save_pretrained(folder)


def shape_of(config: TargetConfig) -> Any:
    """Return the configuration, for transformers, of a target from scratch; its ids come from the tokenizer later.

    Raises ValueError naming the key that transformers does not know.
    """
    from transformers import AutoConfig, LlamaConfig

    if config.architecture is not None:
        values = dict(config.architecture)
        model_type = values.pop("model_type")
        try:
            default = AutoConfig.for_model(model_type)
        except ValueError as error:
            raise ValueError(f"target.architecture.model_type: transformers does not know {model_type}") from error
        known = {*default.to_dict(), *default.attribute_map, *inspect.signature(type(default)).parameters}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"target.architecture.{unknown[0]}: the configuration of {model_type} has no such key")
        return AutoConfig.for_model(model_type, **values)
    assert config.config is not None
    shape = config.config
    return LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads or shape.num_heads,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
    )
