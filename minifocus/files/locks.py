"""Locks that let one writer at a time into a folder. The system releases them when their holder dies.

There are two, because neither of the system's locks does what both need. `hold` is for runs, which take hours: a second run
is refused at once. It uses a POSIX lock, which belongs to the process: workers that a killed run leaves behind keep nobody
out. `hold_in_turn` is for saves, which take seconds: a second save waits. It uses a BSD lock (flock), which belongs to the
open file: threads of one process wait for each other too.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from ..arguments import shown
from ..errors import InputError
from .reading import FOLDER, NOTHING, kind

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
# The errors on a disk that has no locks, such as NFS without its lock daemon.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_log = logging.getLogger("minifocus")
_held: dict[str, tuple[int, int]] = {}  # of this process: folder → thread, how often it is held
_guard = threading.Lock()


@contextlib.contextmanager
def hold(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make `folder` if need be, and be the only process that writes into it inside the block.

    A thread that holds the folder may hold it again. Folders that were made and stay empty are removed. Raises InputError
    where another process or thread holds the folder, and where it cannot be made or written.

    The lock's file is removed at the end. One that a killed process left behind is not locked. Where the system or the disk
    has no locks, the log warns that nothing keeps two runs apart.
    """
    folder = Path(folder)
    name = str(folder) if len(str(folder)) <= 1000 else shown(str(folder))
    try:
        made = _make(folder)
        key, thread = os.path.realpath(folder), threading.get_ident()
        with _guard:
            owner, depth = _held.get(key, (thread, 0))
            if owner != thread:
                raise InputError(f"{name}: another thread of this process writes into it")
            # It is not opened twice: closing a file releases all of the process' locks on it.
            descriptor = None if depth else _lock(folder)
            _held[key] = thread, depth + 1
    except OSError as error:
        raise InputError(f"{name}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with _guard:
            _held[key] = thread, depth
            if not depth:
                del _held[key]
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    (folder / NAME).unlink()  # before the lock is released: see `_in_place`
                os.close(descriptor)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


@contextlib.contextmanager
def hold_in_turn(file: Path) -> Iterator[None]:
    """Make the folder of the lock `file`, wait until nobody else holds it, and hold it inside the block.

    At the end, folder and file are removed if nothing else is in the folder. Where the system or the disk has no locks,
    nobody waits. Raises InputError where the folder or the file is of another kind, and OSError.
    """
    folder = file.parent
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            if folder.is_symlink() or kind(folder) not in (FOLDER, NOTHING):
                raise InputError(f"{folder}: expected a folder, found something else") from None
        try:
            descriptor = _open(file)
        except FileNotFoundError:  # its last holder has just removed the folder
            continue
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a disk without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _in_place(descriptor, file):
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    if os.listdir(folder) == [file.name]:  # noqa: PTH208 (names)
                        file.unlink()
                        folder.rmdir()
            return
        finally:
            os.close(descriptor)


def _make(folder: Path) -> list[Path]:
    """Make the folder. Returns the folders that were not there before, the innermost first."""
    made = []
    for one in (folder, *folder.parents):
        if one.exists() or one.is_symlink():
            break
        made.append(one)
    if made[:1] != [folder] and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _lock(folder: Path) -> int:
    file = folder / NAME
    while True:
        descriptor = _open(file)
        try:
            if not _take(descriptor, folder):
                return descriptor
            if _in_place(descriptor, file):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(file: Path) -> int:
    """Open a lock's file, or make it. Links are not followed and a FIFO is not waited for."""
    options = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(file, options, 0o666)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise InputError(f"{file}: expected the file of a lock, found something else") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{file}: expected the file of a lock, found something else")
    return descriptor


def _in_place(descriptor: int, file: Path) -> bool:
    """Whether `file` is still the one that was opened. If its last holder has removed it meanwhile, locking it is useless."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _take(descriptor: int, folder: Path) -> bool:
    """Take the lock: True if it is taken, False where there are no locks. InputError where another process has it."""
    why = "this system has none"
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = os.read(descriptor, 20).decode(errors="replace").strip()
                other = f"process {holder}" if holder.isdigit() else "another process"
                raise InputError(
                    f"{folder}: {other} writes into it: wait for it to end, or name another folder"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            why = error.strerror or "the disk has none"
    _log.warning("%s: no lock keeps other runs from writing into it: %s", folder, why)
    return False
