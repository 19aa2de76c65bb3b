"""What runs in the processes: a model that answers, alone or shared; and what is sent meanwhile, and in training, counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import minifocus
from minifocus import methods
from minifocus.distributed import tensor_parallel
from minifocus.distributed.processes import Process
from minifocus.generate import Generation
from minifocus.inputs.conversations import read_conversations
from minifocus.training.examples import Batches
from minifocus.training.objective import Objective
from minifocus.training.shard import ShardedObjective, shard, skeleton

from ..clocks import Spent, read
from ..true_size.question import status
from .communication import Counted, of_micro_batch, of_prompt, of_token

QUESTION = "What does the sign say?"


class Answering:
    """A process that answers by itself, or with others that share the decoder."""

    def __init__(self, folder: Path, shared: bool, picture: Path, new_tokens: int):
        self.imports, self.picture, self.new_tokens = status("VmHWM"), picture, new_tokens
        load = tensor_parallel.load if shared else minifocus.load
        self.model = load(folder, "none", dtype="float32")

    def ask(self) -> dict[str, Any]:
        """Tokens, seconds of the prompt and of the further tokens, and what all took of the processors."""
        count, begun = self.new_tokens, read()
        answer = self.model.generate(self.picture, QUESTION, max_new_tokens=count, min_new_tokens=count)
        return {
            "tokens": answer.token_ids,
            "prompt": answer.layer_tokens[0],
            "prefill": answer.prefill_seconds,
            "decode": answer.decode_seconds,
            "spent": Spent.since(begun, torch.get_num_threads()),
        }

    def memory(self) -> dict[str, int]:
        """In bytes: the decoder's values, and the most that was resident after the imports and by now."""
        held = sum(parameter.nbytes for parameter in self.model.language_model.parameters())
        return {"decoder": held, "imports": self.imports, "peak": status("VmHWM")}


class Counting:
    """A process whose collectives are counted. Payloads are in bytes, by kind: as computed, and as counted."""

    def __init__(self, folder: Path, picture: Path, data: Path):
        self.folder, self.picture, self.data = folder, picture, data

    def answers(self) -> dict[str, Any]:
        """Of a prompt without a sampler and with the text-guided one, and of each further token."""
        self.model = tensor_parallel.load(self.folder, "none", dtype="float32")
        (without, token), (text, _) = self._answer(), self._answer("text")
        return {"prompt": without, "prompt, text-guided": text, "token": token}

    def _answer(self, sampler: str = "none") -> tuple[dict[str, Any], dict[str, Any]]:
        self.model.set_sampler(sampler)
        options = {"max_new_tokens": 4, "min_new_tokens": 4}
        generation = Generation(self.model, self.model.processor, [self.picture], [QUESTION], options)
        (row,) = generation.rows
        with Counted() as of_first:
            (logits,) = generation.prefill()
        with Counted() as of_others:
            while (chosen := row.choose(logits)) is not None and not row.finish:
                (logits,) = generation.decode([chosen])
        ((answer,), scored) = generation.answers(), (0, 0)
        for _, before, _ in generation.read.selections:
            ((_, visual),) = before.pictures()
            scored = (int(before.instruction[0, int(visual[-1]) :].sum()), len(visual))
        text, count, width = self.model.config.text, Process.current().count, self.model.dtype.itemsize
        read_by = answer.layer_tokens
        prompt = of_prompt(text, read_by[0], read_by, count, width, scored)
        others = {kind: size / (len(answer.token_ids) - 1) for kind, size in of_others.payload.items()}
        return beside(prompt, of_first.payload), beside(of_token(text, count, width), others)

    def micro_batch(self) -> dict[str, Any]:
        """Of one micro-batch, forward and backward, in shares."""
        device, process = torch.device("cpu"), Process.current()
        model = skeleton(self.folder, lambda config: methods.build("none", config, self.folder, {}))
        batch = Batches(model.processor, read_conversations(self.data), 1, seed=0)[process.rank]
        task = ShardedObjective(model, Objective(), seed=0)
        shard(task, device, lambda name: True)
        with Counted() as counted:
            loss, _ = task(batch, max(1, batch.num_targets), 1)
            loss.backward()
        return beside(of_micro_batch(model, process.count), counted.payload)


def beside(computed: Mapping[str, float], counted: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {"computed": dict(computed), "counted": dict(counted)}
