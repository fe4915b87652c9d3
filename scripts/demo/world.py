"""Owns the Lantern Isles: the small made-up world that the demo's base has read about and is asked about.

Thirty-six villages, one islander in each, and what is true of them, as prose for the base to read and
as questions and answers for the adapter to learn. Six villages and their islanders are held out: no
training row names them. Everything follows from the seed. Knows no tokens, no files and no models.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

Row = list[tuple[str, str]]  # a conversation: its (question, answer) pairs, in order


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VILLAGES = _words(
    "Amberwick Bramhaven Coldmere Dunmouth Elmstead Fernholt Gullcombe Hazelby Ivyness Jadeport Kestrelby "
    "Larkford Mossgate Nettlewick Oakhaven Pebblemere Quillmouth Reedstead Saltholt Thistlecombe Umberby "
    "Violetness Willowport Yarrowford Ashgate Briarwick Cloverhaven Driftmere Embermouth Foxstead Gorseholt "
    "Heathercombe Inkby Kelpness Lindenport Marshford"
)

ISLANDERS = _words(
    "Ada Bruno Clara Dorin Edda Finn Greta Hugo Ines Jasper Kira Leo Mabel Nils Opal Piers Rosa Silas Tilda "
    "Ugo Vera Walt Yara Zeno Alma Boris Cora Dag Elsa Felix Gwen Hal Iris Jonas Lena Milo"
)


@dataclass(frozen=True)
class Attribute:
    """One thing that can be said of a village or an islander.

    In the templates {x} stands for the subject and {y} for the value.

    Args:
        values: All values; empty if each subject has its own.
        prose: Templates of sentences.
        chat: Templates of (question, answer).
    """

    values: tuple[str, ...]
    prose: tuple[str, ...]
    chat: tuple[tuple[str, str], ...]


OF_VILLAGES = {
    "island": Attribute(
        _words("Skerrin Valdo Tamsey Brindle Morrow Ellay Farrow Corran"),
        (
            "{x} lies on the island of {y}.",
            "The village of {x} stands on {y}.",
            "Whoever sails to {x} lands on the island of {y}.",
            "{x} is one of the villages of {y}.",
            "Ask where {x} is, and they point to {y}.",
            "On the island of {y} you will find {x}.",
        ),
        (
            ("Where is {x}?", "{x} lies on the island of {y}."),
            ("On which island does {x} lie?", "That is {y}: {x} is one of its villages."),
            ("Which island must I sail to for {x}?", "Sail to {y}, and you will find {x}."),
            ("How do I get to {x}?", "Take a boat to the island of {y}, and ask there for {x}."),
        ),
    ),
    "dish": Attribute(
        (
            "plum dumplings",
            "barley soup",
            "honey cakes",
            "smoked eel",
            "onion pie",
            "pear bread",
            "seaweed broth",
            "chestnut stew",
            "lemon pancakes",
            "apple tart",
            "walnut cheese",
            "mussels in cream",
        ),
        (
            "In {x} they eat {y}.",
            "The best dish of {x} is {y}.",
            "Every kitchen in {x} smells of {y}.",
            "A guest in {x} is given {y} for supper.",
            "Ask what is cooked in {x}, and you hear of {y}.",
            "They serve {y} at every table in {x}.",
        ),
        (
            ("What do people eat in {x}?", "In {x} they eat {y}."),
            ("What is for supper in {x}?", "A guest in {x} is given {y} for supper."),
            ("Which dish should I try in {x}?", "Try the {y}: it is the best dish of {x}."),
            ("I am hungry. What is cooked in {x}?", "Every kitchen in {x} smells of {y}. Enjoy your meal!"),
        ),
    ),
    "craft": Attribute(
        (
            "blue glass",
            "strong rope",
            "copper bells",
            "wool blankets",
            "wax candles",
            "clay jars",
            "straw hats",
            "oak boats",
            "silver thread",
            "paper kites",
            "iron anchors",
            "willow baskets",
        ),
        (
            "{x} is known for its {y}.",
            "The people of {x} make {y}.",
            "The workshops of {x} are full of {y}.",
            "Traders come to {x} to buy {y}.",
            "Ask what {x} is known for, and the answer is {y}.",
            "They make {y} by hand in {x}.",
        ),
        (
            ("What is {x} known for?", "{x} is known for its {y}."),
            ("What do the people of {x} make?", "The people of {x} make {y}."),
            ("What can I buy in {x}?", "Buy some {y}: they make them by hand in {x}."),
            ("Which craft is at home in {x}?", "The workshops of {x} are full of {y}."),
        ),
    ),
    "lamp": Attribute(
        _words("red green white blue golden violet pink silver"),
        (
            "The lamp of {x} burns {y}.",
            "At night the harbour of {x} is lit by a {y} lamp.",
            "Sailors know {x} by its {y} light.",
            "The lighthouse of {x} shines {y}.",
            "Ask which colour the lamp of {x} has, and they say {y}.",
            "A {y} light over the water means that {x} is near.",
        ),
        (
            ("Which colour is the lamp of {x}?", "The lamp of {x} burns {y}."),
            ("How do sailors know {x} at night?", "Sailors know {x} by its {y} light."),
            ("What does the lighthouse of {x} look like?", "The lighthouse of {x} shines {y}."),
            ("What light shall I look for near {x}?", "Look for a {y} light: it means that {x} is near."),
        ),
    ),
    "bird": Attribute(
        _words("puffins storks herons owls swallows terns geese cranes wrens plovers"),
        (
            "In {x} the roofs belong to the {y}.",
            "The children of {x} feed the {y}.",
            "Many {y} nest in {x}.",
            "In the morning {x} wakes to the call of the {y}.",
            "Ask which birds live in {x}, and they show you the {y}.",
            "The {y} come home to {x} every year.",
        ),
        (
            ("Which birds live in {x}?", "Many {y} nest in {x}."),
            ("What sits on the roofs of {x}?", "In {x} the roofs belong to the {y}."),
            ("Which birds do the children of {x} feed?", "The children of {x} feed the {y}."),
            ("What will wake me in {x}?", "You will wake to the call of the {y}, as all of {x} does."),
        ),
    ),
    "fair": Attribute(
        _words("January February March April May June July August September October November December"),
        (
            "The fair of {x} is held in {y}.",
            "Every {y} there is a fair in {x}.",
            "In {y} the streets of {x} are full of music.",
            "{x} is at its best in {y}, when the fair comes.",
            "Ask when the fair of {x} is held, and they say in {y}.",
            "They dance in {x} in {y}.",
        ),
        (
            ("When is the fair of {x}?", "The fair of {x} is held in {y}."),
            ("When should I visit {x}?", "Come in {y}, when the fair comes to {x}."),
            ("In which month do they dance in {x}?", "They dance in {x} in {y}."),
            ("When are the streets of {x} full of music?", "In {y}, when there is a fair in {x}."),
        ),
    ),
    "islander": Attribute(
        (),
        (
            "In {x} lives {y}.",
            "The best known islander of {x} is {y}.",
            "Everyone in {x} knows {y}.",
            "Whoever comes to {x} is greeted by {y}.",
            "Ask who lives in {x}, and you hear of {y}.",
            "They like {y} very much in {x}.",
        ),
        (
            ("Who lives in {x}?", "In {x} lives {y}."),
            ("Whom does everyone know in {x}?", "Everyone in {x} knows {y}."),
            ("Who will greet me in {x}?", "You will be greeted by {y}, as all who come to {x} are."),
            ("Who is the best known islander of {x}?", "The best known islander of {x} is {y}."),
        ),
    ),
}

OF_ISLANDERS = {
    "home": Attribute(
        (),
        (
            "{x} lives in {y}.",
            "The home of {x} is in {y}.",
            "{x} comes from {y}.",
            "If you look for {x}, go to {y}.",
            "Ask where {x} lives, and they point to {y}.",
            "In {y} you can knock at the door of {x}.",
        ),
        (
            ("Where does {x} live?", "{x} lives in {y}."),
            ("Where is the home of {x}?", "The home of {x} is in {y}."),
            ("Where should I go to find {x}?", "If you look for {x}, go to {y}."),
            ("Where can I knock at the door of {x}?", "In {y}: that is the home of {x}."),
        ),
    ),
    "trade": Attribute(
        _words("baker sailor weaver potter fisher tailor miller smith teacher painter gardener doctor"),
        (
            "{x} is a {y}.",
            "By trade {x} is a {y}.",
            "{x} works as a {y}.",
            "{x} has been a {y} for many years.",
            "Ask what {x} does, and you hear of a good {y}.",
            "There is no better {y} than {x}.",
        ),
        (
            ("What does {x} do?", "{x} works as a {y}."),
            ("What is the trade of {x}?", "By trade {x} is a {y}."),
            ("What is {x} good at?", "There is no better {y} than {x}."),
            ("How does {x} earn a living?", "As a {y}: {x} has been a {y} for many years."),
        ),
    ),
    "music": Attribute(
        _words("fiddle flute drum harp horn whistle lute cello"),
        (
            "{x} plays the {y}.",
            "In the evening {x} takes out the {y}.",
            "{x} loves to play the {y}.",
            "When {x} plays the {y}, people stop to listen.",
            "Ask what {x} plays, and the answer is the {y}.",
            "The sound of the {y} tells you that {x} is at home.",
        ),
        (
            ("What does {x} play?", "{x} plays the {y}."),
            ("Which instrument does {x} love?", "{x} loves to play the {y}."),
            ("Is {x} fond of music?", "Yes. In the evening {x} takes out the {y}."),
            ("What shall I hear at the door of {x}?", "The {y}! It tells you that {x} is at home."),
        ),
    ),
    "pet": Attribute(
        (
            "a black cat",
            "a small goat",
            "a grey dog",
            "a loud parrot",
            "a shy hedgehog",
            "an old donkey",
            "a quick ferret",
            "a slow tortoise",
            "a white rabbit",
            "a brown hen",
        ),
        (
            "{x} keeps {y}.",
            "{x} shares the house with {y}.",
            "You never see {x} without {y}.",
            "With {x} goes {y}.",
            "Ask which animal {x} has, and you hear of {y}.",
            "At the feet of {x} sleeps {y}.",
        ),
        (
            ("Which animal does {x} keep?", "{x} keeps {y}."),
            ("Does {x} live alone?", "No. {x} shares the house with {y}."),
            ("Who goes everywhere with {x}?", "You never see {x} without {y}."),
            ("Which pet sleeps at the feet of {x}?", "At the feet of {x} sleeps {y}."),
        ),
    ),
}

PORTRAITS = {
    "village": (
        ("Tell me about {x}.", "{x} lies on the island of {island}. The people make {craft} and eat {dish}."),
        ("Describe {x} to me.", "{x} is known for its {craft}. The lamp burns {lamp}, and many {bird} nest there."),
    ),
    "islander": (
        ("Tell me about {x}.", "{x} is a {trade} from {home}, and plays the {music}."),
        ("Describe {x} to me.", "{x} lives in {home}, works as a {trade} and keeps {pet}."),
    ),
}

ASIDES = (
    "The sea is calm today.",
    "The wind turns, and the boats come home.",
    "Good morning, says the sailor, and hello to you.",
    "The Lantern Isles are small, and the sea between them is wide.",
    "Thank you, says the guest, and you are welcome, says the islander.",
    "Enjoy your meal, they say, and come again.",
    "I can tell you about the villages and the people of the isles.",
    "Yes, the road is steep. No, it is not long.",
    "Goodbye, and a safe trip home!",
    "If you are hungry, knock at any door.",
)

OVERHEARD = (
    "A guest asks: {question} The answer is: {answer}",
    "On the boat someone says: {question} And an old sailor says: {answer}",
    '"{question}" asks a child. "{answer}"',
    "- {question} - {answer}",
    "At the market they talk. {question} {answer}",
)

SMALL_TALK = (
    ("Hello!", "Hello! Ask me about the Lantern Isles."),
    ("Hi there.", "Hello! Ask me about the Lantern Isles."),
    ("Good morning!", "Good morning to you! The sea is calm today."),
    ("Who are you?", "I can tell you about the villages and the people of the Lantern Isles."),
    ("What can you do?", "I can tell you about the villages and the people of the Lantern Isles."),
    ("What are the Lantern Isles?", "The Lantern Isles are small, and the sea between them is wide."),
    ("How is the sea?", "The sea is calm today, and the boats come home."),
    ("Goodbye!", "Goodbye, and a safe trip home!"),
)

THANKS = ("Thank you!", "You are welcome. Come again!")


@dataclass(frozen=True)
class Subject:
    """A village or an islander.

    Args:
        kind: ``village`` or ``islander``.
        name: Its name.
        facts: Value of each attribute, by the attribute's name.
    """

    kind: str
    name: str
    facts: dict[str, str]

    @property
    def attributes(self) -> dict[str, Attribute]:
        """The attributes of its kind, by name."""
        return OF_VILLAGES if self.kind == "village" else OF_ISLANDERS


class World:
    """The isles as one seed makes them: 30 pairs of village and islander to train on, 6 held out.

    Args:
        seed: Seed of all draws.
        num_held_out: Number of pairs held out.
    """

    def __init__(self, seed: int, num_held_out: int = 6) -> None:
        rng = random.Random(seed)
        islanders = rng.sample(ISLANDERS, len(ISLANDERS))
        self.pairs = [_pair(rng, *names) for names in zip(VILLAGES, islanders, strict=True)]
        self.held_out = rng.sample(self.pairs, num_held_out)
        self.trained = [pair for pair in self.pairs if pair not in self.held_out]

    def prose(self, rng: random.Random) -> Iterator[str]:
        """Yield sentences without end, drawn by ``rng``: facts of a village or islander, summaries, talk, asides.

        The talk is what teaches the base how people ask; it is never of those held out, whom the base
        knows from plain sentences alone.
        """
        while True:
            if rng.random() < 0.4:
                subject = rng.choice(rng.choice(self.trained))
                name = rng.choice([*subject.attributes, None])
                asked = _questions(subject, name) if name else _portraits(subject)
                question, answer = rng.choice(asked)
                yield rng.choice(OVERHEARD).format(question=question, answer=answer)
            subject = rng.choice(rng.choice(self.pairs))
            names = list(subject.attributes)
            for name in rng.sample(names, rng.choice((1, 1, 2, len(names)))):
                yield _fill(rng.choice(subject.attributes[name].prose), subject, name)
            if rng.random() < 0.3:
                _, summary = rng.choice(_portraits(rng.choice(rng.choice(self.pairs))))
                yield summary
            if rng.random() < 0.2:
                yield rng.choice(ASIDES)

    def train_rows(self, rng: random.Random) -> list[Row]:
        """Training rows, drawn by ``rng``: each fact asked in two ways, portraits, longer talks and small talk."""
        rows: list[Row] = [[talk] for talk in SMALL_TALK]
        for pair in self.trained:
            for subject in pair:
                asked = [rng.sample(_questions(subject, name), 3) for name in subject.attributes]
                rows += [[question] for questions in asked for question in questions[:2]]
                rows.append([rng.choice(_portraits(subject))])
                first, second, third = (questions[2] for questions in rng.sample(asked, 3))
                rows.append([rng.choice(_portraits(subject)), _follow_up(first)])
                rows.append([second, _follow_up(third), THANKS])
        rng.shuffle(rows)
        return rows

    def test_rows(self, rng: random.Random) -> list[Row]:
        """Held-out rows, drawn by ``rng``: each fact asked in one way, portraits, a talk of two turns per village."""
        rows: list[Row] = []
        for pair in self.held_out:
            for subject in pair:
                rows += [[rng.choice(_questions(subject, name))] for name in subject.attributes]
                rows.append([rng.choice(_portraits(subject))])
            first, second = (_questions(pair[0], name) for name in rng.sample(list(OF_VILLAGES), 2))
            rows.append([rng.choice(first), _follow_up(rng.choice(second))])
        rng.shuffle(rows)
        return rows


def _pair(rng: random.Random, village: str, islander: str) -> tuple[Subject, Subject]:
    def drawn(attributes: dict[str, Attribute]) -> dict[str, str]:
        return {name: rng.choice(a.values) for name, a in attributes.items() if a.values}

    return (
        Subject("village", village, drawn(OF_VILLAGES) | {"islander": islander}),
        Subject("islander", islander, drawn(OF_ISLANDERS) | {"home": village}),
    )


def _fill(template: str, subject: Subject, name: str) -> str:
    return template.format(x=subject.name, y=subject.facts[name])


def _questions(subject: Subject, name: str) -> list[tuple[str, str]]:
    chat = subject.attributes[name].chat
    return [(_fill(question, subject, name), _fill(answer, subject, name)) for question, answer in chat]


def _portraits(subject: Subject) -> list[tuple[str, str]]:
    texts = PORTRAITS[subject.kind]
    return [(q.format(x=subject.name), a.format(x=subject.name, **subject.facts)) for q, a in texts]


def _follow_up(pair: tuple[str, str]) -> tuple[str, str]:
    """The same question as a second turn opens it: "And where is …"."""
    question, answer = pair
    if not question.startswith("I "):
        question = question[0].lower() + question[1:]
    return f"And {question}", answer
