"""Turns of generated conversations in six real chat families, against transformers' own rendering and scoring.

Every conversation has words in many scripts, code or emoji; some have an empty system message, several turns of one
side in a row, tool calls, or words that look like control tokens. *Wrong rows* are turns whose tokens do not spell the
words that the template writes, byte for byte but for masked tokens of composed characters, or leave some uncovered.
*Wrong prompts* are those that do not spell what `apply_chat_template` writes, or hold other control tokens than with
harmless words. *Refused* turns are those that the template itself refuses. *Other first token* are harmless turns whose
tokens differ from those of the whole rendering: white space of their own melts with the template's there. Of all others
the sum of realised log-probabilities, the token that ends the turn included, is compared with a plain forward pass over
transformers' ids. Weights are random.

A second table says how many neighbouring turns of generated conversations the target reads in one pass, in the order
of single windows, and in that of the blocks that are streamed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from fusion_core.vocabulary.tokenizer_files import load_tokenizer
from services.corpus.ledger import TRAIN
from services.distill.data.join import join
from services.fusion.client import FusedWindow, StreamRequest
from services.fusion.order import StreamPlan
from services.models.chat_template import TurnRefusedError
from services.models.chat_tokenizer import ChatTokenizer, TurnTokens
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.messages import Message, Messages, read_messages
from services.wire.passage import Passage
from tests.bench.parts.chat_families import FAMILIES, drawn, make_model
from tests.bench.parts.report import Report, arguments
from tests.fakes.services.plain_fusion import plain_fusion
from tests.fakes.tiny_model import sentences

_CONVERSATIONS, _QUICK = 200, 24
_LOOK_ALIKES = 0.25
_PASS_WINDOWS = 128


@dataclass
class Tally:
    """What came of a family's conversations; `difference` is the largest of two sums of log-probabilities, in nats."""

    turns: int = 0
    refused: int = 0
    wrong_rows: int = 0
    wrong_prompts: int = 0
    look_alikes: int = 0
    other_first_token: int = 0
    unexplained: int = 0
    scored: int = 0
    difference: float = 0.0


def written(oracle: Any, messages: list[Message], content: str) -> str | None:
    """What transformers writes, None where the template refuses it; null contents are empty if it cannot write null."""
    whole = [*messages, {"role": "assistant", "content": content}]
    empty = [{**message, "content": message["content"] or ""} for message in whole]
    for form in (whole, empty) if "tool_calls" in oracle.chat_template else (empty,):
        try:
            text: str = oracle.apply_chat_template(form, tokenize=False)
        except (TypeError, TemplateError):
            continue
        return text
    return None


def spelled(chat: ChatTokenizer, ids: list[int]) -> str:
    names = {token_id: name.encode() for name, token_id in chat.vocabulary.special_tokens.items()}
    return b"".join(names.get(i) or chat.vocabulary.token_bytes(i) for i in ids).decode(errors="replace")


def rows_are_wrong(chat: ChatTokenizer, turn: TurnTokens, content: str) -> bool:
    """Whether the tokens are not the words: white space at either end may be the outer tokens', which are masked."""
    words, text = turn.words.without_end(), content.encode()
    token = [chat.vocabulary.token_bytes(int(i)) for i in words.token_ids_T]
    virtual = chat.vocabulary.num_virtual_bytes(words.token_ids_T, words.byte_ends_T)
    together = b"".join(token)[virtual:]
    untrimmed = together == text and bool(words.lossless_T.all())
    inner_good = bool(words.lossless_T[1:-1].all())
    trimmed = together.strip() == text.strip() and together in text and inner_good and text != text.strip()
    covers = int(words.byte_ends_T[-1]) == len(text)
    # Tokenizers that compose characters mask those tokens; what is left must be the same words.
    composed = [unicodedata.normalize("NFC", each.decode(errors="replace")).strip() for each in (together, text)]
    normalised = not words.lossless_T.all() and composed[0] == composed[1]
    return not covers or not (untrimmed or trimmed or normalised)


def span(oracle: Any, text: str, messages: list[Message]) -> tuple[list[int], int]:
    """The ids of a rendering, and the place of the first one that overlaps the words.

    They stand where the template puts a word that is nowhere else in the conversation.
    """
    other = written(oracle, messages, "Zzyzx")
    assert other is not None and other.count("Zzyzx") == 1
    encoding = oracle(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoding["offset_mapping"]]
    return encoding["input_ids"], next(place for place, end in enumerate(ends) if end > other.index("Zzyzx"))


async def measure(family: str, num_conversations: int, folder: Path) -> Tally:
    model = make_model(family, folder, seed=len(family))
    config = SourceConfig.model_validate(
        {"name": family.replace("_", "-"), "model": str(model), "engine": "transformers", "dtype": "float32"}
        | {"chat_template": "model", "top_k": 4, "max_tokens": 4000, "canary": {"interval_seconds": None}}
    )
    scorer = await Scorer.load(config, model)
    assert scorer.chat is not None
    chat, oracle, tally, rng = scorer.chat, load_tokenizer(model).tokenizer, Tally(), random.Random(family)
    names = [name for name in chat.vocabulary.special_tokens if "reserved" not in name][:40]
    try:
        for _ in range(num_conversations):
            look_alikes = rng.random() < _LOOK_ALIKES
            messages, content = drawn(rng, names, look_alikes=look_alikes)
            tally.turns += 1
            tally.look_alikes += look_alikes
            passage = Passage(content.encode(), b"", True, Messages(messages).to_bytes())
            text = written(oracle, messages, content)
            try:
                turn = chat.encode_turn(Messages(messages), passage.text, ends=True)
            except TurnRefusedError:
                tally.refused += 1
                tally.unexplained += text is not None
                continue
            if text is None:
                tally.unexplained += 1
                continue
            tally.wrong_rows += rows_are_wrong(chat, turn, content)
            tally.wrong_prompts += prompt_is_wrong(chat, turn, text, messages)
            if not look_alikes:
                await compare(scorer, oracle, tally, passage, text, turn)
    finally:
        scorer.engine.close()
    return tally


def prompt_is_wrong(chat: ChatTokenizer, turn: TurnTokens, text: str, messages: list[Message]) -> bool:
    first = [] if turn.first_id is None else [turn.first_id]
    ids = [*first, *turn.context_ids.tolist(), *turn.words.token_ids_T.tolist()]
    ours = spelled(chat, ids)
    if chat.vocabulary.has_dummy_prefix:  # spaces in front of words are the tokenizer's own
        ours, text = ours.replace(" ", ""), text.replace(" ", "")
    same = unicodedata.normalize("NFC", text).startswith(unicodedata.normalize("NFC", ours))
    harmless = [m if m["content"] is None else {**m, "content": m["content"] and "word"} for m in messages]
    plain = chat.encode_turn(Messages(harmless), b"word", ends=True)
    special = chat.vocabulary.special_ids
    control = [[i for i in each.context_ids.tolist() if i in special] for each in (turn, plain)]
    in_words = sum(int(i) in special for i in turn.words.without_end().token_ids_T)
    return not same or control[0] != control[1] or in_words > 0


async def compare(scorer: Scorer, oracle: Any, tally: Tally, passage: Passage, text: str, turn: TurnTokens) -> None:
    """Compare a turn's sum of log-probabilities with that of a forward pass over the whole rendering's ids."""
    ids, start = span(oracle, text, read_messages(passage.messages).messages)
    first = [] if turn.first_id is None else [turn.first_id]
    ours = [*first, *turn.context_ids.tolist(), *turn.words.token_ids_T.tolist()]
    if ours != ids[: len(ours)]:
        tally.other_first_token += 1
        tally.unexplained += not passage.text[:1].isspace()
        return
    [prompt] = scorer.encode([passage])
    block = await scorer.score(prompt, 4)
    model: Any = scorer.engine._model  # type: ignore[attr-defined]  # a forward pass of its own, on the same weights
    with torch.inference_mode():
        logits = model(torch.tensor([ids[: len(ours)]])).logits[0, start - 1 : len(ours) - 1]
    gold = logits[torch.arange(len(ours) - start), ids[start : len(ours)]] - logits.logsumexp(dim=-1)
    tally.scored += 1
    tally.difference = max(tally.difference, abs(float(gold.double().sum()) - float(block.gold_T.sum(dtype="float64"))))


def turns_together(number: int, folder: Path) -> dict[int, tuple[float, int]]:
    """By the length of blocks in the order: the share of neighbouring turns read in one pass, and tokens read.

    The conversations have 1 to 12 turns; their tokens come from the real service, and passes hold 128 windows.
    """
    draw = random.Random(0)
    chats = [
        [
            {"role": role, "content": sentences(draw.randint(20, 60), seed=draw.randrange(10**9)).strip()}
            for _ in range(draw.randint(1, 12))
            for role in ("user", "assistant")
        ]
        for _ in range(number)
    ]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    corpus_keys = {"files": [f"{folder}/chats.jsonl"], "format": "conversations", "shared_run_bytes": None}
    with plain_fusion(folder, windows=corpus_keys, chat_templates=["plain", "plain"]) as fusion:
        request = StreamRequest(dataset="words", split=TRAIN, seed=0, tokens_only=True)
        windows = [window for window in fusion.client().stream(request) if isinstance(window, FusedWindow)]
    by_index = {window.index: window for window in windows}
    neighbours = sum(n + 1 in by_index and by_index[n + 1].document == by_index[n].document for n in by_index)
    found = {}
    for block in (1, 8):
        order = [window.index for window in StreamPlan("", len(windows), 0, 0, 1, 1, block).windows(None)]
        readings = [
            reading
            for start in range(0, len(order), _PASS_WINDOWS)
            for reading in join([by_index[index].block for index in order[start : start + _PASS_WINDOWS]])
        ]
        places = {id(window.block): window.index for window in windows}
        read = [[places[id(block)] for block in reading.blocks] for reading in readings]
        together = sum(one + 1 == other for turns in read for one, other in itertools.pairwise(turns))
        found[block] = together / neighbours, sum(reading.num_inputs for reading in readings)
    return found


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report, number = Report("conversations"), _QUICK if options.quick else _CONVERSATIONS
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tally = asyncio.run(measure(family, number, Path(folder)))
        report.row(
            family=family,
            conversations=tally.turns,
            **{"with look-alikes": tally.look_alikes, "refused": tally.refused, "wrong rows": tally.wrong_rows},
            **{"wrong prompts": tally.wrong_prompts, "other first token": tally.other_first_token},
            **{"scored": tally.scored, "largest difference (nats)": tally.difference},
        )
        wrong = tally.wrong_rows + tally.wrong_prompts + tally.unexplained
        report.check(f"turns with wrong rows or prompts, {family}", wrong, "turns", at_most=0)
        report.check(f"turns scored against transformers, {family}", tally.scored, "turns", at_least=number // 5)
        report.check(f"sum of log-probabilities, {family}", tally.difference, "nats", at_most=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        found = turns_together(_QUICK if options.quick else 3 * _CONVERSATIONS, Path(folder))
    for block, (share, num_tokens) in found.items():
        report.row(table="turns in one pass", **{"windows in a block": block, "neighbours together": share})
        report.rows[-1]["tokens read"] = num_tokens
    report.check("neighbouring turns read in one pass", found[8][0], "share", at_least=0.8)
    report.finish(options.json)


if __name__ == "__main__":
    main()
