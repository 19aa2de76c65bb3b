"""An installed minifocus where little else is: torch, numpy, pillow, safetensors and one tokenizer library. It answers without
the network and without writing a file, as on a read-only disk, and its import takes little more time than torch's.

python check_bare.py SOURCES     (from another folder than SOURCES, the repository's)
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from resource import RUSAGE_CHILDREN, getrusage

ABSENT = ("jinja2", "sentencepiece", "tqdm", "transformers", "matplotlib")
MOST = 1.2  # of torch's import
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
REFUSED = ("socket.connect", "socket.getaddrinfo", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def hook(event: str, arguments: tuple[object, ...]) -> None:
    """Refuses what a machine that is off the network and has a read-only disk would."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES and arguments[0] != os.devnull
    if event in REFUSED or writes:
        raise OSError(f"check_bare: {event} {arguments}")


def processor_time(module: str) -> float:
    """Seconds to import it."""
    before = getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(sources: str) -> None:
    there = [name for name in ABSENT if find_spec(name)]
    assert not there, f"expected an environment without {', '.join(there)}"
    # In turns, and the least: the first time they are compiled, and other work of the machine may come between.
    rounds = [(processor_time("minifocus"), processor_time("torch")) for _ in range(4)]
    ours, torchs = map(min, zip(*rounds, strict=True))
    ratio = ours / torchs
    assert ratio <= MOST, f"importing minifocus takes {ratio:.2f} times as long as importing torch"

    sys.dont_write_bytecode = True
    sys.addaudithook(hook)
    import minifocus

    model = minifocus.load(f"{sources}/weights/tiny")
    # The folder's own template is jinja's to render; a named one is not.
    answer = model.generate(f"{sources}/examples/cards.png", "What number is on the red card?", template="vicuna")
    assert answer.text, answer
    try:
        model.generate(f"{sources}/examples/cards.png", "What number is on the red card?")
    except minifocus.CheckpointError as error:
        assert "jinja2" in str(error), error
    else:
        raise AssertionError("expected an error that names jinja2")
    print(f"bare: import takes {ratio:.2f} of torch's time; the embedded model answers {answer.text!r}")


if __name__ == "__main__":
    main(sys.argv[1])
