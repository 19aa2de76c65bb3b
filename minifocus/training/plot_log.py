"""Draw a run from its log: the losses, the share of each scale, and the tokens kept."""

from __future__ import annotations

from pathlib import Path

from ..files.writing import replace
from .log import read_log

PANELS = {
    "loss": lambda name: name == "loss" or name.endswith("_loss"),
    "share of regions": lambda name: name.startswith("scale_"),
    "share of visual tokens": lambda name: name in ("tokens", "tokens_entered"),
    "exact answers": lambda name: name == "accuracy",
}


def draw_curve(log: Path, picture: Path) -> None:
    """Write a PNG. Raises ImportError without matplotlib, and InputError for what is no log and a file that cannot be written."""
    import matplotlib  # only here: nothing else needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    names = sorted({name for line in lines for name in line} - {"step", "seconds", "lr"})
    panels = {title: [name for name in names if belongs(name)] for title, belongs in PANELS.items()}
    panels = {title: own for title, own in panels.items() if own}
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(4.2 * max(1, len(panels)), 3.2), squeeze=False)
    for axis, (title, own) in zip(axes[0], panels.items(), strict=False):
        for name in own:
            points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else None)
        axis.set(title=title, xlabel="step")
        if title == "loss":
            axis.set_yscale("log")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    try:
        replace(picture, lambda file: figure.savefig(file, dpi=110, format="png", metadata={"Software": None}))
    finally:
        pyplot.close(figure)
