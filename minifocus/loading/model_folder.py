"""The files that are a model's own, and how a whole set of them takes the place of another in a folder.

What else lies in the folder is let be. The new files are written in a folder inside it, `STAGING`: what is beside it may be
on another disk, or not writable. When they are whole, and on the disk,

1. all of the old model's files go out of the way, config.json first, which every reader of a model begins with,
2. the new ones come in, config.json last.

So old and new files are never side by side, and between the two steps nothing loads, in transformers neither. A save that was
killed there is finished by whoever next loads the folder with minifocus or saves into it. A lock in `STAGING`, which its
process' death releases, keeps two saves apart on file systems that have locks. Who opens one file after another while a save
puts its own in place may get some of each: `minifocus.load` sees it by `stamps` and refuses, other readers do not.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, InputError
from ..files.locks import hold_in_turn
from ..files.reading import FOLDER, NOTHING, kind, named, present, read_bytes

CONFIG, SELECTOR = "config.json", "selector.safetensors"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# The rest of what minifocus or transformers reads of a folder without being asked to.
COMPANIONS = (
    *(CONFIG, "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json"),
)
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files

STAGING = ".minifocus-save"
# In it: files that are whole and have still to come in, those that went out of the way, and the same once they all have.
_READY, _LEAVING, _GONE, _LOCK = "ready", "leaving", "gone", "lock"

Companions = dict[str, bytes | CheckpointError]
Stamps = dict[str, tuple[int, int] | None]


class _CutShort(OSError):
    """Neither the old files nor the new ones are all in place."""


def own_files(folder: Path) -> list[str]:
    """The names, relative to `folder`, of what in it is a model's own; config.json is the first. Links are not followed."""
    names = []
    for file in folder.iterdir():
        if file.name in COMPANIONS or file.name == SELECTOR or WEIGHTS.fullmatch(file.name):
            names.append(file.name)
        elif file.name == TEMPLATES:
            names += [TEMPLATES] if file.is_symlink() or not file.is_dir() else _templates(folder)
    return sorted(names, key=lambda name: (name != CONFIG, name))


def _templates(folder: Path) -> list[str]:
    return [f"{TEMPLATES}/{file.name}" for file in (folder / TEMPLATES).iterdir() if file.suffix == ".jinja"]


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and what was in that folder then.

    companions  its files but for weights and selector by name, or why one cannot be read; `save` writes them again
                whatever has become of the folder since
    stamps      size and time of change, in nanoseconds, of all its files (None of one that is not there); another model
                that was saved there has others
    """

    folder: Path = Path()
    companions: Companions = field(default_factory=dict)
    stamps: Stamps = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Origin:
        folder = folder.absolute()  # wherever the process works by the time that it is asked
        found = stamps(folder)  # before what they are of
        names = [name for name in found if name in COMPANIONS]
        names += _templates(folder) if (folder / TEMPLATES).is_dir() else []
        companions: Companions = {}
        for name in names:
            try:
                companions[name] = read_bytes(folder / name)
            except CheckpointError as error:  # of no concern to who only loads, if it is not a file that is read
                companions[name] = error
        return cls(folder, companions, found)

    def holds_weights(self) -> bool:
        """Whether the folder's weights are those that were there."""
        then, now = ({n: s for n, s in of.items() if WEIGHTS.fullmatch(n)} for of in (self.stamps, stamps(self.folder)))
        return then == now


def stamps(folder: Path) -> Stamps:
    found: Stamps = {}
    for name in own_files(folder):
        try:
            about = (folder / name).stat()
            found[name] = (about.st_size, about.st_mtime_ns)
        except OSError:
            found[name] = None
    return found


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write a model's files in; after the block they are those of `folder`, which is made if need be.

    `folder` itself may be a link to one; links in it are replaced, never written through. If anything goes wrong, its files
    are what they were. Raises InputError where something else has the name of the folder or of a file, and OSError.
    """
    found = kind(folder)
    if found not in (FOLDER, NOTHING):
        raise InputError(f"{named(folder)}: expected a folder that can be written, found {found}")
    made = [parent for parent in (folder, *folder.parents) if not present(parent)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()  # wherever a link may lead later
        with _locked(folder) as staging:
            _finish(folder, staging)
            _refuse_folders(folder)
            fresh = staging / f"new-{uuid.uuid4().hex}"  # its own where there are no locks, too
            fresh.mkdir()
            try:
                yield fresh
                _sync(*fresh.rglob("*"), fresh, *(parent.parent for parent in made))
                fresh.rename(staging / _READY)
                _sync(staging, folder)
                _exchange(folder, staging)
            except _CutShort:
                raise
            except BaseException:
                with suppress(OSError):
                    _clear(staging)
                raise
            with suppress(OSError):  # the new model is in place: leftovers are the next save's to remove
                _clear(staging)
    except BaseException:
        with suppress(OSError):  # the first that is not empty keeps those above it
            for parent in made:
                parent.rmdir()
        raise


def finish_save(folder: Path) -> None:
    """Put the new files in place where a save was killed as it did so; wait for one that is at it.

    Raises CheckpointError where that is needed and cannot be done.
    """
    unfinished = folder / STAGING / _READY / CONFIG
    if not present(unfinished):
        return
    try:
        with _locked(folder.resolve()) as staging:
            _finish(staging.parent, staging)
    except (OSError, InputError) as error:
        if present(unfinished):
            raise CheckpointError(
                f"{folder}: a save into it was cut short, and what it left in {STAGING} cannot be put in place: {error}"
            ) from error


def _finish(folder: Path, staging: Path) -> None:
    """What `replacing` does at its end, from where a process was killed, and what one left that had not come so far."""
    if present(staging / _READY / CONFIG):
        _exchange(folder, staging)
    _clear(staging)


def _exchange(folder: Path, staging: Path) -> None:
    """The two steps, perhaps done in part already. If one fails, what was done here is undone; else it is _CutShort."""
    ready, leaving, gone = staging / _READY, staging / _LEAVING, staging / _GONE
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        for parent in (source.parent, target.parent):
            if parent.is_symlink():  # such as no save leaves behind
                raise InputError(f"{parent}: expected a folder, found a link")
        moved.append((source, target))
        source.replace(target)

    try:
        if not present(gone):
            for name in own_files(folder):
                move(folder / name, leaving / name)
                if name == CONFIG:
                    _sync(leaving, folder)
            leaving.mkdir(exist_ok=True)
            _sync(leaving, folder)
            move(leaving, gone)
            _sync(staging)
        for name in reversed(own_files(ready)):
            if name == CONFIG:
                _sync(folder)
            move(ready / name, folder / name)
        _sync(folder)
    except BaseException:
        try:
            for source, target in reversed(moved):
                if not os.path.lexists(source):  # as the last one may
                    target.replace(source)
        except BaseException as error:
            raise _CutShort(f"cut short, and not undone: {error}. Loading the folder will finish it") from error
        raise
    with suppress(OSError):  # where it is not there, or holds what is not the model's
        (folder / TEMPLATES).rmdir()


def _clear(staging: Path) -> None:
    """Remove everything but the lock; first what would say that there is something left to do."""
    shutil.rmtree(staging / _READY, ignore_errors=True)
    _sync(staging)
    for leftover in staging.iterdir():
        if leftover.name != _LOCK:
            shutil.rmtree(leftover)


def _refuse_folders(folder: Path) -> None:
    for file in (folder / name for name in own_files(folder)):
        if file.is_dir() and not file.is_symlink():
            raise InputError(f"{file}: expected a file, or nothing, found a folder")


def _sync(*paths: Path) -> None:
    """Have the disk hold files' contents, and which files folders hold, before anything that comes after."""
    for path in paths:
        if os.name == "posix":  # elsewhere there are no descriptors of folders
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot, for folders
                    raise
            finally:
                os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """`STAGING`, which no other save is in meanwhile. Afterwards it goes, if it is empty."""
    staging = folder / STAGING
    with hold_in_turn(staging / _LOCK):
        yield staging
