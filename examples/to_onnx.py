"""The parts of a model for ONNX Runtime, for prompts and answers of any length: where torch is too large to ship.

python examples/to_onnx.py weights/tiny --out runs/onnx     # needs onnx, onnxscript and onnxruntime

Tower with projector, decoder layers and head come out, and are compared with the model at several sizes. The samplers do not:
their operators are this project's, and ONNX has none like them. A program would call csrc/cpu for them, and put the parts
together as csrc/runtime/network.cpp does.
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

from pathlib import Path

import onnxruntime
import torch

import minifocus
from minifocus.export.compiling import exported
from minifocus.export.parts import Part, parts_of

SIZES = (3, 17, 200)
TOLERANCE = 1e-3  # of values that are about 1


def drawn(part: Part, size: int) -> tuple[torch.Tensor, ...]:
    """Inputs for a part, with what varies in them of this size, or of as many tiles as it takes."""
    found = []
    for value, varying in zip(*part.examples(), strict=True):
        shape = list(value.shape)
        for dimension, bounds in (varying or {}).items():
            shape[dimension] = min(size, bounds.max)
        found.append(torch.randn(shape))
    return tuple(found)


def error(part: Part, names: list[str], session: onnxruntime.InferenceSession, size: int) -> float:
    weights, inputs = {name: part.weights()[name] for name in names}, drawn(part, size)
    feed = dict(zip((one.name for one in session.get_inputs()), [*weights.values(), *inputs], strict=True))
    given = session.run(None, {name: value.numpy().copy() for name, value in feed.items()})
    expected = part.call(weights, inputs)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    pairs = zip(expected, given[-len(expected) :], strict=True)  # what a part changes of its inputs comes first
    return max(float((one - torch.from_numpy(other)).abs().max()) for one, other in pairs)


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = minifocus.load(arguments.model, "none", dtype="float32")
    with torch.no_grad():
        for name, part in parts_of(model).items():
            program, names = exported(part)
            file = arguments.out / f"{name}.onnx"
            torch.onnx.export(program, (), str(file), dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(str(file))
            worst = max(error(part, names, session, size) for size in SIZES)
            if worst > TOLERANCE:
                raise command_line.Failed(f"{file}: expected what the model computes, got values off by {worst:.2g}")
            print(f"{file}: takes {len(names)} weights and the inputs of {type(part).__name__}; within {worst:.0e}")


if __name__ == "__main__":
    command_line.run(main)
