"""Importance (Eq. 8) before every layer of the decoder, on photographs: its maps, and how concentrated they are.

Nothing is removed, so that all tokens reach every layer: what γ = 1 gives, for all layers in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import minifocus
from minifocus.inputs.token_layout import Layout
from minifocus.llama import DecoderLayer
from minifocus.rows import Rows
from minifocus.samplers.hooks import Context
from minifocus.samplers.text_guided import TextGuidedOptions, TextGuidedSampler

from .photographs import Asked

DRAWN = 8  # layers
TOP = 0.1  # of the tokens, whose share of the importance is given


@dataclass
class Recorder:
    """An inside-LLM sampler that scores before every layer and removes nothing.

    scores  per layer, [n] float32 for a row's n visual tokens, NaN for newlines
    """

    samplers: list[TextGuidedSampler]
    scores: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, index: int, layer: DecoderLayer, rows: Rows, context: Context) -> None:
        found = self.samplers[index](index, layer, rows, context)
        assert found is not None
        self.scores.append(found.scores[0][(rows.picture[0] >= 0) & rows.valid[0]].cpu())


def importance_by_layer(model: minifocus.Llava, asked: Asked) -> tuple[torch.Tensor, Layout]:
    """[L, n] importance of the n uncompressed tokens before each of L layers, NaN for newlines; and where each token is."""
    depth, text = model.config.text.num_hidden_layers, model.config.text
    recorder = Recorder([TextGuidedSampler(TextGuidedOptions(gamma=1.0, layer=i), text) for i in range(depth)])
    model.set_sampler("none")
    model.inside_llm = recorder
    try:
        answer = model.generate(*asked, max_new_tokens=1)
    finally:
        model.set_sampler("none")
    return torch.stack(recorder.scores), answer.pictures[0].layout


def concentration(scores: torch.Tensor) -> dict[str, float]:
    """Of importance [n] without NaN: entropy ÷ log n (1: all alike), and the share of the TOP most important tokens."""
    share = scores / scores.sum()
    entropy = -(share * share.clamp(min=1e-30).log()).sum() / math.log(len(share))
    top = share.sort(descending=True).values[: max(round(TOP * len(share)), 1)].sum()
    return {"entropy": float(entropy), "top": float(top)}


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, of values among which ties are rare."""
    ranks = torch.stack([one.argsort().argsort().double() for one in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def on_the_map(scores: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[n] of all tokens → [H, W]."""
    places = layout.of_cells(torch.arange(layout.height * layout.width))
    return scores[places].view(layout.height, layout.width)


class Saliency:
    """The package's own network, whose backbone the tower is: which pixels of a picture of 224 × 224 are salient."""

    def __init__(self, model: bytes):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, model: minifocus.Llava, image: Any, layout: Layout) -> torch.Tensor:
        """[H, W]: that of the model's view of the whole picture, resized to the picture's map."""
        tiles, _ = model.image_processor(image)
        whole = tiles.reshape(-1, *tiles.shape[-3:])[:1].float()
        (found,) = self.session.run(["output_importance"], {"input_image": whole.numpy()})
        saliency = torch.from_numpy(found).reshape(1, 1, *whole.shape[-2:])
        return F.adaptive_avg_pool2d(saliency, (layout.height, layout.width))[0, 0]


def measure_importance(
    model: minifocus.Llava, asked: list[Asked], saliency: Saliency | None, file: Path
) -> dict[str, Any]:
    """Draws the maps to `file`. → per layer, the mean over photographs:

    entropy, top  see `concentration`; of the thumbnail's tokens and the map's
    saliency      rank correlation of the map's importance with the package's saliency; absent without it
    thumbnail     the share of the importance that is the thumbnail's, beside `thumbnail_tokens`, its share of the tokens
    """
    shown, figures = [], []
    for one in asked:
        scores, layout = importance_by_layer(model, one)
        scored = ~scores[0].isnan()
        salient = None if saliency is None else saliency(model, one[0], layout)
        own = []
        for layer in scores:
            found = concentration(layer[scored])
            found["thumbnail"] = float(layer[: layout.leading].sum() / layer[scored].sum())
            if salient is not None:
                found["saliency"] = rank_correlation(on_the_map(layer, layout).flatten(), salient.flatten())
            own.append(found)
        figures.append(own)
        shown.append((one, torch.stack([on_the_map(layer, layout) for layer in scores])))
    draw(shown, file)
    layers = [{name: fmean(one[name] for one in same) for name in same[0]} for same in zip(*figures, strict=True)]
    return {
        "photographs": len(asked),
        "thumbnail_tokens": layout.leading / int(scored.sum()),
        "drawn": drawn_layers(len(layers)),
        "layers": layers,
    }


def drawn_layers(depth: int) -> list[int]:
    """At most DRAWN, from the first one on: 0, 3, 7, … 27 of 30."""
    step = math.ceil(depth / DRAWN)
    return sorted({min(max(i * step - 1, 0), depth - 1) for i in range(DRAWN)})


def draw(shown: list[tuple[Asked, torch.Tensor]], file: Path) -> None:
    """A row for each photograph: itself, and its maps [L, H, W] of some layers, each from its least to its 98th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    layers = drawn_layers(len(shown[0][1]))
    size = (1.9 * (len(layers) + 1), 1.8 * len(shown))
    figure, axes = pyplot.subplots(len(shown), len(layers) + 1, figsize=size, layout="constrained", squeeze=False)
    for row, ((image, question), maps) in zip(axes, shown, strict=True):
        row[0].imshow(image)
        row[0].set_title(question, fontsize=7)
        for ax, layer in zip(row[1:], layers, strict=True):
            values = maps[layer].numpy()
            ax.imshow(values, vmin=values.min(), vmax=np.quantile(values, 0.98))
            ax.set_title(f"before layer {layer}", fontsize=7)
    for ax in axes.flat:
        ax.axis("off")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    Image.fromarray(np.ascontiguousarray(pixels)).quantize(128).save(file, format="PNG", optimize=True)
    pyplot.close(figure)
