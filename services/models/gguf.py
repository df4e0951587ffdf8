"""Turn a GGUF file into a Hugging Face folder in float32: `python -m services.models.gguf GGUF FOLDER`.

The conversion is a process of its own: it takes several times the model's memory, and its output stays apart.
transformers rebuilds weights and tokenizer from the GGUF. Two details of tokenizers that it leaves out are corrected
here, and the result is compared with the file's own vocabulary before it is saved.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF format
_SPACE = "▁"
_PROBE = "The quick brown fox jumps over the lazy dog. Water is made of hydrogen and oxygen."
_PROBE_MAX_NATS_PER_BYTE = 2.0
"""Most nats per byte on the probe: uniform guessing over 50k tokens costs about 2.5, a working model less than 1."""


def convert(gguf_path: Path, folder: Path) -> None:
    """Write config, float32 weights and tokenizer to `folder`; raises ValueError where they contradict the GGUF."""
    import gguf

    # transformers opens the file three times, and reading 262k strings takes the reader 15 s each time.
    gguf.GGUFReader = cache(gguf.GGUFReader)  # type: ignore[assignment, misc]
    fields = {key: field.contents() for key, field in gguf.GGUFReader(str(gguf_path)).fields.items()}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer = rebuild_tokenizer(loaded, fields)
    check_tokenizer(tokenizer, fields)
    tokenizer.save_pretrained(folder)

    model: Any = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are not quantised any more, and save_pretrained refuses if it is told so
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _check_model(model, tokenizer)
    model.save_pretrained(folder)


def rebuild_tokenizer(loaded: Any, fields: dict[str, Any]) -> Any:
    """Return the tokenizer that the GGUF describes, with tokenizer.json as the only description of it.

    It is not of the model's own tokenizer class: such a class may rebuild the pipeline and ignore the file.
    """
    from tokenizers import Regex, pre_tokenizers
    from transformers import TokenizersBackend

    backend = loaded.backend_tokenizer
    if fields.get("tokenizer.ggml.pre") == "smollm":
        # Every digit is a word of its own before the byte-level split; without it runs of spaces before numbers differ.
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif longest := _longest_space_run(fields):
        # SentencePiece takes user-defined tokens, runs of spaces among them, longest first and before any merge.
        runs = Regex(f"{_SPACE}{{2,{longest}}}")
        backend.pre_tokenizer = pre_tokenizers.Split(runs, behavior="isolated")
    roles = {role: getattr(loaded, role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokenizer = TokenizersBackend(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        add_bos_token=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        **{role: token for role, token in roles.items() if token is not None},
    )
    tokenizer.chat_template = loaded.chat_template
    return tokenizer


def _longest_space_run(fields: dict[str, Any]) -> int:
    """Return the length of the longest user-defined token made of spaces; 0 where there is none."""
    typed = zip(fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", []), strict=False)
    runs = [len(piece) for piece, kind in typed if kind == _USER_DEFINED and set(piece) <= {" ", _SPACE}]
    return max((run for run in runs if run > 1), default=0)


def check_tokenizer(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Raise ValueError unless every id, every special role and the handling of BOS are those of the GGUF."""
    pieces, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    backend = tokenizer.backend_tokenizer
    if backend.get_vocab_size(with_added_tokens=True) != len(pieces):
        raise ValueError(f"tokenizer: {backend.get_vocab_size()} ids, the GGUF has {len(pieces)}")
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token_id, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        spaces = len(piece) > 1 and set(piece) <= {" "}
        found = backend.id_to_token(token_id)
        if found != (_SPACE * len(piece) if spaces else piece):
            raise ValueError(f"tokenizer: id {token_id} is {found!r}, the GGUF has {piece!r}")
        if kind == _CONTROL and token_id not in special:
            raise ValueError(f"tokenizer: id {token_id} ({piece!r}) is a control token, but not marked special")
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        expected = fields.get(f"tokenizer.ggml.{key}_token_id")
        if expected is not None and getattr(tokenizer, f"{role}_token_id") != expected:
            raise ValueError(f"tokenizer: {role} is {getattr(tokenizer, f'{role}_token_id')}, the GGUF has {expected}")
    front = [tokenizer.bos_token_id] if fields.get("tokenizer.ggml.add_bos_token") else []
    for text in ("a b", "\n\n \t", "  é漢🙂\u0001", " 1 23   456"):
        ids = backend.encode(text).ids
        if ids[: len(front)] != front or backend.decode(ids[len(front) :], skip_special_tokens=False) != text:
            raise ValueError(f"tokenizer: {text!r} does not survive encoding and decoding")


def _check_model(model: Any, tokenizer: Any) -> None:
    """Raise ValueError for a model whose loss on plain English is that of garbled weights."""
    import torch

    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([[tokenizer.bos_token_id, *ids]])
    with torch.inference_mode():
        loss = float(model(input_ids=inputs, labels=inputs).loss) * len(ids) / len(_PROBE.encode())
    if not math.isfinite(loss) or loss > _PROBE_MAX_NATS_PER_BYTE:
        raise ValueError(f"model: {loss:.2f} nats per byte on plain English, expected less than 2: broken weights")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
