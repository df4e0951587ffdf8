"""A document's start, the edge of a window and its end, scored by two real models with BOS and EOS habits of their own.

The oracle is a plain forward pass of transformers over the undivided document with its tokenizer's own ids. SmolLM2 is
asked over gRPC, where vLLM scores it; Gemma through the source's scorer.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.corpus.ledger import Corpus
from services.corpus.windows import Reader, plan_windows
from services.fusion.client import StreamRequest
from services.models.catalogue import resolve_model
from services.source.client import SourceClient
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.passage import Passage
from tests.fakes.live import REAL_MODEL, Live

pytestmark = pytest.mark.timeout(900)

DOCUMENT = (
    "The ferry to the island leaves at nine in the morning and comes back at five. It takes forty minutes, or an hour "
    "when the wind is against it. Passengers are asked to be there a quarter of an hour early; bicycles travel free.\n"
    "\nOn Sundays there is no ferry. Whoever wants to stay overnight finds two hotels at the harbour — the Anchor "
    "and the Café Zürich — and a camp site behind the dunes. Thank you for reading, and have a good journey."
).encode()
BOS_AND_EOS = {REAL_MODEL: ("<|endoftext|>", "<|endoftext|>"), "gemma-3-270m": ("<bos>", "<eos>")}
WINDOW_BYTES = 200


def passages_of_the_document(vocabulary: Vocabulary) -> list[Passage]:
    """Its windows, each with all that comes before it."""
    reader = Reader("source", vocabulary, None, reads_context=True)
    [windows] = plan_windows([DOCUMENT], WINDOW_BYTES, len(DOCUMENT), [reader])
    assert len(windows) >= 3 and all(window.at_boundary and window.context_start == 0 for window in windows)
    return [Passage(DOCUMENT[w.start : w.end], DOCUMENT[: w.start], w.end == len(DOCUMENT)) for w in windows]


def oracle(folder: Path, bos: str, eos: str) -> tuple[list[int], npt.NDArray[np.float64]]:
    """The document's ids with EOS behind them, and [T + 1, V] log-probabilities of each from all before it."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(DOCUMENT.decode(), add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([[tokenizer.convert_tokens_to_ids(bos), *ids]])).logits[0]
    return [*ids, tokenizer.convert_tokens_to_ids(eos)], torch.log_softmax(logits.double(), dim=-1).numpy()


def check(blocks: list[Block], ids: list[int], logprobs_TV: npt.NDArray[np.float64]) -> None:
    """All windows together are the rows of the undivided document, the first after BOS, the last about EOS."""
    for block in blocks:
        block.validate()
    assert [block.ends_document for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert np.concatenate([block.token_ids_T for block in blocks]).tolist() == ids
    gold_T = np.concatenate([block.gold_T for block in blocks])
    np.testing.assert_allclose(gold_T, logprobs_TV[np.arange(len(ids)), ids], atol=2e-3)
    topk_TK = np.concatenate([block.topk_logprobs_TK for block in blocks])
    order_TK = np.sort(logprobs_TV, axis=1)[:, ::-1][:, : topk_TK.shape[1]]
    np.testing.assert_allclose(topk_TK, order_TK, atol=5e-3)
    last = blocks[-1]
    assert last.byte_ends_T[-1] == last.byte_ends_T[-2] == len(last.text_bytes)
    best = int(logprobs_TV[-1].argmax())
    assert int(last.topk_ids_TK[-1, 0]) == best
    tail = 1.0 - np.exp(order_TK[-1]).sum()
    assert np.exp(last.tail_T[-1]) == pytest.approx(tail, abs=1e-3)


def test_smollm2_on_vllm_over_grpc(live: Live) -> None:
    folder = resolve_model(REAL_MODEL)

    async def ask() -> list[Block]:
        client = SourceClient(live.deployment.grpc_address, "smollm2")
        try:
            info = await client.info()
            assert (info.bos_token, info.eos_token) == BOS_AND_EOS[REAL_MODEL]
            return await client.score(passages_of_the_document(Vocabulary.from_pretrained(folder)), top_k=16)
        finally:
            await client.close()

    check(asyncio.run(ask()), *oracle(folder, *BOS_AND_EOS[REAL_MODEL]))


def test_gemma_through_the_scorer(home: Path) -> None:
    folder = resolve_model("gemma-3-270m")
    config = SourceConfig(name="gemma3", model="gemma-3-270m", engine="transformers", dtype="float32", top_k=16)

    async def ask() -> list[Block]:
        scorer = await Scorer.load(config, folder)
        assert (scorer.bos_token, scorer.eos_token) == BOS_AND_EOS["gemma-3-270m"]
        try:
            prompts = scorer.encode(passages_of_the_document(scorer.vocabulary))
            return [await scorer.score(prompt, 16) for prompt in prompts]
        finally:
            scorer.engine.close()

    ids, logprobs_TV = oracle(folder, *BOS_AND_EOS["gemma-3-270m"])
    check(asyncio.run(ask()), ids, logprobs_TV)
    # It knows an end when it sees one: EOS there is far likelier than anywhere before.
    assert logprobs_TV[-1, ids[-1]] > logprobs_TV[1:-1, ids[-1]].max()


def test_the_stream_carries_end_rows_into_the_target(live: Live) -> None:
    """Every document ends once, in the target's EOS, fused from both sources, in the control stream too."""
    corpus, target = Corpus.open(live.recipe.corpus_folder), Vocabulary.from_pretrained(live.recipe.target_folder)
    request = StreamRequest(dataset="sentences", split="held_out", seed=0)
    plain = StreamRequest(dataset="sentences", split="held_out", seed=0, tokens_only=True)
    num_ended = 0
    for window, control in zip(live.client.stream(request), live.client.stream(plain), strict=True):
        block = window.block
        assert block.ends_document == corpus.window("held_out", window.index).ends_document
        np.testing.assert_array_equal(block.token_ids_T, control.block.token_ids_T)
        if block.ends_document:
            num_ended += 1
            assert block.token_ids_T[-1] == target.eos_id and block.mask_T[-1]
            assert target.eos_id in block.topk_ids_TK[-1]
            assert 0 > block.gold_T[-1] > -40
    assert num_ended == len({corpus.window("held_out", i).document for i in range(corpus.num_windows("held_out"))})
