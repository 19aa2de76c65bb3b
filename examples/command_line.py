"""How every script of this repository begins and ends, and how it says that it cannot do what it was asked.

A script imports this first and calls `begin` before its other imports, for torch takes seconds; its `main` is `guarded`,
and `run` ends the process. Exit statuses:

0    done
1    the script's own: what it checks is not so, or a program that it started has failed
2    an argument, a file or the machine is in the way: one line, "error: …", on standard error
130  interrupted by Ctrl-C, as shells have it
141  whoever read the output has stopped reading (`| head`), as shells have it of programs that SIGPIPE ends

An exception that none of these foresees is a fault of the script's own and keeps its traceback.

Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import logging
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

FAILED, REFUSED, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
LARGEST = 2**63 - 1  # of a whole number that torch and numpy take
LONGEST = 400  # letters of what argparse says

Pool = TypeVar("Pool", bound=Executor)


class Refused(Exception):
    """A user's mistake that is found before the library is asked; the text is the line that is printed."""


class Failed(Exception):
    """A program that the script started has failed; the text is the line that is printed, and the status is 1."""


class Parser(argparse.ArgumentParser):
    """Takes options in full alone, and says what is wrong in one line that does not repeat an argument at length."""

    def __init__(self, description: str | None, **options: Any):
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(description=description, **options)

    def print_help(self, file: Any = None) -> None:
        (file or sys.stdout).write(self.format_help())  # argparse's own says nothing where it cannot

    def error(self, message: str) -> NoReturn:
        half = LONGEST // 2
        brief = message if len(message) <= LONGEST else f"{message[:half]} … {message[-half:]}"
        self.exit(REFUSED, f"error: {_on_one_line(brief)} (--help says more)\n")


# ----------------------------------------------------------------------------------------------------- begin and end


def begin() -> None:
    """Of a script, before its other imports: Ctrl-C ends it at once, as there is nothing yet to put in order."""
    for descriptor in range(3):
        # A standard stream that is closed (`>&-`) would lend its number to the next file that is opened.
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if "RANK" in os.environ:  # of torch's own warnings: when a process dies, those that miss it have long ones
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 (for as long as the process lives)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's job in the background ignores it
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> NoReturn:
    os._exit(INTERRUPTED)


def guarded(main: Callable[[], int | None]) -> Callable[[], int]:
    """`main` with its exit status as its value, also where it was interrupted or something is in its way."""

    @functools.wraps(main)
    def status() -> int:
        try:
            return main() or 0
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            return BROKEN_PIPE
        except Failed as error:
            complain(str(error))
            return FAILED
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            complain(reason)
            return REFUSED

    return status


def run(main: Callable[[], int]) -> NoReturn:
    """Of a script, as its last line: call `main`, which is `guarded`, and end the process with its status."""
    logging.raiseExceptions = False  # a log that nobody reads any more is no reason for a traceback
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # of what stands in for a stream
            # What a terminal's encoding lacks is escaped: é may not be there in ASCII, nor half a surrogate pair in any.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    ours = signal.getsignal(signal.SIGINT) is _leave
    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what is open is closed on the way out
        code = main()
    except SystemExit as leaving:  # argparse's
        code = leaving.code if isinstance(leaving.code, int) else FAILED if leaving.code else 0
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except KeyboardInterrupt:  # a second one, while the first was dealt with
        code = INTERRUPTED
    finally:
        if ours:
            signal.signal(signal.SIGINT, _leave)
    code = _flush(code)
    if code == INTERRUPTED:
        # Python would wait for threads, and those for programs that they started.
        if "multiprocessing" in sys.modules:
            for child in sys.modules["multiprocessing"].active_children():
                child.terminate()
        for program in tuple(_started):
            program.terminate()
        os._exit(code)
    sys.exit(code)


def _flush(code: int) -> int:
    """Write what is still to be written, where an error can be told; the status that this leaves."""
    for stream, name in ((sys.stdout, "standard output"), (sys.stderr, "standard error")):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or BROKEN_PIPE
            _discard(stream)
        except OSError as error:
            _discard(stream)
            if code == 0:
                complain(f"{name}: {error.strerror}")
                code = REFUSED
        except ValueError:  # closed
            pass
    return code


def _discard(stream: Any) -> None:
    """What is left in its buffer goes nowhere, so that Python does not try again at its end and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


# --------------------------------------------------------------------------------------------- programs and threads

_started: set[subprocess.Popen[str]] = set()


def call(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`; the program ends when this one is interrupted, whichever thread waits for it."""
    with subprocess.Popen(command, text=True, **options) as program:
        _started.add(program)
        try:
            output, errors = program.communicate()
        except BaseException:
            program.terminate()  # and so what it has started itself, if it is torchrun
            raise
        finally:
            _started.discard(program)
    return subprocess.CompletedProcess(command, program.returncode, output, errors)


@contextlib.contextmanager
def working(pool: Pool) -> Iterator[Pool]:
    """A pool of threads or processes. Left by an error, it begins nothing more; interrupted, it is not waited for either."""
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    pool.shutdown()


# ------------------------------------------------------------------------------------------------- what is in the way


def complain(reason: str) -> None:
    """One line on standard error, if that can be written to."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"error: {_on_one_line(reason)}", file=sys.stderr, flush=True)


def _on_one_line(text: str) -> str:
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)  # file names may hold any


def _reason(error: Exception) -> str | None:
    """In words, where it is a user's mistake or the machine's limits; None for a fault of the script."""
    library = sys.modules.get("minifocus.errors")  # imported here, it would take torch with it
    if isinstance(error, Refused) or (library and isinstance(error, (library.CheckpointError, library.InputError))):
        return str(error)
    text, kind = str(error), type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"not enough memory: {(text.splitlines() or ['it ran out'])[0][:LONGEST]}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{_where(error)}{error.strerror}"
    if kind == "SafetensorError" and "(os error " in text:
        return text
    return None


def _where(error: OSError) -> str:
    """The file's name. Writing to one that is open names none: files are named by whoever writes them (`write_text`)."""
    if error.filename is not None:
        return f"{_brief(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename)}: "
    return "output: " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""


def _brief(value: object, longest: int = 200) -> str:
    if isinstance(value, int) and value.bit_length() > 100:
        return f"a whole number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"


# ------------------------------------------------------------------------------------------- arguments, before any work


def option(name: str) -> str:
    """An argument's name as it is given."""
    return f"--{name.replace('_', '-')}"


def expect(fits: bool, arguments: argparse.Namespace, name: str, expected: str) -> None:
    """Refuse the argument `name` where it does not fit."""
    if not fits:
        raise Refused(f"{option(name)}: expected {expected}, got {_brief(getattr(arguments, name))}")


def expect_numbers(arguments: argparse.Namespace, least: float, names: str, most: float = LARGEST) -> None:
    """Refuse those of the named arguments that are given and are not from `least` to `most`, as NaN is not."""
    for name in names.split():
        value = getattr(arguments, name)
        bound = f"at most {most:g}" if value is not None and value > most else f"at least {least:g}"
        expect(value is None or least <= value <= most, arguments, name, f"a number of {bound}")


def expect_text(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse what a terminal sent that is not in its own encoding: no tokenizer takes it, nor does JSON."""
    for name in names:
        given = getattr(arguments, name)
        for text in given if isinstance(given, list) else [given or ""]:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise Refused(
                    f"{option(name)}: expected text, got bytes that are none: {_brief(ascii(text))}"
                ) from None


def expect_file(file: str | Path | None, name: str, *, parents: bool = True) -> None:
    """Refuse at the beginning what could not be written at the end. `parents`: make the folders that it is to lie in."""
    if file is None:
        return
    file = Path(file)
    try:
        if parents:
            file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():  # a device, which would be replaced
            raise Refused(f"{option(name)}: expected a file, got {_brief(file)}, which is something else")
        if not file.name:
            raise Refused(f"{option(name)}: expected the name of a file, got {str(file)!r}")
        with _unfinished(file):
            pass
    except OSError as error:
        raise Refused(f"{option(name)}: {_brief(file)}: {error.strerror}") from error


def write_text(file: Path, text: str) -> None:
    """All of a file or nothing of it: whoever reads it meanwhile, or writes another, never has the half of one."""
    try:
        with _unfinished(file) as unfinished:
            unfinished.write_bytes(text.encode())
            unfinished.replace(file)
    except OSError as error:  # which names no file where one that is open cannot be written
        raise Refused(f"{_brief(file)}: {error.strerror}") from error


@contextlib.contextmanager
def _unfinished(file: Path) -> Iterator[Path]:
    """A new file beside `file`; what is still of that name in the end goes. Raises OSError, of `file`'s name if too long."""
    if len(os.fsencode(file.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(file))
    unfinished = file.with_name(f".unfinished-{uuid.uuid4().hex[:8]}")
    unfinished.open("xb").close()
    try:
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)
