"""The generator's promises: same seed, same bytes; splits that never meet; answers that follow from the scene."""

import itertools
import re

import numpy as np
import pytest

from minifocus import cards
from minifocus.errors import InputError

SCENES = [*itertools.islice(cards.scenes("test"), 60), *(cards.draw(7_000_000 + i, dense=True) for i in range(12))]


def solve(scene: cards.Scene, question: str) -> str:
    """The answer, worked out from the objects with other code than the generator's."""
    by_name = {thing.name: thing for thing in scene.objects}
    assert len(by_name) == len(scene.objects), "two objects share a name"
    if match := re.fullmatch(r"What (?:number|word) (?:is on|does) the (\w+ card)(?: show)?\?", question):
        return by_name[match[1]].text
    if match := re.fullmatch(r"Is there an? (\w+ \w+)\?", question):
        return "yes" if match[1] in by_name else "no"
    if match := re.fullmatch(r"How many (\w+)s are there\?", question):
        return str(sum(name.endswith(match[1]) for name in by_name))
    if match := re.fullmatch(r"What colour is the card with the (?:number|word) (\w+)\?", question):
        (found,) = [thing for thing in scene.objects if thing.text == match[1]]
        return found.colour
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        (found,) = [thing for thing in scene.objects if thing.kind == match[1]]
        return found.colour
    if match := re.fullmatch(r"Is the number on the (\w+ card) even or odd\?", question):
        return "odd" if by_name[match[1]].text[-1] in "13579" else "even"
    if match := re.fullmatch(r"Which card has the (larger|smaller) number, the (\w+) or the (\w+) one\?", question):
        pair = sorted(match.group(2, 3), key=lambda colour: int(by_name[f"{colour} card"].text))
        return pair[match[1] == "larger"]
    match = re.fullmatch(r"What is directly (to the left of|to the right of|above|below) the (\w+ \w+)\?", question)
    assert match, question
    left, top, right, bottom = by_name[match[2]].box
    found = []
    for name, thing in by_name.items():
        x0, y0, x1, y1 = thing.box
        beside = min(bottom, y1) > max(top, y0)
        stacked = min(right, x1) > max(left, x0)
        distance = {
            "to the left of": left - x1 if beside else None,
            "to the right of": x0 - right if beside else None,
            "above": top - y1 if stacked else None,
            "below": y0 - bottom if stacked else None,
        }[match[1]]
        if distance is not None and 0 <= distance <= 24:
            found.append(name)
    (answer,) = found
    return answer


def test_the_same_seed_gives_the_same_bytes():
    for seed, dense in ((0, False), (3, True), (cards.SPLITS["test"] + 5, False)):
        first, second = cards.draw(seed, dense), cards.draw(seed, dense)
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.objects, first.questions) == (second.objects, second.questions)
    assert cards.draw(1).image.tobytes() != cards.draw(2).image.tobytes()


def test_the_splits_never_meet():
    ranges = sorted((first, first + cards.SPLIT_SIZE) for first in cards.SPLITS.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: str(scene.seed))
def test_answers_follow_from_the_scene(scene):
    for asked in scene.questions:
        assert type(asked.question) is str and type(asked.answer) is str
        assert asked.answer == solve(scene, asked.question), asked
    assert len({asked.question for asked in scene.questions}) == len(scene.questions)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: str(scene.seed))
def test_objects_lie_inside_the_picture_and_apart(scene):
    width, height = scene.image.size
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert all(left <= x0 < x1 <= right and top <= y0 < y1 <= bottom for x0, y0, x1, y1 in thing.glyphs)
    for a, b in itertools.combinations(scene.objects, 2):
        overlap_x = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
        overlap_y = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
        assert min(overlap_x, overlap_y) <= 0, (a, b)


def test_an_object_is_where_its_box_says_in_its_colour():
    for scene in SCENES[:20]:
        pixels = np.asarray(scene.image, dtype=float)
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            # The lower middle of every shape is filled; a card's lower edge is below its text.
            y = bottom - 2 if thing.kind == "card" else (top + bottom) // 2
            assert np.abs(pixels[y, (left + right) // 2] - cards.COLOURS[thing.colour]).max() <= 14, thing


def test_sizes_and_aspect_ratios_vary():
    sizes = {scene.image.size for scene in SCENES}
    ratios = [width / height for width, height in sizes]
    assert len(sizes) > 50 and min(ratios) < 0.7 and max(ratios) > 1.4
    assert all(max(size) >= 224 and min(size) >= 140 for size in sizes)
    assert any(width % 14 and height % 14 for width, height in sizes)


def test_dense_scenes_hold_many_cards_of_three_digits():
    for i in range(12):
        shown = [thing for thing in cards.draw(i, dense=True).objects if thing.kind == "card"]
        assert all(100 <= card.number <= 999 for card in shown)
        assert len(shown) >= 5


def test_yes_no_and_pairs_are_balanced():
    """A question alone must not give its answer away."""
    asked = [q for seed in range(300) for q in cards.draw(seed).questions]
    for pattern, answers in (("Is there", ("yes", "no")), ("Is the number", ("even", "odd"))):
        given = [q.answer for q in asked if q.question.startswith(pattern)]
        assert 0.4 < given.count(answers[0]) / len(given) < 0.6
    pairs = [q for q in asked if q.question.startswith("Which card")]
    first = sum(re.search(r"the (\w+) or", q.question)[1] == q.answer for q in pairs)
    assert 0.4 < first / len(pairs) < 0.6


def test_every_family_is_asked_in_turn():
    taken = list(cards.questions("validation", count=40))
    families = [family for _, _, _, family in taken]
    assert set(families) == set(cards.FAMILIES)
    assert all(image.mode == "RGB" and question and answer for image, question, answer, _ in taken)
    again = list(cards.questions("validation", count=40))
    assert [item[1:] for item in taken] == [item[1:] for item in again]


def same(first: cards.Scene, second: cards.Scene) -> bool:
    return first.image.tobytes() == second.image.tobytes() and first.questions == second.questions


def test_every_fourth_scene_is_dense_or_all_or_none():
    start = cards.SPLITS["validation"] + 6
    for dense, expected in ((None, (0, 1, 0, 0, 0, 1)), (True, (1,) * 6), (False, (0,) * 6)):
        taken = list(itertools.islice(cards.scenes("validation", 6, dense), 6))
        assert [scene.seed for scene in taken] == list(range(start, start + 6))
        drawn = [cards.draw(start + i, bool(is_dense)) for i, is_dense in enumerate(expected)]
        assert all(map(same, taken, drawn))


def test_questions_of_dense_scenes():
    for dense in (None, True, False):
        scenes = itertools.islice(cards.scenes("test", 2, dense), 4)
        expected = [
            (scene.image.tobytes(), q.question, q.answer, family)
            for scene in scenes
            for family in cards.FAMILIES
            for q in [q for q in scene.questions if q.family == family][:1]
        ]
        taken = [(image.tobytes(), *rest) for image, *rest in cards.questions("test", 10, 2, dense)]
        assert taken == expected[:10]
    assert list(cards.questions("test", 0)) == []


def test_scenes_of_no_split_are_refused():
    with pytest.raises(InputError, match="split: expected one of train, validation, test, got 'tests'"):
        cards.scenes("tests")
    for seed in (-1, cards.SPLIT_SIZE):
        with pytest.raises(InputError, match=f"seed: expected 0 to 99999999, a scene of the split, got {seed}"):
            cards.scenes("train", seed)
    last = list(cards.scenes("train", cards.SPLIT_SIZE - 1))
    assert [scene.seed for scene in last] == [cards.SPLITS["validation"] - 1]
    assert 0 < len(list(cards.questions("train", 1000, cards.SPLIT_SIZE - 1))) <= len(cards.FAMILIES)


def test_a_scene_as_a_conversation():
    scene = cards.draw(5)
    told = cards.conversation(scene)
    assert told.id == "5" and told.images == (scene.image,)
    assert [(turn.answer, turn.family) for turn in told.turns] == [(q.answer, q.family) for q in scene.questions]
    first, *others = [turn.question for turn in told.turns]
    assert [first.removeprefix("<image>\n"), *others] == [q.question for q in scene.questions]
    assert first.startswith("<image>\n")
    assert cards.conversation(cards.Scene(5, scene.image, [])).turns == ()


def test_scenes_are_those_of_the_split():
    assert len(cards.CardScenes(first=cards.SPLIT_SIZE - 5)) == 5 and len(cards.CardScenes()) == cards.SPLIT_SIZE // 2
    with pytest.raises(InputError, match="seed: expected 0 to 99999999"):
        cards.CardScenes(first=cards.SPLIT_SIZE)
