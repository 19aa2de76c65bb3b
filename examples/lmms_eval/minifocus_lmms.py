"""minifocus models as lmms-eval's model "minifocus": its requests in, answers out.

`run.py` makes the class known to lmms-eval; README.md has the commands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from tqdm import tqdm

import minifocus
from minifocus.inputs.prompt import build_prompt

# image_aspect_ratio speaks to LLaVA's own code; here the checkpoint's preprocessor_config.json decides.
_GENERATION = {"until", "max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "image_aspect_ratio"}


def generation_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's generation_kwargs → the options of `Llava.generate_batch`, and the texts that end an answer.

    `do_sample: false` means greedy whatever the temperature, as in transformers. Raises InputError for beam search and for
    an option that minifocus does not have.
    """
    if unknown := sorted(set(given) - _GENERATION):
        raise minifocus.InputError(f"generation_kwargs: expected some of {sorted(_GENERATION)}, got {unknown}")
    if given.get("num_beams") not in (None, 1):
        raise minifocus.InputError(f"num_beams: expected 1, for there is no beam search, got {given['num_beams']!r}")
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(end, str) and end for end in until):
        raise minifocus.InputError(f"until: expected a text or a list of them, none empty, got {given['until']!r}")
    temperature = given.get("temperature")
    do_sample = bool(temperature) if given.get("do_sample") is None else given["do_sample"]
    options = {"max_new_tokens": given.get("max_new_tokens", 1024), "temperature": 0.0}
    if do_sample:
        options["temperature"] = 1.0 if temperature is None else temperature
        options["top_p"] = 1.0 if given.get("top_p") is None else given["top_p"]
    # lmms-eval fills in "\n\n" for every task that names no end. It would cut an answer after its first paragraph.
    return options, [end for end in until if end != "\n\n"]


class Minifocus(lmms):
    """A model of lmms-eval's "simple" kind.

    pretrained  folder of the checkpoint in Hugging Face's layout
    sampler     "focus", "vision", "text" or "none"; `options` are its own: gamma, layer, keep, selector, ...
    device      where to run; by default what accelerate finds. Under `accelerate launch` each process has its own
    dtype       "float32", "bfloat16", "float16", "int8" or "int4"; by default the checkpoint's
    template    of minifocus.inputs.prompt.TEMPLATES; by default the folder's own chat template
    batch_size  questions at once, where generation is greedy; sampling takes one at a time

    Raises InputError for a bad argument and CheckpointError for a bad folder.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        sampler: str = "focus",
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ):
        super().__init__()
        if pretrained is None:
            raise minifocus.InputError(f"model_args: expected pretrained=FOLDER, got only {sorted(options)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise minifocus.InputError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is not None and self.world_size > 1:
            raise minifocus.InputError(f"device: expected none, for each of the processes has its own, got {device!r}")
        self.batch_size = int(batch_size)
        try:
            self.model = minifocus.load(str(pretrained), sampler, device or self.accelerator.device, dtype, **options)
            self.template = template
            build_prompt("?", 0, template or self.model.processor.prompt_template())  # refuses one that cannot be used
        except minifocus.InputError as error:
            own = "pretrained, sampler, device, dtype, template, batch_size"
            raise minifocus.InputError(f"model_args ({own} and the sampler's): {error}") from None
        self.device = self.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests. What the samplers saved goes into the results' "throughput"."""
        plans = [generation_options(request.args[1]) for request in requests]  # refused before anything is computed
        texts, counts, made, begun = [""] * len(requests), [], 0, time.perf_counter()
        with tqdm(total=len(requests), desc="minifocus", disable=self.rank != 0) as bar:
            for batch in self._batches(requests, plans):
                options, until = plans[batch[0]]
                for i, answer in zip(batch, self._ask([requests[i] for i in batch], options), strict=True):
                    texts[i] = answer.text
                    for end in until:
                        texts[i] = texts[i].partition(end)[0]
                    counts.append(vars(answer.tokens))
                    made += len(answer.token_ids)
                bar.update(len(batch))
        if counts:  # a process may have no share of the requests
            seconds = time.perf_counter() - begun
            means = {f"visual_tokens_{name}": sum(one[name] for one in counts) / len(counts) for name in counts[0]}
            log_metrics(seconds, made, made / seconds, means)
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise minifocus.InputError(
            "loglikelihood: expected a task of output_type generate_until, got multiple_choice, whose pairs of numbers "
            "lmms-eval 0.7.3 turns into text before it scores them"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise minifocus.InputError(
            "generate_until_multi_round: expected a task of single questions, got a conversation"
        )

    def _batches(self, requests: Sequence[Instance], plans: Sequence[Any]) -> Iterator[list[int]]:
        """Places of requests with the same options; the longest questions first, so that memory runs out early if at all."""
        order = sorted(range(len(requests)), key=lambda i: (repr(plans[i]), -len(requests[i].args[0])))
        for _, group in groupby(order, key=lambda i: repr(plans[i])):
            same = list(group)
            # A batch has one seed, with which lmms-eval's repeats of a question would all be alike.
            size = 1 if plans[same[0]][0]["temperature"] else self.batch_size
            yield from (same[begin : begin + size] for begin in range(0, len(same), size))

    def _ask(self, requests: Sequence[Instance], options: dict[str, Any]) -> list[minifocus.Answer]:
        seed = int(torch.randint(2**31, ())) if options["temperature"] else None  # from the generator that --seed sets
        pictures = [self._pictures(*request.args[2:]) for request in requests]
        prompts = [request.args[0] for request in requests]
        try:
            return self.model.generate_batch(pictures, prompts, seed=seed, template=self.template, **options)
        except minifocus.InputError as error:
            documents = ", ".join(f"{request.args[4]} {request.args[3]}" for request in requests)
            raise minifocus.InputError(f"among the documents {documents}: {error}") from error

    def _pictures(self, visual: Callable[..., Any], document: int, task: str, split: str) -> list[Image.Image]:
        given = visual(self.task_dict[task][split][document])
        pictures = [given] if isinstance(given, Image.Image) else list(given or [])
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                kind = type(picture).__name__
                raise minifocus.InputError(f"{task}, document {document}: expected pictures (PIL), got {kind}")
        return pictures
