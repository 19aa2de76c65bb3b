"""A process of a group that shares a decoder: answers, logits and refusals, written as JSON. Of test_tensor_parallel.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import minifocus
from minifocus.distributed import tensor_parallel
from minifocus.generate import Generation

ROOT = Path(__file__).resolve().parents[2]
TINY, CARDS = ROOT / "weights/tiny", ROOT / "examples/cards.png"
QUESTION, OTHER = "What number is on the red card?", "How many stars are there in the picture?"


def described(answer: minifocus.Answer) -> dict[str, Any]:
    kept = [picture.kept.tolist() for picture in answer.pictures]
    return {"tokens": answer.token_ids, "finish": answer.finish, "layers": answer.layer_tokens, "kept": kept}


def ask_all(model: minifocus.Llava) -> dict[str, Any]:
    """Answers with every method, in a batch with padding, and as a stream."""
    found: dict[str, Any] = {}
    for name in minifocus.methods.names():
        model.set_sampler(name)
        found[name] = described(model.generate(CARDS, QUESTION, max_new_tokens=8))
    model.set_sampler("focus", gamma=0.4, layer=2, rope=True)
    both = model.generate_batch([CARDS, CARDS], [QUESTION, OTHER], max_new_tokens=8, temperature=0.5, seed=3)
    stream = model.stream(CARDS, OTHER, max_new_tokens=8)
    return {**found, "batch": [described(one) for one in both], "stream": "".join(stream)}


def logits_of(model: minifocus.Llava) -> torch.Tensor:
    """Of a prompt's end, and of the token after it: the second by the caches."""
    generation = Generation(model, model.processor, [CARDS], [QUESTION], {})
    return torch.cat([generation.prefill(), generation.decode([7])])


def refused(work: Callable[[], object]) -> str:
    try:
        work()
    except (minifocus.InputError, minifocus.CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def main(folders: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    model = tensor_parallel.load(TINY, "none")
    found = ask_all(model)
    found["sampled"] = model.generate(CARDS, QUESTION, max_new_tokens=12, temperature=3.0).token_ids
    found["parameters"] = {
        part: sum(p.numel() for name, p in model.named_parameters() if part in name)
        for part in ("model.layers.1.", "lm_head")
    }
    for name in ("grouped", "tied"):
        shared = tensor_parallel.load(folders / name, "text", gamma=0.5)
        torch.save(logits_of(shared), folders / f"{name}-{rank}.pt")
    found["refused"] = {
        "heads": refused(lambda: tensor_parallel.load(folders / "one key head", "none")),
        "int8": refused(lambda: tensor_parallel.load(TINY, "none", dtype="int8")),
        "folder": refused(lambda: tensor_parallel.load(folders / ("grouped" if rank else "nowhere"), "none")),
        "nan": refused(lambda: tensor_parallel.load(folders / "nan", "none")),
        "samplers": refused(lambda: tensor_parallel.load(TINY, "text", gamma=0.5 + rank / 4)),
        "prompts": refused(lambda: model.generate(CARDS, f"What is {rank}?")),
        "pictures": refused(lambda: model.generate([CARDS, None][rank], "What?")),
        "sampler": refused(lambda: model.set_sampler(("text", "none")[rank])),
        "save": refused(lambda: model.save(folders / "saved")),
    }
    found["afterwards"] = model.generate(CARDS, QUESTION, max_new_tokens=8).text
    (folders / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
