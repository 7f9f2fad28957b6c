"""Words that nobody has used: values that can be said again only by copying them."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence


# Letters that choose the next one: three make words that can be pronounced and are seldom real.
ORDER = 3
# Shorter words stay as they are ("of", "the").
SHORTEST = 4
# Words that begin with the same four letters share a root.
ROOT = 4
LENGTHS = range(5, 11)


class Inventor:
    """Makes words and values that sound like those it was given, by a Markov chain over their letters.

    Args:
        like: Values whose words the made-up ones sound like, and are none of.
        avoid: Values with whose words no made-up one shares its root.
    """

    def __init__(self, like: Iterable[str], avoid: Iterable[str]) -> None:
        self.known = {word.casefold() for value in like for word in value.split()}
        self.avoided = {word.casefold()[:ROOT] for value in avoid for word in value.split()}
        self.following: dict[str, list[str]] = defaultdict(list)
        for word in sorted(self.known):
            if len(word) >= SHORTEST and word.isalpha():
                letters = "^" * ORDER + word + "$"
                for place in range(ORDER, len(letters)):
                    self.following[letters[place - ORDER : place]].append(letters[place])

    def word(self, chance: random.Random) -> str:
        """A made-up word in small letters."""
        while True:
            letters = "^" * ORDER
            while letters[-1] != "$":
                letters += chance.choice(self.following[letters[-ORDER:]])
            word = letters[ORDER:-1]
            if len(word) in LENGTHS and word not in self.known and word[:ROOT] not in self.avoided:
                return word

    def values(self, models: Sequence[str], count: int, chance: random.Random) -> list[str]:
        """So many values, each one of the models with other words in it.

        Short words and those that several models share ("the … Street") stay, and capitals stay where they are.
        """
        shared = {word for word, times in Counter(word for v in models for word in set(v.split())).items() if times > 2}

        def renewed(word: str) -> str:
            if len(word) < SHORTEST or not word.isalpha() or word in shared:
                return word
            return self.word(chance).capitalize() if word[0].isupper() else self.word(chance)

        made = (" ".join(map(renewed, chance.choice(models).split())) for _ in range(count))
        return [value for value in made if value not in models]
