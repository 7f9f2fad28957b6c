"""What the recall task promises: disjoint splits, deterministic episodes of the kind asked for, and fair scoring."""

from __future__ import annotations

import itertools
import re

import pytest

from senri_hf.tasks import recall
from senri_hf.tasks.recall import (
    Question,
    distractor_conversations,
    fill,
    general_conversations,
    load_data,
    names,
    recall_episodes,
    relation_names,
    score_reply,
    training_mixture,
    values,
)


PARTS = ("statements", "questions")


def _question(answer: str, *wrong: str) -> Question:
    return Question([{"role": "user", "content": "What is it?"}], f"It is {answer}.", "name", answer, wrong)


def _edit_distance_below_two(first: str, second: str) -> bool:
    if first == second or abs(len(first) - len(second)) > 1:
        return first == second
    if len(first) == len(second):
        return sum(a != b for a, b in zip(first, second, strict=True)) < 2
    short, long = sorted((first, second), key=len)
    return any(long[:place] + long[place + 1 :] == short for place in range(len(long)))


def test_values_of_the_splits_are_disjoint() -> None:
    for category, pools in load_data()["values"].items():
        both = [value.casefold() for pool in pools.values() for value in pool]
        assert len(set(both)) == len(both), category


def test_phrasings_of_the_splits_are_disjoint() -> None:
    for relation in load_data()["relations"]:
        for part in PARTS:
            train, validation = relation[part]["train"], relation[part]["validation"]
            assert len(set(train)) >= 6 and len(set(validation)) >= 3, relation["key"]
            assert not set(train) & set(validation), relation["key"]


def test_oblique_questions_of_training_are_no_validation_questions() -> None:
    relations = load_data()["relations"]
    validation = {question for relation in relations for question in relation["questions"]["validation"]}
    for relation in relations:
        oblique = relation.get("oblique", [])
        assert (len(set(oblique)) >= 6) == (relation["split"] == "train"), relation["key"]
        assert not validation & set(oblique)
        assert not set(relation["questions"]["train"]) & set(oblique)


FRAME_WORDS = 4


def _word_runs(text: str) -> set[tuple[str, ...]]:
    """All that are so many words in a row."""
    words = re.findall(r"[\w{}']+", text.casefold())
    return {tuple(words[start : start + FRAME_WORDS]) for start in range(len(words) - FRAME_WORDS + 1)}


@pytest.mark.parametrize("name", ["frames", "telling_frames"])
def test_a_frame_shares_no_run_of_words_with_validation(name: str) -> None:
    data = load_data()
    said_in_validation = {
        run
        for relation in data["relations"]
        for part in PARTS
        for phrasing in relation[part]["validation"]
        for run in _word_runs(phrasing.replace(relation.get("about", "{about}"), "{about}"))
    }
    for frame in data[name]:
        assert not _word_runs(frame) & said_in_validation, frame


def test_a_frame_for_telling_holds_what_is_told() -> None:
    frames = load_data()["telling_frames"]
    assert len(set(frames)) >= 12
    for frame in frames:
        assert frame.count("{about}") == frame.count("{v}") == 1 and frame.count("{") == 2 and frame[-1] == ".", frame


def test_a_frame_for_questions_holds_what_is_asked() -> None:
    data = load_data()
    assert len(set(data["frames"])) >= 12
    for frame in data["frames"]:
        assert frame.count("{about}") == 1 and frame.count("{") == 1 and frame[-1] in ".?!", frame
    for relation in data["relations"]:
        assert ("about" in relation) == (relation["split"] == "train"), relation["key"]
        assert relation.get("about", "my").split()[0] in ("the", "my"), relation["about"]


def test_general_conversations_of_training_hold_nothing_of_validation() -> None:
    train, validation = (general_conversations(split) for split in recall.SPLITS)
    assert len(train) >= 45 and len(validation) >= 25
    assert not {c[0]["content"] for c in train} & {c[0]["content"] for c in validation}
    unseen = [value for category in load_data()["values"].values() for value in category["validation"]]
    for conversation in train:
        assert [message["role"] for message in conversation] == ["user", "assistant"]
        said = recall._normal(" ".join(message["content"] for message in conversation))
        assert not any(recall._contains(said, recall._normal(value)) for value in unseen), said


def test_relations_of_the_splits_are_disjoint() -> None:
    train, held_out = relation_names("train"), relation_names("held_out")
    assert len(train) >= 110 and len(held_out) == 20
    assert len({*train, *held_out}) == len(train) + len(held_out)


def test_distractors_of_the_splits_are_disjoint() -> None:
    train, validation = ({text[0]["content"] for text in distractor_conversations(s)} for s in recall.SPLITS)
    assert train and validation and not train & validation


def test_validation_names_share_no_root_with_training_names() -> None:
    assert len(names("validation")) == 220
    for new in map(str.lower, names("validation")):
        for known in map(str.lower, names("train")):
            root = min(4, len(new), len(known))
            assert new[:root] != known[:root] and new not in known and known not in new, (new, known)
            assert not _edit_distance_below_two(new, known), (new, known)


def test_every_template_has_exactly_one_place_for_the_value() -> None:
    for relation in load_data()["relations"]:
        templates = [*itertools.chain(*relation["statements"].values()), *relation["answers"], *relation["corrections"]]
        for template in templates:
            assert template.count("{v}") == 1 and template.count("{") == 1, template
        for question in itertools.chain(*relation["questions"].values()):
            assert "{" not in question, question


def test_every_text_looks_like_a_sentence() -> None:
    data = load_data()
    for relation in data["relations"]:
        value = data["values"][relation["category"]]["train"][0]
        templates = [*relation["answers"], *relation["corrections"]]
        for part in PARTS:
            templates += itertools.chain(*relation[part].values())
        assert len(relation["answers"]) == 2 and len(relation["corrections"]) >= 2
        for text in (fill(template, value) for template in templates):
            assert text[0].isupper() and text[-1] in ".?!" and "  " not in text and text.strip() == text, text
            assert " a a " not in text and " the the " not in text and "is is" not in text.split("This"), text


def test_the_same_seed_gives_the_same_episodes() -> None:
    kind = {"facts": 3, "distractors": 2, "correction": True, "questions": 2}
    assert recall_episodes(5, seed=4, **kind) == recall_episodes(5, seed=4, **kind)
    assert recall_episodes(5, seed=4, **kind) != recall_episodes(5, seed=5, **kind)
    first, again = (list(itertools.islice(training_mixture(7), 30)) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("relations", ["train", "held_out"])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("correction", [False, True])
def test_the_right_reply_scores_and_the_answer_was_told(relations: str, split: str, correction: bool) -> None:
    kind = {"split": split, "relations": relations, "facts": 5, "correction": correction, "questions": 3}
    for episode in recall_episodes(60, **kind):
        said = " ".join(m["content"] for c in episode.told for m in c if m["role"] == "user").casefold()
        for question in episode.questions:
            assert score_reply(question.reply, question), question
            assert question.answer.casefold() in said
            assert question.answer in load_data()["values"][_relation(question.relation)["category"]][split]


def _relation(key: str) -> dict:
    return next(relation for relation in load_data()["relations"] if relation["key"] == key)


def test_facts_are_spread_over_conversations() -> None:
    for episode in recall_episodes(10, facts=7, facts_per_conversation=3):
        assert [len(conversation) for conversation in episode.told] == [6, 6, 2]
        assert len(episode.questions) == 1 and len(episode.questions[0].wrong) == 6


def test_a_correction_comes_after_the_first_value_and_makes_it_wrong() -> None:
    for episode in recall_episodes(50, facts=3, correction=True):
        question = episode.questions[0]
        texts = [conversation[0]["content"].casefold() for conversation in episode.told]
        assert len(texts) == 4 and len(question.wrong) == 3
        corrections = {
            fill(template, question.answer).casefold() for template in _relation(question.relation)["corrections"]
        }
        place = next(index for index, text in enumerate(texts) if text in corrections)
        assert place > 0


def test_validation_distractors_follow_the_facts() -> None:
    distractors = distractor_conversations("validation")
    for episode in recall_episodes(10, split="validation", facts=2, distractors=3):
        assert [conversation in distractors for conversation in episode.told] == [False, False, True, True, True]


def test_conversations_are_the_told_ones_and_the_labelled_questions() -> None:
    (episode,) = recall_episodes(1, facts=3, questions=2)
    assert episode.conversations[:3] == episode.told
    for conversation in episode.conversations[3:]:
        assert conversation[-1]["train"] is True and conversation[-1]["role"] == "assistant"
    assert not any("train" in message for conversation in episode.told for message in conversation)


def test_one_relation_can_be_asked_for_alone() -> None:
    episodes = recall_episodes(20, split="validation", relations="name")
    assert {episode.questions[0].relation for episode in episodes} == {"name"}
    assert {episode.questions[0].answer for episode in episodes} <= set(names("validation"))


@pytest.mark.parametrize("kind", [{"facts": 6, "facts_per_conversation": 2, "distractors": 3}, {"correction": True}])
def test_a_question_says_in_which_conversation_its_answer_was_told(kind: dict) -> None:
    for episode in recall_episodes(40, **{"facts": 3, "questions": 2, **kind}):
        for question in episode.questions:
            holding = [i for i, told in enumerate(episode.told) if _tells(told, question.answer)]
            assert question.told_in == holding[-1]


def _tells(conversation: list[dict], value: str) -> bool:
    return any(value.casefold() in m["content"].casefold() for m in conversation if m["role"] == "user")


def test_a_mixture_of_few_tellings_tells_the_same_again_in_other_company() -> None:
    episodes = list(itertools.islice(training_mixture(1, tellings=12), 300))
    told = [repr(conversation) for episode in episodes for conversation in episode.told]
    assert len(set(told)) < 0.85 * len(told)
    assert len({repr(episode.told) for episode in episodes}) > 0.95 * len(episodes)


def test_made_up_values_of_few_tellings_can_only_be_copied() -> None:
    known = {v.casefold() for category in load_data()["values"].values() for v in [*category["train"]]}
    roots = {
        word.casefold()[:4]
        for category in load_data()["values"].values()
        for value in category["validation"]
        for word in value.split()
    }
    made_up, episodes = [], list(itertools.islice(training_mixture(1, tellings=12), 300))
    for question in (question for episode in episodes for question in episode.questions):
        assert score_reply(question.reply, question), question
        if question.answer.casefold() not in known:
            made_up.append(question)
    assert 0.3 < len(made_up) / sum(len(episode.questions) for episode in episodes) < 0.6
    assert not {_relation(question.relation)["category"] for question in made_up} & set(recall.CLOSED_CATEGORIES)
    for question in made_up:
        models = {word.casefold() for word in " ".join(values(_relation(question.relation)["category"])).split()}
        new = [word for word in question.answer.casefold().split() if word not in models and len(word) >= 4]
        assert new and not any(word[:4] in roots for word in new), question.answer
    again = list(itertools.islice(training_mixture(1, tellings=12), 300))
    assert again == episodes


def test_the_training_mixture_is_varied_and_keeps_to_training_data() -> None:
    episodes = list(itertools.islice(training_mixture(1), 400))
    told_name = {s.split("{v}")[0] for s in _relation("name")["statements"]["train"]}
    assert told_name
    assert {len(episode.questions) for episode in episodes} == {1, 2, 3}
    assert max(len(question.wrong) for episode in episodes for question in episode.questions) >= 9
    held_out = set(relation_names("held_out"))
    assert not any(question.relation in held_out for episode in episodes for question in episode.questions)
    questions = [question for episode in episodes for question in episode.questions]
    oblique = [q for q in questions if q.messages[0]["content"] not in _relation(q.relation)["questions"]["train"]]
    framed = [q for q in oblique if q.messages[0]["content"] not in _relation(q.relation)["oblique"]]
    assert 0.4 < len(oblique) / len(questions) < 0.6 and 0.5 < len(framed) / len(oblique) < 0.9
    for question in framed:
        about = _relation(question.relation)["about"]
        assert question.messages[0]["content"] in [frame.format(about=about) for frame in load_data()["frames"]]
    assert {question.reply for question in oblique} == {f"You told me: {question.answer}." for question in oblique}
    told = [conversation[0]["content"] for episode in episodes for conversation in episode.told]
    heads = [frame.split("{")[0] for frame in load_data()["telling_frames"] if not frame.startswith("{")]
    assert 0.15 < sum(text.startswith(tuple(heads)) for text in told) / len(told) < 0.4  # distractors among all
    for question in questions:
        assert score_reply(question.reply, question), question


@pytest.mark.parametrize(
    ("reply", "answer", "wrong", "right"),
    [
        ("Your name is Priya.", "Priya", (), True),
        ("your name is PRIYA!", "Priya", (), True),
        ("That is Priya's name.", "Priya", (), True),
        ("Your name is Priyanka.", "Priya", (), False),
        ("I do not know.", "Priya", (), False),
        ("", "Priya", (), False),
        ("You are Priya, not Omar.", "Priya", ("Omar",), False),
        ("You are Priya, says Omarion.", "Priya", ("Omar",), True),
        ("It is forty-two.", "forty", (), False),
        ("It is forty-two.", "forty-two", ("forty",), True),
        ("It is green tea.", "green tea", ("green",), True),
        ("You are an architect.", "an architect", (), True),
        ("Your job: architect.", "an architect", ("a baker",), True),
        ("You are an architect and baker.", "an architect", ("a baker",), False),
        ("It is shepherd\u2019s pie.", "shepherd's pie", (), True),
    ],
)
def test_scoring_matches_whole_words_only(reply: str, answer: str, wrong: tuple[str, ...], right: bool) -> None:
    assert score_reply(reply, _question(answer, *wrong)) is right


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "test"}, "'test'"),
        ({"relations": "shoe_size"}, "'shoe_size'"),
        ({"facts": 0}, "0"),
        ({"facts": 999}, "999"),
        ({"facts": 2, "questions": 3}, "3"),
        ({"distractors": -1}, "-1"),
        ({"distractors": 10_000}, "10000"),
        ({"facts_per_conversation": "two"}, "'two'"),
    ],
)
def test_errors_name_the_value(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        recall_episodes(1, **arguments)
