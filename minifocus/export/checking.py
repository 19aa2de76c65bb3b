"""Whether compiled parts compute what the model does: every part is run on what a real question gives it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import InputError
from ..inputs.processor import Picture
from ..llama import rope_tables
from ..load import Llava
from .parts import LAYERS, Part

QUESTION = "What is in the picture?"
# The largest difference, in deviations of the exact values.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


class _Pair:
    """A part, and what it was compiled to; called, it compares the two, and hands on what the part gives."""

    def __init__(self, name: str, part: Part, taken: list[str], folder: Path, dtype: torch.dtype):
        self.name, self.part, self.tolerance = name, part, TOLERANCE[dtype]
        self.names = taken
        self.runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / f"{name}.so"), 1)

    def __call__(self, weights: Mapping[str, torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
        given = {name: weights[name] for name in self.names}
        copies = [one.clone() for one in inputs]  # a step writes into its keys and values
        exact = self.part.call(given, inputs)
        exact = [exact] if isinstance(exact, torch.Tensor) else list(exact)
        found = self.runner.run([*given.values(), *copies])
        pairs = [*zip(exact, found, strict=True), *zip(inputs, copies, strict=True)]
        for expected, got in pairs:
            if got.shape != expected.shape or not self._close(expected, got):
                raise InputError(
                    f"{self.name}: compiled, it does not compute what the model does: expected {list(expected.shape)} within "
                    f"{self.tolerance} deviations, got {list(got.shape)} off by {self._error(expected, got):.3g}"
                )
        return exact

    def _close(self, expected: torch.Tensor, got: torch.Tensor) -> bool:
        if not expected.is_floating_point():
            return torch.equal(expected, got)
        return self._error(expected, got) <= self.tolerance

    @staticmethod
    def _error(expected: torch.Tensor, got: torch.Tensor) -> float:
        if got.shape != expected.shape or not expected.numel():
            return float("nan") if got.shape != expected.shape else 0.0
        deviation = float(expected.double().std(correction=0)) or 1.0
        return float((expected.double() - got.double()).abs().max()) / deviation


def check_parts(
    model: Llava, parts: Mapping[str, Part], taken: Mapping[str, list[str]], folder: Path, pictures: list[Picture]
) -> None:
    """Ask about each picture, with and without dropped tokens. Raises InputError for a part that is wrong."""
    pairs = {name: _Pair(name, part, taken[name], folder, model.dtype) for name, part in parts.items()}
    state, text = dict(model.state_dict()), model.config.text

    def weights(name: str, layer: int = 0) -> dict[str, torch.Tensor]:
        prefix = parts[name].prefix + (f"{layer}." if parts[name].prefix == LAYERS else "")
        return {one: state[prefix + one] for one in taken[name]}

    for picture in pictures:
        inputs = model.processor(picture, QUESTION)
        pairs["picture"](weights("picture"), inputs.tiles[0].to(model.dtype))
        features = model.encode_pictures(inputs.tiles, inputs.sizes, model.before_llm)
        if "regions" in pairs and features[0].map.numel():
            pairs["regions"](weights("regions"), features[0].map.contiguous(), features[0].thumbnail.contiguous())
        rows, _ = model.embed(
            inputs.input_ids[None], features, None, inputs.instruction[None], before_llm=model.before_llm
        )
        x, depth = rows.hidden, text.num_hidden_layers
        cos, sin = rope_tables(text.rope, text.head_dim, rows.positions, x.dtype)
        next_cos, next_sin = rope_tables(text.rope, text.head_dim, rows.positions[:, -1:] + 1, x.dtype)
        one_more = model.language_model.model.embed_tokens(inputs.input_ids[None, -1:])
        for layer in range(depth):
            if "score" in pairs:
                words, tokens = rows.instruction[0].nonzero()[:, 0], rows.pictures()[0][1]
                pairs["score"](weights("score", layer), x, words, tokens, rows.positions[0])
            name = "last" if layer == depth - 1 else "layer"
            x, k, v = pairs[name](weights(name, layer), x, cos, sin)
            k, v = (torch.cat([one, torch.zeros_like(one[:1])]) for one in (k, v))
            one_more = pairs["step"](weights("step", layer), one_more, next_cos, next_sin, k, v)[0]
        for hidden in (x, one_more):
            pairs["head"](weights("head"), hidden)
