"""The page of a run, out of its record."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from ..timing import ratio, remark
from .communication import sent

PLAIN = "plain"
MB = 1e6

PAGE = """# Processes that share a model

Made by `{command}` at `{commit}`, with torch {torch}, on {cores} cores ({cpu}).

A decoder of {decoder:.0f} million random parameters in float32 ({layers} layers, {width} wide, {heads} heads over {keys} key
heads). All processes ran on this one machine, by gloo, and shared its cores: sharing can make nothing faster here, and the
tables say what it costs and what memory it saves. **plain** is one process without any of it; a side's ratio to it is the
median over rounds.

{tables}
- **prompt**, **answer**: tokens per second, of {prompt} tokens that are read and {new_tokens} that are written, the first of
  them left out. Of a step: tokens of {examples} examples. Each is the median over rounds.
- **decoder**: the values of it that a process holds, embeddings among them. **resident**: the most that was in memory at once in
  any of the processes, in brackets what it was after the imports. Of training that is weights, gradients, AdamW's moments,
  activations, and what glibc keeps of freed arrays, gathered layers among them: on a CPU train.py asks it to.
- **sent** by each process of a ring, with its payload's kinds added up; computed from shapes, and as counted in torch. The two
  were equal to the byte: otherwise there would be no record.
"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]) + "\n"


def name_of(side: str, one: dict[str, Any]) -> str:
    processes = "1 process" if one["processes"] == 1 else f"{one['processes']} processes"
    threads = "1 thread" if one["threads"] == 1 else f"{one['threads']} threads"
    return f"{PLAIN if side == PLAIN else processes} ({threads}{'' if one['processes'] == 1 else ' each'})"


def rate(tokens: int, seconds: list[float]) -> str:
    return f"{tokens / median(seconds):.1f}"


def answers(record: dict[str, Any]) -> str:
    sides, rows = record["answers"]["sides"], []
    for name, one in sides.items():
        row = [name_of(name, one)]
        for part, tokens in (("prefill", one["prompt"]), ("decode", record["new_tokens"] - 1)):
            these, those = sides[PLAIN]["seconds"][part], one["seconds"][part]
            row += [rate(tokens, those), f"{ratio(these, those):.2f}"]
        memory = {key: size / MB for key, size in one["memory"].items()}
        row += [f"{memory['decoder']:.0f} MB", f"{memory['peak']:.0f} MB ({memory['imports']:.0f})"]
        rows.append(row)
    return table(["answers", "prompt", "÷ plain", "answer", "÷ plain", "decoder", "resident"], rows)


def training(record: dict[str, Any]) -> str:
    found, rows = record["training"], []
    for name, one in found["sides"].items():
        these, those = found["sides"][PLAIN]["step"], one["step"]
        row = [name_of(name, one), rate(found["tokens"], those), f"{ratio(these, those):.2f}"]
        rows.append([*row, f"{one['memory']['peak'] / MB:.0f} MB"])
    return table(["training", "tokens/s", "÷ plain", "resident"], rows)


def communication(record: dict[str, Any]) -> str:
    rows = []
    for one in record["sent"]:
        for what, payload in one["what"].items():
            computed, counted = (sent(Counter(payload[key]), one["processes"]) / MB for key in ("computed", "counted"))
            size = f"{one['layers']} layers, {one['width']} wide"
            rows.append([size, str(one["processes"]), what, f"{computed:.4g} MB", f"{counted:.4g} MB"])
    return table(["decoder", "processes", "sent by each, of a", "computed", "counted"], rows)


def tables(record: dict[str, Any]) -> str:
    note = remark(record["answers"]["watched"])
    return f"{answers(record)}\n{note}\n\n{training(record)}\n{communication(record)}"


def page(record: dict[str, Any]) -> str:
    model = record["model"]
    return PAGE.format(
        command=record["command"],
        commit=str(record["commit"])[:12] + ("+" if record["dirty"] else ""),
        torch=record["versions"]["torch"],
        **{key: record["machine"][key] for key in ("cores", "cpu")},
        decoder=model["parameters"]["decoder"] / 1e6,
        layers=model["num_hidden_layers"],
        width=model["hidden_size"],
        heads=model["num_attention_heads"],
        keys=model["num_key_value_heads"],
        tables=tables(record),
        prompt=record["answers"]["sides"][PLAIN]["prompt"],
        new_tokens=record["new_tokens"],
        examples=record["training"]["examples"],
    )
