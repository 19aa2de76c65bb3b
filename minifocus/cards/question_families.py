"""The questions about a scene, of four families, and their answers."""

from __future__ import annotations

import numpy as np

from .scene import COLOURS, FREE, SHAPES, SIDES, Box, Object, Question


def neighbour(objects: list[Object], thing: Object, side: str) -> Object | None:
    """What is directly to the ``side`` of an object; None if nothing is, or if the answer is open to doubt.

    Both stand by themselves: parts of a table or a chart have no neighbours. The neighbour is at most 12 pixels away and
    shares at least half of the smaller one's extent across that direction; nothing else that shares any of it may start
    within 24 pixels.
    """
    if thing.kind not in FREE:
        return None
    axis, sign = (0 if side in ("left", "right") else 1), (-1 if side in ("left", "above") else 1)
    across = 1 - axis
    a, close = thing.box, []
    for other in objects:
        b = other.box
        gap = a[axis] - b[axis + 2] if sign < 0 else b[axis] - a[axis + 2]
        shared = min(a[across + 2], b[across + 2]) - max(a[across], b[across])
        if other is not thing and 0 <= gap <= 24 and shared > 0:
            smaller = min(a[across + 2] - a[across], b[across + 2] - b[across])
            close.append((other, gap <= 12 and 2 * shared >= smaller and other.kind in FREE))
    return close[0][0] if len(close) == 1 and close[0][1] else None


def _read(rng: np.random.Generator, objects: list[Object]) -> list[tuple[str, str]]:
    pairs = []
    for thing in objects:
        if thing.kind in ("card", "sign"):
            what = "number" if thing.kind == "card" else "word"
            phrases = (f"What {what} is on the {thing.name}?", f"What {what} does the {thing.name} show?")
            pairs.append((phrases[rng.integers(2)], thing.text))
        elif thing.kind == "row":
            pairs.append((f"What number is beside {thing.colour} in the table?", thing.text))
    return pairs


def _perceive(rng: np.random.Generator, objects: list[Object]) -> list[tuple[str, str]]:
    present = {o.name for o in objects}
    pairs = []
    # As many questions answered by yes as by no, about cards as about shapes: the wording must not give it away.
    for kind in ("card", str(rng.choice(FREE[1:]))):
        there = [c for c in COLOURS if f"{c} {kind}" in present]
        missing = [c for c in COLOURS if f"{c} {kind}" not in present]
        answer = "yes" if rng.random() < 0.5 else "no"
        if there and missing:
            colour = rng.choice(there if answer == "yes" else missing)
            pairs.append((f"Is there {_article(str(colour))} {colour} {kind}?", answer))
    for kind in rng.permutation(SHAPES)[:1]:
        count = sum(o.kind == kind for o in objects)
        if count or rng.random() < 0.4:  # or half of the counts would be zero
            pairs.append((f"How many {kind}s are there?", str(count)))
    for kind in SHAPES:
        same = [o for o in objects if o.kind == kind]
        if len(same) == 1:
            pairs.append((f"What colour is the {kind}?", same[0].colour))
    plates = [o for o in objects if o.kind in ("card", "sign")]
    for i in rng.permutation(len(plates))[:2]:
        what = "number" if plates[i].kind == "card" else "word"
        pairs.append((f"What colour is the {plates[i].kind} with the {what} {plates[i].text}?", plates[i].colour))
    rows = [o for o in objects if o.kind == "row"]
    for i in rng.permutation(len(rows))[:1]:
        pairs.append((f"What colour is beside {rows[i].text} in the table?", rows[i].colour))
    return pairs


def _reason(rng: np.random.Generator, objects: list[Object]) -> list[tuple[str, str]]:
    cards = [o for o in objects if o.kind == "card"]
    pairs = [
        (f"Is the number on the {card.name} even or odd?", "odd" if int(card.text) % 2 else "even") for card in cards
    ]
    for i, a in enumerate(cards):
        for b in cards[:i]:
            first, second = (a, b) if rng.random() < 0.5 else (b, a)
            # The larger number is plainly so: by its length or its first digit. To weigh close ones digit by digit is a
            # skill of its own, which decoders of this size take far longer to learn.
            if len(a.text) == len(b.text) and abs(int(a.text[0]) - int(b.text[0])) < 3:
                continue
            word, pick = ("larger", max) if rng.random() < 0.5 else ("smaller", min)
            answer = pick(first, second, key=lambda card: int(card.text)).colour
            phrase = f"Which card has the {word} number, the {first.colour} or the {second.colour} one?"
            pairs.append((phrase, answer))
    bars = sorted((o for o in objects if o.kind == "bar"), key=lambda bar: bar.box[1])
    if bars:
        pairs += [("Which bar is the tallest?", bars[0].colour), ("Which bar is the shortest?", bars[-1].colour)]
        for i in rng.permutation(len(bars) - 1)[:2]:
            first, second = (bars[i], bars[i + 1]) if rng.random() < 0.5 else (bars[i + 1], bars[i])
            taller = "yes" if first is bars[i] else "no"
            pairs.append((f"Is the {first.name} taller than the {second.name}?", taller))
    return pairs


def _relate(objects: list[Object], tiles: tuple[list[float], list[float]]) -> list[tuple[str, str]]:
    def cut(a: Box, b: Box) -> bool:
        """Whether a seam runs through the two boxes or between them; a thing may lose its outermost 3 pixels."""
        return any(
            min(a[axis], b[axis]) + 3 < seam < max(a[axis + 2], b[axis + 2]) - 3
            for axis in (0, 1)
            for seam in tiles[axis]
        )

    pairs = []
    for thing in objects:
        for side, phrase in SIDES.items():
            other = neighbour(objects, thing, side)
            if other is not None and not cut(thing.box, other.box):
                pairs.append((f"What is directly {phrase} the {thing.name}?", other.name))
    return pairs


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def ask(
    rng: np.random.Generator, objects: list[Object], tiles: tuple[list[float], list[float]], per_family: int = 4
) -> list[Question]:
    """At most ``per_family`` questions of each family, in random order."""
    families = {
        "read": _read(rng, objects),
        "perceive": _perceive(rng, objects),
        "reason": _reason(rng, objects),
        "relate": _relate(objects, tiles),
    }
    asked = []
    for family, pairs in families.items():
        asked += [Question(family, *pairs[i]) for i in rng.permutation(len(pairs))[:per_family]]
    return [asked[i] for i in rng.permutation(len(asked))]
