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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only here: nothing else needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    lines = read_log(log)
    names = sorted({name for line in lines for name in line} - {"step", "seconds", "lr"})
    panels = {title: [name for name in names if belongs(name)] for title, belongs in PANELS.items()}
    panels = {title: own for title, own in panels.items() if own}
    width = 4.2 * max(1, len(panels))
    figure = Figure(figsize=(width, 3.2))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)
    for axis, (title, own) in zip(axes[0], panels.items(), strict=False):
        for name in own:
            points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else None)
        axis.set(title=title, xlabel="step")
        if title == "loss":
            axis.set_yscale("log")
            axis.yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())  # typeset powers take longer
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    # tight_layout would draw everything twice.
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.1 / width, bottom=0.16, top=0.9, wspace=0.25)
    replace(picture, lambda file: figure.savefig(file, dpi=110, format="png", metadata={"Software": None}))
