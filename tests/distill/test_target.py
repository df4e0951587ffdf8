"""Settings of target and training, and the folder that training starts from."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_core.vocabulary import Vocabulary
from services.base.settings import explain
from services.distill.config import DistillConfig
from services.distill.learning_rate import learning_rate
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from tests.fakes.fusion_stream import corpus

TEXTS = [text.decode() for text in corpus(50)]
SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 48, "max_positions": 64}


def from_scratch(size: int = 300, **shape: object) -> TargetConfig:
    return TargetConfig.model_validate({"config": SHAPE | shape, "tokenizer": {"train": {"vocabulary_size": size}}})


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_same_settings_same_target(tmp_path):
    first = prepare_target(from_scratch(), iter(TEXTS), tmp_path / "a", seed=4)
    second = prepare_target(from_scratch(), iter(TEXTS), tmp_path / "b", seed=4)
    assert digests(first) == digests(second)
    other = prepare_target(from_scratch(), iter(TEXTS), tmp_path / "c", seed=5)
    assert digests(first)["tokenizer.json"] == digests(other)["tokenizer.json"]
    assert digests(first)["model.safetensors"] != digests(other)["model.safetensors"]


def test_the_tokenizer_is_lossless_and_has_roles_of_its_own(tmp_path):
    folder = prepare_target(from_scratch(), TEXTS, tmp_path / "target", seed=0)
    vocabulary = Vocabulary.from_pretrained(folder)
    assert vocabulary.size == 300
    assert len({vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id} - {None}) == 3
    strange = "\x00 tabs\t\r\n, ümlaut, 漢字, 🤖 and <|bos|> as text".encode()
    encoding = vocabulary.encode(strange)
    assert encoding.lossless_T.all()
    assert vocabulary.bos_id not in encoding.token_ids_T
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer("the source").input_ids[0] == vocabulary.bos_id
    assert model.config.vocab_size == 300
    assert (model.config.bos_token_id, model.config.eos_token_id) == (vocabulary.bos_id, vocabulary.eos_id)


def test_the_default_shape_has_five_million_parameters(tmp_path):
    config = TargetConfig.model_validate({"config": {}, "tokenizer": {"train": {"vocabulary_size": 4096}}})
    assert config.config is not None
    shape = config.config
    with torch.device("meta"):
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
                num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, tie_word_embeddings=True,
            )
        )  # fmt: skip
    assert 4.5e6 < model.num_parameters() < 5.5e6


def test_what_is_there_is_left_alone_and_another_wish_is_refused(tmp_path):
    def not_again():
        raise AssertionError("the corpus is read once")
        yield

    folder = prepare_target(from_scratch(), TEXTS, tmp_path / "target", seed=0, corpus_fingerprint="one")
    before = digests(folder)
    prepare_target(from_scratch(), not_again(), folder, seed=0, corpus_fingerprint="one")
    assert digests(folder) == before
    for change, key in (
        ({"seed": 1}, "seed"),
        ({"config": from_scratch(hidden_size=64)}, "target"),
        ({"corpus_fingerprint": "two"}, "corpus"),
    ):
        wish = {"config": from_scratch(), "seed": 0, "corpus_fingerprint": "one"} | change
        with pytest.raises(ValueError, match=f"{key}: .* was made with"):
            prepare_target(wish.pop("config"), not_again(), folder, wish.pop("seed"), **wish)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match="is no prepared target"):
        prepare_target(from_scratch(), TEXTS, tmp_path / "foreign", seed=0)


def test_an_interrupted_preparation_leaves_nothing(tmp_path):
    def breaking():
        yield TEXTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_target(from_scratch(), breaking(), tmp_path / "target", seed=0)
    assert not [entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")]
    prepare_target(from_scratch(), TEXTS, tmp_path / "target", seed=0)


def test_a_corpus_too_small_for_the_vocabulary_names_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"target\.tokenizer\.train\.vocabulary_size: the corpus gives no more than"):
        prepare_target(from_scratch(4096), TEXTS[:2], tmp_path / "target", seed=0)
    assert not (tmp_path / "target").exists()


def test_a_pretrained_model_is_taken_as_it_is(tmp_path):
    made = prepare_target(from_scratch(), TEXTS, tmp_path / "made", seed=0)
    folder = prepare_target(TargetConfig(model=str(made)), (), tmp_path / "adopted", seed=0)
    theirs, ours = digests(made), digests(folder)
    assert {name: ours[name] for name in theirs if name != "target.json"} == {
        name: digest for name, digest in theirs.items() if name != "target.json"
    }
    assert Vocabulary.from_pretrained(folder).fingerprint == Vocabulary.from_pretrained(made).fingerprint


def test_a_target_made_from_another_leaves_the_other_as_it_was(tmp_path):
    """Files are linked where the file system can: writing into the copy must not reach the original."""
    first = prepare_target(from_scratch(), TEXTS, tmp_path / "first", 0)
    (first / "fusion-model.json").write_text("{}")
    before = digests(first)
    second = prepare_target(TargetConfig(model=str(first)), (), tmp_path / "second", 1)
    assert digests(first) == before
    assert "fusion-model.json" not in digests(second)
    prepare_target(from_scratch(), TEXTS, first, 0)


def test_a_tokenizer_of_another_model_can_be_used(tmp_path):
    made = prepare_target(from_scratch(), TEXTS, tmp_path / "made", seed=0)
    config = TargetConfig.model_validate({"config": SHAPE, "tokenizer": str(made)})
    folder = prepare_target(config, (), tmp_path / "target", seed=0)
    assert Vocabulary.from_pretrained(folder).fingerprint == Vocabulary.from_pretrained(made).fingerprint


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"model_type": "lama"}, r"target\.architecture\.model_type: transformers does not know lama"),
        ({"model_type": "gpt2", "layers": 3}, r"target\.architecture\.layers: the configuration of gpt2 has no such"),
        ({"model_type": "vit"}, r"target\.architecture: vit is no causal language model"),
        (
            {"model_type": "gptj", "n_layer": 1, "n_embd": 16, "n_head": 1, "rotary_dim": 8},
            "lm_head of gptj is",
        ),
    ],
)
def test_architectures_that_cannot_be_trained_are_named(tmp_path, architecture, message):
    config = TargetConfig.model_validate(
        {"architecture": architecture, "tokenizer": {"train": {"vocabulary_size": 300}}}
    )
    with pytest.raises(ValueError, match=message):
        prepare_target(config, TEXTS, tmp_path / "target", seed=0)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [("no/where", "target.model: no/where is no folder"), ("{empty}", r"has no config.json or no \*.safetensors")],
)
def test_a_missing_model_names_the_key(tmp_path, monkeypatch, model, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        prepare_target(TargetConfig(model=model.format(empty=tmp_path / "empty")), (), tmp_path / "target", seed=0)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (TargetConfig, {}, "exactly one of model (pretrained), config and architecture"),
        (TargetConfig, {"architecture": {"hidden_size": 8}, "tokenizer": "x"}, "architecture.model_type: required"),
        (TargetConfig, {"model": "a", "tokenizer": "b"}, "tokenizer: a pretrained model brings its own"),
        (TargetConfig, {"config": {}}, "tokenizer: required for a target from scratch"),
        (TargetConfig, {"config": {"layers": 2}, "tokenizer": "x"}, "config.layers: unknown key"),
        (TargetConfig, {"config": {"hidden_size": 100, "num_heads": 3}, "tokenizer": "x"}, "multiple of 2 * num_heads"),
        (
            TargetConfig,
            {"config": {}, "tokenizer": {"train": {"vocabulary_size": 9}}},
            "tokenizer.train.vocabulary_size",
        ),
        (DistillConfig, {"lambda": 1.5}, "lambda: Input should be less than or equal to 1"),
        (DistillConfig, {"loss": "l2"}, "loss: Input should be 'cross_entropy', 'forward_kl', 'reverse_kl' or 'jsd'"),
        (DistillConfig, {"schedule": "step"}, "schedule: Input should be 'cosine' or 'constant'"),
        (DistillConfig, {"device": "tpu"}, "device: Input should be 'auto', 'cpu' or 'cuda'"),
        (DistillConfig, {"batch_windows": 5, "num_workers": 2}, "batch_windows: must be a multiple of num_workers = 2"),
        (DistillConfig, {"betas": [0.9, 1.0]}, "betas: must be two numbers"),
        (DistillConfig, {"batch": 5}, "batch: unknown key"),
        (DistillConfig, {"lambda_end": 1.0}, "lambda_end: required with lambda_schedule linear or cosine"),
        (DistillConfig, {"lambda_schedule": "cosine"}, "lambda_end: required with lambda_schedule linear or cosine"),
        (DistillConfig, {"lambda_schedule": "linear", "lambda_end": 1.1}, "lambda_end: Input should be less than or"),
        (DistillConfig, {"jsd_beta": 0.3}, "jsd_beta: only loss jsd has it"),
        (DistillConfig, {"jsd_beta": 1.0, "loss": "jsd"}, "jsd_beta: Input should be less than 1"),
        (DistillConfig, {"sources": ["a", "b", "a"]}, "sources: names a source twice"),
        (DistillConfig, {"sources": []}, "sources: Tuple should have at least 1 item"),
        (DistillConfig, {"lambda": 1.0, "sources": ["a"]}, "sources: no source is asked with lambda 1"),
        (DistillConfig, {"lambda": 1.0, "reward_weighting": True}, "reward_weighting: there is no fusion term"),
        (DistillConfig, {"num_workers": [3, 2]}, "num_workers: must be at least 1, and [least, most] in this order"),
        (DistillConfig, {"num_workers": [1, 4], "batch_windows": 3}, "batch_windows: must be at least the 4 workers"),
        (DistillConfig, {"lora": {"rank": 0}}, "lora.rank: Input should be greater than or equal to 1"),
        (DistillConfig, {"parallel": "tp"}, "parallel: Input should be 'ddp' or 'fsdp'"),
    ],
)
def test_mistakes_name_the_key_and_what_is_allowed(model, values, message):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    assert message in explain(caught.value)


def test_the_schedule_warms_up_and_falls_to_nothing():
    config = DistillConfig(learning_rate=1.0, warmup_share=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(rates) == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[-1] < 1e-3
    constant = DistillConfig(learning_rate=1.0, warmup_share=0.0, schedule="constant")
    assert {learning_rate(constant, step, 100) for step in range(100)} == {1.0}
