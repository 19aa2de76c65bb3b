"""What weights in int8 and int4 cost and save: time, memory, error of the logits, and answers of the miniature.

    python -m experiments.quantized --out experiments/results/quantized.json
    python -m experiments.quantized --quick      # a toy model and few questions, to test the script

A random LLaVA-NeXT with a decoder of 8 layers, 2048 wide (492 M parameters with embeddings and head) is made with
transformers in bfloat16, and written anew by examples/quantize.py:

    write    seconds and the largest resident set of that command, and the folder's bytes
    load     seconds of `minifocus.load`, and the process's own memory (not mapped files) after it and after an answer
    prefill  seconds for prompts of text: the decoder with its cache, and the head for the last token
    decode   seconds per token after the longest prompt: the decoder and its head

Both times are ratios to bfloat16's, medians over interleaved rounds in one process. Random weights are harder on logits than
trained ones. The error is that of the last 256 tokens of a prompt, beside the same weights in float32: root mean square as a
share of the logits' standard deviation, and for how many tokens the likeliest next one is the same. With --decoder, a folder of
`make small`, the same for a trained decoder of 135 M and this repository's README as the text.

The miniature answers its test questions in float32, bfloat16, int8 and int4, greedily and without samplers.
"""

from __future__ import annotations

from examples import command_line

if __name__ in ("__main__", "__mp_main__"):
    command_line.begin()

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import minifocus
from examples.command_line import Failed, expect_file, expect_numbers, write_text
from minifocus import cards
from minifocus.evaluate import wilson
from minifocus.llama import LayerCache
from minifocus.quantized import NAMES

from .clocks import Spent, read
from .end_to_end_programs import QUICK, Settings, Size, Worker
from .record import ROOT, environment
from .timing import columns, interleaved, ratio

KINDS = ("bfloat16", *NAMES)
BARS = {"decode": {"int8": 0.55, "int4": 0.35}, "prefill": {"int8": 1.15, "int4": 1.15}}  # ratios to bfloat16: at most
SAME_ANSWERS, POINT = (
    0.99,
    0.01,
)  # int8's greedy answers that are bfloat16's: at least; accuracy that int4 loses: at most
FULL = Size(
    vision=QUICK.vision,
    text=dict(
        vocab_size=32064, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    words=32,
)  # fmt: skip
TOY = Size(QUICK.vision, QUICK.text | dict(hidden_size=128, intermediate_size=192), QUICK.words)
LOADED = """
import json, sys, time
from pathlib import Path
import torch, minifocus
def own():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
before, begun = own(), time.perf_counter()
model = minifocus.load(sys.argv[1], "none")
seconds, loaded = time.perf_counter() - begun, own() - before
with torch.inference_mode():
    for length in (200, 1):
        model(torch.full((1, length), 9))
print(json.dumps({"seconds": seconds, "own_memory": loaded, "own_memory_after_use": own() - before}))
"""


class Sides:
    """The same decoder with weights of each kind, and what each is timed for."""

    def __init__(self, folders: dict[str, Path], vocabulary: int):
        self.models = {kind: minifocus.load(folder, "none") for kind, folder in folders.items()}
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(4, vocabulary, (1, 4096), generator=generator)  # after the placeholder's id

    @torch.inference_mode()
    def run(self, kind: str, length: int, tokens: int) -> dict[str, Spent]:
        """Read a prompt of `length` tokens, then `tokens` more one by one. → what the prompt took, and a token of these"""
        model = self.models[kind]
        decoder, head = model.language_model.model, model.language_model.lm_head
        rows, visual = model.embed(self.ids[:, :length], [])
        caches = [LayerCache() for _ in range(model.config.text.num_hidden_layers)]
        begun = read()
        head(model.prefill(rows, visual, caches, last=1).rows.hidden[:, -1])
        prefill, begun = Spent.since(begun, torch.get_num_threads()), read()
        for place in range(length, length + tokens):
            head(decoder.decode(self.ids[:, place], torch.tensor([place]), caches))
        return {"prefill": prefill} | ({"decode": Spent.since(begun, calls=tokens)} if tokens else {})

    def times(self, lengths: list[int], tokens: int, rounds: int) -> tuple[dict[str, Any], dict[str, int]]:
        runs = {
            (kind, length): lambda _, kind=kind, length=length: self.run(
                kind, length, tokens if length == lengths[-1] else 0
            )
            for length in lengths
            for kind in self.models
        }
        timed = interleaved(runs, lambda one: one.values(), rounds, warm_up=1, title="round")
        found = timed.results
        spent = {
            f"prefill_{length}": {kind: [one["prefill"] for one in found[kind, length]] for kind in self.models}
            for length in lengths
        }
        spent["decode"] = {kind: [one["decode"] for one in found[kind, lengths[-1]]] for kind in self.models}

        def to_bfloat16(of: list[Spent], by_kind: dict[str, list[Spent]]) -> float:
            return ratio([one.wall for one in of], [one.wall for one in by_kind["bfloat16"]])

        times = {
            what: {kind: {"ratio_to_bfloat16": to_bfloat16(of, by_kind), **columns(of)} for kind, of in by_kind.items()}
            for what, by_kind in spent.items()
        }
        return times, timed.note()


def logit_errors(folders: dict[str, Path], ids: torch.Tensor) -> dict[str, Any]:
    """Of the last 256 tokens' logits, beside the bfloat16 folder's weights in float32. ids [1, S]"""

    @torch.inference_mode()
    def logits(folder: Path, dtype: str | None) -> torch.Tensor:
        model = minifocus.load(folder, "none", dtype=dtype)
        rows, visual = model.embed(ids, [])
        return model.language_model.lm_head(model.prefill(rows, visual).rows.hidden[0, -256:]).float()

    exact = logits(folders["bfloat16"], "float32")
    errors = {}
    for kind, folder in folders.items():
        found = logits(folder, kind if kind in NAMES else "bfloat16")
        errors[kind] = {
            "rms_by_deviation": float((found - exact).pow(2).mean().sqrt() / exact.std()),
            "same_likeliest": float((found.argmax(-1) == exact.argmax(-1)).float().mean()),
        }
    return errors


def write(model: Path, kind: str, out: Path) -> dict[str, Any]:
    """What examples/quantize.py takes."""
    command = [sys.executable, "examples/quantize.py", str(model), "--weights", kind, "--out", str(out)]
    begun = time.perf_counter()
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(program.pid, 0)
    if status:
        raise Failed(f"examples/quantize.py ended with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": time.perf_counter() - begun, "peak_memory": usage.ru_maxrss * 1024}


def loaded(folder: Path) -> dict[str, Any]:
    done = command_line.call([sys.executable, "-c", LOADED, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    if done.returncode:
        raise Failed(f"loading {folder.name} ended with {done.returncode}")
    return json.loads(done.stdout) | {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def answers(model: Path, count: int, batch: int) -> dict[str, Any]:
    """The miniature's answers to the test split's questions, by kind of weights."""
    asked = list(cards.questions("test", count))
    given: dict[str, list[str]] = {}
    for kind in ("float32", *KINDS):
        own = minifocus.load(model, "none", dtype=kind)
        given[kind] = []
        for begin in range(0, len(asked), batch):
            images, texts, _, _ = zip(*asked[begin : begin + batch], strict=True)
            given[kind] += [answer.text for answer in own.generate_batch(images, texts, max_new_tokens=16)]
    found: dict[str, Any] = {"count": len(asked)}
    for kind, texts in given.items():
        right = sum(text == one[2] for text, one in zip(texts, asked, strict=True))
        found[kind] = {
            "accuracy": right / len(asked),
            "interval_95": wilson(right, len(asked)),
            **{
                f"same_as_{other}": sum(a == b for a, b in zip(texts, given[other], strict=True)) / len(asked)
                for other in ("float32", "bfloat16")
            },
        }
    return found


def judge(report: dict[str, Any]) -> dict[str, Any]:
    """The bars, and what was reached."""
    times, asked = report["times"], report["answers"]
    longest = max((name for name in times if name.startswith("prefill")), key=lambda name: int(name.split("_")[1]))
    found = {
        f"{what} {kind}": {
            "at most": bar,
            "reached": times[longest if what == "prefill" else what][kind]["ratio_to_bfloat16"],
        }
        for what, bars in BARS.items()
        for kind, bar in bars.items()
    }
    found["answers int8"] = {"at least": SAME_ANSWERS, "reached": asked["int8"]["same_as_bfloat16"]}
    lost = asked["bfloat16"]["accuracy"] - asked["int4"]["accuracy"]
    found["accuracy lost int4"] = {"at most": POINT, "reached": lost}
    for bar in found.values():
        bar["met"] = bar["reached"] <= bar["at most"] if "at most" in bar else bar["reached"] >= bar["at least"]
    return found


def run(arguments: Any) -> dict[str, Any]:
    size, lengths = (TOY, [32, 200]) if arguments.quick else (FULL, [64, 256, 704])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folders = {kind: Path(place) / kind for kind in KINDS}
        Worker(Settings(size, folders["bfloat16"], "bfloat16", "cpu", 0, 0), "checkpoint").answer()
        written = {kind: write(folders["bfloat16"], kind, folders[kind]) for kind in NAMES}
        report: dict[str, Any] = {
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "write": written,
            "load": {kind: loaded(folder) for kind, folder in folders.items()},
        }
        sides = Sides(folders, size.text["vocab_size"])
        report["parameters"] = sum(value.numel() for value in sides.models["bfloat16"].language_model.parameters())
        report["times"], report["rounds"] = sides.times(lengths, arguments.tokens, arguments.rounds)
        report["logits"] = {"random": logit_errors(folders, sides.ids[:, :320])}
        del sides
    if arguments.decoder is not None:
        tokenizer = minifocus.load(arguments.decoder, "none", check_finite=False).tokenizer
        assert tokenizer is not None  # make small writes one
        ids = torch.tensor([tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8")).ids[:320]])
        report["logits"]["trained"] = logit_errors(dict.fromkeys(KINDS, arguments.decoder), ids)
    report["answers"] = answers(ROOT / "weights/tiny", 8 if arguments.quick else arguments.count, 16)
    return report | {"bars": judge(report)}


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16, help="that are decoded in a round")
    parser.add_argument("--count", type=int, default=1000, help="questions for the miniature")
    parser.add_argument("--decoder", type=Path, help="a folder of `make small`, for the logits of a trained decoder")
    parser.add_argument("--folder", help="where the random models are written for the time being: 2 GB")
    parser.add_argument("--quick", action="store_true", help="a toy model and few questions")
    parser.add_argument("--out", type=Path, help="file to write all figures to, as JSON")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "rounds tokens count")
    expect_file(arguments.out, "out")
    record = environment(Path(__file__), "torch", "transformers", "safetensors") | run(arguments)
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    command_line.run(main)
