"""A corpus on a real S3 server, with rights on one prefix only."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.base.errors import FailedPreconditionError, UnavailableError
from services.base.files import open_location
from services.corpus.config import CorpusConfig
from services.corpus.drawn import Sizes
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus
from services.corpus.prepare import plan_corpus, read_text
from tests.corpus.documents import documents_of, write_stories
from tests.fakes.services.s3_server import rights_on_prefix, s3_server, s3_url


def test_a_corpus_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    write_stories(tmp_path / "in", 12)
    config = CorpusConfig(files=("in/*.txt",), window_bytes=128)
    sizes = Sizes(shard=2000)
    here = plan_corpus(read_text(config, tmp_path / "out", sizes=sizes))
    with s3_server("bucket") as server, rights_on_prefix(server, "bucket", "team") as (address, refused):
        url = s3_url(address, "bucket/team/corpus")
        plan_corpus(read_text(config.model_copy(update={"window_bytes": 256}), url, sizes=sizes))
        there = plan_corpus(read_text(config, url, sizes=sizes))
        for split in (TRAIN, HELD_OUT):
            assert list(documents_of(there, split).items()) == list(documents_of(here, split).items())
        assert [there.fingerprint(split) for split in there.splits] == [here.fingerprint(s) for s in here.splits]
        again = read_text(config, url, sizes=sizes)
        assert (opened := again.planned()) is not None and opened.record == there.record
        shard = there.record["splits"][TRAIN]["shards"][-1]["file"]
        files, root = open_location(url, "corpus")
        files.delete_file(f"{root}/windows/{shard}")
        fresh = Corpus.open(url)
        with pytest.raises(FailedPreconditionError, match=f"s3://bucket/team/corpus/windows/{shard}.* is missing"):
            fresh.window(TRAIN, fresh.num_windows(TRAIN) - 1)
        assert refused == []
    with pytest.raises(UnavailableError, match=r"windows/train/00000.parquet.* cannot be read"):
        fresh.window(TRAIN, 0)
