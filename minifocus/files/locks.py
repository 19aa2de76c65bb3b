"""One at a time in a folder, by locks that the system gives back when their holder dies, however that ends.

There are two, for neither of the system's two locks does what both need. `hold` is for runs, which take hours: who comes
second is refused at once. Its lock is POSIX's, which is the process' own: the workers that a killed run leaves behind keep
nobody out. `hold_in_turn` is for saves, which take seconds: who comes second waits. Its lock is BSD's, which goes with the
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

    The file of the lock is removed at the end; one that a killed process left is locked by nobody. Where the system or the
    disk has no locks, a warning says that nothing keeps two runs apart.
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


@contextlib.contextmanager
def hold_in_turn(file: Path) -> Iterator[None]:
    """Make the folder of `file`, which is a lock, and be the only one in it, after whoever is there already.

    At the end both go, if nothing else is in the folder. Where the system or the disk has no locks, nobody waits. Raises
    InputError where the folder or the lock is something else, and OSError.
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
    """A descriptor of a lock, which is made if need be: neither through a link nor waiting for a FIFO."""
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
    """Whether it is still that file: one that its last holder has removed since it was opened locks nothing any more."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


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
