"""Merge what a run with LoRA has learned into the model that it began from, for every program that takes --model.

python examples/merge_lora.py --model DIR --adapter runs/lora/adapter --out merged

It takes adapters that PEFT wrote for the same model, too: LoRA without its variants.
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
from pathlib import Path

from minifocus.training.adapter_file import merged_model


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="the folder that the run began from")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the folder with adapter_config.json")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write, in the model's dtype")
    return parser.parse_args()


@command_line.guarded
def main() -> None:
    arguments = parse_arguments()
    merged_model(Path(arguments.model), Path(arguments.adapter)).save(arguments.out)
    print(f"{arguments.out}: {arguments.model} with {arguments.adapter}")


if __name__ == "__main__":
    command_line.run(main)
