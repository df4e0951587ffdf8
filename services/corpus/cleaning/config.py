"""Section `curate` of a recipe: which files are cleaned, and by which steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from services.base.settings import Settings

Globs = Annotated[tuple[str, ...], Field(min_length=1)]
PersonalData = Literal["keep", "replace", "drop"]


class LanguageConfig(Settings):
    """The language of each text, from py3langid's bundled model; code is not asked.

    keep: ISO 639-1 codes of the languages that stay, such as `en`; null keeps all.
    min_probability: documents whose language is less sure are dropped; 0 keeps them.
    """

    keep: Annotated[tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...], Field(min_length=1)] | None = None
    min_probability: Annotated[float, Field(ge=0, le=1)] = 0.0


class RulesConfig(Settings):
    """Heuristic rules, each set with its paper's thresholds.

    gopher, repetition: words, symbols, bullets and stop words; repeated lines and n-grams (Rae et al. 2021).
    fineweb: lines without an end, short lines, repeated lines, lists (Penedo et al. 2024).
    c4: sentences, curly brackets, lines of policies (Raffel et al. 2020); rewrites a text to the lines that pass.
    code: for code instead of the others: very long lines, few letters, generated files.
    min_words: fewest words of a text, for `gopher`.
    """

    gopher: bool = True
    repetition: bool = True
    fineweb: bool = True
    c4: bool = False
    code: bool = True
    min_words: Annotated[int, Field(ge=1)] = 50


class NearDuplicatesConfig(Settings):
    """Near copies by MinHash (Broder 1997): of two, the one that comes later is dropped.

    threshold: Jaccard similarity of the sets of n-grams from which two documents count as copies.
    ngram: words in an n-gram.
    """

    threshold: Annotated[float, Field(ge=0.5, le=0.95)] = 0.7
    ngram: Annotated[int, Field(ge=1, le=20)] = 5


class SafetyConfig(Settings):
    """Words, domains and personal data.

    severe_words, mild_words: files with a word or phrase a line. One severe word drops a document; mild ones do when
        there are more than `mild_per_thousand_words` of them.
    blocked_domains: files with a host name a line; documents whose URL is on it, or on a host below it, are dropped.
    email, ip, phone, key: personal data and secrets are kept, replaced by a stand-in, or their documents dropped.
    """

    severe_words: Globs | None = None
    mild_words: Globs | None = None
    mild_per_thousand_words: Annotated[float, Field(gt=0, le=1000)] = 5.0
    blocked_domains: Globs | None = None
    email: PersonalData = "replace"
    ip: PersonalData = "replace"
    phone: PersonalData = "replace"
    key: PersonalData = "replace"


class QualityConfig(Settings):
    """A classifier of quality, trained on examples.

    good, bad: globs of files, read as the corpus is.
    threshold: documents whose probability of being good is lower are dropped.
    """

    good: Globs
    bad: Globs
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5


class DecontaminateConfig(Settings):
    """Items of evaluation suites: documents that hold one are dropped.

    suites: globs of .txt files with an item a line, or .jsonl and .parquet files.
    fields: keys whose texts are the items, each on its own; at least one must be in a row.
    ngram: words in a run that an item and a document have in common; shorter items must occur as a whole.
    share: a document is dropped from this share of an item's words that such runs cover.
    min_words: items with fewer words are not looked for; the ledger counts them.
    """

    suites: Globs
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("prompt", "question", "text")
    ngram: Annotated[int, Field(ge=3, le=50)] = 8
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    min_words: Annotated[int, Field(ge=1)] = 4


class RepositoriesConfig(Settings):
    """Files of one code repository as long documents, each behind the files that it imports.

    max_bytes: longest document; a file that is longer stays one.
    """

    max_bytes: Annotated[int, Field(ge=1024, le=2**26)] = 131_072


class CurateConfig(Settings):
    """Files that `fusion corpus` cleans, and its steps in their order; a step that is null is left out.

    files: globs, local or of an object store such as `s3://bucket/raw/**/*.jsonl.zst`. .jsonl and .parquet hold rows;
        .html is reduced to its main text; .txt, .md, .rst and source code are texts. .gz, .bz2, .xz and .zst are read.
    format: how all files are read, where their names do not say it.
    text_field: key or column that holds the text of a row.
    separator: characters between documents in a text file; without it a file is one document.
    shards: files that every step writes, and tasks that run side by side. It decides the order of documents.
    workers: tasks at once on this machine; null takes a task per core.
    seconds_per_megabyte: time that a source takes for a million bytes, by its name, for the time saved.
    folder: URL such as s3://bucket/folder where steps, documents, ledger and page are kept; null keeps them in the
        run's folder.
    """

    files: Globs
    format: Literal["text", "code", "html", "jsonl", "parquet"] | None = None
    text_field: Annotated[str, Field(min_length=1)] = "text"
    separator: Annotated[str, Field(min_length=1)] | None = None
    shards: Annotated[int, Field(ge=1, le=10_000)] = 16
    workers: Annotated[int, Field(ge=1)] | None = None
    exact_duplicates: bool = True
    language: LanguageConfig | None = LanguageConfig()
    rules: RulesConfig | None = RulesConfig()
    near_duplicates: NearDuplicatesConfig | None = NearDuplicatesConfig()
    safety: SafetyConfig | None = SafetyConfig()
    quality: QualityConfig | None = None
    decontaminate: DecontaminateConfig | None = None
    repositories: RepositoriesConfig | None = None
    seconds_per_megabyte: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    folder: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://")] | None = None
