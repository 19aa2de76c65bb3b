"""Write a package from which a C++ program answers questions about pictures, without Python: see docs/embedding.md.

python examples/export.py weights/tiny --out runs/package
python examples/export.py llava-1.5-7b --out llava-package --dtype bfloat16 --sampler text

It compiles the model's parts (a minute on two cores, and as long for a large model as for a small one), runs each beside the
model on real pictures, and writes the folder only if they agree. It needs a C++ compiler.
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
from pathlib import Path

from command_line import expect
from sampler_options import add_option, read_options

import minifocus
from minifocus.export.compiling import LEVELS
from minifocus.export.package import export
from minifocus.inputs.open_image import open_image

ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = ("none", "text", "vision", "focus")


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="the folder to read, in Hugging Face's layout")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the package to write")
    parser.add_argument(
        "--sampler",
        default="focus",
        choices=SAMPLERS,
        help="what answers are made with, unless the program asks for another that is in the package: with focus all are",
    )
    dtypes = ("float32", "bfloat16", "float16", "int8", "int4")
    parser.add_argument("--dtype", choices=dtypes, help="default: the checkpoint's")
    parser.add_argument("--cpu", choices=list(LEVELS), help="for processors like this; default: this machine's own")
    parser.add_argument("--image", action="append", help="pictures to check with; default: two of this repository's")
    add_option(parser.add_argument_group("sampler"))
    return parser.parse_args()


@command_line.guarded
def main() -> None:
    arguments = parse_arguments()
    expect(bool(arguments.out), arguments, "out", "the name of a folder")
    pictures = arguments.image or [str(ROOT / "examples" / name) for name in ("cards.png", "granularities.png")]
    for picture in pictures:
        open_image(picture)  # rather refused now than after a minute
    model = minifocus.load(arguments.model, arguments.sampler, dtype=arguments.dtype, **read_options(arguments.option))
    export(model, arguments.sampler, Path(arguments.out), pictures, arguments.cpu, lambda step: print(step, flush=True))
    print(f"{arguments.out}: answers with {arguments.sampler}")


if __name__ == "__main__":
    command_line.run(main)
