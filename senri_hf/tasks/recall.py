"""Episodes of telling and asking back: the data on which a model's memory is trained and scored.

A user tells an assistant facts about themself in some conversations; these are over; in a new conversation the user
asks for one of the facts.  Only a memory that outlives the conversation can give the answer.  Values, phrasings and
relations for validation never occur in training.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from .invented import Inventor


Message = dict[str, Any]
Conversation = list[Message]

SPLITS = ("train", "validation")
RELATION_SPLITS = ("train", "held_out")
NAME_RELATION = "name"
# How many facts an episode of the training mixture tells, each as likely.
FACTS_TOLD = (1, 2, 3, 4, 4, 5, 7, 10)
# How many distractor conversations it puts between them, in four episodes of ten.
DISTRACTORS_BETWEEN = (1, 2, 4, 8, 16)
# How many of them it asks for, where there are as many.
QUESTIONS_ASKED = 3
# How often it asks in a way that does not say in which words to reply.
OBLIQUE_SHARE = 0.5
# How often it tells a fact in words in which any fact may be told.
FRAMED_SHARE = 0.4
# Values of the training mixture that are made up, for every value that is not; these categories have none.
INVENTED_SHARE = 1.5
CLOSED_CATEGORIES = ("job", "month", "number", "weekday")  # "a baker", "an actor": the article would not fit

_SENTENCE_START = re.compile(r"(?:^|[.!?]\s+)\{v\}")
_ARTICLE = re.compile(r"^(?:an?|the)\s+")


@dataclass(frozen=True)
class Question:
    """A conversation that asks for one fact told earlier.

    ``messages`` ends with the user's question; ``reply`` is the sentence the assistant should give, ``answer`` the
    value in it, ``wrong`` the values that must not appear in a reply (a corrected value, values of other facts), and
    ``told_in`` the index of the told conversation that holds the answer.
    """

    messages: Conversation
    reply: str
    relation: str
    answer: str
    wrong: tuple[str, ...] = ()
    told_in: int | None = None

    @property
    def conversation(self) -> Conversation:
        """The question followed by the assistant's reply, which is labelled to be learned."""
        reply = {"role": "assistant", "content": self.reply, "train": True}
        return [*self.messages, reply | {"answer": self.answer, "told_in": self.told_in}]


@dataclass(frozen=True)
class Episode:
    """Conversations in which facts are told, and the questions asked after them."""

    told: list[Conversation]
    questions: list[Question]

    @property
    def conversations(self) -> list[Conversation]:
        """The told conversations, then every question with its labelled reply."""
        return [*self.told, *(question.conversation for question in self.questions)]


@cache
def load_data() -> dict[str, Any]:
    """The values, relations, distractors and acknowledgements, read once (do not change them)."""
    text = resources.files(__package__).joinpath("data", "recall.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def _check_choice(what: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def _check_count(what: str, value: object, lowest: int, highest: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or value < lowest or (highest is not None and value > highest):  # type: ignore[operator]
        bounds = f"an integer of at least {lowest}" if highest is None else f"an integer from {lowest} to {highest}"
        raise ValueError(f"{what} must be {bounds}, not {value!r}")


def names(split: str = "train") -> list[str]:
    """The first names of a split; no validation name shares a root with a training name."""
    return values("first_name", split)


def values(category: str, split: str = "train") -> list[str]:
    """The values of one category in a split."""
    _check_choice("category", category, sorted(load_data()["values"]))
    _check_choice("split", split, SPLITS)
    return list(load_data()["values"][category][split])


def relation_names(relations: str = "train") -> list[str]:
    """The keys of the training relations, of the held-out relations, or of the one relation named."""
    return [relation["key"] for relation in _relations(relations)]


def _relations(relations: str) -> list[dict[str, Any]]:
    every = load_data()["relations"]
    if relations in RELATION_SPLITS:
        return [relation for relation in every if relation["split"] == relations]
    chosen = [relation for relation in every if relation["key"] == relations]
    if not chosen:
        raise ValueError(
            f"relations must be 'train', 'held_out' or the key of a relation such as 'name', not {relations!r}"
        )
    return chosen


def distractor_conversations(split: str = "train") -> list[Conversation]:
    """One-exchange conversations about general things, which hold no fact about the user."""
    _check_choice("split", split, SPLITS)
    return [_exchange(entry["user"], entry["assistant"]) for entry in load_data()["distractors"][split]]


def general_conversations(split: str = "train") -> list[Conversation]:
    """Short questions and remarks that have nothing to do with the user, each with an ordinary reply."""
    _check_choice("split", split, SPLITS)
    return [_exchange(entry["user"], entry["assistant"]) for entry in load_data()["general"][split]]


def fill(template: str, value: str) -> str:
    """Put a value into a template's ``{v}``, with a capital letter where it begins a sentence."""
    match = _SENTENCE_START.search(template)
    if match:
        value = value[:1].upper() + value[1:]
    return template.replace("{v}", value)


def score_reply(reply: str, question: Question) -> bool:
    """Whether the reply gives the answer as whole words, in any case, and none of the wrong values.

    An article before the answer ("a baker") may be missing; a wrong value that is part of the answer does not count.
    """
    text, answer = _normal(reply), _normal(question.answer)
    if not _contains(text, _ARTICLE.sub("", answer)):
        return False
    wrong = (_ARTICLE.sub("", _normal(value)) for value in question.wrong)
    return not any(value not in answer and _contains(text, value) for value in wrong)


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("\u2018", "'")
    return " ".join(text.casefold().split())


def _contains(text: str, value: str) -> bool:
    """Whole-word match; a word joined by a hyphen is another word ("forty" is not in "forty-two")."""
    return re.search(rf"(?<!\w)(?<!\w-){re.escape(value)}(?!\w|-\w)", text) is not None


def _exchange(user: str, assistant: str) -> Conversation:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _overlap(first: str, second: str) -> bool:
    first, second = (_ARTICLE.sub("", _normal(value)) for value in (first, second))
    return _contains(first, second) or _contains(second, first)


def _draw_value(
    rng: random.Random,
    relation: dict[str, Any],
    split: str,
    used: list[str],
    texts: list[str],
    earlier: frozenset[str] = frozenset(),
    tellings: int | None = None,
) -> str | None:
    """A value that overlaps with no used value and with none of the texts, or None where there is none.

    Values of `earlier` episodes come last.
    """
    pool = load_data()["values"][relation["category"]][split]
    if tellings is not None:
        pool = _values_told(relation["key"], relation["category"], tellings)
    for value in sorted(rng.sample(pool, len(pool)), key=lambda value: value in earlier):
        bare = _ARTICLE.sub("", _normal(value))
        if not any(_overlap(value, other) for other in used) and not any(_contains(text, bare) for text in texts):
            return str(value)
    return None


@cache
def _values_told(key: str, category: str, tellings: int) -> list[str]:
    """The few values of a relation in the training mixture: some of its category's, and made-up ones."""
    chance = random.Random(key)
    known = load_data()["values"][category]["train"]
    most = tellings * (8 if key == NAME_RELATION else 1)
    told = chance.sample(known, min(most, len(known)))
    if category in CLOSED_CATEGORIES:
        return told
    return [*told, *_inventor().values(known, round(INVENTED_SHARE * len(told)), chance)]


@cache
def _inventor() -> Inventor:
    values = load_data()["values"]
    train, validation = ([v for category in values.values() for v in category[split]] for split in SPLITS)
    return Inventor(like=train, avoid=validation)


def _fixed_words(relation: dict[str, Any]) -> list[str]:
    """The answer sentences without their value: a wrong value that stood there would spoil a right reply."""
    return [_normal(template.replace("{v}", " ")) for template in relation["answers"]]


def _build(
    rng: random.Random,
    pool: list[dict[str, Any]],
    split: str,
    facts: int,
    facts_per_conversation: int,
    distractors: int,
    correction: bool,
    questions: int,
    earlier: frozenset[str] = frozenset(),
    tellings: int | None = None,
    oblique_share: float = 0.0,
    framed_share: float = 0.0,
) -> Episode:
    for _ in range(1000):
        told = rng.sample(pool, facts)
        texts = [text for relation in told for text in _fixed_words(relation)]
        used: list[str] = []
        for relation in told:
            value = _draw_value(rng, relation, split, used, texts, earlier, tellings)
            if value is None:
                break
            used.append(value)
        if len(used) < facts:  # a small category (the weekdays) was drawn too often: draw other relations
            continue
        asked = rng.sample(range(facts), questions)
        renewed = _draw_value(rng, told[asked[0]], split, used, texts, tellings=tellings) if correction else None
        if correction and renewed is None:
            continue
        break
    else:
        raise ValueError(
            f"facts={facts!r} does not leave enough different values in split {split!r} for these "
            f"relations; tell fewer facts"
        )

    acknowledgements = load_data()["acknowledgements"]

    def exchange(relation: dict[str, Any], phrasings: list[str], value: str) -> Conversation:
        chance = rng if tellings is None else random.Random(f"{relation['key']} {value}")
        return _exchange(fill(chance.choice(phrasings), value), chance.choice(acknowledgements))

    def statement(relation: dict[str, Any], value: str) -> Conversation:
        chance = random.Random(f"{value} of {relation['key']}")
        if chance.random() >= framed_share:
            return exchange(relation, relation["statements"][split], value)
        frames = [frame.replace("{about}", relation["about"]) for frame in load_data()["telling_frames"]]
        return exchange(relation, frames, " ".join([*relation.get("article", "").split(), value]))

    exchanges = [statement(relation, value) for relation, value in zip(told, used, strict=True)]
    conversations = [
        [message for pair in exchanges[start : start + facts_per_conversation] for message in pair]
        for start in range(0, facts, facts_per_conversation)
    ]
    told_in = [index // facts_per_conversation for index in range(facts)]
    current = list(used)

    def insert(place: int, conversation: Conversation) -> None:
        conversations.insert(place, conversation)
        told_in[:] = [index + (index >= place) for index in told_in]

    if renewed is not None:  # told again at any place after the conversation with the first value
        current[asked[0]] = renewed
        correcting = exchange(told[asked[0]], told[asked[0]]["corrections"], renewed)
        place = rng.randint(told_in[asked[0]] + 1, len(conversations))
        insert(place, correcting)
        told_in[asked[0]] = place
    others = rng.sample(load_data()["distractors"][split], distractors)
    for entry in others:
        place = rng.randint(0, len(conversations)) if split == "train" else len(conversations)
        insert(place, _exchange(entry["user"], entry["assistant"]))

    asking = []
    for index in asked:
        relation, answer = told[index], current[index]
        phrasings, replies = relation["questions"][split], relation["answers"]
        if oblique_share and rng.random() < oblique_share:
            frames = [frame.format(about=relation["about"]) for frame in load_data()["frames"]]
            phrasings, replies = [*relation["oblique"], *frames], [load_data()["oblique_answer"]]
        asking.append(
            Question(
                messages=[{"role": "user", "content": rng.choice(phrasings)}],
                reply=fill(rng.choice(replies), answer),
                relation=relation["key"],
                answer=answer,
                wrong=tuple(value for value in dict.fromkeys([*used, *current]) if value != answer),
                told_in=told_in[index],
            )
        )
    return Episode(told=conversations, questions=asking)


def _check(
    pool: list[dict[str, Any]],
    relations: str,
    split: str,
    facts: int,
    facts_per_conversation: int,
    distractors: int,
    questions: int,
) -> None:
    _check_count("facts", facts, 1)
    if facts > len(pool):
        raise ValueError(f"facts must be at most {len(pool)}, the number of relations in {relations!r}, not {facts!r}")
    _check_count("facts_per_conversation", facts_per_conversation, 1)
    _check_count("distractors", distractors, 0, len(load_data()["distractors"][split]))
    _check_count("questions", questions, 1, facts)


def recall_episodes(
    num_episodes: int,
    *,
    split: str = "train",
    relations: str = "train",
    facts: int = 1,
    facts_per_conversation: int = 1,
    distractors: int = 0,
    correction: bool = False,
    questions: int = 1,
    seed: int = 0,
) -> list[Episode]:
    """Episodes of one kind, the same for the same arguments.

    ``split`` ("train", "validation") chooses the values and phrasings; ``relations`` is "train", "held_out" or the
    key of one relation such as "name".  ``facts`` different relations are told, ``facts_per_conversation`` in a
    conversation, and ``questions`` of them asked, drawn at random.  ``distractors`` conversations about other things
    come at random places in training and after the facts in validation.  With ``correction`` the fact of the first
    question is told again later with another value, which is then the answer.
    """
    _check_count("num_episodes", num_episodes, 0)
    _check_choice("split", split, SPLITS)
    pool = _relations(relations)
    _check(pool, relations, split, facts, facts_per_conversation, distractors, questions)
    rng = random.Random(seed)
    episodes: list[Episode] = []
    for _ in range(num_episodes):
        # Asked of one relation only, no value comes twice while there are others.
        earlier = frozenset(episode.questions[0].answer for episode in episodes) if len(pool) == 1 else frozenset()
        episodes.append(
            _build(rng, pool, split, facts, facts_per_conversation, distractors, bool(correction), questions, earlier)
        )
    return episodes


def training_mixture(seed: int = 0, tellings: int | None = None) -> Iterator[Episode]:
    """Endless varied training episodes, the same for the same seed.

    One to ten facts, few oftener than many, sometimes several in a conversation; three in ten with a correction, four
    in ten with one to sixteen distractors, about a third with the user's name among the facts; three questions, where
    there are as many facts.  Four facts in ten are told in a frame that any relation may have ("I filled in Emma where
    they ask for my name.").  Half the questions are oblique: they do not hold the words of a reply ("What keeps me
    awake with the light on?"), or hold them in a frame that any relation may have ("Look up my job for me."), so the
    reply does not take them up ("You told me: Emma.").

    With ``tellings`` every relation has at most that many values (the user's name eight times as many), and for two of
    them three that are made up and can only be copied; a value is always told in the same words: conversations come
    again in other company, and need not be read again to train.
    """
    if tellings is not None:
        _check_count("tellings", tellings, 12)
    rng = random.Random(seed)
    pool = [relation for relation in _relations("train") if relation["key"] != NAME_RELATION]
    (name,) = _relations(NAME_RELATION)
    while True:
        facts = rng.choice(FACTS_TOLD)
        chosen = rng.sample(pool, facts)
        if rng.random() < 0.35:
            chosen[0] = name
        if not _room(chosen):  # more facts about weekdays, say, than there are weekdays
            continue
        together = rng.randint(2, facts) if facts > 1 and rng.random() < 0.15 else 1
        distractors = rng.choice(DISTRACTORS_BETWEEN) if rng.random() < 0.4 else 0
        yield _build(
            rng,
            chosen,
            "train",
            facts,
            together,
            distractors,
            rng.random() < 0.3,
            min(QUESTIONS_ASKED, facts),
            tellings=tellings,
            oblique_share=OBLIQUE_SHARE,
            framed_share=FRAMED_SHARE,
        )


def _room(relations: list[dict[str, Any]]) -> bool:
    """Whether every category has enough values for these relations and one correction."""
    counts: dict[str, int] = {}
    for relation in relations:
        counts[relation["category"]] = counts.get(relation["category"], 0) + 1
    return all(count < len(load_data()["values"][category]["train"]) for category, count in counts.items())
