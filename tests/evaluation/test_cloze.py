"""Cloze tasks: the right choice is the text, the others are not in it; the harness counts what a plain loop does."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.corpus.ledger import Window
from services.evaluation.cloze import Question, cloze_questions, write_cloze_tasks
from services.evaluation.harness import evaluate_tasks

_rng = random.Random(7)
WORDS = ["".join(_rng.choices("abcdeioust", k=_rng.randint(4, 8))) for _ in range(400)]


def window_of(number: int, domain: str = "") -> Window:
    rng = random.Random(number)
    sentences = [" ".join(rng.choices(WORDS, k=9)).capitalize() + ", he said. " for _ in range(12)]
    return Window("".join(sentences).encode(), f"file#{number}", 0, number, b"", True, domain=domain)


WINDOWS = [window_of(number) for number in range(12)]


def test_the_right_choice_is_the_text_and_the_others_are_not() -> None:
    questions = cloze_questions(WINDOWS, per_document=3, seed=1)
    texts = {window.document: window.text.decode() for window in WINDOWS}
    assert len(questions) == 36 and len(set(questions)) == 36
    assert {question.answer for question in questions} == {0, 1, 2, 3}
    for question in questions:
        text, right = texts[question.document], question.choices[question.answer]
        assert question.context + right in text and len(question.context) >= 80
        assert len(set(question.choices)) == 4 and right.endswith(".")
        behind = right.lstrip(" ").partition(",")[2]
        for choice in question.choices:
            word = choice.split()[0].strip(",.")
            assert choice.startswith(" ") and choice.endswith(behind)
            assert (word.lower() in (question.context + right).lower()) == (choice == right)
            assert any(word in other for other in texts.values())


def test_the_same_seed_asks_the_same_and_a_document_s_questions_need_no_other_document_s() -> None:
    first = cloze_questions(WINDOWS, per_document=2, seed=1)
    assert cloze_questions(WINDOWS, per_document=2, seed=1) == first
    assert cloze_questions(WINDOWS, per_document=2, seed=2) != first
    backwards = cloze_questions(WINDOWS[::-1], per_document=2, seed=1)
    assert {(q.document, q.context) for q in backwards} == {(q.document, q.context) for q in first}


def test_every_domain_is_a_task_with_words_of_its_own(tmp_path: Path) -> None:
    other = [replace(window_of(n, "b/c"), text=window_of(n).text.upper()) for n in range(20, 26)]
    questions = cloze_questions([*(replace(w, domain="a") for w in WINDOWS), *other], per_document=2, seed=1)
    assert write_cloze_tasks(questions, tmp_path) == {"cloze_a": 24, "cloze_b_c": 12}
    for question in questions:
        assert question.domain != "b/c" or all(choice.split()[0].isupper() for choice in question.choices)
    lines = (tmp_path / "cloze_a.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [q.answer for q in questions if q.domain == "a"]
    assert yaml.safe_load((tmp_path / "cloze_b_c.yaml").read_text())["task"] == "cloze_b_c"


def test_domains_that_would_share_a_task_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    domains = [replace(window, domain=("c+", "c-", "d")[window.index % 3]) for window in WINDOWS]
    with pytest.raises(ValueError, match=r"the domains 'c\+' and 'c-' would both be the task cloze_c_"):
        write_cloze_tasks(cloze_questions(domains, per_document=2, seed=1), tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_texts_that_are_too_short_are_refused(tmp_path: Path) -> None:
    short = [replace(window, text=b"A few words only.") for window in WINDOWS]
    with pytest.raises(ValueError, match="cloze: the documents are too short"):
        write_cloze_tasks(cloze_questions(short, per_document=2, seed=1), tmp_path)


def right_answers(folder: Path, questions: list[Question]) -> dict[str, float]:
    """The harness' two scores, by a loop over the choices."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    hits = {"acc": 0, "acc_norm": 0}
    for question in questions:
        before = len(tokenizer(question.context, add_special_tokens=False).input_ids)
        scores = []
        for choice in question.choices:
            ids = tokenizer(question.context + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            scores.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(before, len(ids))))
        lengths = [len(choice.encode()) for choice in question.choices]
        hits["acc"] += scores.index(max(scores)) == question.answer
        normed = [score / length for score, length in zip(scores, lengths, strict=True)]
        hits["acc_norm"] += normed.index(max(normed)) == question.answer
    return {name: number / len(questions) for name, number in hits.items()}


def test_the_harness_counts_what_a_plain_loop_counts(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    questions = cloze_questions(WINDOWS[:8], per_document=2, seed=1)
    write_cloze_tasks(questions, tmp_path / "tasks")
    found = evaluate_tasks(target, tmp_path / "tasks", device="cpu")["cloze"]
    expected = right_answers(target, questions)
    assert (found["acc,none"], found["acc_norm,none"]) == (expected["acc"], expected["acc_norm"])
