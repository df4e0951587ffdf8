"""Tasks of lm-evaluation-harness in local files against likelihoods computed with transformers alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.evaluation.harness import evaluate_tasks, read_tasks, score_tasks

_CHOICES = [" the sun", " a dog ran", " it is", " we"]
_ROWS = [
    {"question": question, "choices": _CHOICES, "answer": number % 4}
    for number, question in enumerate(("a b", "the dog", "one", "the sun is", "it", "a", "we ran", "so is it"))
]


@pytest.fixture
def tasks(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    return tmp_path


def likeliest(folder):
    """The number of the likeliest choice of every question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in _ROWS:
        sums = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            with torch.no_grad():
                logprobs = model(ids).logits[0].double().log_softmax(-1)
            sums.append(float(logprobs[:-1].gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        found.append(max(range(len(sums)), key=sums.__getitem__))
    return found


def test_scores_are_those_of_the_likeliest_choice(target, tasks):
    expected = [float(choice == row["answer"]) for choice, row in zip(likeliest(target), _ROWS, strict=True)]
    assert score_tasks(target, tasks, device="cpu")["toy"].tolist() == expected
    assert evaluate_tasks(target, tasks, device="cpu")["toy"]["acc,none"] == pytest.approx(sum(expected) / len(_ROWS))
    assert 0 < sum(expected) < len(_ROWS)


def test_the_identity_of_a_task_is_that_of_its_documents_and_settings(tasks):
    before = read_tasks(tasks)["toy"]
    assert before.number == len(_ROWS)
    assert read_tasks(tasks)["toy"] == before
    file = tasks / "toy.yaml"
    file.write_text(file.read_text().replace("target_delimiter: ''", "target_delimiter: ' '"))
    settings = read_tasks(tasks)["toy"]
    rows = [*_ROWS[:-1], {**_ROWS[-1], "answer": 0}]
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len({before.identity, settings.identity, read_tasks(tasks)["toy"].identity}) == 3


def test_what_is_not_here_is_refused_and_not_fetched(target, tmp_path):
    with pytest.raises(ValueError, match=r"--tasks: no \*.yaml in"):
        evaluate_tasks(target, tmp_path)
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: somebody/something\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{a}}'\ndoc_to_choice: '{{b}}'\ndoc_to_target: '{{c}}'\nmetric_list: [{metric: acc}]\n"
    )
    with pytest.raises(ValueError, match="--tasks: far on "):
        evaluate_tasks(target, tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"far in .*"):
        read_tasks(tmp_path)


def test_a_broken_file_is_named(tasks):
    (tasks / "data.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=r"toy in .*JSON"):
        read_tasks(tasks)
    (tasks / "second.yaml").write_text("task: [a\n b: {")
    with pytest.raises(ValueError, match=r"second\.yaml is no YAML"):
        read_tasks(tasks)
    for file in tasks.glob("*.yaml"):
        file.unlink()
    (tasks / "none.yaml").write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match="no task in "):
        read_tasks(tasks)
