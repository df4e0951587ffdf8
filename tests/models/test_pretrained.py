"""Folders of models are data: what would run when it is read is refused, by every door that reads one."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_core.vocabulary import Vocabulary
from services.distill.checkpoint import load_position
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.evaluation.nats_per_byte import nats_per_byte
from services.models.weights import load_model
from services.recipes.load import load_recipe
from services.recipes.recipe import RecipeError
from services.source.config import SourceConfig
from services.source.engines.load import load_engine
from tests.fakes.tiny_model import make_tiny_model

_CODE = """
from pathlib import Path
Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-code"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._ran,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Exists once something out of a folder was run."""
    return tmp_path / "ran"


@pytest.fixture
def with_code(tmp_path: Path, ran: Path) -> Path:
    folder = make_tiny_model(tmp_path / "with-code", vocabulary_size=400, seed=0)
    (folder / "own.py").write_text(_CODE.format(ran=str(ran)))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own-code", "auto_map": own}))
    return folder


@pytest.fixture
def with_pickle(tmp_path: Path, ran: Path) -> Path:
    folder = make_tiny_model(tmp_path / "with-pickle", vocabulary_size=400, seed=0)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(ran)}, folder / "pytorch_model.bin")
    return folder


def source(folder: Path, **settings: Any) -> SourceConfig:
    return SourceConfig(name="own", model=str(folder), dtype="float32", top_k=4, max_tokens=63, **settings)


DOORS: dict[str, Callable[[Path], Any]] = {
    "source": lambda f: asyncio.run(load_engine(source(f, engine="transformers"), f, 0)),
    "target": load_model,
    "evaluation": lambda f: nats_per_byte(f, [b"x"]),
    "preparing": lambda f: load_model(
        prepare_target(TargetConfig.model_validate({"model": str(f)}), [], f.with_name("target"), 0)
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["with_code", "with_pickle"])
def test_no_door_runs_what_a_folder_brings(kind: str, door: str, ran: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match=r"own|safetensors") as caught:
        DOORS[door](folder)
    assert not ran.exists()
    if (kind, door) == ("with_code", "source"):
        assert "brings Python code of its own; sources.own.trust_remote_code: true runs it" in str(caught.value)


def test_code_runs_where_the_recipe_says_so_by_name(with_code: Path, ran: Path) -> None:
    config = source(with_code, engine="transformers", trust_remote_code=True)
    engine = asyncio.run(load_engine(config, with_code, 0))
    assert ran.exists()
    assert asyncio.run(engine.score([1, 2, 3], 4)).gold_T.shape == (2,)


@pytest.mark.parametrize("kind", ["with_code", "with_pickle"])
def test_vllm_gets_the_same_answer(
    kind: str, ran: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without starting it: the arguments that its engine would be made from, looked at as vLLM looks at them."""
    from vllm.v1.engine.async_llm import AsyncLLM

    folder = request.getfixturevalue(kind)
    made: list[Any] = []

    def instead(engine_args: Any) -> Any:
        made.append(engine_args)
        raise InterruptedError

    monkeypatch.setattr(AsyncLLM, "from_engine_args", instead)
    with pytest.raises(InterruptedError):
        asyncio.run(load_engine(source(folder), folder, 0))
    assert (made[0].trust_remote_code, made[0].load_format) == (False, "safetensors")
    if kind == "with_code":
        with pytest.raises(ValueError, match="trust_remote_code"):
            made[0].create_model_config()
    assert not ran.exists()


def test_a_recipe_has_one_key_for_it() -> None:
    changed = load_recipe("quickstart", {"sources.0.trust_remote_code": True})
    assert [source.engine.trust_remote_code for source in changed.sources] == [True, False]
    with pytest.raises(RecipeError, match=r"engine_args\.trust_remote_code: is the source's own key trust_remote_code"):
        load_recipe("quickstart", {"sources.0.engine_args": {"trust_remote_code": True}})


def test_tokenizers_run_no_code(tmp_path: Path, ran: Path) -> None:
    folder = make_tiny_model(tmp_path / "tokenizer", vocabulary_size=400, seed=0)
    (folder / "own.py").write_text(_CODE.format(ran=str(ran)) + "\nclass OwnTokenizer: ...\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    settings = config | {"tokenizer_class": "OwnTokenizer", "auto_map": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        Vocabulary.from_pretrained(folder)
    except ValueError as error:
        assert "tokenizer" in str(error)
    assert not ran.exists()


def test_a_checkpoint_is_read_without_running_it(tmp_path: Path, ran: Path) -> None:
    torch.save({"optimizer": Payload(ran), "position": {}}, tmp_path / "trainer_state.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_position(tmp_path)
    assert not ran.exists()
