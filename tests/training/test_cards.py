"""The generator's promises: same seed, same bytes; splits that never meet; answers that follow from the scene."""

import itertools
import re
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from minifocus import cards
from minifocus.cards import backgrounds, drawing, lettering, packages
from minifocus.cards.backgrounds import PHOTOGRAPHS, TEXTURES
from minifocus.cards.lettering import FONTS
from minifocus.cards.plan import BAR_STEP
from minifocus.cards.words import draw_word
from minifocus.errors import InputError
from minifocus.inputs.tokenizer import Tokenizer

TINY = Path(__file__).resolve().parents[2] / "weights/tiny"


@cache
def some_scenes() -> list[cards.Scene]:
    """Drawn once, by whoever first asks: not by every process that only collects the tests."""
    return [*itertools.islice(cards.scenes("test"), 60), *(cards.draw(7_000_000 + i, dense=True) for i in range(12))]


@pytest.fixture(params=range(72))
def scene(request):
    return some_scenes()[request.param]


def solve(scene: cards.Scene, question: str) -> str:
    """The answer, worked out from the objects with other code than the generator's."""
    by_name = {thing.name: thing for thing in scene.objects}
    assert len(by_name) == len(scene.objects), "two objects share a name"
    if match := re.fullmatch(r"What (number|word) (?:is on|does) the (\w+ (?:card|sign))(?: show)?\?", question):
        assert by_name[match[2]].text.isdigit() == (match[1] == "number")
        return by_name[match[2]].text
    if match := re.fullmatch(r"What number is beside (\w+) in the table\?", question):
        return by_name[f"{match[1]} row"].text
    if match := re.fullmatch(r"What colour is beside (\d+) in the table\?", question):
        (found,) = [thing for thing in scene.objects if thing.kind == "row" and thing.text == match[1]]
        return found.colour
    if match := re.fullmatch(r"Which bar is the (tallest|shortest)\?", question):
        bars = {thing.box[3] - thing.box[1]: thing for thing in scene.objects if thing.kind == "bar"}
        return bars[(max if match[1] == "tallest" else min)(bars)].colour
    if match := re.fullmatch(r"Is the (\w+ bar) taller than the (\w+ bar)\?", question):
        first, second = (by_name[name].box[3] - by_name[name].box[1] for name in match.group(1, 2))
        assert abs(first - second) >= BAR_STEP
        return "yes" if first > second else "no"
    if match := re.fullmatch(r"Is there an? (\w+ \w+)\?", question):
        return "yes" if match[1] in by_name else "no"
    if match := re.fullmatch(r"How many (\w+)s are there\?", question):
        return str(sum(name.endswith(match[1]) for name in by_name))
    if match := re.fullmatch(r"What colour is the (card|sign) with the (?:number|word) (\w+)\?", question):
        (found,) = [thing for thing in scene.objects if (thing.kind, thing.text) == match.group(1, 2)]
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
    assert not match[2].endswith(("row", "bar"))
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


def test_answers_follow_from_the_scene(scene):
    for asked in scene.questions:
        assert type(asked.question) is str and type(asked.answer) is str
        assert asked.answer == solve(scene, asked.question), asked
    assert len({asked.question for asked in scene.questions}) == len(scene.questions)


def test_objects_lie_inside_the_picture_and_apart(scene):
    width, height = scene.image.size
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert all(left <= x0 < x1 <= right and top <= y0 < y1 <= bottom for x0, y0, x1, y1 in thing.glyphs)
        assert len(thing.glyphs) == len(thing.text) <= cards.MOST_GLYPHS
        assert all(a[2] <= b[0] for a, b in itertools.pairwise(thing.glyphs)), "letters overlap"
    for a, b in itertools.combinations([*(thing.box for thing in scene.objects), *scene.distractors], 2):
        overlap_x = min(a[2], b[2]) - max(a[0], b[0])
        overlap_y = min(a[3], b[3]) - max(a[1], b[1])
        assert min(overlap_x, overlap_y) <= 0, (a, b)


def test_no_half_of_a_picture_is_empty(scene):
    """In each half there are bright things, asked about or not, and edges all over: more than grain would give."""
    width, height = scene.image.size
    grey = np.asarray(scene.image.convert("L"), float)
    edges = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
    for axis, middle in ((0, width / 2), (1, height / 2)):
        bright = [*(thing.box for thing in scene.objects), *scene.distractors]
        below = [box[axis] + box[axis + 2] < 2 * middle for box in bright]
        assert any(below) and not all(below)
    for half in (*np.array_split(edges, 2, 0), *np.array_split(edges, 2, 1)):
        assert (half > 20).mean() > 0.02


def test_splits_share_no_background_no_font_and_no_word():
    for of_split in (
        PHOTOGRAPHS,
        TEXTURES,
        {name: [package for package, _ in own] for name, own in FONTS.items()},
        cards.WORDS,
    ):
        assert set(of_split) == set(cards.SPLITS) and all(of_split.values())
        for a, b in itertools.combinations(of_split, 2):
            assert not set(of_split[a]) & set(of_split[b])


@pytest.mark.parametrize("split", cards.SPLITS)
def test_a_scene_is_drawn_with_its_own_split_s(split):
    """By the files that are opened, the textures that are made, and the words that are there."""
    lettering._font.cache_clear()
    lettering.glyph_mask.cache_clear()
    backgrounds._photograph.cache_clear()
    with (
        mock.patch.object(backgrounds, "_texture", wraps=backgrounds._texture) as textures,
        mock.patch.object(lettering.ImageFont, "truetype", wraps=lettering.ImageFont.truetype) as fonts,
        mock.patch.object(backgrounds.Image, "open", wraps=backgrounds.Image.open) as photographs,
    ):
        drawn = [cards.draw(cards.SPLITS[split] + seed) for seed in range(60)]
    assert {call.args[1] for call in textures.call_args_list} == set(TEXTURES[split])
    assert {Path(call.args[0]).name for call in photographs.call_args_list} == set(PHOTOGRAPHS[split])
    assert {Path(call.args[0]).name for call in fonts.call_args_list} <= {Path(file).name for _, file in FONTS[split]}
    words = {thing.text for scene in drawn for thing in scene.objects if thing.kind == "sign"}
    assert words and all(word.isalpha() and word.isupper() and 3 <= len(word) <= 4 for word in words)
    if split != "train":
        assert words <= set(cards.WORDS[split])


def test_a_code_is_no_word_of_the_other_splits():
    """Of as many codes of three letters as there are, half of the words of the others would be drawn by chance."""
    letters = np.random.default_rng(0).permutation(26**3)
    rng = mock.Mock()
    held_out = {word for split in ("validation", "test") for word in cards.WORDS[split] if len(word) == 3}

    def code(number):
        return [chr(65 + number // 676), chr(65 + number // 26 % 26), chr(65 + number % 26)]

    rng.random.return_value = 0.0
    rng.integers.return_value = 3
    rng.choice.side_effect = map(code, letters)
    drawn = {draw_word(rng, "train") for _ in range(len(letters) - len(held_out))}
    assert len(drawn) == len(letters) - len(held_out) and not drawn & held_out


def test_what_scenes_are_drawn_with_is_required_and_pinned():
    """By the extra `cards`, at one version; and in the environment of lmms-eval's tests, which installs no extra."""
    root = TINY.parents[1]
    used = {package for own in FONTS.values() for package, _ in own} | {"scikit-image"}
    used = {package.replace("_", "-") for package in used}
    (extra,) = re.findall(r"^cards = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r'"([\w-]+)"', extra)) == used
    assert used <= set(re.findall(r"^([\w-]+)==", (root / "constraints.txt").read_text(), re.MULTILINE))
    lmms = (root / "Makefile").read_text().split("lmms-eval/installed:")[1]
    assert used <= set(lmms.split())


def test_the_embedded_tokenizer_spells_words_letter_by_letter():
    tokenizer = Tokenizer.from_folder(TINY)
    before = len(tokenizer.encode("ASSISTANT:").ids)
    for word in itertools.chain(*cards.WORDS.values()):
        own = len(tokenizer.encode(f"ASSISTANT: {word}").ids) - before
        assert own - len(word) in (0, 1), word  # the space is a token, or one with the first letter


def test_a_package_that_is_missing_is_named():
    missing = mock.patch.object(packages, "find_spec", return_value=None)
    with (
        missing,
        pytest.raises(InputError, match=r"font_lato, which .* is not installed: pip install 'minifocus\[cards\]'"),
    ):
        packages.package_folder.__wrapped__("font_lato")
    for seed in (-1, 3 * cards.SPLIT_SIZE, 10**5000):
        with pytest.raises(InputError, match="seed: expected 0 to 299999999, got"):
            cards.draw(seed)


def test_an_object_is_where_its_box_says_in_its_colour():
    for scene in some_scenes()[:20]:
        pixels = np.asarray(scene.image, dtype=float)
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            # The lower middle of every shape is filled; the lower edge of a card and a sign is below its text.
            y = bottom - 2 if thing.kind in ("card", "sign") else (top + bottom) // 2
            x = left + 10 if thing.kind == "row" else (left + right) // 2
            assert np.abs(pixels[y, x] - cards.COLOURS[thing.colour]).max() <= 14, thing


def test_sizes_and_aspect_ratios_vary():
    sizes = {scene.image.size for scene in some_scenes()}
    ratios = [width / height for width, height in sizes]
    assert len(sizes) > 50 and min(ratios) < 0.7 and max(ratios) > 1.4
    assert all(max(size) >= 224 and min(size) >= 140 for size in sizes)
    assert any(width % 14 and height % 14 for width, height in sizes)


def test_dense_scenes_hold_many_cards_of_three_digits():
    for i in range(12):
        shown = [thing for thing in cards.draw(i, dense=True).objects if thing.kind == "card"]
        assert all(100 <= card.number <= 999 for card in shown)
        assert len(shown) >= 4


def test_yes_no_and_pairs_are_balanced():
    """A question alone must not give its answer away. Nothing is painted: that takes most of the time."""
    with (
        mock.patch.object(drawing, "draw_background", lambda _, split, width, height: np.zeros((height, width, 3))),
        mock.patch.object(drawing, "draw_distractor"),
        mock.patch.object(drawing, "_paint"),
    ):
        asked = [q for seed in range(300) for q in cards.draw(seed).questions]
    for pattern, answers in (
        ("Is there", ("yes", "no")),
        ("Is the number", ("even", "odd")),
        (r"Is the \w+ bar", ("yes", "no")),
    ):
        given = [q.answer for q in asked if re.match(pattern, q.question)]
        assert len(given) > 40 and 0.4 < given.count(answers[0]) / len(given) < 0.6
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
