"""The paper's tables: which arm stands for which row, what the paper found, and what that says in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..miniature.make import SCALE_WEIGHTS

PAPER_COLUMNS = ("TextVQA", "MME", "ScienceQA", "GQA")  # read, perceive, reason and relate stand for them


@dataclass(frozen=True)
class Row:
    """`paper` has the scores of PAPER_COLUMNS, `cost` the paper's share of tokens and samples/s where it gives them; an
    `extra` row, which the paper's table has not, is only made where its arm is named (--arms)."""

    label: str
    arm: str
    paper: tuple[float, ...] | None = None
    cost: tuple[float, float] | None = None
    extra: bool = False


@dataclass(frozen=True)
class Figures:
    """What claims are checked on, of one arm: means over its seeds of its accuracy by family ("all": over all questions) and
    of its share of tokens, the number of answers behind each accuracy, the lowest and highest accuracy of a seed (None:
    there is one), how many times as fast as the control it is where that was timed, and scales by kind of region."""

    accuracy: dict[str, float]
    answers: dict[str, int]
    tokens: float
    range: tuple[float, float] | None = None
    speed: float | None = None
    scales: dict[str, dict[str, float]] | None = None


Measured = dict[str, Figures]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds here, None where chance alone could decide, and the figures that say so."""

    holds: bool | None
    figures: str = ""

    def __str__(self) -> str:
        words = {True: "Here too", False: "Not here", None: "Too close to say here"}[self.holds]
        return f"**{words}{f' ({self.figures})' if self.figures else ''}.**"


@dataclass(frozen=True)
class Claim:
    """A finding of the paper's table, and whether the miniature's figures point the same way."""

    text: str
    check: Callable[[Measured], Verdict]


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    spread: bool = False  # over three seeds
    timed: bool = False
    notes: str = ""


BASELINE = Row("LLaVA-NeXT (control)", "control", (65.5, 1562, 76.4, 61.7), (1.0, 2.85))
VISION = Row("vision-guided sampler*", "vision", (65.2, 1590, 77.8, 62.3), (0.49, 3.76))
TEXT = Row("text-guided sampler*", "text", (65.4, 1603, 76.9, 62.1), (0.81, 3.19))


def difference(first: Figures, second: Figures, family: str = "all") -> tuple[float, float]:
    """How far the first's accuracy is above the second's, and 1.96 standard errors of that.

    They are those of answers to different questions. That the arms were asked the same makes them too large, that a picture
    has several questions too small; what another seed's training would give is not in them.
    """
    accuracies = [(one.accuracy[family], one.answers[family]) for one in (first, second)]
    return first.accuracy[family] - second.accuracy[family], 1.96 * sum(a * (1 - a) / n for a, n in accuracies) ** 0.5


def _points(found: float, error: float) -> str:
    return f"{100 * found:+.1f} ± {100 * error:.1f} points"


def _above(better: str, worse: str, family: str = "all") -> Callable[[Measured], Verdict]:
    def check(m: Measured) -> Verdict:
        found, error = difference(m[better], m[worse], family)
        return Verdict(found > 0 if abs(found) > error else None, _points(found, error))

    return check


def _as_good(arm: str, reference: str) -> Callable[[Measured], Verdict]:
    """Not below the reference by more than that one's own range over seeds, and not by more than the error of the difference.
    Where only one of the two says so, it is undecided."""

    def check(m: Measured) -> Verdict:
        found, error = difference(m[arm], m[reference])
        low, high = m[reference].range or (0.0, 0.0)
        within = {found >= low - high, found >= -error}
        return Verdict(within.pop() if len(within) == 1 else None, _points(found, error))

    return check


def _best(arm: str) -> Callable[[Measured], Verdict]:
    """Of the arms that leave something out."""

    def check(m: Measured) -> Verdict:
        second = max((name for name in m if name not in (arm, "control")), key=lambda name: m[name].accuracy["all"])
        return _above(arm, second)(m)

    return check


def _collapsed(arm: str) -> Callable[[Measured], Verdict]:
    """One scale for at least 95 % of all regions that show nothing, and of all that show text."""

    def check(m: Measured) -> Verdict:
        scales = m[arm].scales
        assert scales is not None
        empty, text = scales["empty"], scales["text"]
        most = max(empty, key=lambda scale: min(empty[scale], text[scale]))
        share = min(empty[most], text[most])
        return Verdict(share >= 0.95, f"{most.replace('x', '×')} for {share:.0%}")

    return check


def _cheaper(arm: str, other: str) -> Callable[[Measured], Verdict]:
    return lambda m: Verdict(m[arm].tokens < m[other].tokens, f"{m[arm].tokens:.1%} and {m[other].tokens:.1%}")


def _all_below(arms: list[str], reference: str) -> Callable[[Measured], Verdict]:
    def check(m: Measured) -> Verdict:
        found = [_above(arm, reference)(m) for arm in arms]
        holds = [one.holds for one in found]
        return Verdict(False if True in holds else None if None in holds else True, "; ".join(v.figures for v in found))

    return check


TABLES: dict[int, Table] = {
    2: Table(
        "Visual and textual guidance",
        (
            BASELINE,
            VISION,
            TEXT,
            Row("both*", "focus", (65.9, 1597, 78.1, 62.6), (0.39, 4.01)),
            Row("both, Eq. 2's factor as printed", "printed", extra=True),
            Row("the same, from the start of instruction tuning", "single", extra=True),
            Row("both, the selector given cosines", "cosine", extra=True),
            Row("2×2 average pooling", "avgpool"),
            Row("random tokens", "random"),
        ),
        (
            Claim("Both samplers answer as well as all tokens.", _as_good("focus", "control")),
            Claim(
                "Both samplers take at most 39 % of the tokens.",
                lambda m: Verdict(m["focus"].tokens <= 0.39, f"{m['focus'].tokens:.1%}"),
            ),
            Claim(
                "Both are at least 1.41 times as fast as none (its 4.01 ÷ 2.85 samples/s).",
                lambda m: Verdict((m["focus"].speed or 0) >= 1.41, f"× {m['focus'].speed or 0:.2f}"),
            ),
            Claim("The vision-guided sampler alone answers as well as all tokens.", _as_good("vision", "control")),
            Claim("The text-guided sampler alone answers as well as all tokens.", _as_good("text", "control")),
            Claim("The vision-guided sampler saves more than the text-guided one.", _cheaper("vision", "text")),
            Claim("(Not in the paper.) Both answer better than 2×2 average pooling.", _above("focus", "avgpool")),
            Claim("(Not in the paper.) Both answer better than random tokens.", _above("focus", "random")),
        ),
        spread=True,
        timed=True,
        notes="The paper trains once, with the samplers on from the start of instruction tuning, and multiplies a region's "
        "tokens by its scale's probability (Eq. 2), in training alone. Here all arms begin from a model that reads everything, "
        "and take that factor's gradient but leave the tokens as they are; ../paper-650-steps has the other ways "
        "(`--arms printed,single`). "
        "Average pooling and random tokens are not in the paper's table; they are trained like the others.",
    ),
    3: Table(
        "More scales",
        (
            BASELINE,
            Row("3 branches*", "vision", (65.2, 1590, 77.8, 62.3)),
            Row("7 branches", "branches-7", (66.6, 1589, 77.2, 62.4)),
        ),
        (Claim("Seven branches read text better than three.", _above("branches-7", "vision", "read")),),
    ),
    4: Table(
        "Side of a region",
        (
            BASELINE,
            Row("1×1", "window-1", (64.5, 1557, 73.9, 61.9)),
            Row("2×2", "window-2", (65.1, 1549, 76.1, 61.7)),
            Row("4×4*", "vision", (65.2, 1590, 77.8, 62.3)),
            Row("8×8", "window-8", (64.9, 1570, 77.2, 61.8)),
            Row("12×12", "window-12", (64.2, 1567, 78.2, 61.5)),
        ),
        (Claim("4×4 regions answer best.", _best("vision")),),
    ),
    5: Table(
        "Balance loss",
        (
            Row("without", "alpha-0", (61.9, 1439, 74.6, 57.1)),
            Row("0.01", "alpha-0.01", (63.7, 1537, 75.9, 60.0)),
            Row("0.1*", "vision", (65.2, 1590, 77.8, 62.3)),
            Row("0.5", "alpha-0.5", (65.0, 1576, 76.9, 61.5)),
        ),
        (
            Claim("Without it the selector takes one scale everywhere.", _collapsed("alpha-0")),
            Claim("0.1 answers better than none.", _above("vision", "alpha-0")),
            Claim("0.1 answers best.", _best("vision")),
        ),
        notes="Without it, nothing moves the selector from the finest scale, with which its bias has it begin.",
    ),
    6: Table(
        "Textual guidance",
        (
            Row("none (control)", "control", (65.5, 1562, 76.4, 61.7)),
            Row("direct: the control, guided at γ = 0.9 without training", "direct", (64.9, 1543, 76.6, 60.8)),
            Row("train: one layer, one γ", "fixed", (65.3, 1586, 77.3, 61.9)),
            Row("random layers and γ*", "text", (65.4, 1603, 76.9, 62.1)),
        ),
        (
            Claim("Guidance without training costs accuracy.", _above("control", "direct")),
            Claim("Training with random layers does better than direct use.", _above("text", "direct")),
        ),
    ),
    7: Table(
        "Hand-made scores: similarity to the thumbnail",
        (
            Row("all tokens", "control", (65.5, 1562, 76.4, 61.7)),
            Row("most similar 80 %", "like-80", (65.2, 1571, 76.2, 61.3)),
            Row("most similar 60 %", "like-60", (64.3, 1549, 75.9, 58.9)),
            Row("most similar 40 %", "like-40", (62.6, 1508, 75.2, 58.4)),
            Row("least similar 80 %", "unlike-80"),
            Row("least similar 60 %", "unlike-60"),
            Row("least similar 40 %", "unlike-40"),
            Row("vision-guided sampler", "vision", (65.2, 1590, 77.8, 62.3)),
        ),
        (
            Claim(
                "Keeping the most similar tokens loses at every share.",
                _all_below([f"like-{share}" for share in (80, 60, 40)], "control"),
            ),
            Claim("The learned sampler does better than the most similar 60 %.", _above("vision", "like-60")),
            Claim("(Not in the paper.) It does better than the least similar 60 %.", _above("vision", "unlike-60")),
        ),
        spread=True,
        notes="The paper keeps the most similar tokens. The same score with its sign turned keeps what is rare in a picture.",
    ),
    8: Table(
        "Imbalance loss: weights of 4×4, 2×2 and 1×1",
        (
            BASELINE,
            Row("1.0, 1.0, 1.0", "weights-1-1-1", (65.2, 1590, 77.8, 62.3)),
            Row("1.1, 1.0, 0.9", "weights-1.1-1-0.9", (63.7, 1581, 78.0, 61.1)),
            Row("0.9, 1.0, 1.1", "weights-0.9-1-1.1", (65.7, 1587, 76.1, 62.1)),
            Row(f"{SCALE_WEIGHTS.replace(',', ', ')} (all other tables)", "vision"),
        ),
        (
            Claim(
                "The weights that cost the paper reading (its second row) cost it here.",
                _above("weights-1-1-1", "weights-1.1-1-0.9", "read"),
            ),
        ),
        notes="The paper does not say in which order its weights go; here it is coarse to fine.",
    ),
}
