"""The program that renders chat templates: `python -I -S template_renderer.py FOLDER…`, with the folders to find jinja2 in.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it away from the interpreter, but limits neither its
time nor its memory, and no check of the template's text can. So it runs in its own process, which has little of both and cannot
open anything once it has started: no file, no socket, no pipe. `chat_template.py` starts this file outside of the package: it
imports no torch, and starts at once.

Each line of the input is a request, {"source": ..., "variables": {...}}, and each line of the output the reply to it:
{"text": ...}, or {"fault": "syntax", "line": ...}, "refused" (its own raise_exception) or "failed", each with "words".
A template that runs out of time ends the process without a reply.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import signal
import sys
import time
from datetime import datetime
from typing import Any

SECONDS = 2.0  # of processor time; a usual template takes a ten-thousandth of it
MEMORY = 2**29  # bytes of address space; the interpreter with jinja2 takes a tenth of it
LONGEST = 2**20  # characters of the text, beyond a multiple of the request's length


def main() -> None:
    # With -I -S, only the standard library is on the path. jinja2 is wherever the asking process has it, be that a virtual
    # environment, PYTHONPATH or a zip file; its folders come last, so that none hides a module of the standard library.
    sys.path += sys.argv[1:]
    environment = sandbox()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the program that asks
    prepare()
    limit()
    compiled = functools.lru_cache(maxsize=16)(environment.from_string)
    for line in sys.stdin.buffer:
        with deadline():
            reply = answer(compiled, line)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


def prepare() -> None:
    """Import what Python and Jinja import only when a template needs it, while files can still be opened."""
    for name in ("jinja2.debug", "jinja2.constants", "encodings.unicode_escape", "pprint", "textwrap"):
        importlib.import_module(name)
    time.localtime()


def limit() -> None:
    """Limit what a template can use or open from now on, as far as the system has such limits."""
    with contextlib.suppress(ImportError):
        import resource

        for name, most in (("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0), ("NOFILE", 3)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


@contextlib.contextmanager
def deadline() -> Any:
    """Inside the block, the system ends the process when the time is up, whatever it is doing."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def answer(compiled: Any, line: bytes) -> str:
    """The reply to a request, as a line of JSON."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        request = json.loads(line)
        text = compiled(request["source"]).render(request["variables"])
        if len(text) > LONGEST + 16 * len(line):
            return json.dumps({"fault": "failed", "words": f"a text of {len(text)} characters"})
        return json.dumps({"text": text})
    except TemplateSyntaxError as error:
        return json.dumps({"fault": "syntax", "line": error.lineno, "words": brief(error.message)})
    except TemplateError as error:
        fault = "refused" if type(error) is TemplateError else "failed"
        return json.dumps({"fault": fault, "words": brief(error.message)})
    except MemoryError:
        return json.dumps({"fault": "failed", "words": f"more than {MEMORY >> 20} MiB of memory"})
    except Exception as error:
        return json.dumps({"fault": "failed", "words": brief(f"{type(error).__name__}: {error}")})


def brief(words: object) -> str:
    text = str(words)
    return text if len(text) <= 500 else f"{text[:250]} … {text[-250:]}"


def sandbox() -> Any:
    """Jinja with the settings and names that transformers gives to chat templates."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, which marks the model's own words. Here it is text like any other."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> str:
            return str(caller())

    class Names(Namespace):
        """`namespace`, but without the names that lead into the interpreter."""

        def __init__(*arguments: Any, **values: Any):
            own, *rest = arguments
            given = dict(*rest, **values)
            for name in given:
                Names.check(name)
            Namespace.__init__(own, given)

        def __setitem__(self, name: str, value: Any) -> None:
            Names.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace has no place for {name!r}")

    def raise_exception(words: object) -> None:
        raise TemplateError(str(words))

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Names,
    }
    return environment


if __name__ == "__main__":
    main()
