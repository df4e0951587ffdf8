"""The real models' tokenizers, as `fusion models fetch` makes them.

The ids come from independent implementations given the GGUF files' own vocabularies: the SentencePiece library for
Gemma, textbook byte-level BPE (tiny_gguf.encode_smollm) for SmolLM2.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from services.models.catalogue import model_folder
from services.models.fetch import problems

EXPECTED = {
    "smollm2-135m-instruct": {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "In 1969,   12 men and 3.50 dollars": [
            *(788, 216, 33, 41, 38, 41, 28, 333, 33, 34, 1800, 284, 216, 35, 30, 37, 32, 8358),
        ],
        "def f(x):\n\n    return x + 1\n\t\t# ok": [
            *(1604, 275, 24, 104, 727, 1004, 1003, 1792, 1232, 216, 33, 3354, 197, 19, 10907),
        ],
        "Zürich 漢字 🙂\u200d\x01": [74, 7170, 5130, 17097, 137, 112, 36518, 47526, 321, 231, 191],
        " " * 40 + "end": [12427, 415, 1112],
    },
    "gemma-3-270m": {
        "The capital of France is": [2, 818, 5279, 529, 7001, 563],
        "In 1969,   12 men and 3.50 dollars": [
            *(2, 902, 236743, 236770, 236819, 236825, 236819, 236764, 139, 236770, 236778, 1758, 532, 236743),
            *(236800, 236761, 236810, 236771, 11092),
        ],
        "def f(x):\n\n    return x + 1\n\t\t# ok": [
            *(2, 2063, 517, 236769, 236781, 1473, 108, 140, 2060, 1123, 900, 236743, 236770, 107, 255969, 236865, 7546),
        ],
        "Zürich 漢字 🙂\u200d\x01": [2, 236953, 105214, 236743, 201637, 57235, 237243, 249732],
        " " * 40 + "end": [2, 167, 145, 643],
    },
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_fetched_model_tokenizes_as_its_file_says(name: str, home: Path) -> None:
    folder = model_folder(name)
    assert folder.is_relative_to(home)
    assert problems(folder) == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, ids in EXPECTED[name].items():
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
