"""What processes send each other: computed from a model's shapes, and counted while they run.

python -m experiments.many_devices.communication      # the table of docs/scale.md, for models of 7 to 13 billion parameters

A payload is the tensor that a collective is about, whole: what is added up, what a process has after a gather, or before its
sums are scattered. In a ring of n processes each sends 2 (n - 1) / n of it to add up, and (n - 1) / n to gather or to scatter.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from minifocus.loading.config import TextConfig
from minifocus.loading.weights import shapes_of
from minifocus.model import LlavaNetwork

from ..training_memory import BLOCK, DECODERS, LAYER, count, model_of

ADD, GATHER, SCATTER, TELL = "all_reduce", "all_gather", "reduce_scatter", "broadcast"
KINDS = {
    "allreduce_": ADD,
    "all_reduce": ADD,
    "allgather_": GATHER,
    "_allgather_base_": GATHER,
    "all_gather_into_tensor": GATHER,
    "_reduce_scatter_base_": SCATTER,
    "reduce_scatter_tensor": SCATTER,
    "broadcast_": TELL,
    "broadcast": TELL,
}  # torch's operators, of torch.distributed and of DTensor
VISUAL = 2928  # tokens of a picture of 672×672 pixels

Payload = Counter[str]  # bytes, by kind


class Counted(TorchDispatchMode):
    """Counts the payloads of this thread's collectives. Whole numbers, by which processes agree, are counted apart."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Payload = Counter()
        self.agreement = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # of what it does with its parts, collectives among it, this is told
        kind = KINDS.get(func.overloadpacket.__name__)
        if kind is not None and func.namespace in ("c10d", "_c10d_functional"):
            found = [list(tensors_in(one)) for one in args]
            largest = max(found, key=lambda own: sum(one.nbytes for one in own))
            size = sum(one.nbytes for one in largest)
            if largest[0].is_floating_point():
                self.payload[kind] += size
            else:
                self.agreement += size
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def sent(payload: Payload, processes: int) -> float:
    """Bytes that each process of a ring sends for that."""
    share = (processes - 1) / processes
    factors = {ADD: 2 * share, GATHER: share, SCATTER: share, TELL: 1 if processes > 1 else 0}
    return sum(factors[kind] * size for kind, size in payload.items())


# ---- tensor parallel answers ----


def of_prompt(
    text: TextConfig, entered: int, layer_tokens: Sequence[int], processes: int, width: int, scored: tuple[int, int]
) -> Payload:
    """Of a prompt of which `entered` tokens enter, and each layer reads `layer_tokens`, in numbers of `width` bytes.

    scored  (words, visual tokens) whose queries and keys the text-guided sampler gathers; (0, 0) without it
    """
    read = sum(layer_tokens[:-1]) + 1  # of the last layer only the last token comes out
    words, visual = scored
    heads = words * text.num_attention_heads + visual * text.num_key_value_heads
    return Counter(
        {
            ADD: 2 * read * text.hidden_size * width,
            GATHER: logits(text, processes, width) + heads * text.head_dim * width,
            TELL: entered * text.hidden_size * width,
        }
    )


def of_token(text: TextConfig, processes: int, width: int) -> Payload:
    """Of each further token of an answer."""
    added = 2 * text.num_hidden_layers * text.hidden_size * width
    return Counter({ADD: added, GATHER: logits(text, processes, width)})


def logits(text: TextConfig, processes: int, width: int) -> int:
    return -(-text.vocab_size // processes) * processes * width


# ---- training in shares ----


def of_micro_batch(model: LlavaNetwork, processes: int) -> Payload:
    """Of one micro-batch's gradients with --shard, where everything is trained and the method learns nothing.

    Every layer is gathered twice, for the forward and the backward pass, and all that is no layer once; float32. Shares are
    whole rows, so that a little more is sent than there is.
    """
    run = max(model.config.feature_layers)  # blocks of the tower
    shapes = {n: shape for n, shape in shapes_of(model).items() if not n.startswith(BLOCK) or block_of(n) < run}
    layers = count((shape for n, shape in shapes.items() if n.startswith((LAYER, BLOCK))), processes) * processes
    rest = count((shape for n, shape in shapes.items() if not n.startswith((LAYER, BLOCK))), processes) * processes
    return Counter({GATHER: 4 * (2 * layers + rest), SCATTER: 4 * (layers + rest)})


def block_of(name: str) -> int:
    return int(name.removeprefix(BLOCK).partition(".")[0])


# ---- the table ----


def table(processes: Sequence[int] = (2, 4, 8)) -> str:
    """In Markdown: what each process sends, for models of known shapes."""
    of = " | ".join(f"{n} processes" for n in processes)
    lines = [f"| decoder | what | {of} |", "|" + "---|" * (2 + len(processes))]
    for name, decoder in DECODERS.items():
        model = model_of(decoder)
        text = model.config.text
        depth = text.num_hidden_layers
        prompts = [of_prompt(text, VISUAL, [VISUAL] * depth, n, 2, (0, 0)) for n in processes]
        tokens = [of_token(text, n, 2) for n in processes]
        steps = [of_micro_batch(model, n) for n in processes]
        for what, payloads, unit, digits in (
            (f"a prompt of {VISUAL} tokens", prompts, 1e9, 2),
            ("a token of the answer", tokens, 1e6, 2),
            ("a micro-batch with `--shard`", steps, 1e9, 0),
        ):
            cells = (f"{sent(one, n) / unit:.{digits}f}" for one, n in zip(payloads, processes, strict=True))
            lines.append(f"| {name} | {what}, {'GB' if unit == 1e9 else 'MB'} | {' | '.join(cells)} |")
    return "\n".join(lines)


@command_line.guarded
def main() -> None:
    command_line.Parser(__doc__).parse_args()
    print(table())


if __name__ == "__main__":
    command_line.run(main)
