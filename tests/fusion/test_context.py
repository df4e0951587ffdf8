"""Left context for the target: its own tokens of the text before a window, in fused blocks and in plain ones."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from fusion_core.vocabulary import Vocabulary
from services.commands.prepare import corpus_and_target
from services.corpus.ledger import TRAIN, Corpus, Window
from services.fusion.client import FusedWindow, StreamRequest
from services.models.prompt import encode_passages
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion
from tests.fakes.tiny_model import sentences
from tests.fakes.tokenizers import train

STREAM = StreamRequest(dataset="words", split=TRAIN, seed=0)


def windows_of(fusion: PlainFusion) -> dict[int, Window]:
    corpus = Corpus.open(fusion.recipe.corpus_folder)
    return {index: corpus.window(TRAIN, index) for index in range(corpus.num_windows(TRAIN))}


def fused(fusion: PlainFusion, **changes: Any) -> dict[int, FusedWindow]:
    stream = fusion.client().stream(replace(STREAM, **changes))
    return {window.index: window for window in stream if isinstance(window, FusedWindow)}


def test_blocks_hold_the_targets_tokens_of_the_context(tmp_path: Path) -> None:
    with plain_fusion(tmp_path, windows={"context_bytes": 96}) as fusion:
        windows, target = windows_of(fusion), Vocabulary.from_pretrained(fusion.recipe.target_folder)
        assert sum(bool(window.context) for window in windows.values()) > 10
        streamed, tokens = fused(fusion), fused(fusion, tokens_only=True)
        assert streamed.keys() == tokens.keys() == windows.keys()
        for index, window in windows.items():
            for block in (streamed[index].block, tokens[index].block):
                assert block.context_ids_C.tolist() == target.encode(window.context).token_ids_T.tolist()
                spelled = b"".join(target.token_bytes(int(i)) for i in (*block.context_ids_C, *block.token_ids_T))
                assert spelled == window.context + window.text
            assert streamed[index].block.mask_T.all()
        some = [window for window in windows.values() if window.context][:3]
        for window, block in zip(some, fusion.client().fuse([w.passage for w in some]), strict=True):
            np.testing.assert_array_equal(block.context_ids_C, streamed[window.index].block.context_ids_C)
            np.testing.assert_allclose(block.gold_T, streamed[window.index].block.gold_T, atol=1e-5)
        assert json.loads(fusion.client().info().settings["corpus.target_context"]) is True


def test_a_target_that_reads_windows_alone_has_no_context(tmp_path: Path) -> None:
    with plain_fusion(tmp_path, windows={"context_bytes": 96, "target_context": False}) as fusion:
        assert json.loads(fusion.client().info().settings["corpus.target_context"]) is False
        windows, target = windows_of(fusion), Vocabulary.from_pretrained(fusion.recipe.target_folder)
        assert any(window.context for window in windows.values()), "the sources read it"
        for index, streamed in fused(fusion).items():
            assert streamed.block.context_ids_C.size == 0
            assert streamed.block.token_ids_T[: streamed.block.num_text_tokens].tolist() == (
                target.encode(windows[index].text).token_ids_T.tolist()
            )
        passages = [window.passage for window in itertools.islice(windows.values(), 3)]
        assert not any(block.context_ids_C.size for block in fusion.client().fuse(passages))


def test_a_window_behind_its_context_has_no_dummy_prefix(tmp_path: Path) -> None:
    """The target's tokens, and the rows that are aligned with them, are those of the undivided text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train("llama", 640), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "llama")
    documents = [sentences(300, seed=number).encode("ascii", "ignore").decode() for number in range(12)]
    windows = {"context_bytes": 10_000}
    with plain_fusion(
        tmp_path, windows=windows, documents=documents, tokenizer=str(tmp_path / "llama"), max_text_bytes=20_000
    ) as fusion:
        target = Vocabulary.from_pretrained(fusion.recipe.target_folder)
        assert target.has_dummy_prefix
        ledger, streamed, later = windows_of(fusion), fused(fusion), 0
        for index, window in ledger.items():
            block = streamed[index].block
            if window.context and not window.ends_document:
                later += 1
                assert block.mask_T.all()
                whole = target.encode(window.context + window.text).token_ids_T.tolist()
                assert [*block.context_ids_C, *block.token_ids_T] == whole
        assert later > 5


def test_context_and_window_fit_the_target(tmp_path: Path) -> None:
    """The target's positions bound both together, also where every source could take more."""
    windows = {"context_bytes": 400, "name": "words"}
    with plain_fusion(tmp_path, windows=windows, max_positions=128) as fusion:
        corpus = corpus_and_target(fusion.recipe)
        target = Vocabulary.from_pretrained(fusion.recipe.target_folder)
        passages = [window.passage for window in windows_of(fusion).values()]
        sizes = [prompt.num_tokens for prompt in encode_passages(target, passages)]
        assert 100 < max(sizes) <= 128
        assert corpus.record["splits"][TRAIN]["num_shortened_contexts"] > 0
        assert max(window.block.num_inputs for window in fused(fusion).values()) == max(sizes)
