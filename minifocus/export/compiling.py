"""A part → a library that torch's ahead-of-time runtime loads: NAME.so, and NAME.json where it calls operators by name."""

from __future__ import annotations

import platform
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn

from .parts import Part

# The levels of x86 processors that a package may be for, and how many bits their vectors have; csrc/runtime/package.cpp checks.
# On other machines it is for processors like the one that it is made on.
LEVELS: dict[str, int | None] = {"x86-64-v4": 512, "x86-64-v3": 256}
if platform.machine() != "x86_64":
    LEVELS = {platform.machine(): None}


def default_level() -> str:
    """The highest level that this processor has."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return next(iter(LEVELS))
    return list(LEVELS)[-1]


class _WithWeights(nn.Module):
    """A part as a function of the weights `names`, a list, and of its inputs. Other weights stay as they are."""

    def __init__(self, part: Part, names: list[str]):
        super().__init__()
        self.part, self.names = (part,), names  # not a module of this one: it would be exported with its weights

    def forward(self, weights: list[torch.Tensor], *inputs: torch.Tensor) -> object:
        return self.part[0].call(dict(zip(self.names, weights, strict=True)), inputs)


def compile_part(part: Part, name: str, folder: Path, level: str) -> list[str]:
    """Write the library, and return the names of the weights that it takes before its inputs."""
    program, used = exported(part)
    settings: dict[str, object] = {
        "emulate_precision_casts": True,  # bfloat16 is rounded where Python rounds it
        "cpp.dynamic_threads": True,  # as many as the program that runs it has
        "aot_inductor.enable_line_tables": False,
    }
    if LEVELS[level] is not None:
        # The level says that the processor has such vectors: to try them out takes ten seconds.
        settings |= {"cpp.march": level, "cpp.simdlen": LEVELS[level], "cpp.vec_isa_ok": True}
    with tempfile.TemporaryDirectory() as scratch:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{scratch}/{name}.pt2", inductor_configs=settings
        )
        with zipfile.ZipFile(package) as files:
            for suffix in (".so", ".json"):
                found = [one for one in files.namelist() if one.endswith(f".wrapper{suffix}")]
                for one in found:
                    (folder / f"{name}{suffix}").write_bytes(files.read(one))
    return used


def exported(part: Part) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The part as a graph, and the names of the weights that it takes, a list, before its inputs."""
    weights = part.weights()
    names = list(weights)
    program = _export(part, names, weights)
    # A tower has blocks behind the last that is read: their weights are no arguments.
    places = [one for one in program.graph.nodes if one.op == "placeholder"]
    inputs = [one for one in places if one.name in set(program.graph_signature.user_inputs)]
    used = [name for name, place in zip(names, inputs, strict=False) if place.users]
    return (program, names) if used == names else (_export(part, used, weights), used)


def _export(part: Part, names: list[str], weights: dict[str, torch.Tensor]) -> torch.export.ExportedProgram:
    inputs, varying = part.examples()
    given = [weights[name] for name in names]
    shapes = ([None] * len(given), tuple(varying))
    # A map of one region or a prompt of one word has sizes of 1, for which export would else compile no code.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(_WithWeights(part, names), (given, *inputs), dynamic_shapes=shapes, strict=False)
