"""All methods at equal budgets, on one model with one clock: accuracy, tokens, FLOPs, time and memory.

python -m experiments.compare --out experiments/results/compare.json   # the embedded model, accuracy on dense scenes included
python -m experiments.compare --model DIR           # time and memory alone, on any checkpoint
python -m experiments.compare --model DIR --count 1000   # on a miniature of your own: accuracy as well
python -m experiments.compare --random              # the same on a random LLaVA-NeXT (see end_to_end.py)
python -m experiments.compare --trained STF=DIR --trained AVG-LLaVA=DIR:avg-llava   # other trained models beside it
python -m experiments.compare --quick               # few questions, to try the script

A budget is a share of the uncompressed visual tokens, averaged over the decoder's layers (paper §4.4), so that methods
that act inside the decoder, whose first layers see everything, stand beside those that act before it. Each method has
one option that moves it; where no formula says what gives a budget, it is searched for, on scenes that nothing is asked
about afterwards (with --model or --random, on the one picture). Budgets that a method cannot reach are left out.

--trained sets another model beside this one, asked behind a method of its own ("none" if it names none) and shown under its
name: such as one whose projector is LLaVA-STF's. Its ratios are to this model without a sampler.

No method is trained here, but the model was: its decoder behind "focus" and behind nothing, never behind another one;
and its tower's class token on the kinds and colours of things, not on what is written on them
(experiments/miniature/vision.py), which methods that rank patches by that token's attention have to do with.

Time is taken on single questions, every method in turn on each of them, so that a change in the machine's speed falls
on all; figures are medians over questions. A question on which a method had too little of the processors is asked of all again
(clocks.py). FLOPs are the tower's, the projector's and the decoder's, every layer in full
for the tokens that it gets, and AVG-LLaVA's router; what other methods compute to choose is not counted, but timed.
Memory is the largest resident set above what it was before the question (with --device cuda, the peak of allocated memory
above the weights').

With --out, all figures go to that JSON file, the table to a Markdown file and the plot to a PNG file beside it.
"""

from __future__ import annotations

from examples import command_line

if __name__ in ("__main__", "__mp_main__"):
    command_line.begin()

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import minifocus
from examples.command_line import expect_file, expect_numbers, write_text
from minifocus import cards
from minifocus.arguments import shown
from minifocus.evaluate import evaluate
from minifocus.files.writing import replace
from minifocus.inputs.open_image import open_image

from .clocks import Spent, read
from .flops import decoder_flops, router_flops, vision_flops
from .memory import extra_memory
from .record import ROOT, environment
from .timing import columns, interleaved, remark

BUDGETS = (0.75, 0.5, 0.39, 0.25, 0.12)
TOLERANCE = 0.005  # of a budget that is searched for, in shares of the uncompressed tokens
TUNING = 500_000  # place in the test split of the scenes on which it is


@dataclass(frozen=True)
class Trained:
    """A model that is compared with another: its name in the table, its folder, and the method that it is asked behind."""

    name: str
    folder: Path
    method: str


@dataclass(frozen=True)
class Setting:
    """`trained`: of another model than the one that methods are compared on."""

    method: str
    budget: float
    options: dict[str, Any]
    trained: Trained | None = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.budget:.0%}"


@dataclass(frozen=True)
class Models:
    """The model that methods are compared on, and others, by their names."""

    own: minifocus.Llava
    others: dict[str, minifocus.Llava]

    @classmethod
    def load(cls, folder: Path, trained: Sequence[Trained], device: str = "cpu", dtype: str | None = None) -> Models:
        others = {one.name: minifocus.load(one.folder, one.method, device, dtype) for one in trained}
        return cls(minifocus.load(folder, "none", device, dtype), others)

    def behind(self, setting: Setting) -> minifocus.Llava:
        """The model of a setting, with its method."""
        if setting.trained is not None:
            return self.others[setting.trained.name]
        self.own.set_sampler(VARIANTS.get(setting.method, (setting.method,))[0], **setting.options)
        return self.own


# Method → the option to search along for a budget, from the value with the fewest tokens to that with the most. FastV acts
# after 2 of 32 layers, or as early in others.
SEARCHED: dict[str, tuple[str, float, float]] = {
    "focus": ("gamma", 0.01, 0.999),
    "text": ("gamma", 0.01, 0.999),
    "fastv": ("ratio", 0.001, 1.0),
    "pyramiddrop": ("ratio", 0.001, 1.0),
    "feather": ("ratio", 0.001, 1.0),
    "aim": ("ratio", 0.01, 1.0),
}
# These have no budget but their own.
FIXED: dict[str, dict[str, Any]] = {"vision": {}, "avg-llava": {}, "avgpool": {"window": 2}, "maxpool": {"window": 2}}
VARIANTS = {"similarity (flipped)": ("similarity", {"flip": True})}
# The others have a ratio, which is the budget.
KNOWN = [
    name for name in minifocus.methods.names() if name not in SEARCHED and "ratio" in minifocus.methods.options_of(name)
]
METHODS = {*KNOWN, *SEARCHED, *FIXED, *VARIANTS}
TINY = ROOT / "weights/tiny"


def methods_for(folder: Path | None) -> list[str]:
    """The methods to compare on a model: all but AVG-LLaVA where the folder has no router, for which nothing can stand in."""
    has_router = folder is not None and (folder / "router.safetensors").is_file()
    return sorted(METHODS if has_router else METHODS - {"avg-llava"})


def equivalent(model: minifocus.Llava, asked: list[tuple[Any, str]]) -> float:
    answers = model.generate_batch(*map(list, zip(*asked, strict=True)), max_new_tokens=1)
    return fmean(answer.tokens.equivalent for answer in answers)


def search(
    model: minifocus.Llava, method: str, budget: float, asked: list[tuple[Any, str]], extra: dict[str, Any]
) -> dict[str, Any] | None:
    """The options with which a method takes `budget` of the tokens of `asked`; None where it cannot."""
    option, low, high = SEARCHED[method]
    fixed = {**extra, **({"layer": max(model.config.text.num_hidden_layers // 16, 1)} if method == "fastv" else {})}

    def taken(value: float) -> float:
        model.set_sampler(method, **fixed, **{option: value})
        return equivalent(model, asked)

    least, most = taken(low), taken(high)
    if not least <= budget <= most:
        return None
    for number in range(12):
        # Along the chord, and every other time in the middle, so that both ends move.
        part = 0.5 if number % 2 else (budget - least) / max(most - least, 1e-9)
        middle = low + (high - low) * min(max(part, 0.02), 0.98)
        share = taken(middle)
        if abs(share - budget) <= TOLERANCE:
            return {**fixed, option: round(middle, 5)}
        if share > budget:
            high, most = middle, share
        else:
            low, least = middle, share
    return None


def settings_of(
    model: minifocus.Llava, methods: list[str], budgets: tuple[float, ...], asked: list[tuple[Any, str]], selector: dict
) -> list[Setting]:
    found = [Setting("none", 1.0, {})]
    for title in methods:
        method, extra = VARIANTS.get(title, (title, {}))
        extra = {**extra, **(selector if method in ("focus", "vision") else {})}
        if method in FIXED:
            model.set_sampler(method, **FIXED[method], **extra)
            found.append(Setting(title, equivalent(model, asked), {**FIXED[method], **extra}))
            continue
        for budget in budgets:
            options = {"ratio": budget, **extra} if method in KNOWN else search(model, method, budget, asked, extra)
            if options is not None:
                found.append(Setting(title, budget, options))
            print(f"{title} {budget:.0%}: {'cannot' if options is None else options}", file=sys.stderr, flush=True)
    return found


def decoding_steps(answer: minifocus.Answer) -> int:
    """After the prompt, which gives the first token; a step of its own says that an answer is over."""
    return len(answer.token_ids) - (answer.finish == "length")


def measure(
    models: Models,
    settings: list[Setting],
    batches: list[list[tuple[Any, str]]],
    new_tokens: int,
    warm_up: bool = True,
    all_of_them: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Time and memory of every setting for a batch of questions, and tokens and FLOPs of a question; how the rounds went.

    `warm_up`: the first batch is asked once more before. `all_of_them`: no answer ends before it has `new_tokens` tokens.
    """
    rounds = [batches[0], *batches] if warm_up else batches

    def answer(setting: Setting, number: int) -> dict[str, Any]:
        images, questions = map(list, zip(*rounds[number], strict=True))
        model = models.behind(setting)
        least = new_tokens if all_of_them else None

        def ask() -> tuple[list[minifocus.Answer], Spent]:
            begun = read()
            answers = model.generate_batch(images, questions, max_new_tokens=new_tokens, min_new_tokens=least)
            return answers, Spent.since(begun)

        (found, spent), memory = extra_memory(ask, model.device.type == "cuda")
        decoded = max(map(decoding_steps, found))
        tiles = [model.num_tiles((image.height, image.width)) for image in images]
        flops = [
            decoder_flops(model.config, one.layer_tokens)
            + vision_flops(model.config, count)
            + router_flops(model.before_llm, count)
            for one, count in zip(found, tiles, strict=True)
        ]
        return {
            "spent": spent,
            "prefill": found[0].prefill_seconds,
            "decode": found[0].decode_seconds / decoded if decoded else math.nan,
            "memory": memory,
            "flops": fmean(flops),
            "tokens": {name: fmean(vars(one.tokens)[name] for one in found) for name in vars(found[0].tokens)},
        }

    answering = {number: partial(answer, setting) for number, setting in enumerate(settings)}
    timed = interleaved(answering, lambda one: [one["spent"]], len(batches), int(warm_up), title="question")
    runs = list(timed.results.values())

    def middle(values: list[float]) -> float | None:
        real = [value for value in values if value is not None and not math.isnan(value)]
        return median(real) if real else None

    results = []
    for setting, own in zip(settings, runs, strict=True):
        ratios = {
            name: middle([a[name] / b[name] for a, b in zip(own, runs[0], strict=True) if a[name] and b[name]])
            for name in ("prefill", "decode")
        }
        results.append(
            {
                "method": setting.method,
                "budget": setting.budget,
                "options": setting.options,
                **({"trained": setting.trained.method} if setting.trained else {}),
                "tokens": {name: fmean(one["tokens"][name] for one in own) for name in own[0]["tokens"]},
                "gflops": fmean(one["flops"] for one in own) / 1e9,
                "prefill_seconds": middle([one["prefill"] for one in own]),
                "decode_seconds_per_token": middle([one["decode"] for one in own]),
                "prefill_ratio": ratios["prefill"],
                "decode_ratio": ratios["decode"],
                "memory_bytes": middle([one["memory"] for one in own]),
                "whole_call": columns([one["spent"] for one in own]),
            }
        )
    return results, timed.note()


_models: Models  # of a process that `accuracies` started


def _begin(folder: Path, trained: Sequence[Trained]) -> None:
    global _models
    torch.set_num_threads(1)
    _models = Models.load(folder, trained)


def _ask(setting: Setting, count: int) -> dict[str, Any]:
    return evaluate(
        _models.behind(setting), cards.questions("test", count, 0, True), 16, count, families=cards.FAMILIES
    )


def accuracies(folder: Path, settings: list[Setting], count: int, jobs: int) -> list[dict[str, Any]]:
    """What evaluate.py says of each setting, by `jobs` processes of one thread."""
    trained = [one.trained for one in settings if one.trained is not None]
    with command_line.working(ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (folder, trained))) as pool:
        waiting = [pool.submit(_ask, setting, count) for setting in settings]
        found = []
        for setting, answers in zip(settings, waiting, strict=True):
            found.append(answers.result())
            print(f"{setting.name}: {found[-1]['accuracy']:.1%}", file=sys.stderr, flush=True)
    return [{name: one[name] for name in ("accuracy", "interval_95", "families", "tokens")} for one in found]


def page(record: dict[str, Any]) -> str:
    """Markdown: the table, and how the rounds went."""
    went = remark(record["rounds"]) if "rounds" in record else ""
    return table(record["results"]) + (f"\n{went}\n" if went else "")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; the fastest prefill of those that answer best comes first."""

    def row(one: dict[str, Any]) -> str:
        cells = [one["method"], f"{one['budget']:.0%}"]
        if measured:
            low, high = one["interval_95"]
            cells += [f"{one['accuracy']:.1%} ({100 * low:.1f} – {100 * high:.1f})"]
            cells += [f"{share:.1%}" for share in one["families"].values()]
        memory = one["memory_bytes"]
        cells += [
            f"{one['tokens']['equivalent']:.1%}",
            f"{one['gflops']:.2f}",
            f"{one['prefill_ratio']:.2f}",
            "" if one["decode_ratio"] is None else f"{one['decode_ratio']:.2f}",
            "" if memory is None else f"{memory / 2**20:.0f}",
        ]
        return "| " + " | ".join(cells) + " |"

    measured = "accuracy" in results[0]
    heads = ["method", "budget", *(["exact answers", *cards.FAMILIES] if measured else []), "tokens", "GFLOPs"]
    heads += ["prefill ÷ none", "per token ÷ none", "MiB"]
    ordered = sorted(results, key=lambda one: (-one.get("accuracy", 0), one["prefill_ratio"]))
    rule = "|" + "---|" * len(heads)
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *map(row, ordered)]) + "\n"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against prefill time, a line per method; the Pareto front is drawn behind them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    methods = list(dict.fromkeys(one["method"] for one in results if one["method"] != "none"))
    colours = cycle(pyplot.get_cmap("tab20").colors)
    axes.plot(1.0, 100 * results[0]["accuracy"], "k*", markersize=12, label="none", zorder=4)
    for method in methods:
        own = sorted((one for one in results if one["method"] == method), key=lambda one: one["budget"])
        points = [(one["prefill_ratio"], 100 * one["accuracy"]) for one in own]
        own_style = {"color": "k", "linewidth": 2.5, "zorder": 3}
        style = own_style if method == "focus" else {"color": next(colours), "linewidth": 1}
        axes.plot(*zip(*points, strict=True), "o-", label=method, markersize=4, **style)
    front, best = [], -1.0
    for one in sorted(results, key=lambda one: (one["prefill_ratio"], -one["accuracy"])):
        if one["accuracy"] > best:
            best = one["accuracy"]
            front.append((one["prefill_ratio"], 100 * best))
    axes.step(
        *zip(*front, strict=True), where="post", color="gold", alpha=0.5, linewidth=6, zorder=0, label="Pareto front"
    )
    axes.set_xlabel("time to read the prompt ÷ without a sampler")
    axes.set_ylabel("exact answers, %")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def random_model(folder: Path) -> Path:
    """end_to_end.py's random LLaVA-NeXT, with the miniature's tokenizer."""
    from .end_to_end_programs import FULL, Settings, make_checkpoint

    make_checkpoint(Settings(FULL, folder, "float32", "cpu", 0, 0))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tiny = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(("image_token_id", "image_token_index"), tiny["image_token_id"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def trained_of(text: str, parser: argparse.ArgumentParser) -> Trained:
    """NAME=DIR[:METHOD]"""
    name, _, place = text.partition("=")
    folder, colon, method = place.rpartition(":")
    if not colon or method not in minifocus.methods.names():  # a folder's name may have a colon, too
        folder, method = place, "none"
    if not name or not folder:
        parser.error(f"--trained: expected NAME=DIR or NAME=DIR:METHOD, got {shown(text)}")
    return Trained(name, Path(folder), method)


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--model", type=Path, help="measure time and memory on this checkpoint; accuracy only with --count"
    )
    parser.add_argument("--random", action="store_true", help="the same on a random model of 552 M parameters")
    parser.add_argument("--methods", help="with commas between; default: all that the model can have")
    parser.add_argument(
        "--trained",
        action="append",
        default=[],
        metavar="NAME=DIR[:METHOD]",
        help="another model to set beside it, and the method that it is asked behind (none); may be repeated",
    )
    parser.add_argument("--budgets", help=f"with commas between; default: {','.join(map(str, BUDGETS))}")
    parser.add_argument("--count", type=int, help="questions about dense scenes for the accuracy; default: 800")
    parser.add_argument("--jobs", type=int, default=2, help="processes that ask them")
    parser.add_argument("--timed", type=int, help="questions on which time is taken; default: 24")
    parser.add_argument("--image", type=Path, help="with --model or --random: picture to ask about")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--quick", action="store_true", help="by default three methods, one budget, few questions")
    parser.add_argument("--out", type=Path, help="JSON file for all figures, with .md and .png beside it")
    arguments = parser.parse_args()

    quick = arguments.quick
    arguments.tuning = 8 if quick else 64  # questions with which options for a budget are searched for
    defaults = {"count": 16 if quick else 800, "timed": 2 if quick else 24}
    defaults |= {"methods": "focus,fastv,random" if quick else ",".join(methods_for(arguments.model or TINY))}
    defaults |= {"budgets": "0.39" if quick else ",".join(map(str, BUDGETS))}
    arguments.scenes = not arguments.random and (arguments.model is None or arguments.count is not None)
    if arguments.random and arguments.model:
        parser.error("--random: not to be combined with --model")
    if arguments.scenes and arguments.image:
        parser.error("--image: expected --model without --count, or --random, beside it: others are asked about scenes")
    arguments.trained = [trained_of(text, parser) for text in arguments.trained]
    names = [one.name for one in arguments.trained]
    if len(set(names)) < len(names) or {"none", *METHODS} & set(names):
        parser.error(f"--trained: expected names of their own, no method's and each once, got {', '.join(names)}")
    if arguments.random and arguments.trained:
        parser.error("--trained: expected --model or the embedded model beside it: --random has no peer")
    if arguments.random and arguments.count is not None:
        parser.error("--count: is of accuracy, which a random model has none of")
    if arguments.scenes and arguments.out and find_spec("matplotlib") is None:
        parser.error("--out: the plot needs matplotlib, which is not installed: pip install '.[train]'")
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    expect_numbers(arguments, 1, "count new_tokens")
    expect_numbers(arguments, 1, "timed", 1e6)  # they are all in memory
    expect_numbers(arguments, 1, "jobs", 1000)
    arguments.methods = arguments.methods.split(",")
    if unknown := set(arguments.methods) - METHODS:
        parser.error(f"--methods: expected some of {', '.join(sorted(METHODS))}, got {', '.join(sorted(unknown))}")
    try:
        arguments.budgets = tuple(float(value) for value in arguments.budgets.split(","))
    except ValueError:
        parser.error(f"--budgets: expected numbers with commas between, got {arguments.budgets!r}")
    if not all(0 < budget <= 1 for budget in arguments.budgets):
        parser.error(f"--budgets: expected shares above 0 and at most 1, got {arguments.budgets}")
    if arguments.out is not None:
        if arguments.out.suffix in (".md", ".png"):
            parser.error(
                f"--out: expected the name of the JSON file, beside which go .md and .png, got {arguments.out}"
            )
        for suffix in (arguments.out.suffix, ".md", ".png"):
            expect_file(arguments.out.with_suffix(suffix), "out")
    return arguments


def compare(arguments: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    """The figures of every method and budget, on the model of `folder` or the embedded one, "none" first."""
    picture = open_image(arguments.image or ROOT / "examples/cards.png")
    models = Models.load(folder or TINY, arguments.trained, arguments.device, arguments.dtype)
    learned = (folder or TINY) / "selector.safetensors"
    selector: dict[str, Any] = {} if learned.is_file() else {"selector": "variance"}
    if arguments.scenes:
        scenes = islice(cards.scenes("test", TUNING, dense=True), arguments.tuning)
        tuning = [(scene.image, scene.questions[0].question) for scene in scenes]
        timed = [(image, q) for image, q, _, _ in cards.questions("test", arguments.timed, TUNING + 1000, True)]
    else:
        tuning = [(picture, "What is in the picture?")]
        timed = tuning * arguments.timed
    settings = settings_of(models.own, arguments.methods, arguments.budgets, tuning, selector)
    settings += [Setting(one.name, equivalent(models.others[one.name], tuning), {}, one) for one in arguments.trained]
    results, rounds = measure(models, settings, [[one] for one in timed], arguments.new_tokens)
    if arguments.scenes:
        found = accuracies(folder or TINY, settings, arguments.count, arguments.jobs)
        for one, answers in zip(results, found, strict=True):
            one |= answers
    return {"rounds": rounds, "results": results}


@command_line.guarded
def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    record = environment(Path(__file__), "torch", "numpy", "pillow")
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(arguments, random_model(Path(scratch)) if arguments.random else arguments.model)
    print(page(found))
    if arguments.out:
        record |= {"seconds": round(time.perf_counter() - started), "questions": arguments.count, **found}
        write_text(arguments.out, json.dumps(record, indent=1) + "\n")
        write_text(arguments.out.with_suffix(".md"), page(found))
        if "accuracy" in found["results"][0]:
            replace(arguments.out.with_suffix(".png"), lambda file: plot(found["results"], file))


if __name__ == "__main__":
    command_line.run(main)
