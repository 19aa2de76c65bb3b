"""Ask a LLaVA-1.5 or LLaVA-NeXT model a question about a picture, with FocusLLaVA's samplers at work.

python examples/generate.py                                   # the embedded model and picture
python examples/generate.py --model DIR --image photo.jpg --prompt "What is written on the sign?"
python examples/generate.py --prompt "How many circles are there?" --prompt "Is there a pink card?" --figure answers.png
python examples/generate.py --file questions.jsonl --out answers.jsonl                   # many questions, in batches
torchrun --nproc-per-node 8 examples/generate.py --file … --out … --device cuda --model DIR     # by eight GPUs
torchrun --nproc-per-node 2 examples/generate.py --tensor-parallel      # two processes share the decoder
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import batch_questions
import torch
from command_line import Failed, expect, expect_file, expect_text
from PIL import Image
from sampler_options import add_sampler_options, sampler_options
from tqdm import tqdm

import minifocus
from minifocus.cpu_memory import give_back_freed_memory
from minifocus.distributed.processes import Process, joined
from minifocus.generation_options import Options
from minifocus.inputs.open_image import open_image
from minifocus.inputs.prompt import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", default=str(ROOT / "weights/tiny"), help="folder in Hugging Face's layout")
    parser.add_argument("--image", action="append", help="picture; several for several <image> places in the prompt")
    parser.add_argument("--prompt", action="append", help="the question; several are asked one after the other")
    parser.add_argument("--template", choices=list(TEMPLATES), help="default: the model's")
    add_sampler_options(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="float32, bfloat16, float16, int8 or int4; default: the checkpoint's")
    parser.add_argument(
        "--tensor-parallel", action="store_true", help="the processes that torchrun started share the decoder"
    )
    parser.add_argument("--max-new-tokens", type=int, help="default: what generation_config.json says, or else 256")
    parser.add_argument(
        "--min-new-tokens", type=int, help="default of this and the next two: what generation_config.json says"
    )
    parser.add_argument("--repetition-penalty", type=float, help="of what was said or asked already; 1: none")
    parser.add_argument("--no-repeat-ngram-size", type=int, help="say no so many tokens in a row twice; 0: any")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", action="store_true", help="print a JSON object per question instead of text")
    parser.add_argument("--figure", help="write a PNG: the scale of each region, the importance of each kept token")
    batch_questions.add_options(parser)
    return parser.parse_args()


def load_model(arguments: argparse.Namespace) -> minifocus.Llava:
    """Load with a progress bar, of the first process, on a terminal only."""
    options, load = sampler_options(arguments), minifocus.load
    if arguments.tensor_parallel:
        from minifocus.distributed.tensor_parallel import load
    hidden = True if Process.current().rank else None
    with tqdm(desc="loading", unit="B", unit_scale=True, leave=False, disable=hidden) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return load(arguments.model, arguments.sampler, arguments.device, arguments.dtype, progress=progress, **options)


def report(arguments: argparse.Namespace, prompt: str, answer: minifocus.Answer) -> dict[str, Any]:
    """What --json prints."""
    return {
        "prompt": prompt,
        "images": arguments.image,
        "answer": answer.text,
        "token_ids": answer.token_ids,
        "finish": answer.finish,
        "sampler": arguments.sampler,
        "visual_tokens": vars(answer.tokens),
        "seconds": {"prefill": round(answer.prefill_seconds, 4), "decode": round(answer.decode_seconds, 4)},
    }


def print_accounts(answer: minifocus.Answer) -> None:
    tokens, seconds = answer.tokens, answer.decode_seconds
    print(
        f"\nvisual tokens  {tokens.full} in the picture, {tokens.after_vision} enter the language model, "
        f"{tokens.after_text} reach its last layer; equivalent to {tokens.equivalent:.1%}"
    )
    rate = f" ({len(answer.token_ids) / seconds:.0f} tokens/s)" if seconds else ""
    print(f"time           {answer.prefill_seconds:.3f} s to read, {seconds:.3f} s to answer{rate}")


def ask(
    model: minifocus.Llava, pictures: list[Image.Image], prompt: str, arguments: argparse.Namespace
) -> minifocus.Answer:
    """One question, answered as the text is made."""
    stream = model.stream(pictures, prompt, **generation_options(arguments))
    if not arguments.json:
        print(f"question  {prompt}\nanswer    ", end="", flush=True)
    for piece in stream:
        if not arguments.json:
            print(piece, end="", flush=True)
    assert stream.answer is not None  # the stream has ended
    if arguments.json:
        print(json.dumps(report(arguments, prompt, stream.answer)))
    else:
        print_accounts(stream.answer)
    return stream.answer


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "min_new_tokens", "temperature", "top_p", "seed", "template")
    names += ("repetition_penalty", "no_repeat_ngram_size")
    return {name: getattr(arguments, name) for name in names}


def check(arguments: argparse.Namespace) -> None:
    """What can be told before a model is loaded. The question and the picture of a call without any are filled in."""
    by_torchrun = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    expect(by_torchrun or not arguments.tensor_parallel, arguments, "tensor_parallel", "to be started by torchrun")
    batch_questions.check(arguments)
    if arguments.file is None:
        arguments.image = arguments.image or [str(ROOT / "examples/cards.png")]
        arguments.prompt = arguments.prompt or ["What number is on the red card?"]
    expect_text(arguments, "prompt")
    expect(all(arguments.image or []), arguments, "image", "the names of pictures")
    Options(**generation_options(arguments))
    if arguments.figure is not None:
        kind = Image.registered_extensions().get(Path(arguments.figure).suffix.lower())
        expect(kind in Image.SAVE, arguments, "figure", "the name of a picture, such as a.png")
        expect_file(arguments.figure, "figure", parents=False)


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    give_back_freed_memory()
    if arguments.file is not None:
        with joined(torch.device("cpu")) as process:
            wrong = batch_questions.run(process, arguments, load_model, generation_options(arguments))
        if wrong is not None:
            raise Failed(wrong)
        return
    if not arguments.tensor_parallel:
        answer(arguments)
        return
    from minifocus.distributed.tensor_parallel import device_of_process

    with joined(device_of_process(arguments.device), even_alone=True) as process:
        others = contextlib.redirect_stdout(None) if process.rank else contextlib.nullcontext()
        with others:
            answer(arguments)


def answer(arguments: argparse.Namespace) -> None:
    """The questions of the command line. Of processes that share a decoder all are needed, and the first prints."""
    pictures = [open_image(file) for file in arguments.image]
    model = load_model(arguments)
    asked = [(prompt, ask(model, pictures, prompt, arguments)) for prompt in arguments.prompt]
    if arguments.figure and not Process.current().rank:
        from minifocus.figure import draw_answers

        try:
            draw_answers(pictures, asked, model.image_processor).save(arguments.figure)
        except (OSError, ValueError) as error:
            raise minifocus.InputError(f"--figure: {arguments.figure}: {error}") from error
        if not arguments.json:
            print(f"figure         {arguments.figure}")


@command_line.guarded
def main() -> None:
    run(parse_arguments())


if __name__ == "__main__":
    command_line.run(main)
