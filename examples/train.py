"""Train a LLaVA-1.5 or LLaVA-NeXT model with FocusLLaVA's samplers.

python examples/train.py --out runs/try --steps 200                        # the embedded model, on pictures drawn for it
python examples/train.py --stage align --data blip_558k.json --images DIR --model DIR --fresh projector --out runs/align
python examples/train.py --data llava_665k.json --images DIR --model runs/align/model --out runs/focus
torchrun --nproc-per-node 8 examples/train.py …                            # the same run, shared by eight processes

Started again with the same arguments, a run goes on from its last checkpoint. It leaves OUT/model (a Hugging Face folder
with the selector's file), OUT/log.jsonl and OUT/curve.png.
"""

from __future__ import annotations

import command_line

if __name__ == "__main__":
    command_line.begin()

import argparse
import hashlib
import os
import sys
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from command_line import expect, expect_numbers
from sampler_options import add_option, read_options

import minifocus
from minifocus import cards
from minifocus.arguments import shown
from minifocus.cards.preset import MINIATURE
from minifocus.evaluate import evaluate, longest_answer
from minifocus.files.reading import FILE, FOLDER, NOTHING, kind
from minifocus.inputs.conversations import asked_alone, read_conversations
from minifocus.inputs.prompt import TEMPLATES
from minifocus.load import usable_device
from minifocus.loading.model_folder import SELECTOR
from minifocus.samplers.vision_guided import VisionGuidedOptions
from minifocus.training.examples import Batches, Source
from minifocus.training.log import LOG
from minifocus.training.loop import fit
from minifocus.training.memory import keep_freed_memory
from minifocus.training.model_digest import digest_of_model
from minifocus.training.objective import AnswerObjective, Objective
from minifocus.training.optimizers import make_optimizers
from minifocus.training.parts import PARTS, learning_rate, new_projector, new_selector
from minifocus.training.plot_log import draw_curve
from minifocus.training.presets import LLAVA
from minifocus.training.processes import Process
from minifocus.training.settings import MOST, MOST_EXAMPLES, Settings

ROOT = Path(__file__).resolve().parent.parent
# Arguments by which two runs may differ and yet be the same one: where things are (the model and the data count by what is in
# them), and what changes neither the weights nor their order.
NOT_OF_A_RUN = {
    *("out", "model", "data", "images", "device", "workers", "gradient_checkpointing", "skip_unusable"),
    *("images_anywhere", "save_every", "log_every", "validate", "validate_every", "validation_data"),
}


def parse_arguments() -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / "weights/tiny"), help="folder in Hugging Face's layout to start from")
    add("--out", required=True, help="folder of the run: checkpoint, log, curve, and the trained model")
    add(
        "--stage",
        default="instruct",
        choices=("align", "instruct"),
        help="align: the projector alone, without samplers",
    )
    add("--fresh", default="", help="parts to start anew, with commas: projector, selector")

    data = parser.add_argument_group("data")
    data.add_argument("--data", help="conversations in LLaVA's JSON format; default: the miniature's, drawn on the way")
    data.add_argument("--images", help="folder that the JSON's pictures are named from; default: the JSON's")
    data.add_argument("--images-anywhere", action="store_true", help="take pictures that the JSON names elsewhere, too")
    data.add_argument(
        "--turns", choices=("chat", "independent"), help="whether a conversation's turns see the ones before"
    )
    data.add_argument("--template", choices=list(TEMPLATES), help="default: the model's; what is saved keeps that")
    data.add_argument("--max-turns", type=int, help="of a conversation (miniature: 12)")
    data.add_argument("--max-tokens", type=int, help="of a sequence; turns that do not fit are left out, the first cut")
    data.add_argument(
        "--skip-unusable", action="store_true", help="leave out records that cannot be used, and say which"
    )
    data.add_argument("--first-scene", type=int, default=0, help="miniature: the training split's scene to begin with")
    data.add_argument("--dense", action="store_true", help="miniature: dense scenes only, instead of every fourth")
    data.add_argument("--workers", type=int, default=0, help="processes that read pictures ahead")

    samplers = parser.add_argument_group("samplers")
    samplers.add_argument("--sampler", choices=minifocus.methods.names(), help="default: focus (align: none)")
    add_option(samplers)
    samplers.add_argument("--window", type=int, help="a new selector's: 1, 2, 4, 8 or 12")
    samplers.add_argument("--branches", type=int, help="a new selector's: 3 or 7")
    samplers.add_argument("--thumbnail", choices=("keep", "compress", "drop"))
    samplers.add_argument("--straight-through", action="store_true", help="Eq. 2's factor as p / p.detach()")
    samplers.add_argument("--selector-bias", type=float, help="a new selector's lean to the finest scale (1)")
    samplers.add_argument("--alpha", type=float, help=f"the balance loss' factor ({Objective.alpha})")
    samplers.add_argument("--scale-weights", help="Eq. 10's weights, coarse to fine, with commas")
    samplers.add_argument("--gamma", default="0.75,0.95", help="the range to draw gamma from")
    samplers.add_argument(
        "--layers", default="0.25,0.75", help="the range of depths to draw the text sampler's layer from"
    )
    samplers.add_argument(
        "--sampler-dropout", type=float, default=0.0, help="a sample's chance to go without a sampler"
    )

    steps = parser.add_argument_group("steps")
    steps.add_argument("--steps", type=int, help="default: one pass over the data (miniature: 500)")
    steps.add_argument("--batch", type=int, help="examples per step, over all processes")
    steps.add_argument(
        "--micro-batch",
        type=int,
        help="examples per forward pass of a process (miniature: 4; else 1), over which the balance loss is taken",
    )
    steps.add_argument("--warmup", type=float, help="share of the steps over which the learning rates rise")
    steps.add_argument("--final-lr", type=float, default=0.0, help="where the cosine ends, as a share of the peak")
    for part in PARTS:
        steps.add_argument(f"--lr-{part}", type=float, help=f"peak learning rate of the {part}; 0 freezes it")
    steps.add_argument("--lr-selector-bias", type=float, help="peak learning rate of the selector's bias")
    steps.add_argument("--freeze", default="", help=f"parts to leave as they are, with commas: {', '.join(PARTS)}")
    steps.add_argument("--optimizer", choices=("adamw", "muon"), help="default: adamw (miniature: muon for matrices)")
    steps.add_argument("--weight-decay", type=float, default=0.0)
    steps.add_argument("--beta2", type=float, default=0.98)
    steps.add_argument("--max-grad-norm", type=float, default=1.0)
    steps.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    steps.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    steps.add_argument("--device", help="default: cuda where there is one, else cpu")
    steps.add_argument("--seed", type=int, default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    output.add_argument("--log-every", type=int, default=10)
    output.add_argument(
        "--validate", type=int, default=0, help="ask this many questions of the validation split (or data)"
    )
    output.add_argument("--validate-every", type=int, default=200)
    output.add_argument("--validation-data", help="a JSON file to validate on, with --data")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Check what neither argparse nor the library checks."""
    expect_numbers(arguments, 1, "steps max_turns max_tokens save_every log_every validate_every")
    expect_numbers(arguments, 1, "batch micro_batch", MOST_EXAMPLES)
    expect_numbers(arguments, 0, "first_scene validate seed")
    expect_numbers(arguments, 0, "workers", 1000)
    expect_numbers(arguments, 0, "weight_decay final_lr lr_selector_bias", MOST)
    expect_numbers(arguments, 0, " ".join(f"lr_{part}" for part in PARTS), MOST)
    expect_numbers(arguments, -MOST, "selector_bias", MOST)
    warmup = arguments.warmup
    expect(warmup is None or 0 <= warmup <= 1, arguments, "warmup", "a share from 0 to 1")
    expect(0 <= arguments.beta2 < 1, arguments, "beta2", "a number from 0 to below 1")
    expect(arguments.max_grad_norm > 0, arguments, "max_grad_norm", "a number above 0")
    expect(bool(arguments.out), arguments, "out", "the name of a folder")
    if arguments.data is None:
        for name in ("images", "images_anywhere", "validation_data", "skip_unusable"):
            expect(not getattr(arguments, name), arguments, name, "--data beside it")
    else:
        for name in ("dense", "first_scene"):
            expect(not getattr(arguments, name), arguments, name, "no --data, as it is of the miniature")
        held_out = arguments.validation_data
        expect(not arguments.validate or held_out, arguments, "validate", "--validation-data beside it")
        expect(arguments.validate or not held_out, arguments, "validation_data", "--validate beside it")


def check_out(out: Path) -> None:
    """Check at the beginning that what a run writes at its end can be written."""
    for name, fits in (("model", (FOLDER, NOTHING)), ("curve.png", (FILE, NOTHING))):
        found = kind(out / name)
        if found not in fits and not (out / name).is_symlink():
            raise minifocus.InputError(f"--out: {out / name}: expected {fits[0]} or nothing, found {found}")


def names(text: str, option: str, known: tuple[str, ...]) -> set[str]:
    found = {name.strip() for name in text.split(",") if name.strip()}
    if found - set(known):
        raise minifocus.InputError(f"--{option}: expected some of {', '.join(known)}, got {shown(text)}")
    return found


def numbers(text: str, option: str, count: int | None = None) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if not values or (count is not None and len(values) != count):
        wanted = f"{count} numbers" if count else "numbers"
        raise minifocus.InputError(f"--{option}: expected {wanted} with commas between, got {shown(text)}")
    return values


def load_model(arguments: argparse.Namespace, fresh: set[str], device: torch.device) -> minifocus.Llava:
    """The model to train, in float32, with its samplers; parts that are to start anew do."""
    sampler = arguments.sampler
    given = {"window": arguments.window, "branches": arguments.branches, "thumbnail": arguments.thumbnail}
    own = {name: value for name, value in given.items() if value is not None}
    if arguments.straight_through:
        own["straight_through"] = True
    has_selector = kind(Path(arguments.model) / SELECTOR) == FILE and "selector" not in fresh
    learned = sampler in ("focus", "vision")
    if not learned and own:
        option = next(iter(own)).replace("_", "-")
        raise minifocus.InputError(f"--{option}: sampler {sampler!r} has no such option")
    for name in ("alpha", "scale_weights"):
        if not learned and getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise minifocus.InputError(f"--{option}: sampler {sampler!r} has no selector to balance")
    if arguments.selector_bias is not None and (has_selector or not learned):
        raise minifocus.InputError(
            "--selector-bias: expected a new selector to give it to, such as --fresh selector makes"
        )
    options = {**read_options(arguments.option, own), **own}
    for name, drawn in {"gamma": "gamma", "layer": "layers"}.items() if sampler in ("focus", "text") else ():
        if name in options:
            raise minifocus.InputError(f"--option: {name} is drawn for every sample: expected its range as --{drawn}")
    if learned and not has_selector:
        known = {field.name for field in fields(VisionGuidedOptions)}
        of_text = {name: value for name, value in options.items() if name not in known}
        # Refuses what is an option of neither.
        model = minifocus.load(arguments.model, "text" if sampler == "focus" else "none", device, "float32", **of_text)
        full = VisionGuidedOptions(**{name: value for name, value in options.items() if name in known})
        new_selector(model, full, 1.0 if arguments.selector_bias is None else arguments.selector_bias)
    else:
        model = minifocus.load(arguments.model, sampler, device, "float32", **options)
    if "projector" in fresh:
        new_projector(model, arguments.seed)
    model.language_model.model.recompute = arguments.gradient_checkpointing
    return model


def train(arguments: argparse.Namespace) -> None:
    check(arguments)
    device = usable_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    preset = (MINIATURE if arguments.data is None else LLAVA)[arguments.stage]
    for name in ("batch", "warmup", "optimizer", "turns", "lr_selector_bias", *(f"lr_{part}" for part in PARTS)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(preset, name))
    arguments.sampler = arguments.sampler or ("none" if arguments.stage == "align" else "focus")
    frozen, fresh = names(arguments.freeze, "freeze", PARTS), names(arguments.fresh, "fresh", PARTS[1::2])
    rates = {part: 0.0 if part in frozen else getattr(arguments, f"lr_{part}") for part in PARTS}
    rates["selector_bias"] = 0.0 if "selector" in frozen else arguments.lr_selector_bias
    independent = arguments.turns == "independent"
    weights = arguments.scale_weights
    objective = Objective(
        alpha=Objective.alpha if arguments.alpha is None else arguments.alpha,
        scale_weights=None if weights is None else numbers(weights, "scale-weights"),
        gamma=numbers(arguments.gamma, "gamma", 2),
        layers=numbers(arguments.layers, "layers", 2),
        sampler_dropout=arguments.sampler_dropout,
        independent=independent,
    )
    read = partial(
        read_conversations,
        image_folder=arguments.images,
        skip_unusable=arguments.skip_unusable,
        images_anywhere=arguments.images_anywhere,
    )
    dense = True if arguments.dense else None
    source: Source
    source = (
        cards.CardScenes(first=arguments.first_scene, dense=dense) if arguments.data is None else read(arguments.data)
    )
    held_out = read(arguments.validation_data) if arguments.validation_data else []
    steps = arguments.steps or preset.steps or max(1, len(source) // arguments.batch)
    settings = Settings(
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
    out = Path(arguments.out)
    process = Process.join(device)
    with process.alone(out):
        check_out(out)
        model = load_model(arguments, fresh, device)
        if arguments.template:
            model.template = arguments.template
        # Named in the identity of a run, of which they were a part before they could be absent.
        arguments.alpha = objective.alpha
        arguments.selector_bias = 1.0 if arguments.selector_bias is None else arguments.selector_bias
        batches = Batches(
            model.processor,
            source,
            settings.micro_batch,
            arguments.seed,
            independent,
            arguments.max_turns or preset.max_turns,
            arguments.max_tokens,
            shuffle=preset.shuffle,
            skip_unusable=arguments.skip_unusable,
        )
        task = AnswerObjective(model, objective, arguments.seed)
        optimizers = make_optimizers(task, partial(learning_rate, rates=rates, model=model), settings)
        identity = {name: value for name, value in vars(arguments).items() if name not in NOT_OF_A_RUN}
        identity["model"] = digest_of_model(Path(arguments.model))
        if arguments.data is not None:
            identity["conversations"] = len(source)
            identity["data"] = hashlib.sha256(Path(arguments.data).read_bytes()).hexdigest()

        def validate() -> dict[str, Any]:
            count, longest = arguments.validate, 16
            asked = (question for conversation in held_out for question in asked_alone(conversation))
            if arguments.data is None:
                asked = cards.questions("validation", count, dense=dense)
            else:
                asked = list(islice(asked, count))
                count, longest = len(asked), longest_answer(model, asked)
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
        if process.rank == 0:
            leave_results(model, out)
            print(f"{settings.steps} steps in {seconds:.0f} s; the model is in {out / 'model'}")
    process.leave()


def leave_results(model: minifocus.Llava, out: Path) -> None:
    """The trained model and the picture of its run."""
    model.save(out / "model")
    try:
        draw_curve(out / LOG, out / "curve.png")
    except ImportError:
        print(f"{out / 'curve.png'} is not drawn: it needs matplotlib", file=sys.stderr)


@command_line.guarded
def main() -> None:
    train(parse_arguments())


if __name__ == "__main__":
    command_line.run(main)
