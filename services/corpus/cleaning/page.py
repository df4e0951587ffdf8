"""The ledger as a page for people: tables of counts, and dropped documents to look at, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_STEPS = {
    "read": "Files are read; what holds no text is dropped.",
    "exact_duplicates": "Of documents with the same text, the first one stays.",
    "language": "The language of each text is told, and those that were chosen stay.",
    "rules": "Heuristic rules of Gopher, FineWeb, C4, and for code.",
    "near_duplicates": "Of documents that are nearly the same, the first one stays.",
    "safety": "Words, domains and personal data.",
    "quality": "A classifier that was trained on the user's examples.",
    "decontaminate": "Documents that hold items of evaluation suites.",
    "repositories": "Files of a repository become long documents, in the order of their imports.",
}
REASONS = {
    "empty": "nothing but white space",
    "not_utf8": "not valid UTF-8",
    "not_json": "a line that is no JSON",
    "no_text": "a row without the text field",
    "no_main_text": "an HTML page without main text",
    "exact_copy": "the same text as an earlier document",
    "near_copy": "nearly the same words as an earlier document",
    "unsure_language": "its language is less sure than asked for",
    "other_language": "a language that was not chosen",
    "gopher_short_doc": "fewer words than `min_words`",
    "gopher_long_doc": "more than 100,000 words",
    "gopher_below_avg_threshold": "words of fewer than 3 letters on average",
    "gopher_above_avg_threshold": "words of more than 10 letters on average",
    "gopher_short_word": "words of fewer than 3 letters on average",
    "gopher_too_many_hashes": "more than one # for ten words",
    "gopher_too_many_ellipsis": "more than one ellipsis for ten words",
    "gopher_too_many_bullets": "more than 90 % of its lines are list items",
    "gopher_too_many_end_ellipsis": "more than 30 % of its lines end with an ellipsis",
    "gopher_below_alpha_threshold": "fewer than 80 % of its words have a letter",
    "gopher_few_stop_words": "fewer than two of the commonest English words",
    "repetition_dup_para_frac": "more than 30 % of its paragraphs are repeated",
    "repetition_dup_para_char_frac": "more than 20 % of its characters are in repeated paragraphs",
    "repetition_dup_line_frac": "more than 30 % of its lines are repeated",
    "repetition_dup_line_char_frac": "more than 20 % of its characters are in repeated lines",
    "c4_too_few_sentences": "fewer than five sentences",
    "c4_curly_bracket": "a curly bracket",
    "c4_lorem_ipsum": "lorem ipsum",
    "fineweb_line_punct_ratio": "fewer than 12 % of its lines end with punctuation",
    "fineweb_short_line_ratio": "more than 67 % of its lines are short",
    "fineweb_char_dup_ratio": "more than 1 % of its characters are in repeated lines",
    "fineweb_list_ratio": "more than three line ends for ten words",
    "code_long_line": "a line of more than 1,000 characters",
    "code_long_lines": "lines of more than 100 characters on average",
    "code_few_letters": "less than a quarter of it is letters and digits",
    "code_generated": "a generated file",
    "blocked_domain": "a blocked domain",
    "severe_word": "a severe word",
    "mild_words": "too many mild words",
    "has_email": "an e-mail address",
    "has_ip": "an IP address",
    "has_phone": "a telephone number",
    "has_key": "a secret key",
    "low_quality": "the classifier takes it for a bad one",
    "in_suite": "an item of an evaluation suite",
}


def explained(reason: str) -> str:
    """Return a reason in words."""
    if reason.startswith("repetition_top_"):
        return f"one {reason.split('_')[2]}-gram makes up too much of it"
    if reason.startswith("repetition_duplicated_"):
        return f"too much of it is repeated {reason.split('_')[2]}-grams"
    return REASONS.get(reason, reason)


def page_of(ledger: dict[str, Any], name: str) -> str:
    """Return the page in Markdown."""
    return "\n".join(_lines(ledger, name)) + "\n"


def _lines(ledger: dict[str, Any], name: str) -> Iterator[str]:
    joined = f" + {ledger['joined']:,} joined to others" if ledger["joined"] else ""
    kept, dropped = f"{ledger['kept']:,} kept", f"{ledger['dropped']:,} dropped"
    yield from (
        f"# The corpus of {name}",
        "",
        f"{ledger['documents_in']:,} documents = {kept} + {dropped}{joined}.",
        "",
    )
    saved = ledger["bytes_in"] - ledger["bytes_kept"]
    yield f"{ledger['bytes_in']:,} bytes in, {ledger['bytes_kept']:,} kept: sources are spared {saved:,} bytes a pass."
    yield ""
    for source, seconds in ledger["seconds_saved"].items():
        yield from (f"Source {source} is spared {seconds:,.0f} s a pass.", "")
    if not ledger["seconds_saved"]:
        yield from ("No source was timed (`curate.seconds_per_megabyte`).", "")
    entries = [entry for entry in ledger["steps"] if entry["step"] in _STEPS]
    yield from (
        "| step | documents in | kept | dropped | joined | bytes in | bytes kept |",
        "|---|---|---|---|---|---|---|",
    )
    for entry in entries:
        numbers = (entry["documents_in"], entry["kept"], sum(entry["dropped"].values()), entry["joined"])
        cells = [entry["step"], *(f"{n:,}" for n in (*numbers, entry["bytes_in"], entry["bytes_kept"]))]
        yield f"| {' | '.join(cells)} |"
    for entry in entries:
        yield from ("", f"## {entry['step']}", "", _STEPS[entry["step"]], "")
        yield from _reasons(entry)


def _reasons(entry: dict[str, Any]) -> Iterator[str]:
    notes = {note: number for note, number in entry["notes"].items() if number}
    for note, number in notes.items():
        yield from (f"{note}: {number:,}", "")
    if entry["dropped"]:
        yield from ("| reason | | documents | bytes |", "|---|---|---|---|")
        for reason, number in sorted(entry["dropped"].items(), key=lambda item: (-item[1], item[0])):
            yield f"| `{reason}` | {explained(reason)} | {number:,} | {entry['dropped_bytes'][reason]:,} |"
    for reason, samples in entry["samples"].items():
        yield from ("", f"### Dropped for `{reason}`", "")
        for sample in samples:
            head = f"{sample['id']}: {sample['detail']}" if sample["detail"] else sample["id"]
            # Indented code: neither Markdown nor HTML in a document counts.
            yield from (f"    {line}" for line in [f"[{head}]".replace("\n", " "), *sample["text"].splitlines()])
            yield from ("", "")
