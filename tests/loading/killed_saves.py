"""Saves that are killed anywhere: a program for test_saving.py, and the folders that both look at."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import minifocus

OTHERS = {
    "README.md": b"mine", ".gitattributes": b"*", "LICENSE": b"free", "notes.json": b"{}", "log.jsonl": b"",
    "model_ema.safetensors": b"another's", "trainer_state.json": b"{}", ".git/config": b"[core]",
    "checkpoint-1/config.json": b"{}", "additional_chat_templates/notes.txt": b"mine",
}  # fmt: skip


def with_others(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    for name, content in OTHERS.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def main() -> None:
    """Let saves kill themselves before the system is asked for the N-th change of, or look into, a file or folder."""
    old, new, work = map(Path, sys.argv[1:])
    model, target = minifocus.load(new), work / "target"
    of_old, of_new = contents(old), contents(new)
    seen = {"untouched": 0, "between": 0, "replaced": 0}
    number = code = 1
    while code:
        if not target.exists():
            with_others(old, target)
        child = os.fork()
        if not child:
            left = number

            def hook(event: str, _: object) -> None:
                nonlocal left
                if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "fcntl.flock"):
                    left -= 1
                    if not left:
                        os._exit(9)

            sys.addaudithook(hook)
            os.fsync = lambda descriptor: None  # of no use to a process that is killed
            model.save(target)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        found = {name: content for name, content in contents(target).items() if not name.startswith(".minifocus-save")}
        for name, content in OTHERS.items():
            assert found.pop(name) == content, name
        # What transformers sees.
        assert found.items() <= of_old.items() or found.items() <= of_new.items(), sorted(found)
        assert "config.json" not in found or found in (of_old, of_new), sorted(found)
        seen["untouched" if found == of_old else "replaced" if found == of_new else "between"] += 1
        if "config.json" not in found and number % 2:
            minifocus.load(target)
            assert contents(target) == of_new | OTHERS
        elif code and number % 4 == 0:
            model.save(target)
            assert contents(target) == of_new | OTHERS and not (target / ".minifocus-save").exists()
        shutil.rmtree(target / ".minifocus-save" if found == of_old else target, ignore_errors=True)
        number += 1 if "config.json" not in found else 3
    print(number, seen)
    assert min(seen.values()) > 5


if __name__ == "__main__":
    main()
