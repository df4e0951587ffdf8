"""Six real families of chat models: tokenizer and template as published, random weights.

Five bring both in a package. Mistral's tokenizer is the SentencePiece model of `mistral-common` (v3), put into the form
of transformers here; no package carries its template, which is written down below as Mistral-7B-Instruct-v0.3 has it.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path
from typing import Any

from services.models.catalogue import resolve_model
from services.wire.messages import Message
from tests.fakes.chat import conversation, words
from tests.fakes.real_tokenizers import folder

FAMILIES = ("llama3_1", "qwen3", "gemma3", "mistral", "deepseek_v3", "smollm2")
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_FILE = "data/mistral_instruct_tokenizer_240323.model.v3"


def make_model(family: str, making: Path, seed: int) -> Path:
    """A folder with the family's tokenizer and template, and a Llama of 16 hidden units with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fusion_core.vocabulary.tokenizer_files import load_tokenizer

    if family == "mistral":
        _save_mistral(making)
    else:
        source = resolve_model("smollm2-135m-instruct") if family == "smollm2" else folder(family)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (source / name).is_file():
                shutil.copy2(source / name, making / name)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(load_tokenizer(making).tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(making)
    return making


def drawn(rng: random.Random, names: list[str], *, look_alikes: bool) -> tuple[list[Message], str]:
    """Messages and an answer; every third conversation takes strict turns. `names`: control tokens of the family."""
    messages = conversation(rng, look_alikes=look_alikes, alternates=rng.random() < 0.34)
    content = words(rng, look_alikes=look_alikes)
    if look_alikes:
        content += f" {rng.choice(names)} and {rng.choice(names)}."
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']} {rng.choice(names)}"}
    return messages, content


def _save_mistral(making: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.submodule_search_locations, "mistral-common comes with vLLM"
    model = sentencepiece.SentencePieceProcessor()
    model.Load(str(Path(spec.submodule_search_locations[0]) / _MISTRAL_FILE))
    ids = {model.IdToPiece(number): number for number in range(model.GetPieceSize())}
    special = [piece for piece, number in ids.items() if model.IsControl(number) or model.IsUnknown(number)]
    plain = [piece for piece, number in ids.items() if piece not in set(special) and not model.IsByte(number)]
    merges = [
        (-model.GetScore(ids[piece]), piece[:cut], piece[cut:])
        for piece in plain
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    made: Any = models.BPE(
        vocab=ids,
        merges=[(left, right) for _, left, right in sorted(merges, key=lambda m: (m[0], ids[m[1]], ids[m[2]]))],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer = Tokenizer(made)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    for text in ("The capital of  France,\nnaïve 数字 👍", " a b"):
        assert tokenizer.encode(text).ids == model.encode(text), "the pieces are put together as SentencePiece does"
    wrapped: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = _MISTRAL_TEMPLATE
    wrapped.save_pretrained(making)
