"""All methods at equal budgets, on one model with one clock: accuracy, tokens, FLOPs, time and memory.

python benchmarks/compare.py                       # the embedded model, accuracy on dense scenes included
python benchmarks/compare.py --model DIR           # time and memory alone, on any checkpoint
python benchmarks/compare.py --random              # the same on a random LLaVA-NeXT (see end_to_end.py)
python benchmarks/compare.py --quick               # few questions, to try the script

A budget is a share of the uncompressed visual tokens, averaged over the decoder's layers (paper §4.4), so that methods
that act inside the decoder, whose first layers see everything, stand beside those that act before it. Each method has
one option that moves it; where no formula says what gives a budget, it is searched for on questions that are not asked
afterwards. Budgets that a method cannot reach are left out.

No method is trained here except that the embedded model was trained with "focus", which the others were not.

Time is taken on single questions, every method in turn on each of them, so that a change in the machine's speed falls
on all; figures are medians over questions. Memory is the largest resident set above what it was before the question
(with --device cuda, the peak of allocated memory above the weights'). Results go to benchmarks/results/compare.json,
a table to compare.md and the plot to compare.png beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from flops import decoder_flops, vision_flops
from PIL import Image
from record import ROOT, environment

import minifocus
from minifocus import cards

sys.path.insert(0, str(ROOT / "examples"))
from evaluate import evaluate

BUDGETS = (0.75, 0.5, 0.39, 0.25, 0.12)
TOLERANCE = 0.01  # of a budget that is searched for
TUNING = 500_000  # place in the test split of the scenes on which it is


@dataclass(frozen=True)
class Setting:
    method: str
    budget: float
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method} {self.budget:.0%}"


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
FIXED = {"vision": {}, "avgpool": {"window": 2}, "maxpool": {"window": 2}}  # these have no budget but their own
VARIANTS = {"similarity (flipped)": ("similarity", {"flip": True})}
# The others have a ratio, which is the budget.
KNOWN = [
    name
    for name in minifocus.samplers.names()
    if name not in SEARCHED and "ratio" in minifocus.samplers.options_of(name)
]


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

    if not taken(low) <= budget <= taken(high):
        return None
    for _ in range(12):
        middle = (low + high) / 2
        share = taken(middle)
        if abs(share - budget) <= TOLERANCE * budget / 2:
            break
        low, high = (low, middle) if share > budget else (middle, high)
    return {**fixed, option: round(middle, 5)} if abs(taken(middle) - budget) <= TOLERANCE else None


def settings_of(
    model: minifocus.Llava, methods: list[str], budgets: tuple[float, ...], asked: list[tuple[Any, str]], selector: dict
) -> list[Setting]:
    found = [Setting("none", 1.0, {})]
    for shown in methods:
        method, extra = VARIANTS.get(shown, (shown, {}))
        extra = {**extra, **(selector if method in ("focus", "vision") else {})}
        if method in FIXED:
            model.set_sampler(method, **FIXED[method], **extra)
            found.append(Setting(shown, equivalent(model, asked), {**FIXED[method], **extra}))
            continue
        for budget in budgets:
            options = {"ratio": budget, **extra} if method in KNOWN else search(model, method, budget, asked, extra)
            if options is not None:
                found.append(Setting(shown, budget, options))
            print(f"{shown} {budget:.0%}: {'cannot' if options is None else options}", file=sys.stderr, flush=True)
    return found


def use(model: minifocus.Llava, setting: Setting) -> None:
    model.set_sampler(VARIANTS.get(setting.method, (setting.method,))[0], **setting.options)


def peak_memory(device: torch.device, act: Callable[[], Any]) -> tuple[Any, int | None]:
    """What `act` gives, and the largest amount of memory over what there was before, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        first = torch.cuda.memory_allocated(device)
        result = act()
        return result, torch.cuda.max_memory_allocated(device) - first
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def field(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) * 1024

    try:
        clear.write_text("5")  # the high-water mark falls to what is resident now
    except OSError:
        return act(), None
    first = field("VmRSS:")
    result = act()
    return result, max(field("VmHWM:") - first, 0)


def measure(
    model: minifocus.Llava, settings: list[Setting], asked: list[tuple[Any, str]], new_tokens: int
) -> list[dict[str, Any]]:
    """Time, memory, tokens and FLOPs of every setting, on single questions."""
    runs: list[list[dict[str, Any]]] = [[] for _ in settings]
    for number, (image, question) in enumerate([asked[0], *asked]):
        for own, setting in zip(runs, settings, strict=True):
            use(model, setting)
            answer, memory = peak_memory(
                model.device, lambda i=image, q=question: model.generate(i, q, max_new_tokens=new_tokens)
            )
            if number:  # the first question warms up
                tiles = model.num_tiles((image.height, image.width))
                flops = decoder_flops(model.config, answer.layer_tokens) + vision_flops(model.config, tiles)
                decoded = max(len(answer.token_ids) - 1, 0)
                own.append(
                    {
                        "prefill": answer.prefill_seconds,
                        "decode": answer.decode_seconds / decoded if decoded else math.nan,
                        "memory": memory,
                        "flops": flops,
                        **vars(answer.tokens),
                    }
                )
        print(f"question {number} of {len(asked)}", file=sys.stderr, flush=True)

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
                "tokens": {name: fmean(one[name] for one in own) for name in vars(answer.tokens)},
                "gflops": fmean(one["flops"] for one in own) / 1e9,
                "prefill_seconds": middle([one["prefill"] for one in own]),
                "decode_seconds_per_token": middle([one["decode"] for one in own]),
                "prefill_ratio": ratios["prefill"],
                "decode_ratio": ratios["decode"],
                "memory_bytes": middle([one["memory"] for one in own]),
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; the fastest prefill of those that answer best comes first."""

    def row(one: dict[str, Any]) -> str:
        shares = [one["accuracy"], *one["families"].values()] if "accuracy" in one else []
        memory = one["memory_bytes"]
        cells = [
            one["method"],
            f"{one['budget']:.0%}",
            *(f"{share:.1%}" for share in shares),
            f"{one['tokens']['equivalent']:.1%}",
            f"{one['gflops']:.2f}",
            f"{one['prefill_ratio']:.2f}",
            "" if one["decode_ratio"] is None else f"{one['decode_ratio']:.2f}",
            "" if memory is None else f"{memory / 2**20:.0f}",
        ]
        return "| " + " | ".join(cells) + " |"

    measured = "accuracy" in results[0]
    heads = ["method", "budget", *(["all", *cards.FAMILIES] if measured else []), "tokens", "GFLOPs"]
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
    methods = list(dict.fromkeys(one["method"] for one in results))
    colours = pyplot.get_cmap("tab20")
    for number, method in enumerate(methods):
        own = sorted((one for one in results if one["method"] == method), key=lambda one: one["budget"])
        points = [(one["prefill_ratio"], 100 * one["accuracy"]) for one in own]
        style = {"linewidth": 2.5, "zorder": 3} if method in ("focus", "none") else {"linewidth": 1}
        axes.plot(*zip(*points, strict=True), "o-", color=colours(number % 20), label=method, markersize=4, **style)
    front, best = [], -1.0
    for one in sorted(results, key=lambda one: (one["prefill_ratio"], -one["accuracy"])):
        if one["accuracy"] > best:
            best = one["accuracy"]
            front.append((one["prefill_ratio"], 100 * best))
    axes.step(*zip(*front, strict=True), where="post", color="0.8", linewidth=6, zorder=0, label="Pareto front")
    axes.set_xlabel("time to read the prompt ÷ without a sampler")
    axes.set_ylabel("exact answers, %")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def random_model(folder: Path) -> Path:
    """end_to_end.py's random LLaVA-NeXT, with the miniature's tokenizer."""
    from sides import FULL, Settings, make_checkpoint

    make_checkpoint(Settings(FULL, folder, "float32", "cpu", 0, 0))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "weights/tiny" / name, folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tiny = json.loads((ROOT / "weights/tiny/config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(("image_token_id", "image_token_index"), tiny["image_token_id"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="measure time and memory on this checkpoint, and no accuracy")
    parser.add_argument("--random", action="store_true", help="the same on a random model of 552 M parameters")
    parser.add_argument("--methods", help="with commas between; default: all")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--count", type=int, default=800, help="questions about dense scenes")
    parser.add_argument("--timed", type=int, default=24, help="questions on which time is taken")
    parser.add_argument("--image", type=Path, help="picture to ask about, with --model")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--quick", action="store_true", help="two methods, one budget, few questions")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/compare.json", help="file to write")
    arguments = parser.parse_args()
    started = time.perf_counter()
    record = environment(Path(__file__), "torch", "numpy", "pillow")
    if arguments.quick:
        arguments.methods, arguments.budgets, arguments.count, arguments.timed = "focus,fastv,random", "0.39", 16, 2
    known = [*KNOWN, *SEARCHED, *FIXED, *VARIANTS]
    methods = sorted(known) if arguments.methods is None else arguments.methods.split(",")
    if unknown := set(methods) - set(known):
        parser.error(f"--methods: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    try:
        budgets = tuple(float(value) for value in arguments.budgets.split(","))
    except ValueError:
        parser.error(f"--budgets: expected numbers with commas between, got {arguments.budgets!r}")
    if arguments.random and arguments.model:
        parser.error("--random: not to be combined with --model")
    scratch = tempfile.TemporaryDirectory()
    if arguments.random:
        arguments.model = random_model(Path(scratch.name))
    try:
        model = minifocus.load(arguments.model or ROOT / "weights/tiny", "none", arguments.device, arguments.dtype)
        selector: dict[str, Any] = {}
        if arguments.model is None:
            scenes = islice(cards.scenes("test", TUNING, dense=True), 64)
            tuning = [(scene.image, scene.questions[0].question) for scene in scenes]
            timed = [(image, q) for image, q, _, _ in cards.questions("test", arguments.timed, TUNING + 1000, True)]
        else:
            if not (arguments.model / "selector.safetensors").is_file():
                selector = {"selector": "variance"}
            with Image.open(arguments.image or ROOT / "examples/cards.png") as opened:
                image = opened.convert("RGB")
            tuning = [(image, "What is in the picture?")]
            timed = tuning * arguments.timed
        settings = settings_of(model, methods, budgets, tuning, selector)
        results = measure(model, settings, timed, arguments.new_tokens)
        if arguments.model is None:
            for setting, one in zip(settings, results, strict=True):
                use(model, setting)
                found = evaluate(model, cards.questions("test", arguments.count, 0, True), 16, arguments.count)
                one |= {name: found[name] for name in ("accuracy", "interval_95", "families", "samples_per_second")}
                one["tokens"] = found["tokens"]
                print(f"{setting.name}: {found['accuracy']:.1%}", file=sys.stderr, flush=True)
    except (minifocus.CheckpointError, minifocus.InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record |= {"seconds": round(time.perf_counter() - started), "results": results}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    arguments.json.with_suffix(".md").write_text(table(results), encoding="utf-8")
    if arguments.model is None:
        plot(results, arguments.json.with_suffix(".png"))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
