"""Processes of one run, as torchrun would start them, but forked after the imports, which take longer than most runs here."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from forked import ROOT, Forked


class Several(Forked):
    """`count` processes that run a script: examples/SCRIPT.py, or the file SCRIPT. Used with `with`, which ends them."""

    def __init__(
        self, count: int, script: str | Path, *arguments: Any, folders: tuple[Path, ...] = (), **environment: str
    ):
        """`folders`: in which each of them begins."""
        with socket.create_server(("localhost", 0)) as free:
            place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        ranks = [
            {**place, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            for rank in range(count)
        ]
        file = script if isinstance(script, Path) else ROOT / f"examples/{script}.py"
        super().__init__([file, *arguments], ranks, folders)
