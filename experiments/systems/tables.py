"""The tables of LLaVA-STF's and AVG-LLaVA's papers: which arm stands for which row, and what the paper found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..paper.tables import Claim, Figures, Measured, Verdict, difference


@dataclass(frozen=True)
class Row:
    """`paper` has what the paper says of it, in the table's columns."""

    label: str
    arm: str
    paper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """
    columns  the paper's
    spread   over three seeds; else of the first
    claims   what the paper finds, and whether the miniature's figures point the same way
    choices  of the rows' routers, what they choose for which questions (choices.py), instead of what they answer
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    spread: bool = False
    notes: str = ""
    choices: bool = False


def above(better: str, worse: str, by: float = 0.0) -> Callable[[Measured], Verdict]:
    """Whether one arm's accuracy is above another's, by more than `by` points; None where chance alone could decide."""

    def check(measured: Measured) -> Verdict:
        found, error = difference(measured[better], measured[worse])
        margin = found - by / 100
        return Verdict(margin > 0 if abs(margin) > error else None, f"{100 * margin:+.1f} ± {100 * error:.1f} points")

    return check


@dataclass(frozen=True)
class Choosing(Figures):
    """Of an arm with a router; `choices` has what choices.py says of each seed."""

    choices: Sequence[dict[str, Any]] = ()


def choices_of_arm(measured: Measured, arm: str) -> Sequence[dict[str, Any]]:
    found = measured[arm]
    assert isinstance(found, Choosing)
    return found.choices


def near_least_loss(arm: str, by: float) -> Callable[[Measured], Verdict]:
    """Whether the tokens that are chosen are within `by` points of those at which the loss of the answers is least."""

    def check(measured: Measured) -> Verdict:
        seeds = choices_of_arm(measured, arm)
        chosen, least = (fmean(seed[name]["all"] for seed in seeds) for name in ("tokens", "tokens_at_least_loss"))
        return Verdict(abs(chosen - least) <= by / 100, f"{chosen:.1%} of the tokens, {least:.1%} at the least loss")

    return check


def coarser_for_easy(arm: str, share: float) -> Callable[[Measured], Verdict]:
    """Whether about one picture the easy question gets the coarser granularity in this share of pairs, and never the finer."""

    def check(measured: Measured) -> Verdict:
        pairs = [seed["pairs"] for seed in choices_of_arm(measured, arm)]
        coarser, finer = (fmean(one[way] / sum(one.values()) for one in pairs) for way in ("coarser", "finer"))
        return Verdict(coarser >= share and finer == 0, f"coarser in {coarser:.0%} of pairs, finer in {finer:.1%}")

    return check


def finer_for_text(arm: str) -> Callable[[Measured], Verdict]:
    """Whether the questions about small text get more tokens than each other family."""

    def check(measured: Measured) -> Verdict:
        families = [seed["tokens"] for seed in choices_of_arm(measured, arm)]
        means = {name: fmean(one[name] for one in families) for name in families[0] if name != "all"}
        others = max(value for name, value in means.items() if name != "read")
        return Verdict(
            means["read"] > others, f"{means['read']:.1%} of the tokens, at most {others:.1%} for the others"
        )

    return check


AVERAGE = ("its average",)
LLAVA_STF = {
    "3": Table(
        "The fusion modules",
        AVERAGE,
        (
            Row("LLaVA (control)", "control", ("65.5",)),
            Row("MBTF", "mbtf", ("66.6",)),
            Row("STF", "stf", ("65.6",)),
            Row("MBTF and STF", "both", ("66.3",)),
            Row("2×2 average pooling of the projector's tokens, trained", "avgpool"),
        ),
        (
            Claim("MBTF alone answers better than LLaVA.", above("mbtf", "control")),
            Claim("With STF, MBTF answers better than without.", above("both", "stf")),
            Claim("STF alone is level with LLaVA at a quarter of the tokens.", above("stf", "control")),
            Claim(
                "(The bar of this project.) STF is 5 points above trained average pooling.", above("stf", "avgpool", 5)
            ),
            Claim("(The bar of this project.) Both are 5 points above it.", above("both", "avgpool", 5)),
        ),
        spread=True,
        notes="These arms have the public code's form, begin as average pooling exactly (`--projector-start pooling`), and take "
        "the same steps.",
    ),
    "3b": Table(
        "STF beside trained pooling, a table of this project for runs of more steps",
        AVERAGE,
        (
            Row("STF", "stf", ("65.6",)),
            Row("MBTF and STF", "both", ("66.3",)),
            Row("2×2 average pooling of the projector's tokens, trained", "avgpool"),
        ),
        (
            Claim("With STF, MBTF answers better than without.", above("both", "stf")),
            Claim(
                "(The bar of this project.) STF is 5 points above trained average pooling.", above("stf", "avgpool", 5)
            ),
            Claim("(The bar of this project.) Both are 5 points above it.", above("both", "avgpool", 5)),
        ),
        spread=True,
    ),
    "4": Table(
        "Side k of a window and tokens E of it",
        AVERAGE,
        (
            Row("k = 2, E = 1", "k2-e1", ("66.3",)),
            Row("k = 2, E = 2", "k2-e2", ("66.0",)),
            Row("k = 4, E = 4", "k4-e4", ("63.5",)),
            Row("k = 4, E = 8", "k4-e8", ("64.3",)),
        ),
        (
            Claim("A larger window loses at a quarter of the tokens.", above("k2-e1", "k4-e4")),
            Claim("It loses at half of the tokens.", above("k2-e2", "k4-e8")),
        ),
        notes="From random values, a quarter of the steps for the projector alone on top, all by AdamW. The paper's k = 8 would "
        "be the whole view here.",
    ),
    "5": Table(
        "How a window is fused",
        AVERAGE,
        (
            Row("AvgPool", "average", ("64.7",)),
            Row("TokenConcat", "both", ("65.4",)),
            Row("STF: a convolution", "convolution", ("66.3",)),
            Row("the same from random values, as in the paper, without MBTF", "fresh-stf"),
            Row("the same with MBTF", "fresh-both"),
            Row("TokenPacker, s = 2, from random values", "tokenpacker"),
        ),
        (
            Claim("Concatenation answers better than averaging.", above("both", "average")),
            Claim("A convolution answers better than concatenation.", above("convolution", "both")),
        ),
        notes="All read the states of all four blocks by MBTF but where it is said. The last three rows are not in the paper's "
        "table; they take a quarter of the steps for the projector alone on top.",
    ),
}

AVG_LLAVA = {
    "3": Table(
        "Granularities, forced and chosen",
        (),
        (
            Row("LLaVA-NeXT (control)", "control"),
            *(Row(f"forced to {tokens} of 64 tokens a view", f"forced-{tokens}") for tokens in (4, 8, 16, 32, 64)),
            Row("the router chooses", "router"),
            Row("the router, with a price of 0.03 for all tokens (not in the paper)", "price-0.03"),
            Row("the router, with a price of 0.1 for all tokens (not in the paper)", "price-0.1"),
        ),
        (
            Claim("The router answers better than the finest granularity.", above("router", "forced-64")),
            Claim("Finer granularities answer better.", above("forced-64", "forced-16")),
        ),
        spread=True,
        notes="The paper's router reads 14.7 % (AI2D) to 99.1 % (ChartQA) of the tokens.",
    ),
    "4": Table(
        "Ablations",
        ("its ScienceQA", "its ChartQA", "its MME", "its MMB"),
        (
            Row("AVG-LLaVA", "router", ("71.1", "66.3", "1557.4", "69.9")),
            Row("(a) fixed to the finest", "forced-64", ("70.0", "66.4", "1554.5", "68.7")),
            Row("(c) the router sees the picture alone", "image", ("70.1", "53.9", "1525.2", "69.0")),
            Row("(d) three granularities", "three", ("69.8", "65.3", "1547.7", "66.3")),
            Row("(e) trained by the answers' loss", "answers", ("70.5", "50.9", "1514.8", "68.6")),
            Row("(f) without the ranking loss", "no-ranking", ("70.1", "64.8", "1534.6", "68.6")),
            Row("(g) without the cross-entropy", "no-choice", ("70.2", "66.3", "1550.8", "69.4")),
        ),
        tuple(Claim(f"{text} costs accuracy.", above("router", arm)) for text, arm in (
            ("(c) A picture alone", "image"),
            ("(d) Fewer granularities", "three"),
            ("(e) The answers' loss instead of feedback", "answers"),
            ("(f) No ranking loss", "no-ranking"),
            ("(g) No cross-entropy", "no-choice"),
        )),
        notes="(b), a random granularity, is the mean of the five forced ones.",
    ),
    "Figure 5": Table(
        "What the router chooses for which questions",
        (),
        (Row("the router", "router"), Row("price of 0.03", "price-0.03"), Row("price of 0.1", "price-0.1")),
        (
            Claim("Text needs finer granularities than other questions.", finer_for_text("router")),
            Claim("With a price of 0.1 it does, too.", finer_for_text("price-0.1")),
            *(
                Claim(f"(A bar of this project, {title}.) {text}", check)
                for arm, title in (("router", "the router"), ("price-0.03", "price of 0.03"), ("price-0.1", "price of 0.1"))
                for text, check in (
                    ("Tokens within 10 points of those at the least loss.", near_least_loss(arm, 10)),
                    ("Coarser for an easy question about a picture in 30 % of pairs, finer in none.", coarser_for_easy(arm, 0.3)),
                )
            ),
        ),
        spread=True,
        notes="Over all questions about 200 scenes, of which every fourth is dense. A cell has the share of questions at 4, 8, "
        "16, 32 and 64 tokens a view, and the mean share of tokens. Of each scene one question about small text is compared with "
        "an easy one: whether a thing is there, how many there are, or the colour of a shape.",
        choices=True,
    ),
    "Figure 7": Table(
        "How many words the router reads",
        (),
        (*(Row(f"{k} words", f"words-{k}") for k in (4, 8, 16)), Row("32 words", "router")),
    ),
}  # fmt: skip
TABLES: dict[str, dict[str, Table]] = {"llava-stf": LLAVA_STF, "avg-llava": AVG_LLAVA}
