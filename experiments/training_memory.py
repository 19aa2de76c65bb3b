"""What training takes of a GPU's memory, from the shapes of well-known models: the table of docs/training.md.

python -m experiments.training_memory
python -m experiments.training_memory --tokens 2048 --gpus 1,8,16

Everything is trained by AdamW, in bfloat16 by autocast, one example at a time with --gradient-checkpointing. The models are made
on the meta device. Gathered groups are counted as FSDP2 holds them at its fullest: the weights of two layers, and once more as
they arrive; the gradients of one, and once more as they are sent; weights and gradients of all that is no layer, likewise.
Activations are 34 bytes for each token and channel of a block that keeps them (Korthikanti et al., 2023, without the attention
matrix), and 4 for each input of a block that is run again.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.command_line import expect, expect_numbers
from minifocus.loading.config import load_config
from minifocus.loading.weights import shapes_of, without_values
from minifocus.model import LlavaNetwork

TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWER |= {"image_size": 336, "patch_size": 14}
DECODERS: dict[str, dict[str, int]] = {
    "7B (Vicuna)": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32064},
    "8B (Llama 3)": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 128320,
        "num_key_value_heads": 8,
    },
    "13B (Vicuna)": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "vocab_size": 32064,
        "num_attention_heads": 40,
    },
}
LAYER, BLOCK = "language_model.model.layers.", "vision_tower.encoder.layers."
GB = 1e9


@dataclass(frozen=True)
class Needs:
    """Bytes of one GPU: what stays for the whole run, what is gathered at the fullest, and the activations."""

    lasting: int
    gathered: int
    activations: int

    @property
    def whole(self) -> int:
        return self.lasting + self.gathered + self.activations


def model_of(decoder: dict[str, int]) -> LlavaNetwork:
    """LLaVA-NeXT with a decoder of these shapes, on the meta device."""
    text: dict[str, Any] = {
        "model_type": "llama",
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        **decoder,
    }
    vision: dict[str, Any] = {"model_type": "clip_vision_model", **TOWER}
    members = {"model_type": "llava_next", "image_token_index": 32000, "text_config": text, "vision_config": vision}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(members))
        config = load_config(Path(folder))
    model = without_values(lambda: LlavaNetwork(config))
    assert isinstance(model, LlavaNetwork)
    return model


def count(shapes: Iterable[tuple[int, ...]], processes: int = 1) -> int:
    """Numbers in tensors of these shapes, or in the share of the process that has most: whole rows."""
    total = 0
    for first, *others in shapes:
        rows = -(-first // processes)
        for side in others:
            rows *= side
        total += rows
    return total


def needs(model: LlavaNetwork, processes: int, tokens: int, tiles: int, sharded: bool) -> Needs:
    """What a GPU of so many needs. Without shares each has 16 bytes for every parameter, and autocast's copies."""
    shapes, text, vision = shapes_of(model), model.config.text, model.config.vision
    layer = count(shape for name, shape in shapes.items() if name.startswith(f"{LAYER}0."))
    rest = count(shape for name, shape in shapes.items() if not name.startswith((LAYER, BLOCK)))
    patches = tiles * (1 + (vision.image_size // vision.patch_size) ** 2)
    activations = 34 * patches * vision.hidden_size * max(model.config.feature_layers)
    activations += (34 + 4 * text.num_hidden_layers) * tokens * text.hidden_size
    if not sharded:
        every = count(shapes.values())
        return Needs(16 * every, 2 * every, activations)
    gathered = (3 * 4 + 2 * 4 + 2) * layer + (4 + 2 * 4 + 2) * rest
    return Needs(16 * count(shapes.values(), processes), gathered, activations)


def table(gpus: list[int], tokens: int, tiles: int) -> str:
    """The table in Markdown, in GB."""
    of_gpus = " | ".join("1 GPU" if number == 1 else f"{number} GPUs" for number in gpus)
    lines = [
        f"| decoder | parameters | without `--shard` | {of_gpus} |",
        "|" + "---|" * (3 + len(gpus)),
    ]
    for name, decoder in DECODERS.items():
        model = model_of(decoder)
        parameters = count(shapes_of(model).values())
        plain = needs(model, 1, tokens, tiles, sharded=False).whole
        shared = (needs(model, number, tokens, tiles, sharded=True).whole for number in gpus)
        row = " | ".join(f"{value / GB:.0f}" for value in (plain, *shared))
        lines.append(f"| {name} | {parameters / GB:.1f} billion | {row} |")
    return "\n".join(lines)


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--gpus", default="1,2,4,8", help="numbers of GPUs, with commas (1,2,4,8)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the sequence that a GPU reads at once (4096)")
    parser.add_argument("--tiles", type=int, default=5, help="of its pictures (5)")
    arguments = parser.parse_args()
    words = arguments.gpus.split(",")
    expect(all(re.fullmatch(r"[1-9]\d{0,5}", word) for word in words), arguments, "gpus", "whole numbers with commas")
    expect_numbers(arguments, 1, "tokens")
    expect_numbers(arguments, 0, "tiles")
    print(table([int(word) for word in words], arguments.tokens, arguments.tiles))


if __name__ == "__main__":
    command_line.run(main)
