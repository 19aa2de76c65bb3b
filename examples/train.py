"""Train a LLaVA-1.5 or LLaVA-NeXT model with FocusLLaVA's samplers.

python examples/train.py --out runs/try --steps 200                        # the embedded model, on pictures drawn for it
python examples/train.py --stage align --data blip_558k.json --images DIR --model DIR --fresh projector --out runs/align
python examples/train.py --data llava_665k.json --images DIR --model runs/align/model --out runs/focus
python examples/train.py … --lora-rank 64 --freeze vision                  # the decoder by LoRA, for one GPU of 24 GB
torchrun --nproc-per-node 8 examples/train.py …                            # the same run, its examples shared by eight processes
torchrun --nproc-per-node 8 examples/train.py … --shard                    # each of which holds an eighth of the model, too

Started again with the same arguments, a run goes on from its last checkpoint. It leaves OUT/model (a Hugging Face folder
with the selector's file; with LoRA, OUT/adapter in its place), OUT/log.jsonl and OUT/curve.png.
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from train_options import (
    KEEP_FEATURES,
    add_options,
    check,
    lora_of,
    names,
    new_projector_of,
    numbers,
    options_of_sampler,
    ranking_of,
)

import minifocus
from minifocus import cards
from minifocus.cards.preset import MINIATURE
from minifocus.cpu_memory import keep_freed_memory
from minifocus.distributed.processes import Process, joined, local_device
from minifocus.evaluate import evaluate, longest_answer
from minifocus.files.reading import FILE, FOLDER, NOTHING, kind
from minifocus.inputs.conversations import asked_alone, read_conversations
from minifocus.load import usable_device
from minifocus.loading.config import Config
from minifocus.samplers.hooks import Samplers
from minifocus.training.adapter_file import WHOLE, merged_model, save_adapter
from minifocus.training.examples import Batches, Source
from minifocus.training.feedback import Feedback
from minifocus.training.granularities import GranularityObjective, granular
from minifocus.training.log import LOG
from minifocus.training.loop import fit
from minifocus.training.lora import LoRA, add_lora, widen
from minifocus.training.model_digest import digest_of_model
from minifocus.training.objective import AnswerObjective, Objective
from minifocus.training.optimizers import make_optimizers
from minifocus.training.parts import FRESH, PARTS, learning_rate, load_to_train, new_projector
from minifocus.training.plot_log import draw_curve
from minifocus.training.presets import LLAVA, Preset
from minifocus.training.router import RouterObjective
from minifocus.training.settings import Settings
from minifocus.training.shard import ShardedObjective, gathered_rest, sampler_to_save, save_shared, shard, skeleton

# Arguments that may change when a run is resumed: where its files are (the model and the data are known by their content), and
# what affects neither the weights nor the order of the examples.
MAY_CHANGE = {
    *("out", "model", "data", "images", "device", "workers", "gradient_checkpointing", "skip_unusable"),
    *(
        "feedback",
        "keep_features",
        "images_anywhere",
        "lora_merge",
        "save_every",
        "shard",
        "log_every",
        "validate",
        "validate_every",
        "validation_data",
    ),
}
# Settings that a preset fills in where they were not given.
SAMPLERS = {"align": "none", "instruct": "focus", "granularities": "avg-llava", "router": "avg-llava"}  # by default
FILLED = ("batch", "warmup", "optimizer", "turns", "lr_selector_bias", *(f"lr_{part}" for part in PARTS))


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add_options(parser)
    return parser.parse_args()


def check_out(out: Path) -> None:
    """Refuse at the beginning a folder in which the model or the curve could not be written at the end."""
    for name, fits in (("model", (FOLDER, NOTHING)), ("adapter", (FOLDER, NOTHING)), ("curve.png", (FILE, NOTHING))):
        found = kind(out / name)
        if found not in fits and not (out / name).is_symlink():
            raise minifocus.InputError(f"--out: {out / name}: expected {fits[0]} or nothing, found {found}")


def objective_of(arguments: argparse.Namespace) -> Objective:
    weights = arguments.scale_weights
    return Objective(
        alpha=Objective.alpha if arguments.alpha is None else arguments.alpha,
        scale_weights=None if weights is None else numbers(weights, "scale-weights"),
        gamma=numbers(arguments.gamma, "gamma", 2),
        layers=numbers(arguments.layers, "layers", 2),
        sampler_dropout=arguments.sampler_dropout,
        independent=arguments.turns == "independent",
    )


def settings_of(arguments: argparse.Namespace, preset: Preset, num_examples: int, device: torch.device) -> Settings:
    steps = arguments.steps or preset.steps or max(1, num_examples // arguments.batch)
    return Settings(
        steps=steps,
        batch=arguments.batch,
        micro_batch=arguments.micro_batch or preset.micro_batch,
        warmup_steps=round(arguments.warmup * steps),
        final_lr=arguments.final_lr,
        max_grad_norm=arguments.max_grad_norm,
        muon=arguments.optimizer == "muon",
        betas=(0.9, arguments.beta2),
        weight_decay=arguments.weight_decay,
        bf16=device.type == "cuda" if arguments.bf16 is None else arguments.bf16,
        save_every=arguments.save_every,
        log_every=arguments.log_every,
    )


class Data(NamedTuple):
    """What a run learns from.

    source     its conversations
    asked      given a model, the questions to validate it on, their number, and the most tokens of an answer
    identity   what identifies the data of a run beside its arguments
    """

    source: Source
    asked: Callable[[minifocus.Llava], tuple[Iterable[Any], int, int]]
    identity: dict[str, Any]


def miniature(arguments: argparse.Namespace) -> Data:
    """The miniature's scenes, which are drawn when they are needed."""
    dense, count = True if arguments.dense else None, arguments.validate
    return Data(
        cards.CardScenes(first=arguments.first_scene, dense=dense),
        lambda model: (cards.questions("validation", count, dense=dense), count, 16),
        {},
    )


def conversations(arguments: argparse.Namespace) -> Data:
    """Conversations from JSON files."""
    read = partial(
        read_conversations,
        image_folder=arguments.images,
        skip_unusable=arguments.skip_unusable,
        images_anywhere=arguments.images_anywhere,
    )
    source = read(arguments.data)
    held_out = read(arguments.validation_data) if arguments.validation_data else []

    def asked(model: minifocus.Llava) -> tuple[list[Any], int, int]:
        every = (question for conversation in held_out for question in asked_alone(conversation))
        found = list(islice(every, arguments.validate))
        return found, len(found), longest_answer(model, found)

    content = hashlib.sha256(Path(arguments.data).read_bytes()).hexdigest()
    return Data(source, asked, {"conversations": len(source), "data": content})


def train(arguments: argparse.Namespace) -> None:
    check(arguments)
    device = usable_device(local_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    with joined(device, even_alone=arguments.shard) as process:
        run(arguments, device, process)


def run(arguments: argparse.Namespace, device: torch.device, process: Process) -> None:
    """The run, as one of the processes that share it."""
    presets, read = (MINIATURE, miniature) if arguments.data is None else (LLAVA, conversations)
    preset = presets[arguments.stage]
    if arguments.lora_rank is not None and arguments.lr_llm is None:
        arguments.lr_llm = preset.lr_lora
    for name in FILLED:
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(preset, name))
    arguments.sampler = arguments.sampler or SAMPLERS[arguments.stage]
    frozen, fresh = names(arguments.freeze, "freeze", PARTS), names(arguments.fresh, "fresh", FRESH)
    rates = {part: 0.0 if part in frozen else getattr(arguments, f"lr_{part}") for part in PARTS}
    if arguments.stage == "router" and any(rates[part] for part in PARTS if part != "router"):
        raise minifocus.InputError("--stage: router trains the router alone: expected no other learning rate")
    if arguments.stage == "router" and "projector" in fresh:
        raise minifocus.InputError("--fresh: router trains the router alone: expected no new projector")
    rates["selector_bias"] = 0.0 if "selector" in frozen else arguments.lr_selector_bias
    projector = new_projector_of(arguments, fresh, rates["projector"] > 0)
    lora = lora_of(arguments, projector is not None or "projector" in fresh, rates["llm"] > 0)
    if lora is not None:  # PEFT's files have no place for the newline
        rates |= {"lora": rates["llm"], "llm": 0.0, "newline": 0.0}
    objective = objective_of(arguments)
    data = read(arguments)
    settings = settings_of(arguments, preset, len(data.source), device)

    out = Path(arguments.out)
    with process.alone(out):
        check_out(out)
        options = options_of_sampler(arguments, fresh)
        new = minifocus.methods.new_part(arguments.sampler, Path(arguments.model), options, fresh)
        if new == "router" and not rates["router"]:
            raise minifocus.InputError("--lr-router: a new router has to be trained: expected a rate above 0, got 0")
        # Both are part of a run's identity, which has always held their values and not None.
        arguments.alpha = objective.alpha
        arguments.selector_bias = 1.0 if arguments.selector_bias is None else arguments.selector_bias
        narrow = lora is not None and settings.bf16

        def rate(name: str) -> float:
            return learning_rate(name, rates, model)

        if arguments.shard:
            model = skeleton(Path(arguments.model), sampler_of(arguments, options, new is not None))
            if "projector" in fresh:
                new_projector(model, arguments.seed)
        else:
            model = load_to_train(
                arguments.model,
                arguments.sampler,
                device,
                options,
                fresh,
                new is not None,
                arguments.selector_bias,
                arguments.seed,
                projector,
                torch.bfloat16 if narrow else torch.float32,
            )
        if lora is not None:
            add_lora(model, lora, arguments.seed, device)
        if narrow and not arguments.shard:
            widen(model, {name for name, _ in model.named_parameters() if rate(name)})
        model.language_model.model.recompute = arguments.gradient_checkpointing
        if arguments.template:
            model.template = arguments.template
        batches = Batches(
            model.processor,
            data.source,
            settings.micro_batch,
            arguments.seed,
            objective.independent,
            arguments.max_turns or preset.max_turns,
            arguments.max_tokens,
            shuffle=preset.shuffle,
            skip_unusable=arguments.skip_unusable,
            examples=arguments.examples,
        )
        of_data = {"model": digest_of_model(Path(arguments.model)), **data.identity}
        task = task_of(arguments, model, objective, {**of_data, "bf16": settings.bf16})
        if isinstance(task, ShardedObjective):
            shard(task, device, lambda name: rate(name) > 0, narrow)
        optimizers = make_optimizers(task, rate, settings)
        identity = {name: value for name, value in vars(arguments).items() if name not in MAY_CHANGE}
        identity |= of_data
        if not arguments.lr_router:
            del identity["lr_router"]  # so that runs that began before there was one go on

        def validate() -> dict[str, Any]:
            asked, count, longest = data.asked(model)
            with gathered_rest(task) if isinstance(task, ShardedObjective) else nullcontext():
                result = evaluate(model, asked, 16, count, max_new_tokens=longest, families=cards.FAMILIES)
            return {name: result[name] for name in ("accuracy", "families", "tokens")}

        seconds = fit(
            task,
            optimizers,
            batches,
            settings,
            out,
            device,
            identity,
            workers=arguments.workers,
            validate=validate if arguments.validate else None,
            validate_every=arguments.validate_every,
            title=arguments.stage,
        )
        if process.rank == 0 or arguments.shard:
            left = leave_results(arguments, task, lora, {part for part in WHOLE if rates[part]}, out)
        if process.rank == 0:
            print(f"{settings.steps} steps in {seconds:.0f} s; the {left} is in {out / left}")


def task_of(
    arguments: argparse.Namespace, model: minifocus.Llava, objective: Objective, of_data: dict[str, Any]
) -> torch.nn.Module:
    """What the stage trains: a model with its loss."""
    independent = objective.independent
    if arguments.stage == "granularities":
        return GranularityObjective(model, independent)
    if arguments.stage == "router":
        names = ("seed", "turns", "max_turns", "max_tokens", "first_scene", "dense", "template", "skip_unusable")
        said = {name: getattr(arguments, name) for name in names}
        options = granular(model)
        sampler = {"granularities": options.granularities, "crop": options.options.crop}
        folder = Path(arguments.feedback or Path(arguments.out) / "feedback")
        feedback = Feedback(folder, {**of_data, **said, **sampler}, len(options.granularities))
        again = arguments.examples is not None  # they are taken again
        keep = KEEP_FEATURES if arguments.keep_features is None else arguments.keep_features
        return RouterObjective(
            model, ranking_of(arguments), feedback, arguments.seed, independent, round(keep * 2**30) if again else 0
        )
    kind_of = ShardedObjective if arguments.shard else AnswerObjective
    return kind_of(model, objective, arguments.seed)


def sampler_of(arguments: argparse.Namespace, options: dict[str, Any], new: bool) -> Callable[[Config], Samplers]:
    """What makes the sampler of --sampler, given a model's config: a new one, or as the model's folder has it."""
    if new:
        return lambda config: minifocus.methods.begin(arguments.sampler, config, options, arguments.selector_bias)
    return lambda config: minifocus.methods.build(arguments.sampler, config, Path(arguments.model), options)


def leave_results(arguments: argparse.Namespace, task: Any, lora: LoRA | None, whole: set[str], out: Path) -> str:
    """Leave the trained model, or its adapter, and the picture of its run in `out`; the name of the folder there.

    whole  the parts beside LoRA that are trained

    Processes that each hold a share of the model all take part, and the first writes.
    """
    left = "adapter" if lora is not None and not arguments.lora_merge else "model"
    if lora is not None:
        save_adapter(task.model, sampler_to_save(task), lora, arguments.model, whole, out / "adapter")
    elif arguments.shard:
        save_shared(task, out / "model")
    else:
        task.model.save(out / "model")
    if Process.current().rank:
        return left
    if arguments.lora_merge:
        merged_model(Path(arguments.model), out / "adapter").save(out / "model")
    try:
        draw_curve(out / LOG, out / "curve.png")
    except ImportError:
        print(f"{out / 'curve.png'} is not drawn: it needs matplotlib", file=sys.stderr)
    return left


@command_line.guarded
def main() -> None:
    train(parse_arguments())


if __name__ == "__main__":
    command_line.run(main)
