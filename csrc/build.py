"""Builds csrc/ into the package: minifocus/ops/_cpu.abi3.so and, where nvcc is found, minifocus/ops/_cuda.abi3.so.

setup.py calls this for pip. By hand it rebuilds what has changed, in place:

    python -m csrc.build

The libraries call LibTorch's stable ABI and no Python at all, so one build serves every Python and torch that minifocus
supports, whichever torch the headers came from. torch is not imported, no GPU need be present, and a CPU build of torch will
do for the CUDA half too. What was built, or why not, is written to minifocus/ops/_build.txt, one line a half.

Environment variables:
    MINIFOCUS_BUILD       all, cpu or none: build exactly that, or fail. Unset: what this machine can build; the PyTorch
                          reference (minifocus/ops/reference.py) does the work of a half that is missing.
    CXX                   the C++ compiler
    CUDA_HOME             the CUDA toolkit
    TORCH_CUDA_ARCH_LIST  the GPUs to compile for, as for torch's own extensions; "7.5 8.0 9.0+PTX" unless set
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path("build/operators")  # below ROOT, as all paths in the ninja files are
HALVES = ("cpu", "cuda")
PACKAGE = Path("minifocus/ops")  # where they are loaded from

# The oldest torch that the libraries load in, and the same as its headers want it: a byte for 2, a byte for 10.
TORCH = (2, 10)
STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000 -DPy_LIMITED_API=0x030a0000"

OPTIMISE = "-std=c++17 -O3"
HOST = "-fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math"
CXX_OPTIONS = f"{OPTIMISE} {HOST} -Wall -Wextra"
# Where a compiler links libstdc++ statically, its symbols stay inside: another library's would be taken for some of them, and
# what is written to a stream would crash.
LINK_OPTIONS = "-shared -Wl,--no-undefined -Wl,--exclude-libs=ALL"
NVCC_OPTIONS = f"{OPTIMISE} -lineinfo -Xcompiler {HOST.replace(' ', ',')}"

# A CPU build of torch has no libtorch_cuda.so to link with; this stands in for it. It is not shipped: when the CUDA half is
# loaded, torch has loaded the real one.
LIBTORCH_CUDA = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'


class Missing(Exception):
    """Something that a half is built with is not there."""


class Failed(Exception):
    """A half does not compile."""


def find_torch() -> tuple[Path, str] | None:
    """The folder and version of a torch whose headers will do. pip's isolated builds hide the environment that they install
    into from `import`, but its site-packages are still the ones that sysconfig names."""
    paths = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for torch in distributions(name="torch", path=paths):
        folder = Path(str(torch.locate_file("torch")))
        version = tuple(int(number) for number in re.findall(r"\d+", torch.version)[:2])
        if version >= TORCH and (folder / "include/torch/csrc/stable/library.h").exists():
            return folder, torch.version
    return None


def find_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_nvcc() -> str | None:
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if os.environ.get("CUDA_HOME") else [None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)


def find_ninja() -> list[str] | None:
    """The package first, which pip brings to where it builds: another version on the PATH would not read its logs, and would
    build everything again."""
    if find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return ["ninja"] if shutil.which("ninja") else None


def requested() -> tuple[str, ...] | None:
    """The halves that MINIFOCUS_BUILD asks for; None where it is not set."""
    choice = os.environ.get("MINIFOCUS_BUILD")
    if not choice:
        return None
    if choice not in ("all", "cpu", "none"):
        raise SystemExit(f"MINIFOCUS_BUILD is {choice!r}; all, cpu and none are understood")
    return {"all": HALVES, "cpu": ("cpu",), "none": ()}[choice]


def needs_torch() -> bool:
    """Whether torch's headers are all that is missing to build something."""
    return bool(requested() != () and sys.platform == "linux" and find_compiler() and not find_torch())


def gpu_options() -> str:
    """nvcc's options for TORCH_CUDA_ARCH_LIST: machine code for each GPU, and PTX, for newer ones, where it says +PTX."""
    options = []
    for name in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "7.5 8.0 9.0+PTX"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if not match:
            raise Failed(f'TORCH_CUDA_ARCH_LIST has {name!r}; something like "9.0" or "9.0+PTX" is expected')
        gpu = match[1] + match[2]
        options.append(f"-gencode=arch=compute_{gpu},code=sm_{gpu}")
        if match[3]:
            options.append(f"-gencode=arch=compute_{gpu},code=compute_{gpu}")
    return " ".join(options)


def quote(path: Path | str) -> str:
    """A path for a command (the shell's quoting) in a ninja file (ninja's)."""
    return shlex.quote(str(path)).replace("$", "$$")


def ninja_file(half: str, compiler: str, nvcc: str | None, torch: Path) -> str:
    """What ninja needs to know of one half. Only register.cpp includes torch; the rest is plain C++ and CUDA."""
    folder = BUILD / half
    register = f"{STABLE_ABI} -isystem {quote(torch / 'include')}"
    link_with = f"-L{quote(torch / 'lib')} -ltorch_cpu"
    if half == "cpu":
        sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "csrc/register.cpp"]
        compile_ = f"{quote(compiler)} {CXX_OPTIONS}"
        link = f"{quote(compiler)} {LINK_OPTIONS}"
        stub = ""
    else:
        assert nvcc is not None
        sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/register.cpp"]
        driver = f"{quote(nvcc)} -ccbin {quote(compiler)}"
        compile_ = f"{driver} {NVCC_OPTIONS} {gpu_options()}"
        register += " -DUSE_CUDA"
        link = f"{driver} -shared -nodlink -cudart static -Xlinker --no-undefined -Xlinker --exclude-libs=ALL"
        link_with += f" -L{folder} -ltorch_cuda"
        stub = f"{folder}/libtorch_cuda.so"

    rules = f"""
builddir = {folder}
rule compile
  command = {compile_} $flags -MMD -MF $out.d -c $in -o $out
  description = $in
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in {link_with} -o $out
  description = $out
rule stub
  command = {quote(compiler)} -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out
  description = $out
"""
    edges = ""
    for source in sources:
        edges += f"build {folder}/{source.stem}.o: compile {source.relative_to(ROOT)}\n"
        if source.name == "register.cpp":
            edges += f"  flags = {register}\n"
    objects = " ".join(f"{folder}/{source.stem}.o" for source in sources)
    if stub:
        edges += f"build {stub}: stub {folder}/libtorch_cuda.cpp\n"
    edges += f"build {folder}/{library(half)}: link {objects} | {stub}\n"
    return rules + edges


def library(half: str) -> str:
    return f"_{half}.abi3.so"


def run_ninja(ninja: list[str], file: Path) -> None:
    """Runs ninja, showing what it and the compilers say; raises Failed with the first error."""
    command, said = [*ninja, "-f", str(file)], []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            said.append(line.strip())
    if running.returncode:
        raise Failed(next(filter(re.compile("error|undefined reference").search, said), "ninja failed"))


def build_half(half: str) -> str:
    """Builds one half below BUILD and says with what."""
    if sys.platform != "linux":
        raise Missing("only Linux is supported")
    compiler, nvcc, torch, ninja = find_compiler(), find_nvcc(), find_torch(), find_ninja()
    if compiler is None:
        raise Missing("no C++ compiler was found (CXX, or c++, g++ or clang++ on the PATH)")
    if half == "cuda" and nvcc is None:
        raise Missing("nvcc was not found (in CUDA_HOME, on the PATH, in /usr/local/cuda)")
    if torch is None:
        raise Missing(f"torch >= {TORCH[0]}.{TORCH[1]}, for its headers, was not found")
    if ninja is None:
        raise Missing("ninja was not found (as a package or on the PATH)")
    folder = ROOT / BUILD / half
    folder.mkdir(parents=True, exist_ok=True)
    stub = folder / "libtorch_cuda.cpp"
    if half == "cuda" and not (stub.exists() and stub.read_text() == LIBTORCH_CUDA):
        stub.write_text(LIBTORCH_CUDA)
    (folder / "build.ninja").write_text(ninja_file(half, compiler, nvcc, torch[0]))
    run_ninja(ninja, BUILD / half / "build.ninja")
    return f"{version(nvcc if half == 'cuda' and nvcc else compiler)}, headers of torch {torch[1]}"


def version(tool: str) -> str:
    """The line of `tool --version` with the version in it: nvcc's says "release", a C++ compiler's is the first."""
    lines = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    return next((line for line in lines if "release" in line), lines[0])


def build(package: Path, forgive: tuple[type[Exception], ...] = (Missing, Failed)) -> None:
    """Builds the halves into `package`. One that cannot be built is left out, for a reason to forgive, or ends the program."""
    halves = requested()
    record, unforgiven = [], []
    for half in HALVES:
        target = package / library(half)
        try:
            if halves is not None and half not in halves:
                raise Missing(f"MINIFOCUS_BUILD is {os.environ['MINIFOCUS_BUILD']}")
            record.append(f"{half}: built with {build_half(half)}")
            # Not written over the old one, which a running Python may have loaded.
            shutil.copy2(ROOT / BUILD / half / target.name, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)
        except (Missing, Failed) as reason:
            target.unlink(missing_ok=True)
            record.append(f"{half}: not built, the PyTorch reference does its work: {reason}")
            if half in (halves or ()) or (halves is None and not isinstance(reason, forgive)):
                unforgiven.append(half)
        print(f"minifocus operators: {record[-1]}", flush=True)
    (package / "_build.txt").write_text("\n".join(record) + "\n")
    if unforgiven:
        raise SystemExit(f"minifocus operators: {' and '.join(unforgiven)} could not be built; the reason is above")


if __name__ == "__main__":
    from examples import command_line

    @command_line.guarded
    def main() -> None:
        command_line.Parser(__doc__).parse_args()
        build(ROOT / PACKAGE, forgive=(Missing,))

    command_line.begin()
    command_line.run(main)
