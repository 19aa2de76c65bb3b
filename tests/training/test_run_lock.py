"""No two runs write into one folder."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
from training_runs import SHORT, draw_cards, train, trainer

import minifocus
from minifocus.files import locks

pytestmark = pytest.mark.usefixtures("one_thread")

HOLDER = """
import os, sys, time
from minifocus.files.locks import hold
with hold(sys.argv[1]):
    if os.fork() == 0:  # a process that reads ahead, which may live longer
        time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no POSIX locks")
def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    """The second ends at once and touches nothing. When the first is killed, its children keep nobody out."""
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, out], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = {file: file.read_bytes() for file in out.iterdir()}
        with mock.patch.object(trainer, "load_to_train", side_effect=AssertionError("loaded")):
            done = train("--out", out, *SHORT)
        assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1
        assert done.err.startswith(f"error: {out}: process {holder.pid} writes into it: wait for it to end, or name")
        with pytest.raises(minifocus.InputError, match=rf"^{out}: process {holder.pid} writes into it"):
            draw_cards.write_json(out, "train", 1)
        assert {file: file.read_bytes() for file in out.iterdir()} == before and list(before) == [out / ".lock"]
        holder.kill()
        holder.wait(30)
        with locks.hold(out):
            assert (out / ".lock").read_text() == f"{os.getpid()}\n"
        assert not list(out.iterdir())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_s_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "a/b"
    with locks.hold(folder):
        with locks.hold(folder), locks.hold(tmp_path):
            assert folder.is_dir()
        raised: list[Exception] = []

        def from_a_thread() -> None:
            try:
                with locks.hold(f"{folder}/../b"):
                    pass
            except minifocus.InputError as error:
                raised.append(error)

        thread = threading.Thread(target=from_a_thread)
        thread.start()
        thread.join()
        assert "another thread of this process writes into it" in str(raised[0])
        assert (folder / ".lock").exists()
    assert not list(tmp_path.iterdir())  # folders that were made for nothing are gone

    mine = tmp_path / "mine"
    mine.write_text("mine")
    for make in (lambda lock: lock.symlink_to(mine), os.mkfifo, Path.mkdir):
        odd = tmp_path / make.__name__.strip("<>") / "odd"
        odd.mkdir(parents=True)
        make(odd / ".lock")
        with pytest.raises(minifocus.InputError, match=r"\.lock: expected the file of a lock, found something else"):
            locks.hold(odd).__enter__()
    for bad in (mine, mine / "below", tmp_path / ("a" * 5000), "/sys/run"):
        with pytest.raises(minifocus.InputError, match="cannot be written: ") as error:
            locks.hold(bad).__enter__()
        assert len(str(error.value)) < 400
    assert mine.read_text() == "mine"

    def none(descriptor: int, what: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)
    with locks.hold(tmp_path):  # NFS without a lock daemon: two runs there are the user's own affair
        assert "no lock keeps other runs from writing into it: No locks available" in caplog.text
