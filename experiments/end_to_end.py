"""How fast and how large minifocus is beside transformers: prefill, decoding, memory, loading and cold start.

    python -m experiments.end_to_end --out experiments/results/end_to_end.json
    python -m experiments.end_to_end --quick      # a toy model and one round, to test the script
    python -m experiments.end_to_end --folder DIR --device cuda --dtype bfloat16    # a LLaVA-NeXT of yours

One random LLaVA-NeXT (CLIP ViT-L/14-336 as it is; a Llama decoder of 16 layers, 1024 wide, 16 heads over 4 key heads;
552 M parameters) is made with transformers and saved as safetensors. Every side then reads that folder and the same
random 672×672 picture (five tiles, 2928 visual tokens) between 32 random text tokens:

    transformers   LlavaNextForConditionalGeneration, attention "sdpa", logits of the last token only
    none           minifocus without a sampler: the same computation; its greedy tokens must equal transformers'
    vision         the vision-guided sampler with the training-free selector ("variance")
    text           the text-guided sampler as it comes (γ = 0.85 at a quarter of the depth)
    focus          both
    focus_reference  both, their operators in plain PyTorch instead of C++ or CUDA (MINIFOCUS_BACKEND=reference)
    half           the text-guided sampler told to keep half of the tokens that it scores, before layer 0

Each side is one process that lives through all rounds. A round asks one after the other, so that only one computes at a
time and a change in the machine's speed falls on all; figures are medians over rounds, ratios medians of each round's
ratio. A round in which a side had too little of the processors is run again (clocks.py). What is measured:

    prefill          seconds: vision tower, projector, embedding, decoder with its cache, logits of the last token
    decoder_prefill  seconds: the part of it from the decoder on
    decode           seconds per token: greedy steps with the cache
    load             seconds of the load call alone, in a fresh process after its imports, files in the page cache. Both
                     sides map the weights into memory without reading them; a thread of minifocus reads them all once,
                     to refuse NaN and infinity, unless told check_finite=False ("none_unchecked"). What is not read at
                     loading is read during the first prefill ("first_prefill").
    memory           bytes: the process's largest resident set (VmHWM) over import, load, prefill and decoding. Mapped
                     weights count as far as they were read, although the page cache shares them. With `--device cuda`
                     it is torch's peak of allocated device memory.
    cold_start       seconds of a whole fresh process on the CPU: import, load weights/tiny, answer one question

Random weights say nothing about answers, and the share of tokens that `text` and `focus` keep is not that of a trained
model; `half` is there because its share is fixed. Exit status: 0 measured, 1 the sides disagree (in float32, or in the
cold start's answer) or one failed, 2 usage, or --checkpoint is something else.
"""

from __future__ import annotations

from examples import command_line

if __name__ in ("__main__", "__mp_main__"):
    command_line.begin()

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from subprocess import PIPE
from typing import Any

from examples.command_line import Refused, expect_file, expect_numbers, write_text

from .clocks import Spent, read
from .end_to_end_programs import FULL, QUICK, SAMPLERS, THEIRS, Settings, SideFailed, Size, Worker
from .record import ROOT, device_name, environment, relative
from .timing import Rounds, columns, interleaved, ratio, remark

BARS = {"prefill": 1.03, "decode": 1.03, "load": 0.5, "cold_start": 0.5}  # ratios to transformers: at most
HALF_BAR = 1.7  # the decoder's prefill rate with half the visual tokens, ÷ that with all: at least
QUESTION = "What number is on the red card?"

OURS_COLD = """
import sys, minifocus
folder, picture, question, tokens = sys.argv[1:]
model = minifocus.load(folder, sampler="none")
print(model.generate(picture, question, max_new_tokens=int(tokens)).text)
"""
THEIRS_COLD = """
import sys
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
folder, picture, question, tokens = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(ids, skip_special_tokens=True).strip())
"""


def summary(spent: dict[str, list[Spent]]) -> dict[str, Any]:
    """Rounds of every side → its median, and the median of each round's ratio to transformers."""
    seconds = {name: [one.wall for one in rounds] for name, rounds in spent.items()}
    return {
        name: {
            "seconds": median(seconds[name]),
            "ratio_to_transformers": ratio(seconds[name], seconds[THEIRS]),
            **columns(rounds),
        }
        for name, rounds in spent.items()
    }


def prepare_checkpoint(settings: Settings) -> None:
    """Make the folder, or check that the one given is what would be made."""
    folder, recipe = settings.folder, settings.folder / "recipe.json"
    if not recipe.exists():
        if folder.exists() and any(folder.iterdir()):
            raise Refused(f"--checkpoint: {folder} is not empty, and nothing that this script made")
        folder.mkdir(parents=True, exist_ok=True)
        Worker(settings, "checkpoint").answer()
    else:
        try:
            same = json.loads(recipe.read_text(encoding="utf-8")) == json.loads(json.dumps(settings.recipe()))
        except ValueError:
            same = False
        if not same:
            raise Refused(f"--checkpoint: {folder} was made for other sizes, another dtype or another seed")


def describe(settings: Settings) -> dict[str, Any]:
    """What the report says of the model."""
    return settings.recipe() | {
        "bytes": sum(file.stat().st_size for file in settings.folder.glob("*.safetensors")),
        "visual_tokens": settings.size.visual_tokens,
        "new_tokens": settings.new_tokens,
    }


def measure_sides(settings: Settings, rounds: int) -> dict[str, Any]:
    """Prefill, decoding and memory of every side. Raises SideFailed where `none` does not do what transformers does."""
    workers = {name: Worker(settings, name) for name in (THEIRS, *SAMPLERS)}
    first = {}
    for name, worker in workers.items():
        worker.ask("load")
        first[name] = worker.ask("run")["spent"]["prefill"].wall
    asking = {name: lambda _, worker=worker: worker.ask("run") for name, worker in workers.items()}
    timed: Rounds[str, Any] = interleaved(asking, lambda run: run["spent"].values(), rounds, title="round")
    results = timed.results

    tokens = {name: [run["tokens"] for run in results[name]] for name in (THEIRS, "none")}
    same = tokens[THEIRS] == tokens["none"]
    if not same and settings.dtype == "float32":  # in lower precision the likeliest token may differ by rounding
        raise SideFailed(f"the greedy tokens of transformers and minifocus differ: {tokens}")
    times = {
        key: summary({name: [run["spent"][key] for run in runs] for name, runs in results.items()})
        for key in ("prefill", "decoder_prefill", "decode")
    }
    sides: dict[str, Any] = {}
    for name, worker in workers.items():
        sides[name] = {key: figures[name] for key, figures in times.items()} | {
            "decode_tokens_per_second": 1 / times["decode"][name]["seconds"],
            "decoder_prefill_rate_to_none": ratio(
                *(times["decoder_prefill"][side]["rounds"] for side in ("none", name))
            ),
            "first_prefill": {"seconds": first[name]},
            "memory": worker.ask("memory"),
            "visual_tokens_per_layer": results[name][0]["visual"],
            "threads": worker.ask("threads"),
        }
        sides[name]["memory"]["ratio_to_transformers"] = sides[name]["memory"]["peak"] / sides[THEIRS]["memory"]["peak"]
        worker.close()
    return {"same_greedy_tokens": same, "rounds": timed.note(), "sides": sides}


def measure_load(settings: Settings, rounds: int) -> dict[str, Any]:
    """Seconds of the load call alone, each time in a fresh process."""
    calls: dict[str, dict[str, Any]] = {THEIRS: {}, "none": {}, "none_unchecked": {"check_finite": False}}

    def load(name: str) -> Spent:
        worker = Worker(settings, name.removesuffix("_unchecked"))
        worker.ask("threads")  # answered only after its imports, which are not timed
        spent = worker.ask("load", **calls[name])
        worker.close()
        return spent

    loading = {name: lambda _, name=name: load(name) for name in calls}
    timed = interleaved(loading, lambda spent: [spent], rounds, title="load")
    return summary(timed.results) | {"rounds": timed.note()}


def measure_cold_start(folder: Path, picture: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a whole process that imports, loads a small model and answers one question about a picture."""
    if not (folder / "model.safetensors").exists():
        return {"skipped": f"--tiny: there is no model.safetensors in {relative(folder)}"}
    if not picture.exists():
        return {"skipped": f"--picture: there is no {relative(picture)}"}
    programs = {THEIRS: THEIRS_COLD, "none": OURS_COLD}
    answers: dict[str, str] = {}

    def start(name: str) -> Spent:
        command = [sys.executable, "-c", programs[name], str(folder.resolve()), str(picture.resolve()), QUESTION, "32"]
        begun = read(children=True)
        done = command_line.call(command, cwd=ROOT, stdout=PIPE, stderr=PIPE)
        spent = Spent.since(begun)
        if done.returncode:
            raise SideFailed(f"cold start of {name}: status {done.returncode}\n{done.stderr}")
        answers[name] = done.stdout.strip()
        return spent

    starting = {name: lambda _, name=name: start(name) for name in programs}
    timed = interleaved(starting, lambda spent: [spent], rounds, title="cold start")
    same = answers[THEIRS] == answers["none"]
    return summary(timed.results) | {
        "rounds": timed.note(),
        "picture": relative(picture),
        "question": QUESTION,
        "answers": answers,
        "same_answer": same,
    }


def judge(report: dict[str, Any]) -> dict[str, Any]:
    """The bars, and what was reached; None where a figure was not measured."""
    ratios, half = report["ratio_to_transformers"], report["sides"]["half"]["decoder_prefill_rate_to_none"]
    bars: dict[str, Any] = {name: {"value": ratios[name], "at_most": limit} for name, limit in BARS.items()}
    for bar in bars.values():
        bar["met"] = None if bar["value"] is None else bar["value"] <= bar["at_most"]
    return bars | {"half_decoder_prefill_rate": {"value": half, "at_least": HALF_BAR, "met": half >= HALF_BAR}}


def print_table(report: dict[str, Any]) -> None:
    model, sides = report["model"], report["sides"]
    print(
        f"{report['machine']['cpu']}, {sides[THEIRS]['threads']} threads; {model['dtype']} on {report['device']}, "
        f"{model['bytes'] / 1e9:.2f} GB of weights, {model['visual_tokens']} visual tokens\n\n"
        f"{'':16}{'prefill':>9} {'ratio':>6}{'decoder':>10} {'rate':>6}{'decode':>12} {'ratio':>6}{'memory':>11} "
        f"{'ratio':>6}  visual tokens, first and last layer"
    )
    for name, side in sides.items():
        prefill, decode, memory, visual = (
            side[key] for key in ("prefill", "decode", "memory", "visual_tokens_per_layer")
        )
        print(
            f"{name:16}{prefill['seconds']:7.3f} s {prefill['ratio_to_transformers']:6.3f}"
            f"{side['decoder_prefill']['seconds']:8.3f} s {side['decoder_prefill_rate_to_none']:6.2f}"
            f"{side['decode_tokens_per_second']:8.1f} t/s {decode['ratio_to_transformers']:6.3f}"
            f"{memory['peak'] / 1e9:8.2f} GB {memory['ratio_to_transformers']:6.3f}  {visual[0]}, {visual[-1]}"
        )
    print("ratio: time or memory ÷ transformers'; rate: of the decoder's part of prefill ÷ none's\n")
    for part in ("load", "cold_start"):
        if "skipped" in report[part]:
            print(f"{part:11} skipped: {report[part]['skipped']}")
        for name in (THEIRS, "none", "none_unchecked"):
            if name in report[part]:
                own = report[part][name]
                print(f"{part:11} {name:15} {own['seconds']:7.3f} s  ratio {own['ratio_to_transformers']:.3f}")
    if report["cold_start"].get("same_answer") is False:
        print(f"cold_start  THE ANSWERS DIFFER: {report['cold_start']['answers']}")
    if not report["same_greedy_tokens"]:
        print("greedy tokens of transformers and none differ, as rounding in this dtype may make them")
    parts = (report, report["load"], report["cold_start"])
    print(remark(*(part["rounds"] for part in parts if "rounds" in part)))
    print(
        f"focus: prefill with native operators ÷ with plain PyTorch {report['focus_prefill_native_to_reference']:.3f}"
    )
    print("\nbars" + (", which are meant for the full size:" if report["quick"] else ":"))
    for name, bar in report["bars"].items():
        limit = f"at most {bar['at_most']}" if "at_most" in bar else f"at least {bar['at_least']}"
        value = "not measured" if bar["value"] is None else f"{bar['value']:.3f}"
        print(f"  {name:26} {value:>12}  {limit:13} {'' if bar['met'] is None else 'met' if bar['met'] else 'MISSED'}")


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--rounds", type=int, help="of everything (5; quick: 1)")
    parser.add_argument("--load-rounds", type=int, help="of loads and of cold starts, where it is another number")
    parser.add_argument("--new-tokens", type=int, help="greedy steps after each prefill (32; quick: 4)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--checkpoint", type=Path, help="keep the random model in this folder, or use it again")
    parser.add_argument("--folder", type=Path, help="a LLaVA-NeXT that is there, in place of the random model")
    parser.add_argument("--tiny", type=Path, default=ROOT / "weights/tiny", help="the model folder of the cold start")
    parser.add_argument("--picture", type=Path, default=ROOT / "examples/cards.png", help="the cold start's picture")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pixels and text")
    parser.add_argument("--quick", action="store_true", help="a toy model")
    parser.add_argument("--out", type=Path, help="file to write all figures to, as JSON")
    arguments = parser.parse_args()
    for name, full, quick in (("rounds", 5, 1), ("new_tokens", 32, 4)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    for name in ("checkpoint", "quick") if arguments.folder is not None else ():
        if getattr(arguments, name):
            parser.error(f"--{name}: is of the random model, not to be combined with --folder")
    expect_numbers(arguments, 1, "rounds load_rounds new_tokens")
    expect_numbers(arguments, 0, "seed")
    expect_file(arguments.out, "out")
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    given = arguments.folder is not None
    size = Size.of(folder) if given else QUICK if arguments.quick else FULL
    settings = Settings(size, folder, arguments.dtype, arguments.device, arguments.new_tokens, arguments.seed)
    report: dict[str, Any] = {
        "benchmark": "end_to_end",
        "quick": arguments.quick,
        "device": device_name(arguments.device),
    }
    report |= environment(Path(__file__), "torch", "safetensors", THEIRS)
    if not given:
        prepare_checkpoint(settings)
    report["model"] = describe(settings)
    report |= measure_sides(settings, arguments.rounds)
    report["load"] = measure_load(settings, arguments.load_rounds or arguments.rounds)
    report["cold_start"] = measure_cold_start(
        arguments.tiny, arguments.picture, arguments.load_rounds or arguments.rounds
    )
    ours = report["sides"]["none"]
    report["ratio_to_transformers"] = {
        "prefill": ours["prefill"]["ratio_to_transformers"],
        "decode": ours["decode"]["ratio_to_transformers"],
        "load": report["load"]["none"]["ratio_to_transformers"],
        "load_unchecked": report["load"]["none_unchecked"]["ratio_to_transformers"],
        "cold_start": report["cold_start"].get("none", {}).get("ratio_to_transformers"),
        "peak_memory": ours["memory"]["ratio_to_transformers"],
    }
    native, plain = (report["sides"][name]["prefill"]["rounds"] for name in ("focus", "focus_reference"))
    report["focus_prefill_native_to_reference"] = ratio(native, plain)
    return report | {"bars": judge(report)}


@command_line.guarded
def main() -> int:
    arguments = parse_arguments()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            own = arguments.folder or arguments.checkpoint or Path(temporary) / "checkpoint"
            report = measure(arguments, own.resolve())
    except SideFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(report)
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(report) + "\n")
    return 0 if report["cold_start"].get("same_answer", True) else 1


if __name__ == "__main__":
    command_line.run(main)
