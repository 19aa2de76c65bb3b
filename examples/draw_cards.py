"""Write the miniature's pictures and questions in LLaVA's JSON format, as you would your own data.

python examples/draw_cards.py --out runs/cards --count 1000 --seed 0

DIR/cards.json has one record per scene, with all of its questions; DIR/images has its picture, named by the scene's seed.
The same arguments give the same bytes (with the same Pillow, fonts and photographs: pip install '.[cards]').
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import json
import shlex
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

import minifocus
from minifocus import cards
from minifocus.arguments import shown
from minifocus.files.locks import NAME as LOCK
from minifocus.files.locks import hold
from minifocus.files.writing import clear, replace
from minifocus.inputs.conversations import Turn


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="how many scenes, of a picture each")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the split's scene to begin with")
    parser.add_argument("--split", default="train", choices=list(cards.SPLITS))
    parser.add_argument("--dense", action="store_true", help="dense scenes only, instead of every fourth")
    parser.add_argument("--overwrite", action="store_true", help="write into a DIR that is not empty")
    return parser.parse_args()


def check(split: str, count: int, seed: int) -> None:
    """Refuse a first scene that is not in the split, and more scenes than the split has from there on."""
    cards.scenes(split, seed)
    if not 1 <= count <= cards.SPLIT_SIZE - seed:
        raise minifocus.InputError(
            f"count: expected 1 to {cards.SPLIT_SIZE - seed} from scene {seed} on, got {shown(count)}"
        )


def write_json(folder: Path, split: str, count: int, seed: int = 0, dense: bool | None = None) -> int:
    """Write `count` scenes of a split, from its `seed`-th on, and return how many questions they have.

    `dense`: as `cards.scenes` takes it. Files of the same names are replaced, others left alone. Raises InputError where
    the split has no such scenes, where another process writes into `folder` or where it cannot be written.
    """
    check(split, count, seed)
    scenes = cards.scenes(split, seed, dense)
    file, num_questions = folder / "cards.json", 0

    def write(unfinished: Path) -> None:
        nonlocal num_questions
        with unfinished.open("wb") as stream:  # in bytes, so that line ends are the same on every system
            stream.write(b"[\n")
            for number, scene in enumerate(tqdm(islice(scenes, count), total=count, unit="scene", disable=None)):
                image = f"images/{scene.seed:06d}.png"
                replace(folder / image, lambda new, scene=scene: scene.image.save(new, format="PNG"))
                conversation = cards.conversation(scene)
                record = {
                    "id": conversation.id,
                    "image": image,
                    "conversations": [said for turn in conversation.turns for said in exchange(turn)],
                    "families": [turn.family for turn in conversation.turns],
                }
                stream.write((",\n" if number else "").encode() + json.dumps(record).encode())
                num_questions += len(conversation.turns)
            stream.write(b"\n]\n")

    with hold(folder):
        try:
            (folder / "images").mkdir(exist_ok=True)
            file.unlink(
                missing_ok=True
            )  # if this run is cut short, an older file would name the pictures of a newer one
        except OSError as error:
            raise minifocus.InputError(f"{error.filename}: cannot be written: {error.strerror}") from error
        for one in (folder, folder / "images"):
            clear(one)
        replace(file, write)
    return num_questions


def exchange(turn: Turn) -> list[dict[str, Any]]:
    return [{"from": "human", "value": turn.question}, {"from": "gpt", "value": turn.answer}]


def run(arguments: argparse.Namespace) -> None:
    out = arguments.out
    check(arguments.split, arguments.count, arguments.seed)
    with hold(out):
        if not arguments.overwrite and any(one.name != LOCK for one in out.iterdir()):
            raise minifocus.InputError(f"--out: {out} is not empty; --overwrite writes into it all the same")
        questions = write_json(out, arguments.split, arguments.count, arguments.seed, arguments.dense or None)
    file = shlex.quote(str(out / "cards.json"))
    print(f"{file}: {arguments.count} pictures of the {arguments.split} split, {questions} questions")
    if arguments.split == "train":
        print(f"train on it    python examples/train.py --data {file} --out runs/trained")
    print(f"evaluate on it python examples/evaluate.py --data {file}")


@command_line.guarded
def main() -> None:
    run(parse_arguments())


if __name__ == "__main__":
    command_line.run(main)
