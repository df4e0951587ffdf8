"""Windows planned for several tokenizers: nothing lost, no limit broken, cuts where all of them have a boundary."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.vocabulary import Vocabulary
from services.corpus.config import CorpusConfig
from services.corpus.ledger import TRAIN, Corpus
from services.corpus.prepare import WindowTokenizer, plan_corpus, read_text
from services.corpus.windows import PlannedWindow, Reader, plan_windows
from services.models.prompt import encode_passages
from services.wire.passage import Passage
from tests.fakes.strategies import texts
from tests.fakes.tokenizers import CORPUS, FAMILIES, LOSSLESS, vocabulary

plain_texts = st.text(st.sampled_from("ab é漢🙂\n\t"), max_size=400) | st.text(max_size=100)
documents = (texts(max_pieces=30) | plain_texts.map(str.encode)).filter(bool)


def readers(*families: str, max_tokens: int | None = None) -> list[Reader]:
    return [Reader(name, vocabulary(name), max_tokens, reads_context=True) for name in families]


def pieces(text: bytes, windows: list[PlannedWindow]) -> list[bytes]:
    return [text[window.start : window.end] for window in windows]


def story(num_words: int) -> bytes:
    return " ".join(f"word{index}" for index in range(num_words)).encode() + b".\n"


@given(
    documents,
    st.integers(16, 200),
    st.integers(0, 100),
    st.lists(st.sampled_from(FAMILIES), max_size=3, unique=True),
    st.integers(8, 60),
)
def test_windows_are_the_text_and_fit_every_reader(
    text: bytes, window_bytes: int, context_bytes: int, families: list[str], max_tokens: int
) -> None:
    planned_for = readers(*families, max_tokens=max_tokens)
    try:
        [windows] = plan_windows([text], window_bytes, context_bytes, planned_for)
    except ValueError as error:  # a single character that compatibility decomposition blows up
        assert "unigram_nfkc.max_tokens" in str(error)
        return
    assert b"".join(pieces(text, windows)) == text
    assert [window.end for window in windows[:-1]] == [window.start for window in windows[1:]]
    for window in windows:
        assert 0 < window.end - window.start <= window_bytes
        assert 0 <= window.start - window.context_start <= context_bytes
        passage = Passage(text[window.start : window.end], text[window.context_start : window.start], True)
        passage.text.decode(), passage.context.decode()  # raises where a character was cut in two
        for reader in planned_for:
            [prompt] = encode_passages(reader.vocabulary, [passage])
            assert prompt.context_ids.size + prompt.encoding.num_tokens <= max_tokens
    assert plan_windows([text], window_bytes, context_bytes, planned_for) == [windows]


@given(texts(max_pieces=30, lossless=True).filter(bool), st.lists(st.sampled_from(LOSSLESS), min_size=1, max_size=3))
def test_a_cut_at_a_boundary_leaves_the_tokens_of_the_document_as_they_are(text: bytes, families: list[str]) -> None:
    """For those whose tokens before a boundary do not depend on what is behind it; windows continue each other."""
    [windows] = plan_windows([text], 24, 0, readers(*families))
    for name in families:
        ends = {0, *vocabulary(name).encode(text).byte_ends_T.tolist()}
        for window in windows:
            if window.at_boundary:
                assert window.start in ends


@pytest.mark.parametrize("name", ["gemma", "llama", "metaspace", "unigram", "unigram_prefix"])
def test_context_and_window_are_the_tokens_of_the_undivided_text(name: str) -> None:
    text = " ".join(CORPUS).encode()
    [windows] = plan_windows([text], 200, 10_000, readers(name))
    whole = vocabulary(name).encode(text).token_ids_T.tolist()
    assert len(windows) > 3 and all(window.at_boundary for window in windows)
    for window in windows:
        assert window.context_start == 0
        [prompt] = encode_passages(vocabulary(name), [Passage(text[window.start : window.end], text[: window.start])])
        ids = prompt.context_ids.tolist() + prompt.encoding.token_ids_T.tolist()
        assert ids == whole[: len(ids)]


def test_words_stay_whole_and_windows_alike() -> None:
    text = story(2000)
    [windows] = plan_windows([text], 512)
    parts = pieces(text, windows)
    assert all(part.startswith(b" ") for part in parts[1:])
    assert not any(part.endswith(b" ") for part in parts)
    lengths = [len(part) for part in parts]
    assert len(parts) <= len(text) // 512 + 2
    assert max(lengths) - min(lengths) < 64


def test_a_document_a_little_longer_than_a_window_gives_two_halves() -> None:
    [windows] = plan_windows([b"word " * 210], 1024)
    assert [window.end for window in windows] == [524, 1050]


def test_text_without_spaces_is_cut_where_all_have_a_boundary() -> None:
    text = ("日本語の文章です。日本の言葉を学ぶ。中文的句子也在这里，中文很好。" * 10).encode()
    [windows] = plan_windows([text], 100, 0, readers("byte_level", "gemma", "unigram"))
    assert len(windows) > 8 and all(window.at_boundary for window in windows)


def test_a_character_that_does_not_fit_names_the_reader() -> None:
    with pytest.raises(ValueError, match=r"byte_level\.max_tokens: 2 do not hold a single character"):
        plan_windows(["ok 🙂".encode()], 16, 0, readers("byte_level", max_tokens=2))


def test_context_gives_way_where_both_do_not_fit() -> None:
    [windows] = plan_windows([story(200)], 64, 64, readers("byte_level", max_tokens=50))
    assert any(window.shortened for window in windows)
    [windows] = plan_windows([story(200)], 64, 64, readers("byte_level", max_tokens=500))
    assert not any(window.shortened for window in windows)
    assert all(window.start - window.context_start > 30 for window in windows[1:])


@pytest.fixture
def stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(20):
        text = " ".join(f"word{number}x{index}" for index in range(60)) + ".\n"
        (tmp_path / "in" / f"{number:02}.txt").write_text(text)
    return CorpusConfig(files=("in/*.txt",), window_bytes=128, context_bytes=200)


def wished(name: str = "byte_level", **changes: object) -> WindowTokenizer:
    return WindowTokenizer(**({"name": name, "identity": name, "load": lambda: vocabulary(name)} | changes))  # type: ignore[arg-type]


def test_windows_know_their_context_and_the_end_of_their_document(stories: CorpusConfig, tmp_path: Path) -> None:
    corpus = plan_corpus(read_text(stories, tmp_path / "out"), [wished()])
    before: dict[str, bytes] = {}
    ended: set[str] = set()
    for index in range(corpus.num_windows(TRAIN)):
        window = corpus.window(TRAIN, index)
        so_far = before.get(window.document, b"")
        assert so_far.endswith(window.context)
        assert min(100, len(so_far)) <= len(window.context) <= 200
        assert window.document not in ended
        before[window.document] = so_far + window.text
        if window.ends_document:
            ended.add(window.document)
    assert ended == set(before)


def test_a_changed_tokenizer_limit_or_setting_makes_a_new_plan(stories: CorpusConfig, tmp_path: Path) -> None:
    def prepared(config: CorpusConfig, *tokenizers: WindowTokenizer) -> Corpus:
        return plan_corpus(read_text(config, tmp_path / "out"), tokenizers)

    first = prepared(stories, wished())
    written = (tmp_path / "out" / "corpus.json").stat().st_mtime_ns
    assert first.record["vocabularies"] == {"byte_level": vocabulary("byte_level").fingerprint}
    texts = list(first.texts(TRAIN))
    refused = wished(load=lambda: pytest.fail("the plan is there: no tokenizer is loaded"))
    assert prepared(stories, refused).fingerprint(TRAIN) == first.fingerprint(TRAIN)
    assert (tmp_path / "out" / "corpus.json").stat().st_mtime_ns == written
    limited = prepared(stories, wished(max_tokens=40))
    assert limited.num_windows(TRAIN) > first.num_windows(TRAIN)
    other = prepared(stories, wished(), wished("unigram"))
    assert other.record["vocabularies"].keys() == {"byte_level", "unigram"}
    without = prepared(stories.model_copy(update={"context_bytes": 0}), wished())
    assert without.fingerprint(TRAIN) != first.fingerprint(TRAIN)
    assert list(without.texts(TRAIN)) == texts
    assert prepared(stories, wished()).fingerprint(TRAIN) == first.fingerprint(TRAIN)


def test_a_tokenizer_that_cannot_be_had_is_left_out_and_named(
    stories: CorpusConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> Vocabulary:
        raise ValueError("no folder /nowhere")

    with caplog.at_level(logging.WARNING):
        corpus = plan_corpus(read_text(stories, tmp_path / "out"), [wished(), wished("a", load=fails)])
    assert "without the tokenizer of a: no folder /nowhere" in caplog.text
    assert list(corpus.record["vocabularies"]) == ["byte_level"]


def test_the_text_for_a_tokenizer_is_the_train_split_whether_the_corpus_was_there_or_not(
    stories: CorpusConfig, tmp_path: Path
) -> None:
    seen: list[tuple[str, list[str]]] = []
    capped = stories.model_copy(update={"train_bytes": 1500})
    for _ in range(2):
        text = read_text(capped, tmp_path / "out")
        seen.append((text.fingerprint, list(text.train_texts())))
        plan_corpus(text)
    assert seen[0] == seen[1]
    assert sum(len(text.encode()) for text in seen[0][1]) == 1500


def test_real_text_is_cut_at_boundaries_of_both_real_tokenizers(real_models: dict[str, Path]) -> None:
    """README and sources of this repository: nearly every cut is a boundary for both, all at whitespace."""
    real = [
        Reader(name, Vocabulary.from_pretrained(folder), 1023, reads_context=True)
        for name, folder in real_models.items()
    ]
    root = Path(__file__).parents[2]
    files = [root / "README.md", *sorted((root / "fusion_core").rglob("*.py"))]
    planned = plan_windows([file.read_bytes() for file in files], 1024, 0, real)
    inner = [window for windows in planned for window in windows[1:]]
    assert len(inner) > 150
    assert sum(window.at_boundary for window in inner) / len(inner) > 0.99
