"""A small world told in sentences, with questions about where things are, scattered over a long text.

Named after BABILong (Kuratov et al. 2024), which scatters the stories of bAbI (Weston et al. 2015) over books; here the
stories are made up anew, so that there are as many as one wants, and the text between them is the caller's.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


PEOPLE = ("Alice", "Daniel", "John", "Mary", "Priya", "Sandra", "Tom", "Yuki")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office", "park", "school")
THINGS = ("apple", "book", "cup", "football", "key", "letter", "milk", "umbrella")
KINDS = ("where is the person", "where is the thing", "where was the thing before")


@dataclass(frozen=True)
class WorldStory:
    """Sentences in order, a question about them and its answer.

    Attributes:
        supporting: Indices of the sentences that the answer follows from.
    """

    sentences: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]

    def scattered(self, filler: Sequence[str], words: int, seed: int = 0) -> str:
        """The sentences, in order, at random places of a stretch of `filler` of at least `words` words.

        Args:
            filler: Paragraphs or sentences that say nothing of the story; they are taken in order, from a random one
                on, and again from the first where they run out.

        Raises:
            ValueError: when there is no filler but some is needed.
        """
        if words > 0 and not any(text.split() for text in filler):
            raise ValueError(f"words={words} was given, but the filler holds no word to fill them with")
        chance, around, count = random.Random(seed), [], 0
        at = chance.randrange(len(filler)) if words > 0 else 0
        while count < words:
            text = filler[at % len(filler)]
            around.append(text)
            count, at = count + len(text.split()), at + 1
        places = sorted(chance.randint(0, len(around)) for _ in self.sentences)
        for place, sentence in reversed(list(zip(places, self.sentences, strict=True))):
            around.insert(place, sentence)
        return " ".join(around)


def world_story(kind: str, length: int, seed: int = 0) -> WorldStory:
    """A story of `length` sentences in which people go to places, take things and put them down.

    Args:
        kind: `"where is the person"` (one sentence answers), `"where is the thing"` (who has it, and where they are:
            two) or `"where was the thing before"` (the last place it came from: three), as in tasks 1 to 3 of bAbI.
        length: At least 1, 2 or 4 sentences, by kind.

    Raises:
        ValueError: for another kind, or too short a length.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} was given, but kind must be one of {KINDS}")
    least = {KINDS[0]: 1, KINDS[1]: 2, KINDS[2]: 4}[kind]
    if length < least:
        raise ValueError(f"length={length!r} was given, but a story of {kind!r} has at least {least} sentences")
    for attempt in range(1000):
        told = _Told(random.Random(f"{seed}/{attempt}"))
        for _ in range(length):
            told.go_on()
        found = told.ask(kind)
        if found is not None:
            question, answer, supporting = found
            return WorldStory(tuple(told.sentences), question, answer, supporting)
    raise ValueError(f"No story of {kind!r} with {length} sentences was found in 1,000 attempts; make it longer")


class _Told:
    """What has been told, and what is true after it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.sentences: list[str] = []
        self.place: dict[str, tuple[str, int]] = {}  # of a person, and the sentence that said so
        self.holder: dict[str, tuple[str, int]] = {}  # of a thing
        # Of a thing: every place that it has been in, and the sentences that this follows from.
        self.trail: dict[str, list[tuple[str, tuple[int, ...]]]] = {}

    def go_on(self) -> None:
        now, held = len(self.sentences), {thing for thing, _ in self.holder.items()}
        people = sorted(self.place)
        if people and self.chance.random() < 0.4:
            person = self.chance.choice(people)
            mine = sorted(thing for thing, (who, _) in self.holder.items() if who == person)
            free = [thing for thing in THINGS if thing not in held and self._is_here(thing, person)]
            if mine and self.chance.random() < 0.3:
                thing = self.chance.choice(mine)
                self.sentences.append(f"{person} put down the {thing}.")
                del self.holder[thing]
                return
            if free:
                thing = self.chance.choice(free)
                self.sentences.append(f"{person} took the {thing}.")
                self.holder[thing] = person, now
                self._moved(thing, person)
                return
        person = self.chance.choice(PEOPLE)
        known = self.place.get(person)
        place = self.chance.choice([place for place in PLACES if known is None or place != known[0]])
        self.sentences.append(f"{person} went to the {place}.")
        self.place[person] = place, now
        for thing, (who, _) in self.holder.items():
            if who == person:
                self._moved(thing, person)

    def _is_here(self, thing: str, person: str) -> bool:
        """Whether a thing that nobody holds can be taken: it was seen nowhere yet, or last where the person is."""
        trail = self.trail.get(thing)
        return trail is None or trail[-1][0] == self.place[person][0]

    def _moved(self, thing: str, person: str) -> None:
        """A thing is where the person is who holds it."""
        place, said = self.place[person]
        trail = self.trail.setdefault(thing, [])
        if not trail or trail[-1][0] != place:
            trail.append((place, tuple(sorted({said, self.holder[thing][1]}))))

    def ask(self, kind: str) -> tuple[str, str, tuple[int, ...]] | None:
        """A question, its answer, and what it follows from; None where nothing can be asked."""
        if kind == KINDS[0]:
            person = self.chance.choice(sorted(self.place)) if self.place else None
            if person is None:
                return None
            place, sentence = self.place[person]
            return f"Where is {person}?", place, (sentence,)
        least = 1 if kind == KINDS[1] else 2
        things = sorted(thing for thing, trail in self.trail.items() if len(trail) >= least)
        if not things:
            return None
        thing = self.chance.choice(things)
        trail = self.trail[thing]
        place, said = trail[-1]
        if kind == KINDS[1]:
            return f"Where is the {thing}?", place, said
        before, earlier = trail[-2]
        return f"Where was the {thing} before the {place}?", before, tuple(sorted({*earlier, *said}))
