"""How scripts begin and end: one line for what is in their way, quiet when interrupted, nothing done on --help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from example_scripts import example
from safetensors import SafetensorError

import minifocus
from examples import command_line

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    file
    for folder in ("csrc", "examples", "experiments")
    for file in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__":' in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (minifocus.InputError("gamma: no"), 2, "gamma: no"),
        (minifocus.CheckpointError("a\n  b\x1b[0m"), 2, r"a b\x1b[0m"),
        (command_line.Refused("--x: no"), 2, "--x: no"),
        (command_line.Failed("a stage ended"), 1, "a stage ended"),
        (FileNotFoundError(2, "No such file or directory", "x/y"), 2, "x/y: No such file or directory"),
        (OSError(36, "File name too long", "a" * 5000), 2, f"{'a' * 100} … {'a' * 100}: File name too long"),
        (OSError(28, "No space left on device"), 2, "output: No space left on device"),
        (SafetensorError("I/O error: File too large (os error 27)"), 2, "I/O error: File too large (os error 27)"),
        (MemoryError(), 2, "not enough memory: it ran out"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "not enough memory: CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory: Default"),
        (BrokenPipeError(32, "Broken pipe"), 141, None),
        (KeyboardInterrupt(), 130, None),
        (RuntimeError("a fault of our own"), None, None),
        (KeyError("another"), None, None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_ends_a_script(
    raised: BaseException, status: int | None, line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    main = command_line.guarded(mock.Mock(side_effect=raised, __name__="main"))
    if status is None:
        with pytest.raises(type(raised)):
            main()
    else:
        assert main() == status
    said = capsys.readouterr()
    assert said.out == "" and (said.err.startswith(f"error: {line}") if line else not said.err)
    assert said.err.count("\n") == bool(line)


PROGRAM = """
import sys
from examples import command_line
command_line.begin()
import os, time
from concurrent.futures import ThreadPoolExecutor

@command_line.guarded
def main():
    parser = command_line.Parser("×" * 9000 + " and … 🙂")
    parser.add_argument("--what", choices=("many", "text", "wait", "stuck", "stuck in threads", "exit"))
    what = parser.parse_args().what
    command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    if what == "many":
        for number in range(100000):
            print("line", number)
    elif what == "text":
        print("× 🙂 \\ud800")
    elif what == "wait":
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("in order")
    elif what == "stuck":
        command_line.call(command)
    elif what == "stuck in threads":
        with command_line.working(ThreadPoolExecutor(1)) as pool:
            for running in [pool.submit(command_line.call, command) for _ in range(5)]:
                running.result()
    elif what == "exit":
        os.write(1, b"number ")
        print("last", os.open(os.devnull, os.O_RDONLY))

command_line.run(main)
"""
MAYBE_BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
MAYBE_BUFFERED["PYTHONPATH"] = str(ROOT)


def shell(tmp_path: Path, line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which $P is the program."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    program = f"{sys.executable} {tmp_path / 'program.py'}"
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; P="{program}"; {line}'],
        capture_output=True,
        env={**MAYBE_BUFFERED, **environment},
        timeout=60,
    )


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    done = shell(tmp_path, "$P --what many | head -1; echo ${PIPESTATUS[0]} >&2")
    assert done.stdout == b"line 0\n" and done.stderr == b"141\n"
    done = shell(tmp_path, "$P --help | true; echo ${PIPESTATUS[0]} >&2", PYTHONIOENCODING="ascii")
    assert done.stderr == b"141\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_behind_the_output(tmp_path: Path, buffered: bool) -> None:
    """Also where it shows at the very end alone, and on --help."""
    environment = {} if buffered else {"PYTHONUNBUFFERED": "1"}
    for words in ("--what text", "--what many", "--help"):
        done = shell(tmp_path, f"$P {words} > /dev/full", **environment)
        assert done.returncode == 2 and re.fullmatch(rb"error: .*output: No space left on device\n", done.stderr), words


def test_streams_that_are_closed(tmp_path: Path) -> None:
    """No file that is opened takes their numbers."""
    assert shell(tmp_path, "$P --what exit").stdout.split()[:2] == [b"number", b"last"]
    for closed in (">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
        done = shell(tmp_path, f"$P --what exit {closed}")
        assert done.returncode == 0 and done.stderr == b""
        assert not done.stdout or int(done.stdout.split()[-1]) > 2
    assert shell(tmp_path, "$P --what none 2>&-").returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_a_terminal_that_lacks_a_letter_shows_its_escape(tmp_path: Path, encoding: str) -> None:
    for words in ("--what text", "--help"):
        done = shell(tmp_path, f"$P {words}", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert (done.returncode, done.stderr) == (0, b"")
        shown = done.stdout.decode(encoding)
        assert (r"\xd7" in shown) == (encoding == "ascii") and (r"\U0001f642" in shown) == (encoding != "utf-8")
    assert r"\ud800" in shell(tmp_path, "$P --what text", PYTHONIOENCODING=encoding).stdout.decode(encoding)


def interrupted(program: str, tmp_path: Path) -> tuple[int, bytes, bytes]:
    """What came of Ctrl-C after the first line of output."""
    file = tmp_path / "interrupted.py"
    file.write_text(program, encoding="utf-8")
    running = subprocess.Popen(
        [sys.executable, file], env=MAYBE_BUFFERED, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None
    first = running.stdout.readline()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    return running.returncode, first + out, err


def test_ctrl_c(tmp_path: Path) -> None:
    """During the imports, in the work, and while a program that it started is waited for, which ends too."""
    importing = PROGRAM.replace("import os, time\n", "import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    assert interrupted(importing, tmp_path) == (130, b"importing\n", b"")
    for what, out in (("wait", b"ready\nin order\n"), ("stuck", None), ("stuck in threads", None)):
        program = PROGRAM.replace("parser.parse_args()", f"parser.parse_args(['--what', {what!r}])")
        begun = time.monotonic()
        code, said, err = interrupted(program, tmp_path)
        assert (code, err) == (130, b"") and time.monotonic() - begun < 20
        if out is not None:
            assert said == out
            continue
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(int(said), 0)
                time.sleep(0.05)


def test_what_argparse_says_is_one_short_line(tmp_path: Path) -> None:
    for words in ("--wha text", "--unknown", f"--what {'a' * 5000}", "--what"):
        done = shell(tmp_path, f"$P {words}")
        assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
        assert len(done.stderr) < 600, words


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_script_is_guarded(file: Path) -> None:
    """From before its imports to its end; and it has a parser, which is all that --help reaches."""
    text = file.read_text(encoding="utf-8")
    assert len(re.findall(r"command_line\.run\((?:command_line\.guarded\()?main\)", text)) == 1
    if file.name != "build.py":  # setup.py imports it, of a source tree that may have nothing else
        begins = text.index("command_line.begin()")
        heavy = [text.find(f"\n{word}") for word in ("import torch", "import minifocus", "from minifocus", "from tqdm")]
        assert all(place < 0 or place > begins for place in heavy)
        assert "guarded" in text
    assert "command_line.Parser(" in text or file.name == "run.py"  # lmms-eval's own
    assert "argparse.ArgumentParser(" not in text and "sys.exit(" not in text


@pytest.mark.parametrize("script", ["-m csrc.build", "-m experiments.accuracy", "tests/wheel/check_wheel.sh"])
def test_help_does_no_work(script: str) -> None:
    command = ["bash" if script.endswith(".sh") else sys.executable, *script.split(), "--help"]
    built = ROOT / "minifocus/ops/_build.txt"
    before = built.stat().st_mtime_ns if built.exists() else None
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout and not done.stderr
    assert (built.stat().st_mtime_ns if built.exists() else None) == before


LONG = "a" * 5000
GENERATE: list[tuple[list[Any], str]] = [
    (["--temperature", "nan"], "temperature: "),
    (["--top-p", "1e400"], "top_p: "),
    (["--max-new-tokens", 0], "max_new_tokens: "),
    (["--seed", "9" * 30], "seed: "),
    (["--prompt", "a\udcff"], "--prompt: expected text, got bytes that are none: 'a\\udcff'"),
    (["--image", ""], "--image: expected the names of pictures"),
    (["--image", "nowhere.png"], "nowhere.png: "),
    (["--figure", "a.xyz"], "--figure: expected the name of a picture, such as a.png, got a.xyz"),
    (["--figure", "a.psd"], "--figure: expected the name of a picture"),  # which Pillow reads alone
    (["--figure", "folder.png"], "--figure: expected a file, got folder.png"),
    (["--figure", "nowhere/a.png"], "--figure: nowhere/a.png: No such file or directory"),
    (["--figure", f"{LONG}.png"], "File name too long"),
    (["--option", LONG], "--option: expected NAME=VALUE"),
    (["--option", f"{LONG}=1"], "--option: expected NAME=VALUE"),
    (["--option", f"per={'[' * 50000}"], "--option: per: nested too deeply"),
    (["--sampler", LONG], "argument --sampler: invalid choice"),
]


@pytest.mark.parametrize(("arguments", "words"), GENERATE, ids=[words[:40] for _, words in GENERATE])
def test_generate_refuses_before_it_loads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[Any],
    words: str,
) -> None:
    generate = example("generate")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    monkeypatch.setattr(minifocus, "load", mock.Mock(side_effect=AssertionError("loaded")))
    try:
        code = generate.main()
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    assert code == 2 and not said.out and [file.name for file in tmp_path.iterdir()] == ["folder.png"]
    assert said.err.startswith("error: ") and words in said.err and said.err.count("\n") == 1 and len(said.err) < 700


@pytest.mark.parametrize("device", ["meta", "privateuseone", "mkldnn", "hpu", "", "cpu:-1", LONG])
def test_a_device_that_holds_no_numbers(device: str) -> None:
    from minifocus.load import usable_device

    with pytest.raises(minifocus.InputError, match=r"^device: .* is not usable here: ") as error:
        usable_device(device)
    assert len(str(error.value)) < 600


def test_a_folder_s_name_that_is_none() -> None:
    with pytest.raises(minifocus.CheckpointError, match="a name that cannot be used") as error:
        minifocus.load(LONG)
    assert len(str(error.value)) < 400


def test_output_files_are_whole_or_not_there(tmp_path: Path) -> None:
    """Refused before the work where they could not be written after it; no device is replaced, no link written through."""
    link, mine = tmp_path / "out.json", tmp_path / "mine.txt"
    mine.write_text("mine")
    link.symlink_to(mine)
    command_line.expect_file(link, "out")
    assert mine.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    command_line.write_text(link, json.dumps([1]))
    assert link.read_text() == "[1]" and not link.is_symlink() and mine.read_text() == "mine"
    for bad in (tmp_path, mine / "below.json", tmp_path / LONG, "/dev/null", "/sys/out.json"):
        with pytest.raises(command_line.Refused, match="^--out: ") as error:
            command_line.expect_file(bad, "out")
        assert len(str(error.value)) < 400
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.txt", "out.json"]
