"""Labels of SFT: the answer's tokens and its end, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.posttrain.config import PosttrainConfig
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.job import StageJob
from services.posttrain.stages.sft import labelled_rows
from tests.fakes.chat import CHATML, chat_tokenizer


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    chat_tokenizer("byte_level", "chatml").save_pretrained(folder)
    return folder


def test_only_the_answers_tokens_have_labels(chat_folder: Path, tmp_path: Path) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The cat <|im_end|> sat?"}]
    rows = [{"prompt": conversation, "completion": "Yes, there."}, {"prompt": "The cat ", "completion": "sat there"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PosttrainConfig.model_validate(
        {"stages": [{"kind": "sft", "data": ["-"]}], "gate": {"prompts": ["-"]}, "chat_template": CHATML}
    )
    job = StageJob("1-sft", tmp_path, chat_folder, config.stages[0], config, "")
    tokenizer = chat_tokenizer("byte_level", "chatml")
    turn, text = labelled_rows(job, 500)
    with_loss = [i for i in turn["labels"] if i != -100]
    assert tokenizer.decode(with_loss) == "Yes, there.<|im_end|>"
    assert turn["input_ids"][-len(with_loss) :] == with_loss
    before = turn["input_ids"][: -len(with_loss)]
    assert tokenizer.decode(before).endswith("sat?<|im_end|>\n<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert before.count(end) == 2, "the user's words are no control token"
    assert tokenizer.decode([i for i in text["labels"] if i != -100]) == "sat there<eos>"
    assert tokenizer.decode(text["input_ids"]) == "<bos>The cat sat there<eos>"


def test_sampled_ids_become_text_up_to_the_end_of_the_turn(chat_folder: Path) -> None:
    tokens = PromptTokens(chat_folder, None)
    _, answer = tokens.with_answer([{"role": "user", "content": "Well?"}], "the mat")
    assert tokens.text_of([*answer, 5, 6]) == ("the mat", True)
    assert tokens.text_of(answer[:-1]) == ("the mat", False)
