"""Which files belong to a model, and how a save replaces all of them at once.

Other files in the folder are left alone. The new files are first written into a folder inside it, `STAGING`: a folder beside
it could be on another disk, or not writable. When they are complete and on the disk,

1. the old model's files move out, config.json first, as every reader of a model begins with it,
2. the new files move in, config.json last.

So old and new files are never side by side, and between the two steps nothing loads, not in transformers either. If a save is
killed there, the next load of the folder by minifocus, or the next save into it, finishes it. A lock in `STAGING` keeps two
saves apart on file systems that have locks. A reader that opens one file after another during the two steps may get files of
both models: `minifocus.load` notices by their `stamps` and refuses, other readers do not.
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

CONFIG, SELECTOR, ROUTER = "config.json", "selector.safetensors", "router.safetensors"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# The other files of a folder that minifocus or transformers reads unasked.
COMPANIONS = (
    *(CONFIG, "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json"),
)
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files

STAGING = ".minifocus-save"
# In it: new files that are complete and have still to move in; old files that are moving out; the same once all have; the lock.
_READY, _LEAVING, _GONE, _LOCK = "ready", "leaving", "gone", "lock"

Companions = dict[str, bytes | CheckpointError]
Stamps = dict[str, tuple[int, int] | None]


class _CutShort(OSError):
    """A save failed half-way: neither all old files nor all new ones are in place."""


def own_files(folder: Path) -> list[str]:
    """The names of the model's files, relative to `folder`, config.json first. Links are not followed."""
    names = []
    for file in folder.iterdir():
        if file.name in (*COMPANIONS, SELECTOR, ROUTER) or WEIGHTS.fullmatch(file.name):
            names.append(file.name)
        elif file.name == TEMPLATES:
            names += [TEMPLATES] if file.is_symlink() or not file.is_dir() else _templates(folder)
    return sorted(names, key=lambda name: (name != CONFIG, name))


def _templates(folder: Path) -> list[str]:
    try:
        return [f"{TEMPLATES}/{file.name}" for file in (folder / TEMPLATES).iterdir() if file.suffix == ".jinja"]
    except FileNotFoundError:  # a save into the folder may be moving it away
        return []


@dataclass(frozen=True)
class Origin:
    """The folder that a model was loaded from, as it was then.

    companions  its files by name, without weights, selector and router, or the error of one that cannot be read; `save` writes
                them again, whatever has happened to the folder since
    stamps      size and time of change, in nanoseconds, of all its files (None: not there); they tell whether another model
                has been saved there since
    """

    folder: Path = Path()
    companions: Companions = field(default_factory=dict)
    stamps: Stamps = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Origin:
        folder = folder.absolute()  # it must stay valid when the working directory changes
        found = stamps(folder)  # taken before the files are read
        names = [name for name in found if name in COMPANIONS]
        names += _templates(folder) if (folder / TEMPLATES).is_dir() else []
        companions: Companions = {}
        for name in names:
            try:
                companions[name] = read_bytes(folder / name)
            except CheckpointError as error:  # raised when the model is saved: loading may not need the file
                companions[name] = error
        return cls(folder, companions, found)

    def holds_weights(self) -> bool:
        """Whether the folder still holds the weights that were loaded."""
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
    """Gives an empty folder to write a model's files into. After the block they replace the model's files in `folder`.

    `folder` is made if need be, and may be a link to a folder. Links inside it are replaced and never written through. If
    anything fails, its files are what they were. Raises InputError where something else is in the place of the folder or of
    one of the files, and OSError.
    """
    found = kind(folder)
    if found not in (FOLDER, NOTHING):
        raise InputError(f"{named(folder)}: expected a folder that can be written, found {found}")
    made = [parent for parent in (folder, *folder.parents) if not present(parent)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()  # the link may be changed meanwhile
        with _locked(folder) as staging:
            _finish(folder, staging)
            _refuse_folders(folder)
            fresh = staging / f"new-{uuid.uuid4().hex}"  # a name of its own, as there may be no locks
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
            with suppress(OSError):  # the new model is in place; the next save removes leftovers
                _clear(staging)
    except BaseException:
        with suppress(OSError):  # stops at the first folder that is not empty
            for parent in made:
                parent.rmdir()
        raise


def finish_save(folder: Path) -> None:
    """Finish a save that was killed while it moved its files into place, or wait for one that is doing so.

    Raises CheckpointError where the save cannot be finished.
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
    """Finish a save that was killed while it moved its files, and remove what one left that was killed earlier."""
    if present(staging / _READY / CONFIG):
        _exchange(folder, staging)
    _clear(staging)


def _exchange(folder: Path, staging: Path) -> None:
    """The two steps, part of which may be done already. A failure is undone; where that fails too, it raises _CutShort."""
    ready, leaving, gone = staging / _READY, staging / _LEAVING, staging / _GONE
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        for parent in (source.parent, target.parent):
            if parent.is_symlink():  # no save makes such a link
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
                if not os.path.lexists(source):  # the last move may not have happened
                    target.replace(source)
        except BaseException as error:
            raise _CutShort(f"cut short, and not undone: {error}. Loading the folder will finish it") from error
        raise
    with suppress(OSError):  # it may be absent, or hold files of the user's
        (folder / TEMPLATES).rmdir()


def _clear(staging: Path) -> None:
    """Remove everything but the lock. What marks a save as unfinished goes first."""
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
    """Flush files and folders to the disk before anything else is written."""
    for path in paths:
        if os.name == "posix":  # other systems have no descriptors of folders
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
                    raise
            finally:
                os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """`STAGING`, made if need be and held by this save alone. Afterwards it is removed if it is empty."""
    staging = folder / STAGING
    with hold_in_turn(staging / _LOCK):
        yield staging
