"""Write the miniature's pictures and questions as a folder in LLaVA's JSON format, as data of your own would be.

python examples/draw_cards.py --out runs/cards --count 1000 --seed 0

DIR/cards.json has one record per scene, with all of its questions; DIR/images has its picture, named by the scene's seed.
The same arguments give the same bytes (with the same Pillow: it compresses the pictures).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

import minifocus
from minifocus import cards
from minifocus.conversations import Turn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="how many scenes, of a picture each")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the split's scene to begin with")
    parser.add_argument("--split", default="train", choices=list(cards.SPLITS))
    parser.add_argument("--dense", action="store_true", help="dense scenes only, instead of every fourth")
    parser.add_argument("--overwrite", action="store_true", help="write into a DIR that is not empty")
    return parser.parse_args()


def write_json(folder: Path, split: str, count: int, seed: int = 0, dense: bool | None = None) -> int:
    """Write `count` scenes of a split, from its `seed`-th on, and return how many questions they have.

    `dense`: as `cards.scenes` takes it. Files of the same names are replaced, others left alone. Raises InputError where
    the split has no such scenes, and OSError where `folder` cannot be written.
    """
    scenes = cards.scenes(split, seed, dense)
    if not 1 <= count <= cards.SPLIT_SIZE - seed:
        raise minifocus.InputError(f"count: expected 1 to {cards.SPLIT_SIZE - seed} from scene {seed} on, got {count}")
    file = folder / "cards.json"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # if this run is cut short, an older file would name the pictures of a newer one
    lines, num_questions = [], 0
    for scene in tqdm(islice(scenes, count), total=count, unit="scene", disable=None):
        image = f"images/{scene.seed:06d}.png"
        scene.image.save(folder / image)
        conversation = cards.conversation(scene)
        record = {
            "id": conversation.id,
            "image": image,
            "conversations": [said for turn in conversation.turns for said in exchange(turn)],
            "families": [turn.family for turn in conversation.turns],
        }
        lines.append(json.dumps(record))
        num_questions += len(conversation.turns)
    file.write_bytes(("[\n" + ",\n".join(lines) + "\n]\n").encode())  # as bytes: line ends are alike on every system
    return num_questions


def exchange(turn: Turn) -> list[dict[str, Any]]:
    return [{"from": "human", "value": turn.question}, {"from": "gpt", "value": turn.answer}]


def run(arguments: argparse.Namespace) -> None:
    out = arguments.out
    try:
        if out.is_dir() and any(out.iterdir()) and not arguments.overwrite:
            raise minifocus.InputError(f"--out: {out} is not empty; --overwrite writes into it all the same")
        questions = write_json(out, arguments.split, arguments.count, arguments.seed, arguments.dense or None)
    except OSError as error:
        raise minifocus.InputError(f"--out: {out}: {error}") from error
    file = shlex.quote(str(out / "cards.json"))
    print(f"{file}: {arguments.count} pictures of the {arguments.split} split, {questions} questions")
    if arguments.split == "train":
        print(f"train on it    python examples/train.py --data {file} --out runs/trained")
    print(f"evaluate on it python examples/evaluate.py --data {file}")


def main() -> int:
    try:
        run(parse_arguments())
    except minifocus.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
