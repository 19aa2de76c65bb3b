"""Write a model's folder anew with the decoder's weights in int8 or int4: a half or a quarter of its size in bfloat16.

python examples/quantize.py llava-1.5-7b --weights int8 --out llava-1.5-7b-int8
python examples/generate.py --model llava-1.5-7b-int8 --image photo.jpg --prompt "What does the sign say?" --sampler text

It takes the memory of the new model, as weights are read one by one. docs/checkpoints.md says what becomes of which part.
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
from pathlib import Path

from command_line import Refused, expect
from tqdm import tqdm

import minifocus
from minifocus.files.reading import present, read_bytes
from minifocus.loading.model_folder import LEARNED
from minifocus.quantized import NAMES


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="the folder to read, in Hugging Face's layout")
    parser.add_argument("--weights", required=True, choices=NAMES)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """What can be told before a model is loaded."""
    expect(bool(arguments.out), arguments, "out", "the name of a folder")
    if Path(arguments.out).resolve() == Path(arguments.model).resolve():
        raise Refused("--out: expected another folder than the model's own, whose weights would be lost")


@command_line.guarded
def main() -> None:
    arguments = parse_arguments()
    check(arguments)
    with tqdm(desc="reading", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model = minifocus.load(arguments.model, "none", dtype=arguments.weights, progress=progress)
    model.save(arguments.out)
    for file in (Path(arguments.model) / name for name in LEARNED):
        if present(file):  # what a sampler has learned stays as it is
            (Path(arguments.out) / file.name).write_bytes(read_bytes(file))
    print(f"{arguments.out}: weights in {model.config.quantized}")


if __name__ == "__main__":
    command_line.run(main)
