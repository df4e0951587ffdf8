"""Which channels are encrypted, and what is said about files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.recipes.load import load_recipe
from services.recipes.recipe import RecipeError
from services.rpc.tls import channel_credentials, split_address
from tests.security.certificates import Authority, Pair

VARIABLES = ("FUSION_TLS_CA", "FUSION_TLS_CERT", "FUSION_TLS_KEY")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Authority, Pair]:
    authority = Authority(tmp_path, "authority")
    pair = authority.client("client")
    for variable, file in zip(VARIABLES, (authority.cert, pair.cert, pair.key), strict=True):
        monkeypatch.setenv(variable, str(file))
    return authority, pair


def test_the_address_says_whether_a_channel_is_encrypted() -> None:
    assert split_address("gateway.example:443") == ("gateway.example:443", False)
    assert split_address("grpcs://gateway.example:443") == ("gateway.example:443", True)
    recipe = load_recipe("quickstart", {"service.address": "grpcs://gateway.example:443"})
    assert recipe.fusion_address == "grpcs://gateway.example:443"
    with pytest.raises(RecipeError, match=r"service\.address"):
        load_recipe("quickstart", {"service.address": "https://gateway.example:443"})


@pytest.mark.usefixtures("files")
def test_good_files_are_taken_and_none_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    channel_credentials()
    for variable in VARIABLES:
        monkeypatch.delenv(variable)
    channel_credentials()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_missing_file_is_named(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=rf"^{variable}: cannot read {tmp_path}/nowhere: No such file"):
        channel_credentials()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_file_that_is_no_pem_is_named(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "junk").write_text("junk")
    monkeypatch.setenv(variable, str(tmp_path / "junk"))
    with pytest.raises(ValueError, match=variable):
        channel_credentials()


def test_certificate_and_key_go_together(files: tuple[Authority, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    authority, _ = files
    monkeypatch.setenv("FUSION_TLS_KEY", str(authority.client("other").key))
    with pytest.raises(ValueError, match="are no pair"):
        channel_credentials()
    monkeypatch.delenv("FUSION_TLS_KEY")
    with pytest.raises(ValueError, match="FUSION_TLS_CERT: goes with FUSION_TLS_KEY"):
        channel_credentials()


def test_the_command_line_names_the_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_TLS_CA", "/nowhere/ca.crt")
    done = CliRunner().invoke(app, ["fetch", "--address", "grpcs://127.0.0.1:1", "--text", "x"])
    assert done.exit_code == 2
    assert "FUSION_TLS_CA: cannot read /nowhere/ca.crt" in done.output
