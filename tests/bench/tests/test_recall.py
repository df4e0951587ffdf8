"""The generated two-hop questions: facts where the spans say, rivals around them, no names in common between halves."""

from __future__ import annotations

import random

from tests.bench.recall.documents import ManyNames, Names, make_example

SENTENCES = [f"Sentence number {number} of the running text says nothing at all." for number in range(50)]


def test_facts_are_planted_and_chained() -> None:
    draw, names = random.Random(0), Names(1)
    for _ in range(50):
        example = make_example(draw, names, SENTENCES, 300)
        first, second = (example.text[start:end] for start, end in example.spans)
        assert 300 < example.text.count(" ") < 600
        assert example.answer in second and example.answer not in first
        assert all(example.text.count(fact) == 1 for fact in (first, second))
        person = [name for name in (*names.first, *names.last) if name in example.question]
        assert len(person) == 2 and all(name in first and name not in second for name in person)
        thing = [name for name in names.things if name in first]
        assert len(thing) == 1 and thing[0] in second and thing[0] not in example.question
        rivals = [name for name in names.things if name in example.text and name not in thing]
        assert len(rivals) == 5
        assert any(name in example.text.replace(first, "") for name in person)  # shared with a rival


def test_training_validation_and_test_share_no_name() -> None:
    words = [*SENTENCES, "Alma wrote to Penrith, where Becker and others waited for the Kestrel."]
    train, again = (ManyNames(random.Random(5), words, 200) for _ in range(2))
    assert train.first == again.first
    validation, test = Names(0), Names(1)
    sets = [{*each.first, *each.last, *each.things, *each.places} for each in (train, validation, test)]
    assert len(sets[0]) > 100
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
