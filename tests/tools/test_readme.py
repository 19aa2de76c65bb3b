"""The README and docs/ are true: their links, commands, output and Python, and every figure that comes from a record."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from forked import python
from safetensors.torch import load_file

import minifocus
from experiments.many_devices import communication
from experiments.many_devices import report as many_devices_report
from experiments.miniature import make
from experiments.timing import remark
from experiments.true_size import report
from experiments.true_size.folder import num_bytes
from experiments.true_size.models import MODELS
from minifocus import methods
from minifocus.inputs.model_inputs import num_visual_tokens
from minifocus.loading.config import read_config
from minifocus.loading.json_fields import JsonFields
from minifocus.loading.weights import shapes_of, without_values
from minifocus.model import LlavaNetwork

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments/results"
DOCS = ("training", "methods", "results", "operators", "checkpoints", "scale", "embedding", "notes")
MANY_DEVICES = [file.parent.name for file in RESULTS.glob("many-devices/results.json")]
TRUE_SIZES = sorted(file.parent.name for file in RESULTS.glob("true-size/*/results.json"))
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in DOCS),
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "weights/README.md",
    "examples/lmms_eval/README.md",
    "experiments/results/README.md",
    "experiments/results/paper/README.md",
    "experiments/results/paper-650-steps/README.md",
    "experiments/results/small/README.md",
    *(f"experiments/results/true-size/{name}/README.md" for name in TRUE_SIZES),
    *(f"experiments/results/{name}/README.md" for name in MANY_DEVICES),
]
WRITTEN = [page for page in PAGES if not page.startswith("experiments/")]  # by hand


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(page), flags=re.DOTALL)


def without_blocks(page: str) -> str:
    return re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)


# ---- links and form ----


def anchors(page: str) -> set[str]:
    """GitHub's names for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(str(target.resolve().relative_to(ROOT))), link


def test_every_page_of_docs_is_linked() -> None:
    assert {file.stem for file in (ROOT / "docs").glob("*.md")} == set(DOCS)
    written = "".join(map(read, WRITTEN))
    for name in DOCS:
        assert f"{name}.md" in written


def test_everything_is_on_the_map() -> None:
    """CONTRIBUTING.md links every folder and every file of the package's top, and what else is at the repository's top."""
    linked = set(
        re.findall(r"\]\(([^)#\s]+)\)", read("CONTRIBUTING.md").split("## Where everything is")[1].split("\n## ")[0])
    )
    package = ROOT / "minifocus"
    there = {file.name for file in package.glob("*.py")} - {"__init__.py", "version.py"}
    there |= {file.parent.name for file in package.glob("*/__init__.py")}
    there = {f"minifocus/{name}" for name in there} | {"csrc", "examples", "experiments", "tests", "weights", "docs"}
    assert linked == there


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 130
    prose = [line for line in without_blocks("README.md").splitlines() if not line.startswith(("|", "!"))]
    shown = [re.sub(r"\]\([^)]*\)", "]", line) for line in prose]  # as it is read: without the links' targets
    assert max(map(len, shown)) <= 100


@pytest.mark.parametrize("page", [page for page in WRITTEN if page != "README.md"])
def test_prose_keeps_to_its_columns(page: str) -> None:
    """CONTRIBUTING.md names the limit. Tables and code may be wider."""
    (limit,) = re.findall(r"prose up to (\d+)", read("CONTRIBUTING.md"))
    prose = [line for line in without_blocks(page).splitlines() if not line.lstrip().startswith(("|", "!"))]
    assert max(map(len, prose)) <= int(limit)


def test_the_path_is_short() -> None:
    """The README says how many lines its eight files have, with the two that it names beside them."""
    files = re.findall(r"^\d\. \[(minifocus/[\w/]+\.py)\]", read("README.md"), flags=re.MULTILINE)
    files += ["minifocus/rows.py", "minifocus/samplers/hooks.py"]
    assert len(files) == 10
    (limit,) = re.findall(r"fewer than (\d+)\slines", read("README.md"))
    assert sum(len(read(file).splitlines()) for file in files) < int(limit)


def test_the_idea_s_names_are_in_its_files() -> None:
    rows = re.findall(r"^\| `(.+?)` \| .*? \| (.+) \|$", read("README.md").split("## The idea")[1], flags=re.MULTILINE)
    rows = list(itertools.takewhile(lambda row: "python" not in row[0], rows))
    assert 12 <= len(rows) <= 16
    for _, where in rows:
        (target,) = re.findall(r"\]\((minifocus/[^)]+)\)", where)
        names = re.findall(r"`(\w+)`", where)
        assert names
        for name in names:
            assert re.search(rf"^ *(class|def) {name}\b", read(target), flags=re.MULTILINE), where


# ---- commands ----


def commands(page: str) -> list[str]:
    """Lines of the shell that a page shows, in blocks and in its text."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^\$ (.*)$", "".join(blocks(page, "console")), flags=re.MULTILINE)
    lines += re.findall(r"`((?:python|pytest|make) [^`]+)`", without_blocks(page))
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


EVERY = sorted({line for page in WRITTEN for line in commands(page)})


def test_make_targets_exist() -> None:
    targets = {shlex.split(line, comments=True)[1] for line in EVERY if line.startswith("make ")}
    assert {"demo", "check", "test", "weights"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", read("Makefile"), flags=re.MULTILINE), target


def asks_for_a_model(words: list[str]) -> bool:
    """Whether a command is given a model of the reader's own."""
    return "--model" in words or "examples/convert.py" in words or "examples/quantize.py" in words


FEWER = {"--steps": "2", "--count": "3"}


def test_commands_on_the_embedded_model(tmp_path: Path) -> None:
    """Each once and as it is written, but with fewer steps, scenes and questions, and of all that train, one alone has the
    default batch of 12 conversations."""
    found = [shlex.split(line, comments=True) for line in EVERY if line.startswith("python examples/")]
    ours = list(dict.fromkeys(tuple(words[1:]) for words in found if not asks_for_a_model(words)))
    ours.sort(key=lambda words: "--data" in words)  # after the command that draws the data
    assert len(ours) >= 6
    for folder in ("examples", "weights"):  # what the commands write goes elsewhere
        (tmp_path / folder).symlink_to(ROOT / folder)
    shortest = min((words for words in ours if "examples/train.py" in words), key=len)
    for arguments in ours:
        words = [FEWER.get(before, word) for before, word in zip(("", *arguments), arguments, strict=False)]
        smaller = "examples/train.py" in words and arguments != shortest and "--batch" not in words
        done = python(*words, *(["--batch", 4] if smaller else []), cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def shown_by_help(program: tuple[str, ...]) -> str:
    done = python(*program, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_options_of_the_commands_that_take_long_or_a_model_of_yours() -> None:
    """They are not run here: their programs are there, and their options are those of --help."""
    known = cache(shown_by_help)
    tried = set()
    for line in EVERY:
        words = shlex.split(line, comments=True)
        if "-m" in words:
            module = words[words.index("-m") + 1]
            if module.endswith(".NAME"):  # of a rule
                continue
            assert importlib.util.find_spec(module), line
            if "lmms_eval" in module:  # which test_lmms_eval.py tries, in an environment of its own
                continue
            program: tuple[str, ...] = ("-m", module)
        elif asks_for_a_model(words) and (script := next(word for word in words if "/" in word)).startswith(
            "examples/"
        ):
            program = (script,)
        else:
            continue
        for option in words[words.index(program[-1]) + 1 :]:
            if option.startswith("--"):
                assert re.search(rf"{option}\b", known(program)), line
        tried.add(program)
    assert len(tried) >= 8


def test_the_demo_s_output() -> None:
    """All but the times, which are another run's."""
    done = python("examples/generate.py")
    assert done.returncode == 0, done.stderr
    (block,) = blocks("README.md", "console")
    command, block = block.split("\n", 1)
    assert command == "$ python examples/generate.py"
    shown, came = (re.sub(r"[\d.]+ s\b|\d+ tokens/s", "TIME", text).splitlines() for text in (block, done.stdout))
    assert shown == came and "TIME" in shown[-1]
    assert f"all {re.findall('[0-9]+', came[2])[0]} visual tokens" in " ".join(read("README.md").split())


# ---- Python ----


def run_block(page: str, names: dict[str, Any], number: int = 0) -> dict[str, Any]:
    exec(compile(blocks(page, "python")[number], page, "exec"), names)
    return names


def test_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    run_block("README.md", {})
    assert capsys.readouterr().out.startswith("870 TokenCounts(full=")

    model = minifocus.load("weights/tiny", sampler="none")
    prompt = model.processor("examples/cards.png", "Is there a red card?")
    names = {
        "input_ids": prompt.input_ids[None],
        "pixel_values": prompt.tiles[0][None],
        "image_sizes": torch.tensor(prompt.sizes),
        "attention_mask": None,
    }
    run_block("docs/checkpoints.md", names)
    assert "TokenCounts(full=" in capsys.readouterr().out
    assert len(names["answers"]) == 2 and names["logits"].shape[:2] == names["input_ids"].shape  # type: ignore[arg-type,union-attr]


def test_python_of_the_operators() -> None:
    names = {
        "cells": torch.randn(6 * 5, 8),
        "grid_hw": torch.tensor([[6, 5]]),
        "choice": torch.tensor([0, 1, 2, 0]),
        "q": torch.randn(3, 4, 128),
        "k": torch.randn(30, 2, 128),
        "cu_text": torch.tensor([0, 3]),
        "cu_visual": torch.tensor([0, 30]),
        "hidden": torch.randn(30, 16),
        "positions": torch.arange(30),
    }
    run_block("docs/operators.md", names)
    assert len(names["tokens"]) == len(names["source"]) == 1 + 2 + 8 + 1
    assert torch.equal(names["positions"], names["index"]) and len(names["hidden"]) == int(names["count"])


def test_python_of_a_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The method that docs/methods.md adds can be loaded by its name, and drops half of the map."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    names = run_block("docs/methods.md", {})
    assert "every-second" in methods.names() and "TokenCounts(full=" in capsys.readouterr().out
    picture = names["model"].generate("examples/cards.png", "Is there a red card?").pictures[0]
    layout = picture.layout
    cells = layout.cells(picture.entered)
    assert int((cells >= 0).sum()) == math.ceil(layout.height * layout.width / 2)
    assert int((cells < 0).sum()) == layout.leading + layout.height


def test_the_methods_are_listed() -> None:
    table = read("docs/methods.md").split("| `--sampler` |", 1)[1].split("\n\n", 1)[0]
    first = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`([\w+-]+)`", "".join(first)), key=methods.names().index) == methods.names()
    assert f"{len(methods.training_free())} training-free methods" in read("README.md")


# ---- citation and CI ----


def test_citation() -> None:
    cited = yaml.safe_load(read("CITATION.cff"))
    assert cited["version"] == minifocus.__version__ and cited["license"] == "MIT"
    (paper,) = cited["references"]
    authors = ", ".join(f"{one['given-names']} {one['family-names']}" for one in paper["authors"])
    assert f"{authors}: *{paper['title']}*, {paper['year']}." in " ".join(read("README.md").split())
    assert paper["url"] in read("README.md") and paper["url"].endswith(
        paper["identifiers"][0]["value"][len("arXiv:") :]
    )


def test_github_runs_what_a_contributor_runs() -> None:
    (job,) = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"].values()
    (step,) = [step for step in job["steps"] if "run" in step]
    assert step["run"] == ".ci/run" and step["env"] == {"MINIFOCUS_BUILD": "cpu"} and job["timeout-minutes"] == 90


# ---- figures ----


@cache
def record(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def went(*parts: Any) -> list[str]:
    """What a page has to say about the rounds of these parts of a record; nothing where they are older than the watch."""
    return [sentence for sentence in [remark(*(part["rounds"] for part in parts if "rounds" in part))] if sentence]


def accuracy_rows() -> list[str]:
    rows = []
    for scenes, by_sampler in record("accuracy.json")["results"].items():
        for sampler, found in by_sampler.items():
            low, high = (100 * end for end in found["interval_95"])
            families = " | ".join(f"{100 * share:.1f}" for share in found["families"].values())
            tokens = f"{100 * found['tokens']['equivalent']:.1f} %"
            exact = f"{100 * found['accuracy']:.1f} % ({low:.1f} – {high:.1f})"
            rows.append(f"| {scenes} | {sampler} | {exact} | {families} | {tokens} |")
    return rows


def parameters() -> list[str]:
    file = ROOT / "weights/tiny/model.safetensors"
    return [f"{sum(value.numel() for value in load_file(file).values()) / 1e6:.1f} million parameters"]


def size() -> list[str]:
    return [f"a trained model of {(ROOT / 'weights/tiny/model.safetensors').stat().st_size / 1e6:.0f} MB"]


def scales() -> list[str]:
    looked = record("accuracy.json")["where"]
    share = {
        things: {scale: f"{100 * one:.0f} %" for scale, one in of.items()} for things, of in looked["scales"].items()
    }
    mixed, dense = (of["none"]["count"] for of in record("accuracy.json")["results"].values())
    training = json.loads(read("weights/training/record.json"))["seconds"]
    return [
        f"{mixed} about scenes as they come, {dense} about dense ones",
        f"1×1 to {share['text']['1x1']} of the regions with text, to {share['things']['1x1']} of those with other things, "
        f"and to {share['empty']['1x1']} of the empty ones, {share['empty']['4x4']} of which become a single token",
        f'Of {looked["questions"]} "read" questions',
        f"every letter and digit of what is asked in {100 * looked['asked_text_covered']:.1f} %",
        f"in {sum(training.values()) / 60:.0f} minutes",
    ]


def two_forms() -> list[str]:
    found = record("paper-650-steps/results.json")

    def row(arm: str) -> str:
        seeds = found["arms"][arm].values()
        exact = ", ".join(f"{100 * seed['accuracy']:.1f}" for seed in seeds)
        tokens = ", ".join(f"{100 * seed['tokens']['equivalent']:.{int(arm != 'control')}f}" for seed in seeds)
        return f"| {exact} % | {'100' if arm == 'control' else tokens} % |"

    speed = found["speed"]["focus"]
    times = f"{speed['times_as_fast']:.2f} times as fast as none, one by one {speed['times_as_fast_alone']:.2f} times"
    full = 500  # steps of the stage, as it was then
    stages = (
        f"in one stage of {full + found['steps']} steps (`--arms single --seeds 1`), instead of {full} with all tokens"
    )
    return [
        f"{found['steps']} steps each, three seeds, {found['questions']} dense questions",
        f"| all tokens {row('control')}",
        f"(`--straight-through`) {row('focus')}",
        f"factor as printed {row('printed')}",
        f"{stages} and then {found['steps']} {row('single')}",
        times,
    ]


def mean(arm: str) -> tuple[str, str]:
    """Exact answers and tokens of an arm of the paper's tables, over its seeds, in percent."""
    seeds = record("paper/results.json")["arms"][arm].values()
    exact, tokens = (
        fmean(values) for values in zip(*((s["accuracy"], s["tokens"]["equivalent"]) for s in seeds), strict=True)
    )
    return f"{100 * exact:.1f} %", f"{100 * tokens:.0f} %"


def error(*arms: str) -> float:
    """1.96 standard errors of the difference of two arms, in points."""
    found = record("paper/results.json")["arms"]
    shares = [[seed["accuracy"] for seed in found[arm].values()] for arm in arms]
    questions = record("paper/results.json")["questions"]
    return 196 * math.sqrt(sum(fmean(of) * (1 - fmean(of)) / questions / len(of) for of in shares))


def paper_in_miniature() -> list[str]:
    found = record("paper/results.json")
    exact = {arm: mean(arm)[0] for arm in found["arms"]}
    tokens = {arm: mean(arm)[1] for arm in found["arms"]}
    control, both = ([100 * s["accuracy"] for s in found["arms"][arm].values()] for arm in ("control", "focus"))
    stages = json.loads(read("weights/training/record.json"))["seconds"]
    first = sum(seconds for stage, seconds in stages.items() if stage not in ("focus", "router"))
    one_seed = found["arms"]["control"]["1"]["accuracy"]
    unsaid = 196 * math.sqrt(2 * one_seed * (1 - one_seed) / found["questions"])
    by_side = {side: mean(f"window-{side}")[0] for side in (1, 2, 8, 12)} | {4: exact["vision"]}
    best, *_, worst = sorted(by_side, key=lambda side: -float(by_side[side][:-2]))
    apart = max(control) - min(control)
    return [
        f"{first / 60:.0f} minutes of them for the first three stages",
        f"{found['steps']} steps of {found['batch']} conversations",
        f"asked {found['questions']} dense questions",
        f"differences below {unsaid:.1f} points",
        f"all tokens {exact['control']}. Vision-guided {exact['vision']} at {tokens['vision']} of the tokens, "
        f"text-guided {exact['text']} at {tokens['text']}, both {exact['focus']} at {tokens['focus']} and "
        f"{found['speed']['focus']['times_as_fast']:.2f} times as fast",
        f"Both are {fmean(control) - fmean(both):.1f} ± {error('control', 'focus'):.1f} points below all tokens, whose own "
        f"seeds are {apart:.1f} points apart",
        f"has {exact['avgpool']} at {tokens['avgpool']}; random tokens {exact['random']} at {tokens['random']}",
        f"seven scales do worse than three ({exact['branches-7']} at {tokens['branches-7']})",
        f"regions of {best}×{best} cells do best here ({by_side[best]} at {tokens[f'window-{best}']})",
        f"{worst}×{worst} regions do worst ({by_side[worst]})",
        f"costs nothing here ({exact['direct']} at {tokens['direct']})",
        f"the most similar {tokens['like-60']} of the tokens lose most answers ({exact['like-60']})",
        f"least similar {tokens['unlike-40']} answer as well as the learned vision-guided sampler at "
        f"{100 * found['arms']['vision']['1']['tokens']['equivalent']:.0f} % ({exact['unlike-40'][:-2]} and "
        f"{100 * found['arms']['vision']['1']['accuracy']:.1f} %)",
    ]


def tried() -> list[str]:
    """What docs/notes.md says of the arms that are on record. Its other trials left no record."""
    long, short = record("paper-650-steps/results.json"), record("paper/results.json")

    def by_seed(found: Any, arm: str) -> tuple[str, str]:
        seeds = [one for _, one in sorted(found["arms"][arm].items())]
        shares = (
            [f"{100 * s['accuracy']:.1f}" for s in seeds],
            [f"{100 * s['tokens']['equivalent']:.1f}" for s in seeds],
        )
        exact, tokens = (", ".join(of[:-1]) + f" and {of[-1]} %" if of[1:] else f"{of[0]} %" for of in shares)
        return exact, tokens

    (control, _), (printed, printed_tokens), (focus, focus_tokens) = (
        by_seed(long, arm) for arm in ("control", "printed", "focus")
    )
    single, single_tokens = by_seed(long, "single")
    means = {arm: 100 * fmean(s["accuracy"] for s in short["arms"][arm].values()) for arm in short["arms"]}
    lost = {arm: f"{means['control'] - means[arm]:.1f}" for arm in ("vision", "text", "focus")}
    return [
        f"{long['steps']} steps, {long['questions']} dense questions, three seeds",
        f"the control answers {control}; both samplers with the printed factor {printed} with {printed_tokens[:-2]} % of "
        f"the tokens; with its gradient alone (`--straight-through`) {focus} with {focus_tokens}",
        f"{single} at {single_tokens} of the tokens, within the range of the three seeds",
        f"{short['steps']} steps of {short['batch']} are too few for both samplers at once: {by_seed(short, 'focus')[0]} "
        f"(three seeds) at {mean('focus')[1]} of the tokens, where the control has {by_seed(short, 'control')[0]}: "
        f"{lost['focus']} ± {error('control', 'focus'):.1f} points less, more than either alone ({lost['vision']} and "
        f"{lost['text']})",
    ]


def beside_transformers() -> list[str]:
    found = record("end_to_end.json")
    sides, load, cold = found["sides"], found["load"], found["cold_start"]

    def ratios(side: str, *more: str) -> str:
        figures = [f"{sides[side][what]['ratio_to_transformers']:.2f}" for what in ("prefill", "decode", "memory")]
        return f"| {figures[0]} | {figures[1]} | {' | '.join(more or ('', ''))} | {figures[2]} |".replace(
            "|  |  |", "| | |"
        )

    vision, text = (found["model"]["size"][part] for part in ("vision", "text"))
    missed = [name for name, bar in found["bars"].items() if not bar["met"]]
    bar = f"the one for prefill, at most {found['bars']['prefill']['at_most']}, is missed"
    assert missed in ([], ["prefill"])  # the page has words for no other
    unchecked = load["none_unchecked"]["ratio_to_transformers"]
    loading = f"{load['none']['ratio_to_transformers']:.2f}"
    compiled = [
        f"{a / b:.2f}"
        for a, b in zip(*(sides[side]["prefill"]["rounds"] for side in ("focus", "focus_reference")), strict=True)
    ]
    none = ratios(
        "none",
        f"{loading}, or {unchecked:.2f} with `check_finite=False`",
        f"{cold['none']['ratio_to_transformers']:.2f}",
    )
    return [
        f"transformers {found['versions']['transformers'].rsplit('.', 1)[0]} (sdpa)",
        f"two shared cores, {len(compiled)} rounds.",
        f"ViT-L/{vision['patch_size']}-{vision['image_size']} and a decoder of {text['num_hidden_layers']} layers, "
        f"{text['hidden_size']} wide, and reads {found['model']['visual_tokens']} visual tokens",
        f"| `none` (the same computation) {none}",
        f'| `focus` (`selector="variance"`) {ratios("focus")}',
        f"| `focus`, operators in plain PyTorch {ratios('focus_reference')}",
        f"prefill is {sides['half']['decoder_prefill_rate_to_none']:.1f} times as fast",
        f"({', '.join(compiled[:-1])} and {compiled[-1]} of the prefill with plain PyTorch)",
        f"Loading takes {loading} of the time",
        f"without it, {unchecked:.2f}",
        f"only {bar}" if missed else "all of them are met",
        *went(found, load, cold),
    ]


def beside_transformers_in_bfloat16() -> list[str]:
    found = record("end_to_end_bfloat16.json")
    assert not found["same_greedy_tokens"]  # the page says so
    none, focus = (
        [found["sides"][side][what]["ratio_to_transformers"] for what in ("prefill", "decode")]
        for side in ("none", "focus")
    )
    load = found["load"]["none"]["ratio_to_transformers"]
    return [
        f"`none` takes {none[0]:.2f} of the prefill, {none[1]:.2f} of the time for a token and {load:.2f} of the time to load; "
        f"`focus` {focus[0]:.2f} and {focus[1]:.2f}"
    ]


def quantized_rows() -> list[str]:
    found = record("quantized.json")
    times, asked, logits = found["times"], found["answers"], found["logits"]["trained"]
    lengths = [name for name in times if name.startswith("prefill")]
    missed = [name for name, bar in found["bars"].items() if not bar["met"]]
    assert missed == ["prefill int4"]  # the page has words for no other

    def row(kind: str) -> str:
        ratios = " | ".join(f"{times[name][kind]['ratio_to_bfloat16']:.2f}" for name in ("decode", *lengths))
        return (
            f"| {kind} | {found['load'][kind]['bytes'] / 1e6:.0f} MB | {ratios} | {100 * logits[kind]['same_likeliest']:.0f} % | "
            f"{100 * asked[kind]['accuracy']:.1f} %, {100 * asked[kind]['same_as_bfloat16']:.1f} % |"
        )

    return [
        f"a random decoder of {found['parameters'] / 1e6:.0f} M parameters",
        *(row(kind) for kind in ("bfloat16", "int8", "int4")),
        f"prefill in int4, at most {found['bars']['prefill int4']['at most']}, is missed",
        *went(found),
    ]


def embedding_rows() -> list[str]:
    found = record("embedding.json")
    start, decode, disk = found["start"], found["decode"], found["disk"]
    missed = [name for name, bar in found["bars"].items() if not bar["met"]]
    assert missed in ([], ["decode"])  # the page has words for no other
    token = f"the one for a token, at most {found['bars']['decode']['at most']} of Python's, is missed"
    libraries = sum(disk[name] for name in ("program", "libraries_of_torch", "other_libraries"))
    files = {
        "c++": (disk["package"], libraries),
        "python": (disk["model"], disk["python_packages"]),
        "transformers": None,
    }

    def row(label: str, side: str) -> str:
        one, need = start[side], files[side]
        each = f"{1000 * decode[side]['seconds_per_token']:.2f} ms" if side in decode else ""
        size = f"{need[0] / 1e6:.0f} and {need[1] / 1e6:.0f} MB" if need else ""
        cells = (label, f"{one['seconds']:.2f} s", f"{one['memory'] / 1e6:.0f} MB", each, size)
        return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")

    ratios = [start["c++"]["ratio_to_python"], start["c++"]["memory_ratio_to_python"], decode["c++"]["ratio_to_python"]]
    return [
        f"All {found['same']['count']} questions",
        row("the C++ runtime", "c++"),
        row("`minifocus`", "python"),
        row("`transformers`", "transformers"),
        f"are {ratios[0]:.2f}, {ratios[1]:.2f} and {ratios[2]:.2f} of Python's",
        f"whole questions take {decode['c++']['questions_ratio_to_python']:.2f} of its time",
        token if missed else "All of this project's bars for it are met",
    ]


def real_parts() -> list[str]:
    speed = record("small/results.json")["speed"]

    def range_of(rows: list[Any]) -> tuple[Any, Any]:
        own = [one for one in rows if one["method"] not in ("none", "vision", "avgpool", "maxpool")]  # at the budget
        return min(own, key=lambda one: one["prefill_ratio"]), max(own, key=lambda one: one["prefill_ratio"])

    (fast, slow), (fast_together, slow_together) = range_of(speed["alone"]), range_of(speed["batch"])
    names = [one["method"] for one in (fast, slow, fast_together, slow_together)]
    assert names == ["focus", "aim", "random", "focus"] and speed["rounds"][1] == 1
    assert len(speed["batch"]) == len(speed["alone"]) == 20  # all methods that need no router, and none
    return [
        f"at {100 * speed['budget']:.0f} % of the tokens, reading one photograph takes {fast['prefill_ratio']:.2f}",
        f"to {slow['prefill_ratio']:.2f} (`aim`)",
        f"that all {speed['alone'][0]['tokens']['full']:.0f} tokens take",
        f"in a batch of {speed['batch_size']}",
        f"{fast_together['prefill_ratio']:.2f} (`random`) to {slow_together['prefill_ratio']:.2f} (`focus`, at "
        f"{100 * slow_together['tokens']['equivalent']:.0f} %)",
    ]


def true_sizes() -> list[str]:
    """Sizes that follow from the shapes."""
    found = []
    for name, model in MODELS.items():
        config = read_config(JsonFields(model.config(), "config.json"), ROOT)
        shapes = shapes_of(without_values(lambda config=config: LlavaNetwork(config)))  # type: ignore[misc]
        cache = 2 * 2 * config.text.num_hidden_layers * config.text.num_key_value_heads * config.text.head_dim
        visual = num_visual_tokens(config, (672, 672))
        found.append(
            f"| `llava-hf/{name}-hf` | {sum(map(num_bytes, shapes.values())) / 1e9:.1f} GB | {cache / 1e6:.2f} MB | "
            f"{visual * cache / 1e9:.2f} GB |"
        )
    return [*found, f"all {visual} visual tokens"]


def true_size_rows() -> list[str]:
    """Of every record in bfloat16 that there is, the table as its own page has it."""
    records = (record(f"true-size/{name}/results.json") for name in TRUE_SIZES)
    found = [report.whole_table(one) for one in records if one["dtype"] == "bfloat16"]
    return list(dict.fromkeys(line for table in found for line in table.splitlines()))


def of_a_gpu() -> list[str]:
    """What docs/scale.md says of a model of 7 billion parameters on a GPU beside the table."""
    found, rows = record("gpu/end_to_end.json"), []
    none, focus = (
        [f"{found['sides'][side][what]['ratio_to_transformers']:.2f}" for what in ("prefill", "decode")]
        for side in ("none", "focus")
    )
    memory, token = [], []
    for name in ("", "-int8", "-int4"):
        of_gpu = record(f"true-size/llava-v1.6-vicuna-7b-on-h200{name}/results.json")
        for side, sampler, _, _, first, _, _, _, of_token, device in report.rows(of_gpu):
            if name:
                rows.append(f"| {side} | {name[1:]} | {sampler} | {first} | {of_token} | {device} |")
            if (side, sampler) == ("672²", "`none`"):
                memory.append(device.removesuffix(" GB"))
                token.append(f"{float(of_token.removesuffix(' ms')):.0f}")
    return [
        *rows,
        f"took {memory[0]} GB on an H200",
        f"{memory[1]} and {memory[2]} GB instead of {memory[0]}, and cost time: a token took {token[1]} and {token[2]} ms "
        f"instead of {token[0]}",
        f"`none` takes {none[0]} of the prefill and {none[1]} of the time for a token, `focus` {focus[0]} and {focus[1]}; "
        f"loading takes {found['load']['none']['ratio_to_transformers']:.2f} of its time",
    ]


def many_devices() -> list[str]:
    """What processes send, by the shapes; and of the record, if there is one, two tables as its own page has them."""
    found = communication.table().splitlines()
    for name in MANY_DEVICES:
        of_record = record(f"{name}/results.json")
        for table in (many_devices_report.answers(of_record), many_devices_report.training(of_record)):
            found += table.splitlines()
    return list(dict.fromkeys(found))


def operator_rows() -> list[str]:
    rows = []
    for case in record("operators_cpu.json")["cases"]:
        peers, extra = case["peer ÷ minifocus"], case["extra_bytes"]
        plain = "reference" if "reference" in peers else "indexing"
        copy = f"{peers['copy']:.2f}" if "copy" in peers else ""
        name = f"`{case['operator']}`, {case['sizes'].removeprefix('1 × ').replace('%', ' %')}"
        memory = f"{extra['minifocus'] / 1e6:.3g} MB; {extra[plain] / 1e6:.3g} MB"
        row = f"| {name} | {1000 * case['seconds']['minifocus']:.2g} ms | {peers[plain]:.1f} | {copy} | {memory} |"
        rows.append(row.replace("|  |", "| |"))
    return rows + went(*record("operators_cpu.json")["cases"])


def gpu_rows() -> list[str]:
    checked, found = record("gpu/gpu_check.json"), record("gpu/operators_cuda.json")
    assert all(step["passed"] for step in checked["steps"].values())
    assert checked["commit"] == found["commit"] and checked["steps"]["benchmark"]["cases"] == found["cases"]
    rows, met = [], []
    for case in found["cases"]:
        peers = case["peer ÷ minifocus"]
        plain = peers.get("reference", peers.get("indexing"))
        other = next((f"{peers[name]:.2f} ({name})" for name in ("copy", "compiled") if name in peers), "")
        met += [(case["operator"], name) for name, bar in case["bars"].items() if bar["met"]]
        name = f"`{case['operator']}`, {case['sizes'].replace('%', ' %')}"
        micro, host = (1e6 * case[of]["minifocus"] for of in ("seconds", "host_seconds"))
        rows.append(f"| {name} | {micro:.0f} µs | {plain:.1f} | {other} | {host:.0f} µs |".replace("|  |", "| |"))
    assert met == [("importance", "reference")]  # the page says that all others are missed; this one is met in bfloat16
    without = next(
        1e6 * case["seconds"]["minifocus"]
        for case in record("gpu/operators_cuda_without_tensor_cores.json")["cases"]
        if case["operator"] == "importance" and "bfloat16" in case["sizes"]
    )
    bars = {case["operator"]: case["bars"] for case in found["cases"]}
    reached = bars["importance"]
    return [
        *rows,
        f"One {found['device']}, at `{found['commit'][:7]}`",
        f"Without them it takes {without:.0f} µs",
        f"at least {bars['region_route']['copy']['at_least']} of the copy",
        f"at most {bars['select_top_p']['microseconds']['at_most']:.0f} µs",
        f"at least {bars['gather_tokens']['copy']['at_least']} of the copy",
        f"{reached['reference']['at_least']:.0f} times as fast as the reference and "
        f"{reached['compiled']['at_least']:.0f} times as fast as what torch.compile makes of it",
    ]


def llava_stf() -> list[str]:
    arms = record("llava-stf/results.json")["arms"]
    of = {name: [one for _, one in sorted(own.items())] for name, own in arms.items()}
    mean = {name: fmean(100 * one["accuracy"] for one in own) for name, own in of.items()}
    seeds = {name: ", ".join(f"{100 * one['accuracy']:.1f}" for one in own) for name, own in of.items()}
    labels = {
        "control": "LLaVA-NeXT (control)",
        "mbtf": "MBTF alone",
        "stf": "STF alone",
        "both": "MBTF and STF",
        "avgpool": "2×2 average pooling, trained",
    }

    def apart(*names: str) -> float:
        """1.96 standard errors of the difference of two arms, in points."""
        return 1.96 * math.sqrt(sum(mean[n] * (100 - mean[n]) / sum(one["count"] for one in of[n]) for n in names))

    assert all(both["accuracy"] > stf["accuracy"] for both, stf in zip(of["both"], of["stf"], strict=True))
    return [
        *(
            f"| {label} | {seeds[name]} % | {100 * fmean(one['tokens']['equivalent'] for one in of[name]):.1f} % |"
            for name, label in labels.items()
        ),
        f"MBTF helps in every seed, by {mean['both'] - mean['stf']:.1f} ± {apart('both', 'stf'):.1f} points",
        f"alone it is {mean['control'] - mean['mbtf']:.1f} ± {apart('control', 'mbtf'):.1f} below the control",
        f"STF is {mean['stf'] - mean['avgpool']:.1f} above it, both are {mean['both'] - mean['avgpool']:.1f}",
        f"lose {mean['control'] - max(mean['both'], mean['stf']):.1f} points of the control's or more",
        "level ({:.1f}, {:.1f} and {:.1f} %, ± {:.1f} for a difference)".format(
            mean["average"],
            100 * of["both"][0]["accuracy"],
            mean["convolution"],
            apart("average", "convolution"),
        ),
        f"STF without MBTF reaches {mean['fresh-stf']:.1f} %",
        f"TokenPacker, {mean['fresh-both']:.1f} and {mean['tokenpacker']:.1f} %",
    ]


def avg_llava() -> list[str]:
    arms = record("avg-llava/results.json")["arms"]
    of = {name: [one for _, one in sorted(own.items())] for name, own in arms.items()}
    labels = {
        "control": "LLaVA-NeXT (control)",
        **{f"forced-{tokens}": f"forced to {tokens} tokens of a view's 64" for tokens in (4, 8, 16, 32, 64)},
        "router": "the router chooses",
        "price-0.03": "the router, `--token-price 0.03`",
        "price-0.1": "the router, `--token-price 0.1`",
    }

    seeds = {name: [one["accuracy"] for one in own] for name, own in of.items()}

    def mean(name: str, share: Callable[[Any], float]) -> float:
        return 100 * fmean(share(one) for one in of[name])

    chose = {name: [one["choices"] for one in of[name]] for name in ("router", "price-0.03", "price-0.1")}
    tokens = {
        name: {key: 100 * fmean(one[key]["all"] for one in own) for key in ("tokens", "tokens_at_least_loss")}
        for name, own in chose.items()
    }
    pairs = {
        name: [
            100 * fmean(one["pairs"][way] / sum(one["pairs"].values()) for one in own) for way in ("coarser", "finer")
        ]
        for name, own in chose.items()
    }
    of_text = {
        name: [100 * fmean(one["tokens"][family] for one in own) for family in ("read", "relate")]
        for name, own in chose.items()
    }
    return [
        *(
            f"| {label} | {', '.join(f'{100 * accuracy:.1f}' for accuracy in seeds[name])} % | "
            f"{mean(name, lambda one: one['tokens']['equivalent']):.1f} % |"
            for name, label in labels.items()
        ),
        f"{tokens['router']['tokens']:.1f} % of the tokens, where the least loss is at "
        f"{tokens['router']['tokens_at_least_loss']:.1f} %",
        f"With a price of 0.03 it is {tokens['price-0.03']['tokens']:.1f} %, of 0.1 {tokens['price-0.1']['tokens']:.1f} %",
        f"coarser for the easy question in {pairs['router'][0]:.0f} % of pairs without a price, in {pairs['price-0.03'][0]:.0f} "
        f"and {pairs['price-0.1'][0]:.0f} % with one, and finer in {pairs['router'][1]:.1f}, {pairs['price-0.03'][1]:.1f} and "
        f"{pairs['price-0.1'][1]:.1f} %",
        f"With a price of 0.1, small text gets {of_text['price-0.1'][0]:.0f} % of the tokens, "
        f"a relation {of_text['price-0.1'][1]:.0f} %",
        f"learns from the answers alone gives one granularity to all ({100 * of['answers'][0]['accuracy']:.1f} % at "
        f"{100 * of['answers'][0]['tokens']['equivalent']:.1f} %)",
    ]


def three_seeds() -> list[str]:
    found = record("paper-harder-scenes/results.json")
    arms = {arm: list(found["arms"][arm].values()) for arm in ("control", "focus", "cosine")}

    def by_seed(arm: str, of: Callable[[Any], float]) -> str:
        return ", ".join(f"{100 * of(one):.1f}" for one in arms[arm])

    control, focus, cosine = (fmean(100 * one["accuracy"] for one in arms[arm]) for arm in arms)
    shares = [fmean(100 * one["tokens"]["equivalent"] for one in arms[arm]) for arm in ("focus", "cosine")]
    return [
        f"{found['steps']} steps of {found['batch']} conversations, {found['questions']} dense questions",
        f"| all tokens | {by_seed('control', lambda one: one['accuracy'])} % | 100 % |",
        *(
            f"| both samplers{label} | {by_seed(arm, lambda one: one['accuracy'])} % | "
            f"{by_seed(arm, lambda one: one['tokens']['equivalent'])} % |"
            for arm, label in (("focus", ""), ("cosine", ", the selector given cosines (`score_norm=cosine`)"))
        ),
        f"{control - focus:.1f} points below all tokens, at {shares[0]:.0f} % of them; with cosines "
        f"{control - cosine:.1f}, at {shares[1]:.0f} %",
    ]


def level_with_focus() -> tuple[float, float]:
    """The lowest budget down to which the least similar tokens do as well as `focus`, and the next, where they do not."""
    found = {(one["method"], one["budget"]): one["accuracy"] for one in record("compare.json")["results"]}
    shared = sorted(
        {b for method, b in found if method == "focus" and ("similarity (flipped)", b) in found}, reverse=True
    )
    level = list(itertools.takewhile(lambda b: found["similarity (flipped)", b] >= found["focus", b], shared))
    below = shared[len(level)]
    assert found["focus", below] > found["similarity (flipped)", below]
    return level[-1], below


def caveat() -> list[str]:
    return [f"does as well as `focus` down to {100 * level_with_focus()[0]:.0f} % of the tokens"]


def method_figures() -> list[str]:
    found = {(one["method"], one["budget"]): one for one in record("compare.json")["results"]}
    listed = ["similarity", "focus", "vtc-cls", "fopru", "text", "globalcom2", "prumerge", "aim"]
    listed += ["fastv", "pyramiddrop", "random"]
    rows = []
    for name in listed:
        key = name.replace("similarity", "similarity (flipped)")
        cells = (f"{100 * found[key, b]['accuracy']:.1f}" if (key, b) in found else "" for b in (0.5, 0.39, 0.25))
        shown = f"`{name}`" + (", flipped" if name == "similarity" else "")
        rows.append(f"| {shown} | {' | '.join(cells)} |".replace("|  |", "| |"))
    rule, focus = (f"{found[key, 0.39]['prefill_ratio']:.2f}" for key in ("similarity (flipped)", "focus"))
    questions = record("compare.json")["questions"]
    level, _ = level_with_focus()
    budgets = sorted((100 * budget for method, budget in found if method == "random"), reverse=True)
    return [
        "| | 50 % | 39 % | 25 % |",  # the columns of the rows
        *rows,
        f"Down to {100 * level:.0f} % a hand-made rule, the least similar tokens, does as well",
        f"± is about {196 * math.sqrt(0.97 * 0.03 / questions):.0f} point near the top",
        f"and {196 * math.sqrt(0.25 / questions):.1f} in the middle",
        f"{', '.join(f'{b:.0f}' for b in budgets[:-1])} and {budgets[-1]:.0f} % of the tokens",
        f"{questions} questions about dense scenes",
        f"With all tokens it is {100 * found['none', 1.0]['accuracy']:.1f}",
        f"({rule} against {focus} of the prefill)",
        f'`focus` at "39 %" keeps {100 * found["focus", 0.39]["tokens"]["equivalent"]:.0f} % of the tokens, and at "25 %" '
        f"{100 * found['focus', 0.25]['tokens']['equivalent']:.0f} %",
    ]


def trained_compared() -> list[str]:
    labels = {"focus": "`focus`", "AVG-LLaVA": "AVG-LLaVA", "STF": "LLaVA-STF", "avgpool": "`avgpool`"}
    return [
        f"| {labels[one['method']]} | {100 * one['accuracy']:.1f} % | {100 * one['tokens']['equivalent']:.1f} % | "
        f"{one['prefill_ratio']:.2f} |"
        for one in record("compare-trained.json")["results"]
        if one["method"] in labels
    ]


def mutants_recorded() -> list[str]:
    return [f"{len(record('mutants.json')['mutants'])} lines, every barrier among them"]


FIGURES: dict[str, list[Callable[[], Iterable[str]]]] = {
    "README.md": [accuracy_rows, parameters, size, caveat],
    "weights/README.md": [parameters],
    "docs/methods.md": [method_figures, trained_compared],
    "docs/notes.md": [tried],
    "docs/operators.md": [mutants_recorded],
    "docs/scale.md": [true_sizes, true_size_rows, of_a_gpu, many_devices],
    "docs/results.md": [
        accuracy_rows,
        parameters,
        scales,
        two_forms,
        paper_in_miniature,
        real_parts,
        beside_transformers,
        beside_transformers_in_bfloat16,
        quantized_rows,
        embedding_rows,
        operator_rows,
        gpu_rows,
        three_seeds,
        llava_stf,
        avg_llava,
    ],
}


def test_a_gpu_s_memory_in_training_is_the_logs_() -> None:
    """docs/training.md has other figures, of settings and of arithmetic."""
    text = " ".join(read("docs/training.md").split())
    for name, words in (("lora", "took {:.1f} GB with rank 16"), ("shard", "took {:.1f} GB")):
        last = (RESULTS / f"gpu/{name}_7b.jsonl").read_text().splitlines()[-1]
        assert words.format(json.loads(last)["gpu_memory"]) in text


@pytest.mark.parametrize("page", FIGURES)
def test_figures_are_the_records(page: str) -> None:
    """Each is built from its record and looked for; a figure with a decimal point that no record gave fails.

    It may stand in docs/notes.md alone, which is about trials that left no record.
    """
    text = " ".join(read(page).replace("**", "").replace("*least*", "least").split())
    for figure in (figure for figures in FIGURES[page] for figure in figures()):
        assert figure in text, figure
        text = text.replace(figure, "")
    if page == "docs/notes.md":
        return
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|§[\d.]+|LLaVA-1\.5", "", text)
    assert not re.findall(r"(?<![\w.])\d+\.\d+", re.sub(r"Python [≥\d. ]+|torch [≥\d. ]+", "", text))


def test_the_stages_of_the_embedded_model() -> None:
    stages = re.findall(
        r"^\| `(\w+)` .*\| (\d+) of (\d+) (?:tiles|scenes) \|$", read("weights/README.md"), re.MULTILINE
    )
    assert {stage: int(steps) for stage, steps, _ in stages} == json.loads(read("weights/training/record.json"))[
        "steps"
    ]
    assert {int(batch) for stage, _, batch in stages if stage in ("full", "focus")} == {make.BATCH}


@pytest.mark.parametrize(
    "folder",
    [
        "paper",
        "paper-650-steps",
        "paper-harder-scenes",
        "small",
        *(f"true-size/{name}" for name in TRUE_SIZES),
        *MANY_DEVICES,
    ],
)
def test_generated_pages_name_their_record_s_command(folder: str) -> None:
    """A program may have moved since. The command stays the one that was run at the commit that stands beside it."""
    found = record(f"{folder}/results.json")
    page = read(f"experiments/results/{folder}/README.md")
    assert f"Made by `{found['command']}` at `{found['commit'][:12]}`" in " ".join(page.split())


def test_records_say_how_they_were_made() -> None:
    records = [file for file in RESULTS.rglob("*.json") if "commit" in json.loads(file.read_text())]
    assert {file.name for file in records} >= {"accuracy.json", "compare.json", "end_to_end.json", "operators_cpu.json"}
    for file in records:
        found = json.loads(file.read_text())
        assert not found["dirty"] and found["command"] and found["versions"] and found["machine"], file


def test_no_kernel_spills() -> None:
    assert not any(one["spill_store_bytes"] or one["spill_load_bytes"] for one in record("ptxas.json")["kernels"])


# ---- the records are of what is there ----


def test_the_operators_benchmark() -> None:
    done = python("-m", "experiments.operators", "--quick")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    recorded = record("operators_cpu.json")
    assert [case["operator"] for case in report["cases"]] == [case["operator"] for case in recorded["cases"]]
    assert all(bar["met"] for case in recorded["cases"] for bar in case["bars"].values())


def test_the_recorded_mutants_are_those_of_the_kernels() -> None:
    """Every change that the script makes still applies, and the record is of these: none has survived."""
    from experiments.kernels.mutate import mutants

    found = record("mutants.json")
    assert [(row["file"], row["mutant"]) for row in found["mutants"]] == [mutant[:2] for mutant in mutants()]
    assert {row["outcome"] for row in found["mutants"]} == {"noticed"}
