"""Stories of a small world: their answers follow from their sentences, wherever these stand."""

import pytest

from senri_hf.tasks import world, world_story
from senri_hf.tasks.world import KINDS, PLACES


def where_things_are(sentences: tuple[str, ...]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Places of people, and every place that a thing was in, read off the sentences alone."""
    place: dict[str, str] = {}
    held: dict[str, str] = {}
    trail: dict[str, list[str]] = {}
    for sentence in sentences:
        words = sentence.rstrip(".").split()
        person, last = words[0], words[-1]
        if words[1] == "went":
            place[person] = last
        elif words[1] == "took":
            held[last] = person
        else:
            del held[last]
        for thing, who in held.items():
            been = trail.setdefault(thing, [])
            if not been or been[-1] != place[who]:
                been.append(place[who])
    return place, trail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [6, 30])
def test_an_answer_is_true_of_the_story(kind: str, length: int) -> None:
    for seed in range(60):
        story = world_story(kind, length, seed)
        assert len(story.sentences) == length and story == world_story(kind, length, seed)
        place, trail = where_things_are(story.sentences)
        words = story.question.rstrip("?").split()
        if kind == KINDS[0]:
            assert story.answer == place[words[-1]]
        elif kind == KINDS[1]:
            assert story.answer == trail[words[-1]][-1]
        else:
            assert story.answer == trail[words[3]][-2] and words[-1] == trail[words[3]][-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_supporting_sentences_say_the_answer(kind: str) -> None:
    """One of them names the place; all are needed, in bAbI's numbers."""
    for seed in range(40):
        story = world_story(kind, 12, seed)
        said = [story.sentences[index] for index in story.supporting]
        assert any(sentence.endswith(f"the {story.answer}.") for sentence in said)
        assert len(said) <= {KINDS[0]: 1, KINDS[1]: 2, KINDS[2]: 4}[kind]
    answers = [world_story(kind, 12, seed).answer for seed in range(200)]
    assert max(answers.count(place) for place in PLACES) < 60  # guessing one place is right for an eighth


def test_a_scattered_story_is_all_there_in_order() -> None:
    story = world_story(KINDS[1], 8, seed=3)
    filler = [f"Paragraph {number} says nothing." for number in range(50)]
    text = story.scattered(filler, 300, seed=1)
    assert len(text.split()) >= 300 + sum(len(sentence.split()) for sentence in story.sentences)
    places = []
    for sentence in story.sentences:
        places.append(text.index(sentence, places[-1] + 1 if places else 0))
    assert text == story.scattered(filler, 300, seed=1) != story.scattered(filler, 300, seed=2)
    assert story.scattered([], 0) == " ".join(story.sentences)


def test_what_cannot_be_told_is_refused() -> None:
    for make, message in (
        (lambda: world_story("who has the thing", 5), "kind='who has the thing'"),
        (lambda: world_story(world.KINDS[2], 3), "length=3.*at least 4"),
        (lambda: world_story(KINDS[0], 3).scattered([""], 9), "words=9"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
