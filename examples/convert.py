"""Turn a folder as the original LLaVA repository writes it into one that every program here takes as --model.

python examples/convert.py llava-v1.5-7b --out llava-1.5 --vision-tower clip-vit-large-patch14-336
python examples/convert.py AVG-LLaVA --out avg-llava                    # its weights have the vision tower

It takes LLaVA-1.5, LLaVA-1.6 (NeXT), AVG-LLaVA and LLaVA-STF: docs/checkpoints.md says more.
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse

from minifocus.original_llava import TEMPLATES, convert


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("original", metavar="ORIGINAL", help="the folder to read")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--vision-tower", metavar="DIR", help="a folder of the CLIP model that config.json calls mm_vision_tower"
    )
    parser.add_argument("--template", choices=TEMPLATES, help="of the conversations that it was trained with")
    return parser.parse_args()


@command_line.guarded
def main() -> None:
    arguments = parse_arguments()
    words = convert(arguments.original, arguments.out, arguments.vision_tower, arguments.template)
    print(f"{arguments.out}: {words}")


if __name__ == "__main__":
    command_line.run(main)
