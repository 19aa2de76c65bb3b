"""The CUDA kernels of csrc/cuda without a GPU: builds them with g++ and the emulator of tests/emulator, and calls them.

    operators = emulated.operators("checked")      # or "fast": without checks of memory, several times faster
    tokens, source, offsets = operators.region_pool(x, grid_hw, choice, window, [4, 4, 2, 2, 1, 1])
    with emulated.schedule(order="reverse", preempt=20):
        ...                                         # the same calls, their threads taking turns in another order

`operators(mode)` has the functions of torch.ops.minifocus, whose outputs are as large as they can get, on CPU tensors.
What a kernel does wrong is raised as an EmulationError that names the kernel, the thread and the source line.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import posixpath
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11
import torch

from minifocus.ops import backend

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulator"

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall"]
COMMON += ["-Itests/emulator", f"-ffile-prefix-map={ROOT}=.", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
CHECKS = "thread,alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift"
MODES = {  # how the kernels are compiled; the emulator itself always with -O2
    "fast": ["-O2"],
    "checked": ["-O1", "-g", f"-fsanitize={CHECKS}", "--param", "tsan-instrument-func-entry-exit=0"],
}
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # as csrc/build.py has it
EMULATOR = ["runtime.cpp", "checks.cpp", "atomics.cpp", "fibers.cpp"]
MODULES = {  # name: the kernels, and the file that binds them
    "operators": (sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "tests/emulator/module.cpp"),
    "planted_bugs": ([ROOT / "tests/emulator/planted_bugs.cu"], ROOT / "tests/emulator/planted_bugs_module.cpp"),
}


class EmulationError(Exception):
    """What the emulator found wrong in a kernel or its launch."""


# ---------------------------------------------------------------------------------------------------------- building


@functools.cache
def _compiler() -> tuple[str, str]:
    """g++ and its version."""
    path = shutil.which("g++")
    if path is None:
        raise RuntimeError(
            "the CUDA emulator needs g++, which is not on the PATH (Debian, Ubuntu: apt-get install g++)"
        )
    return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def _compile(source: Path, flags: list[str], label: str) -> Path:
    """source → its object file, from the cache if nothing that goes into it has changed."""
    compiler, version = _compiler()
    headers = sorted(h for part in ("csrc", "csrc/cuda", "tests/emulator") for h in (ROOT / part).glob("*.h"))
    digest = hashlib.sha256("\0".join([version, str(ROOT), *COMMON, *flags]).encode())
    for file in [source, *headers]:
        digest.update(file.read_bytes())
    target = CACHE / f"{source.stem}-{label}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        part = target.with_suffix(".part")
        command = [compiler, *COMMON, *flags, "-x", "c++", "-c", str(source.relative_to(ROOT)), "-o", str(part)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        for old in CACHE.glob(f"{source.stem}-{label}-*.o"):
            old.unlink()
        part.replace(target)
    return target


def build(name: str, mode: str) -> Path:
    """Compiles and links what has changed; → the module's file. A second process waits for the first one's build."""
    kernels, binding = MODULES[name]
    torch_folder = Path(torch.__file__).parent
    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(torch_folder / "include")]
    jobs = [(kernel, MODES[mode], mode) for kernel in kernels]
    jobs += [(ROOT / "tests/emulator" / file, ["-O2"], "emulator") for file in EMULATOR]
    flags = ["-O0", STABLE_ABI, *(f"-isystem{folder}" for folder in includes)]
    jobs.append((binding, flags, "binding"))
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(lambda job: _compile(*job), jobs[::-1]))  # the binding takes longest: first
        digest = hashlib.sha256(" ".join(file.name for file in objects).encode()).hexdigest()[:16]
        target = CACHE / f"{name}-{mode}-{digest}.so"
        if not target.exists():
            part = target.with_suffix(".part")
            link_with = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
            subprocess.run([_compiler()[0], "-shared", "-o", part, *objects, *link_with], check=True)
            for old in CACHE.glob(f"{name}-{mode}-*.so"):
                old.unlink()
            part.replace(target)
    return target


@functools.cache
def load(name: str, mode: str) -> ModuleType:
    """The Python module `name` of MODULES, with its kernels compiled for `mode`."""
    # The last part of the name is what the file's initialisation is called; the whole must differ from mode to mode.
    spec = importlib.util.spec_from_file_location(f"emulated.{mode}.{name}", build(name, mode))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------- calling

_FORWARD = dict(
    order="forward", seed=0, preempt=0, resident_blocks=1, poison=0xFF, shared_bytes=225 * 1024, changing=None
)
_schedule: dict[str, Any] = dict(_FORWARD)

# Orders that a correct kernel does not depend on; tests take all of them or draw from them.
SCHEDULES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": dict(order="reverse", poison=0),
    "random": dict(order="random", seed=1, poison=0x3F),
    "interleaved": dict(order="random", seed=2, resident_blocks=4),
    "preempted": dict(order="random", seed=3, resident_blocks=3, preempt=50),
}


@contextlib.contextmanager
def schedule(**changes: Any) -> Iterator[None]:
    """Within it, kernels run differently. Every call begins anew from `seed`, so that it can be repeated.

    order            in which threads and blocks take their turns: "forward", "reverse" or "random"
    seed             of all that is random
    preempt          n > 0: about one memory access in n ("fast": one atomic in n) lets another thread go first
    resident_blocks  how many blocks are under way at a time
    poison           the byte that shared memory is full of before a block begins
    shared_bytes     what gpu::max_shared_bytes() says
    changing         ("choice", other): as if another stream wrote `other` to this input meanwhile, and back again, so that
                     each read finds either; "checked" only. The tensors are left with some of both
    """
    global _schedule
    unknown = set(changes) - set(_FORWARD)
    if unknown:
        raise TypeError(f"schedule: no such option: {', '.join(sorted(unknown))}")
    before, _schedule = _schedule, {**_schedule, **changes}
    try:
        yield
    finally:
        _schedule = before


@functools.cache
def _source_line(file: str, address: str, function: bool) -> str:
    """An address in a module → "file:line", or the function's name. Frames inlined from the emulator's header are skipped."""
    if shutil.which("addr2line") is None:
        return address
    command = ["addr2line", "-Cfi", "-e", file, address]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names, places = lines[::2], [posixpath.normpath(place.split(" (discriminator")[0]) for place in lines[1::2]]
    if function:
        return names[-1]
    own = [place for place in places if not place.startswith("tests/emulator/cuda_on_cpu.h:")]
    return (own or places)[0]


def call(module: ModuleType, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), which is the module's, under the current schedule; what failed in it becomes an EmulationError
    with source lines."""
    name, other = _schedule["changing"] or ("", None)
    module.configure(**{**_schedule, "changing": name, "other": b"" if other is None else array(other).tobytes()})
    result = function(*arguments)
    failure = module.failure()
    if failure:
        file = str(module.__file__)
        raise EmulationError(
            re.sub(r"<(pc|function) (0x[0-9a-f]+)>", lambda m: _source_line(file, m[2], m[1] == "function"), failure)
        )
    return result


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's own memory, as kernels are given it: contiguous, bfloat16 as uint16."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def garbage(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output before a kernel has written it."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).fill_(0xEE)
    return tensor


class Operators:
    """The operators as torch.ops.minifocus has them."""

    def __init__(self, mode: str) -> None:
        self._module = load("operators", mode)
        namespace = f"minifocus_emulated_{mode}"
        self._library = torch.library.Library(namespace, "DEF")  # what it declares goes when it does
        for schema in backend.schemas():
            self._library.define(schema)
        self._module.register_in(namespace)
        self._operators = getattr(torch.ops, namespace)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(call, self._module, getattr(self._operators, name))


@functools.cache
def operators(mode: str) -> Any:
    """The operators with their kernels compiled for `mode`."""
    return Operators(mode)
