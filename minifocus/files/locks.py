"""One process at a time may write into a folder: a lock that the system gives back when its holder dies."""

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

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
# What systems say where a disk has no locks; NFS without its lock daemon is one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_log = logging.getLogger("minifocus")
_held: dict[str, tuple[int, int]] = {}  # of this process: folder → thread, how often it is held
_guard = threading.Lock()


@contextlib.contextmanager
def hold(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make `folder`, if it is not there, and be the only one that writes into it meanwhile.

    InputError, which names the folder and the other process, where someone else holds it, and where it cannot be made or
    written. A thread that holds it already may hold it again. Folders that were made and stay empty are removed.

    The lock is POSIX's, on a file in the folder: it goes with the process, however that ends, and processes that it
    started have no part in it. The file is removed at the end; one that a killed process left is locked by nobody. Where
    the system or the disk has no locks, a warning says that nothing keeps two runs apart.
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
            # Not opened again: closing a file gives back all of a process' locks on it.
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
                    (folder / NAME).unlink()  # before it is given back: see `_lock`
                os.close(descriptor)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _make(folder: Path) -> list[Path]:
    """Those folders that were not there, the innermost first."""
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
        # Neither through a link nor waiting for a FIFO.
        options = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(file, options, 0o666)
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
                raise InputError(f"{file}: expected the file of a lock, found something else") from error
            raise
        try:
            opened = os.fstat(descriptor)
            if not stat.S_ISREG(opened.st_mode):
                raise InputError(f"{file}: expected the file of a lock, found something else")
            if not _take(descriptor, folder):
                return descriptor
            # Its last holder may have removed the file since it was opened: then another one is in its place.
            if os.path.exists(file) and os.path.samestat(opened, os.stat(file)):  # noqa: PTH110, PTH116
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> bool:
    """Whether the lock is taken; False where there are none. InputError where someone else has it."""
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
