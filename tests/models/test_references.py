"""Models that a URL names: fetched from a hub or an object store, resumed, recorded, refused where they are pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from services.base.files import Files
from services.base.home import FetchError
from services.models import remote_files
from services.models.catalogue import resolve_model
from services.models.fetch import fetch, fetch_reference, problems
from services.models.reference import parse_reference
from tests.fakes.hub import Hub, running_hub
from tests.fakes.services.s3_server import s3_server, s3_url
from tests.fakes.tiny_model import make_tiny_model

URL = "hf://owner/tiny"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small model with its tokenizer, and files beside it that nobody wants."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", vocabulary_size=300, seed=0)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files.keys()
    return files | {
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickled",
        "consolidated.safetensors": b"x",
    }


@pytest.fixture
def hub(model_files: dict[str, bytes]) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.files = dict(model_files)
        hub.files["original/consolidated.safetensors"] = b"the same weights again"
        yield hub


@pytest.fixture(scope="module")
def bucket(model_files: dict[str, bytes]) -> Iterator[str]:
    """Address of an S3 server with the model at models/tiny."""
    with pytest.MonkeyPatch.context() as patch, s3_server("models") as address:
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        for name, data in model_files.items():
            Files(s3_url(address, "models")).write(f"tiny/{name}", data)
        yield address


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    unwanted = {"modeling.py", "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.safetensors"}
    return {name: data for name, data in files.items() if name not in unwanted}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "fusion-model.json"}


def record(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((folder / "fusion-model.json").read_text())
    return found


def test_a_model_of_the_hub_is_fetched_once_and_recorded(hub: Hub) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with pytest.raises(
        ValueError, match=r"hf://owner/tiny is not there yet: run `fusion models fetch hf://owner/tiny`"
    ):
        resolve_model(URL)
    shares: list[float] = []
    folder = fetch_reference(URL, lambda what, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert contents(folder) == wanted(hub.files)
    assert record(folder)["origin"] == {"hub": "owner/tiny", "revision": hub.revision, "requested": "main"}
    assert problems(folder, full=True) == []
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size >= len(AutoTokenizer.from_pretrained(folder))
    asked = len(hub.requests)
    assert fetch(URL) == folder == resolve_model(URL)
    assert len(hub.requests) == asked
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == [folder.name]


def test_revisions_lie_beside_each_other(hub: Hub) -> None:
    pinned = fetch_reference(f"{URL}@{hub.revision}")
    assert pinned != fetch_reference(URL)
    assert record(pinned)["origin"]["requested"] == hub.revision
    with pytest.raises(FetchError, match="there is no revision elsewhere"):
        fetch_reference(f"{URL}@elsewhere")


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    size = len(hub.files["model.safetensors"])
    hub.breaks_after = size // 2
    with pytest.raises(FetchError, match=r"^hf://owner/tiny \(at http://127.0.0.1:\d+\): "):
        fetch_reference(URL)
    with pytest.raises(ValueError, match="not there yet"):
        resolve_model(URL)
    hub.breaks_after = None
    hub.requests.clear()
    folder = fetch_reference(URL)
    assert contents(folder) == wanted(hub.files)
    ranges = [request for request in hub.requests if "model.safetensors bytes=" in request]
    assert len(ranges) == 1
    assert int(ranges[0].rpartition("=")[2].rstrip("-")) > 0


def test_a_file_with_other_contents_than_announced_is_refused(hub: Hub) -> None:
    announced = hub.files["model.safetensors"]
    hub.announced = {"model.safetensors": hashlib.sha256(announced).hexdigest()}
    hub.files["model.safetensors"] = announced[::-1]
    with pytest.raises(FetchError, match=r"model.safetensors has another SHA-256"):
        fetch_reference(URL)
    hub.files["model.safetensors"] = announced
    assert contents(fetch_reference(URL)) == wanted(hub.files)


def test_a_private_model_takes_the_token_of_the_environment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(FetchError, match="no such model, or HF_TOKEN is not set to a token that may read it"):
        fetch_reference(URL)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert contents(fetch_reference(URL)) == wanted(hub.files)
    assert "hf_secret" not in (parse_reference(URL).folder / "fusion-model.json").read_text()


def test_a_gated_model_says_what_to_do(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(FetchError, match="is gated: accept its terms there, and set HF_TOKEN"):
        fetch_reference(URL)


def test_an_unreachable_hub_is_named(hub: Hub) -> None:
    with pytest.MonkeyPatch.context() as patch:  # undone before the hub's own
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(FetchError, match=r"^hf://owner/tiny \(at http://127.0.0.1:9\): ConnectError") as error:
            fetch_reference(URL)
        assert "\n" not in str(error.value)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set"):
            fetch_reference(URL)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, r"has pickled weights only \(pytorch_model.bin\)"),
        ({"README.md": b"x"}, "has no config.json and no tokenizer.json"),
    ],
)
def test_what_is_no_model_with_safetensors_is_refused(hub: Hub, files: dict[str, bytes], message: str) -> None:
    hub.files = files
    with pytest.raises(ValueError, match=message):
        fetch_reference(URL)
    assert not parse_reference(URL).folder.exists()


def test_missing_shards_are_named(hub: Hub) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    hub.files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": b"x",
    }
    with pytest.raises(FetchError, match=r"model-2.safetensors is missing"):
        fetch_reference(URL)
    hub.files["model-2.safetensors"], hub.revision = b"y", "b" * 40
    assert contents(fetch_reference(URL)) == hub.files


def test_a_model_of_an_object_store(bucket: str, model_files: dict[str, bytes]) -> None:
    url = s3_url(bucket, "models/tiny")
    folder = fetch_reference(url)
    assert contents(folder) == wanted(model_files)
    assert record(folder)["origin"]["url"] == url
    assert len(record(folder)["origin"]["revision"]) == 32
    assert resolve_model(url) == folder
    with pytest.raises(ValueError, match=r"models/nowhere\?\S+ has no config.json and no tokenizer.json"):
        fetch_reference(s3_url(bucket, "models/nowhere"))


class Killed(BaseException):
    """Ends a download in its middle, as a signal does."""


def test_a_download_from_an_object_store_goes_on_where_it_stopped(
    bucket: str, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_CHUNK_BYTES", 1000)
    url, changed = s3_url(bucket, "models/copy"), model_files["model.safetensors"][::-1]
    store = Files(s3_url(bucket, "models"))
    for name, data in model_files.items():
        store.write(f"copy/{name}", data)

    def fetch_until(share: float) -> list[float]:
        seen: list[float] = []

        def report(what: str, done: float) -> None:
            seen.append(done)
            if done >= share:
                raise Killed

        with pytest.raises(Killed):
            fetch_reference(url, report)
        return seen

    first, second = fetch_until(0.4), fetch_until(0.6)
    with pytest.raises(ValueError, match="not there yet"):
        resolve_model(url)
    assert sum(share <= first[-1] for share in second) < len(first) / 4  # some for files that are there: one a file
    store.write("copy/model.safetensors", changed)
    folder = fetch_reference(url)
    assert contents(folder) == wanted(model_files | {"model.safetensors": changed})


@pytest.mark.parametrize("url", ["hf://tiny", "hf://a/b/c", "hf://owner/tiny@", "hf://owner/ti ny", "://x"])
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"give hf://ORG/NAME"):
        fetch_reference(url)
    with pytest.raises(ValueError, match=r"give hf://ORG/NAME"):
        resolve_model(url)


def test_credentials_in_a_url_are_refused() -> None:
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as error:
        fetch_reference("s3://id:secret@bucket/model")
    assert "secret@" not in str(error.value)
