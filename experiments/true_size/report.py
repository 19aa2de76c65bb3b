"""The page of a true-size run, out of its record."""

from __future__ import annotations

from statistics import median
from typing import Any

from ..timing import ratio, remark

MOST_ANONYMOUS = 2_000_000_000  # bytes beside weights that are mapped as they are: the bar
MAPPED = (None, "bfloat16")  # --dtype with which they are

HEAD = """# {name} on this machine

Made by `{command}` at `{commit}`, with torch {torch}, on {threads} threads of {cores} cores ({cpu}), device {device}.

{model} Its decoder has {layers} layers, {width} wide; {parameters:.2f} billion parameters in all take {size:.1f} GB, and were
used in {dtype}. {asked}

{tables}
{first}
- **FLOPs ÷ none**: of the tower, the projector and the decoder, every layer in full. It is the limit of the column before: what
  would be left of the time if every operation took as long as without a sampler and choosing took nothing.
- **a token**: seconds of each further token of the answer, the median of {new_tokens}, less the first.
{memory}
"""
FIRST = """- **first token**: from the question to the first token of the answer, in seconds of the clock and, in brackets, of all
  processors; the vision tower's part of it beside. "÷ none" is the median over rounds of the ratio."""
FIRST_ON_GPU = """- **first token**: from the question to the first token of the answer; the vision tower's part of it beside.
  "÷ none" is the median over rounds of the ratio."""
MEMORY = """- **anonymous**: the most memory that the system could not take back by dropping pages of the model's files
  (RssAnon), from the process's start. **resident**: all that was in memory at once (VmHWM), those pages included; they are taken
  back where memory is short, and read again."""
MEMORY_ON_GPU = "- **GPU memory**: the most that torch had allocated at once while it answered, weights included."
MADE = """The folder was made for this run: random weights in the exact shapes of {name}, and the miniature's tokenizer, filled
up with tokens that stand for nothing. Times and memory are those of the real one; answers are not, nor is the share of the
tokens that `text` and `focus` keep."""
GIVEN = "The folder `{name}` was there."
BAR = """The bar: anonymous memory of at most {most:.1f} GB, as weights in the folder's dtype are mapped and not copied. The most
was {value:.2f} GB: {met}."""


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]) + "\n"


Question = dict[str, Any]  # of a record: a sampler and a side, and what question.py printed in each round


def middle(question: Question, what: str, clock: str = "wall") -> float:
    """The median over rounds, in seconds."""
    return median(float(one["seconds"][what][clock]) for one in question["rounds"])


def none_of(question: Question, record: dict[str, Any]) -> Question:
    """The same question without a sampler."""
    found: Question = next(
        one for one in record["questions"] if one["sampler"] == "none" and one["side"] == question["side"]
    )
    return found


def time_ratio(question: Question, record: dict[str, Any]) -> float:
    """Of the first token, to `none`: the median over rounds."""
    these, those = (
        [run["seconds"]["first_token"]["wall"] for run in one["rounds"]]
        for one in (question, none_of(question, record))
    )
    return ratio(these, those)


def flops_ratio(question: Question, record: dict[str, Any]) -> float:
    """To `none`: what time_ratio is when all operations take as long."""
    these, those = (int(one["rounds"][0]["flops"]) for one in (question, none_of(question, record)))
    return these / those


def anonymous(question: Question) -> int:
    """The most anonymous memory of any round, in bytes."""
    used = [run["memory"] for run in question["rounds"]]
    return max(int(one[when]) for one in used for when in ("imports", "load", "first_token", "answer"))


def rows(record: dict[str, Any]) -> list[list[str]]:
    """A row for each question; docs/scale.md shows them, too."""
    found = []
    for one in record["questions"]:
        first = one["rounds"][0]
        tokens, memory = first["tokens"], [run["memory"] for run in one["rounds"]]
        cells = [f"{one['side']}²", f"`{one['sampler']}`", f"{tokens['after_vision']} of {tokens['full']}"]
        cells += [f"{tokens['equivalent']:.1%}"]
        begin, tower = middle(one, "first_token"), middle(one, "tower")
        token = middle(one, "token") if "token" in first["seconds"] else None
        ratios = [f"{time_ratio(one, record):.2f}", f"{flops_ratio(one, record):.2f}"]
        if on_gpu(record):
            cells += [f"{begin * 1e3:.0f} ms", f"{tower * 1e3:.0f} ms", *ratios]
            cells += ["" if token is None else f"{token * 1e3:.1f} ms"]
            cells += [f"{max(use['device'] for use in memory) / 1e9:.1f} GB"]
        else:
            cells += [f"{begin:.1f} s ({middle(one, 'first_token', 'processor'):.0f})", f"{tower:.1f} s", *ratios]
            cells += ["" if token is None else f"{token:.2f} s"]
            cells += [f"{anonymous(one) / 1e9:.2f} GB", f"{max(use['resident'] for use in memory) / 1e9:.1f} GB"]
        found.append(cells)
    return found


def on_gpu(record: dict[str, Any]) -> bool:
    return "device" in record["questions"][0]["rounds"][0]["memory"]


HEADS = ["picture", "sampler", "tokens that enter", "§4.4", "first token", "tower", "÷ none", "FLOPs ÷ none", "a token"]


def whole_table(record: dict[str, Any]) -> str:
    """Its heads, and a row for each question."""
    return table(HEADS + (["GPU memory"] if on_gpu(record) else ["anonymous", "resident"]), rows(record))


def bar(record: dict[str, Any]) -> str:
    """What is said of the bar on memory; nothing where the weights are not mapped as they are."""
    if record["dtype"] not in MAPPED or record["device"] != "cpu":
        return ""
    value = max(map(anonymous, record["questions"]))
    met = "met" if value <= MOST_ANONYMOUS else "**missed**"
    return "\n" + BAR.format(most=MOST_ANONYMOUS / 1e9, value=value / 1e9, met=met) + "\n"


def tables(record: dict[str, Any]) -> str:
    loads = [run["seconds"]["load"] for one in record["questions"] for run in one["rounds"]]
    wall, processor = (median(load[clock] for load in loads) for clock in ("wall", "processor"))
    loading = f"\nLoading took {wall:.1f} s ({processor:.1f} of the processors), the median of {len(loads)} processes. "
    if on_gpu(record):
        firsts = [run["seconds"]["first_question"]["wall"] for one in record["questions"] for run in one["rounds"]]
        loading += (
            f"A question before, not counted, had CUDA's libraries loaded: {median(firsts):.1f} s for two tokens. "
        )
    return whole_table(record) + f"{loading}{remark(record['watched'])}\n" + bar(record)


def page(record: dict[str, Any]) -> str:
    model, first = record["model"], record["questions"][0]["rounds"]
    stand_in = any(run["options"] for one in record["questions"] for run in one["rounds"])
    rounds = "One round" if len(first) == 1 else f"Medians over {len(first)} interleaved rounds"
    asked = f"{rounds}, every question in a process of its own."
    if stand_in:
        asked += ' `vision` and `focus` have the stand-in for a trained selector, `selector="variance"`.'
    return HEAD.format(
        name=model["name"],
        command=record["command"],
        commit=str(record["commit"])[:12] + ("+" if record["dirty"] else ""),
        torch=record["versions"]["torch"],
        threads=first[0]["threads"],
        **record["machine"],
        device=record["device"],
        model=(MADE if model["random"] else GIVEN).format(name=model["name"]),
        layers=model["layers"],
        width=model["width"],
        parameters=model["parameters"] / 1e9,
        size=model["bytes"] / 1e9,
        dtype=record["dtype"] or first[0]["dtype"],
        asked=asked,
        tables=tables(record),
        new_tokens=record["new_tokens"],
        first=FIRST_ON_GPU if on_gpu(record) else FIRST,
        memory=MEMORY_ON_GPU if on_gpu(record) else MEMORY,
    )
