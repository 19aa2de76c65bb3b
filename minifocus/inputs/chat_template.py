"""The chat template of a model's folder: a Jinja template for the text that the checkpoint was trained with.

It is found where transformers finds it, and rendered as transformers renders it, but in another process: see
`template_renderer.py`. That process starts, and jinja2 is looked for, only when a template is rendered.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import CheckpointError, InputError
from ..files.reading import FOLDER, kind, present, read_bytes
from ..loading.json_fields import JsonFields

_LONGEST = 2**20  # bytes of a template; usual ones have a few thousand

# Messages as transformers takes them: {"role": "user" or "assistant", "content": text or a list of parts}, a part being
# {"type": "text", "text": ...} or {"type": "image", ...}.
Message = dict[str, Any]
Special = tuple[tuple[str, str], ...]


class TemplateFails(CheckpointError):
    """A valid template fails with these messages. It may not with others."""


@dataclass(frozen=True)
class ChatTemplate:
    """
    place    the file that it came from, and the key in it if there is one
    source   the template itself, in Jinja's language
    special  its variables bos_token, eos_token and so on, from the tokenizer
    fault    why it cannot be used, raised only when it is: another template may be named instead
    """

    place: str
    source: str
    special: Special
    fault: str = ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Equals transformers' apply_chat_template(messages).

        Raises InputError if the template itself refuses the messages. Raises CheckpointError if it is not valid, fails, or
        takes more time or memory than any template needs.
        """
        if self.fault:
            raise CheckpointError(f"{self.place}: {self.fault}")
        variables = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **dict(self.special),
        }
        reply = _renderer.ask({"source": self.source, "variables": variables})
        if reply is None:
            raise CheckpointError(f"{self.place}: the chat template takes more time or memory than any needs")
        if "text" in reply:
            return str(reply["text"])
        words = reply["words"]
        if reply["fault"] == "refused":
            raise InputError(f"prompt: the chat template of {self.place} refuses it: {words}")
        if reply["fault"] == "syntax":
            raise CheckpointError(f"{self.place}: line {reply['line']}: not a chat template that can be read: {words}")
        raise TemplateFails(f"{self.place}: the chat template fails: {words}")


def read_chat_template(folder: Path, special: Special) -> ChatTemplate | None:
    """The folder's template; None if it has none. Of several named ones, it is the one called "default".

    The files are tried in the order of transformers' processors, then of its tokenizers: processor_config.json,
    chat_template.json, chat_template.jinja, additional_chat_templates/default.jinja, tokenizer_config.json. Raises
    CheckpointError for a file that cannot be read.
    """
    processor = JsonFields.of_file(folder / "processor_config.json", default={})
    if found := _of_field(processor, special):
        return found
    file = folder / "chat_template.json"
    if present(file):
        older = JsonFields.of_file(file)
        if "chat_template" not in older:
            raise CheckpointError(f"{file}: expected the key chat_template, found {shown(sorted(older.members))}")
        if _named_files(folder):
            raise CheckpointError(
                f"{file}: expected chat_template.jinja beside additional_chat_templates, as transformers does"
            )
        if found := _of_field(older, special):
            return found
    named = _named_files(folder)
    for template in (folder / "chat_template.jinja", *named.values()):
        is_default = template.name in ("chat_template.jinja", "default.jinja")
        if is_default and present(template) and (text := _read(template)):
            return ChatTemplate(str(template), text, special)
    if named:
        return ChatTemplate(str(folder / "additional_chat_templates"), "", special, _no_default(named))
    return _of_field(JsonFields.of_file(folder / "tokenizer_config.json", default={}), special)


def _of_field(fields: JsonFields, special: Special) -> ChatTemplate | None:
    """The template in a JSON file, written as text, {name: text}, or a list of {"name": name, "template": text}."""
    key, value = "chat_template", fields.get("chat_template")
    place = f"{fields.where}: {key}"
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if isinstance(value, dict):
        texts = bool(value) and all(isinstance(part, str) for pair in value.items() for part in pair)
        fields.check(key, texts, "templates with their names")
        if "default" not in value:
            return ChatTemplate(place, "", special, _no_default(value))
        value = value["default"]
    fields.check(key, value is None or isinstance(value, str), "a chat template as text")
    return ChatTemplate(place, value, special) if value else None


def _no_default(names: Any) -> str:
    return f"expected a chat template named 'default', found {shown(sorted(names))}"


def _named_files(folder: Path) -> dict[str, Path]:
    extra = folder / "additional_chat_templates"
    if kind(extra) != FOLDER:
        return {}
    try:
        return {file.stem: file for file in extra.iterdir() if file.suffix == ".jinja"}
    except OSError as error:
        raise CheckpointError(f"{extra}: cannot be read: {error.strerror}") from error


def _read(file: Path) -> str:
    try:
        text = read_bytes(file, most=_LONGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not readable as text in UTF-8: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Renderer:
    """The process that renders. All templates share one; if a template ends it, the next template starts a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The reply to a request; None if the request ended the process."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                reply = self._process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:  # the reply to an interrupted request would be taken for the next one's
                self._end()
                raise
            if not reply.endswith(b"\n"):
                self._end()
                return None
        found: dict[str, Any] = json.loads(reply)
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        if find_spec("jinja2") is None:
            raise CheckpointError("the package jinja2, which renders a folder's chat template, is not installed")
        if getattr(sys, "frozen", False) or not sys.executable:  # a frozen program would start itself again
            raise CheckpointError(
                "a folder's chat template is rendered by a Python interpreter, and this process has none to start: "
                "expected template= with the name of one that is built in"
            )
        program = Path(__file__).with_name("template_renderer.py")
        folders = [entry for entry in sys.path if os.path.isabs(entry)]  # noqa: PTH117 (entries are text)
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", str(program), *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the process that renders chat templates cannot be started: {error}") from error

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def close(self) -> None:
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a forked child: the process belongs to the parent, in which a thread may have held the lock."""
        self.__init__()  # type: ignore[misc]


_renderer = _Renderer()
atexit.register(_renderer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)
