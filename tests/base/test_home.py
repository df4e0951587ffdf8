"""The home folder: from the environment or the user's, and named where there is none."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from services.base.files import Files
from services.base.home import expand_user, fusion_home
from services.corpus.readers import local_files
from services.models.catalogue import resolve_model


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry in the password file, as OpenShift gives containers."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FUSION_HOME", raising=False)
    assert fusion_home() == tmp_path / ".cache" / "llm-fusion"
    monkeypatch.setenv("FUSION_HOME", "~/models")
    assert fusion_home() == tmp_path / "models"


@pytest.mark.usefixtures("nobody")
def test_without_any_home_the_setting_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSION_HOME", str(tmp_path))
    assert fusion_home() == tmp_path
    monkeypatch.delenv("FUSION_HOME")
    for call, setting in (
        (fusion_home, "FUSION_HOME"),
        (lambda: resolve_model("~/model"), "model"),
        (lambda: Files("~/store"), r"service\.store"),
        (lambda: local_files(["~/*.txt"]), r"files\.0"),
    ):
        with pytest.raises(ValueError, match=f"^{setting}: nobody knows the home directory of ~"):
            call()


def test_the_home_of_a_user_who_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"^model: nobody knows the home directory of ~no-such-user-here/x"):
        expand_user("~no-such-user-here/x", "model")
