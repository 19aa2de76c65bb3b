"""The command-line options that choose a sampler, for generate.py and evaluate.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Container
from typing import Any

import minifocus
from minifocus.arguments import shown


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampler")
    group.add_argument("--sampler", default="focus", choices=minifocus.methods.names())
    group.add_argument("--gamma", type=float, help="text-guided: share of the importance to keep (0.85)")
    group.add_argument("--ratio", type=float, help="training-free methods: share of the tokens to keep")
    group.add_argument("--keep", type=int, help="keep this many tokens per picture instead")
    group.add_argument("--layer", type=int, help="text-guided: act before this layer (a quarter of the depth)")
    group.add_argument(
        "--selector", help="vision-guided: a selector file, or 'variance' for the training-free stand-in"
    )
    add_option(group)


def add_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of the sampler, such as per=tile or layers=[1,2]; may be repeated",
    )


def sampler_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given. Raises InputError."""
    names = ("gamma", "ratio", "keep", "layer", "selector")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {**options, **read_options(arguments.option, options)}


def read_options(given: list[str], taken: Container[str] = (), flag: str = "--option") -> dict[str, Any]:
    """The values of --option: JSON, or else text. Raises InputError where a name is there twice or `taken`."""
    options: dict[str, Any] = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not equals or not name.isidentifier() or len(name) > 50 or name in options or name in taken:
            raise minifocus.InputError(f"{flag}: expected NAME=VALUE, each name once, got {shown(one)}")
        try:
            options[name] = json.loads(text)
        except RecursionError:
            raise minifocus.InputError(f"{flag}: {name}: nested too deeply") from None
        except ValueError:
            options[name] = text
    return options
