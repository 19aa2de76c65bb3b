"""The command-line options of train.py, and the checks of their values."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from command_line import expect, expect_numbers, option
from sampler_options import add_option, read_options

import minifocus
from minifocus.arguments import shown
from minifocus.inputs.prompt import TEMPLATES
from minifocus.projectors import PROJECTORS
from minifocus.training.lora import TARGETS, LoRA
from minifocus.training.new_projector import NewProjector
from minifocus.training.objective import Objective
from minifocus.training.parts import FRESH, PARTS
from minifocus.training.router import Ranking
from minifocus.training.settings import MOST, MOST_EXAMPLES

RANKING = {
    "ranking": "form",
    "ranking_margin": "margin",
    **{name: name for name in ("rank_weight", "choice_weight", "token_price")},
}  # arguments → fields of Ranking
KEEP_FEATURES = 1.0  # GiB
ROOT = Path(__file__).resolve().parent.parent


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=str(ROOT / "weights/tiny"), help="folder in Hugging Face's layout to start from")
    add("--out", required=True, help="folder of the run: checkpoint, log, curve, and the trained model")
    add(
        "--stage",
        default="instruct",
        choices=("align", "instruct", "granularities", "router"),
        help="align: the projector alone, without samplers; granularities and router: stages 3 and 4 of AVG-LLaVA",
    )
    add("--fresh", default="", help=f"parts to start anew, with commas: {', '.join(FRESH)}")

    projector = parser.add_argument_group("projector")
    projector.add_argument("--projector", choices=tuple(PROJECTORS), help="a new one in the place of the model's")
    projector.add_argument(
        "--projector-option",
        action="append",
        metavar="NAME=VALUE",
        help="of the new projector, such as window=2; repeatable",
    )
    projector.add_argument(
        "--vision-layers",
        help="hidden states of the tower that it reads, with commas, as vision_feature_layer numbers them: --vision-layers=-2,1",
    )
    projector.add_argument(
        "--projector-start",
        choices=("random", "pooling"),
        help="pooling: at first its tokens are means of those of the model's own projector (default: random)",
    )

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
    samplers.add_argument("--printed-factor", action="store_true", help="Eq. 2's factor as p, not as p / p.detach()")
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

    lora = parser.add_argument_group("LoRA")
    lora.add_argument(
        "--lora-rank", type=int, help="leave the language model's weights as they are, and learn products of this rank"
    )
    lora.add_argument(
        "--lora-alpha", type=float, help="the products are taken times alpha / rank; default: twice the rank"
    )
    lora.add_argument("--lora-dropout", type=float, help="of what the products read (0.05)")
    lora.add_argument("--lora-targets", help=f"matrices that get one, with commas; default: {','.join(TARGETS)}")
    lora.add_argument("--lora-merge", action="store_true", help="leave a merged model in OUT/model, too")

    router = parser.add_argument_group("AVG-LLaVA's router (--stage router)")
    router.add_argument("--examples", type=int, help="train on the first so many examples again and again")
    router.add_argument(
        "--feedback", help="folder of the language model's losses of them, computed once; default: OUT/feedback"
    )
    router.add_argument(
        "--keep-features",
        type=float,
        help=f"with --examples: GiB of the device's memory for their pictures' features, computed once ({KEEP_FEATURES:g})",
    )
    router.add_argument("--ranking", choices=("paper", "released"), help="form of the ranking loss (paper)")
    router.add_argument("--ranking-margin", type=float, help=f"released form: factor of the margins ({Ranking.margin})")
    router.add_argument("--rank-weight", type=float, help=f"of the ranking loss ({Ranking.rank_weight:g})")
    router.add_argument(
        "--choice-weight", type=float, help=f"of the best choice's cross-entropy ({Ranking.choice_weight})"
    )
    router.add_argument(
        "--token-price", type=float, help="added to the loss that all tokens have, not in the paper (0)"
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
    steps.add_argument(
        "--shard", action="store_true", help="under torchrun: each process holds a share of the model, too, by FSDP2"
    )
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
    if arguments.projector is None:
        for name in ("projector_option", "vision_layers", "projector_start"):
            expect(getattr(arguments, name) is None, arguments, name, "--projector beside it")
    if arguments.data is None:
        for name in ("images", "images_anywhere", "validation_data", "skip_unusable"):
            expect(not getattr(arguments, name), arguments, name, "--data beside it")
    else:
        for name in ("dense", "first_scene"):
            expect(not getattr(arguments, name), arguments, name, "no --data, as it is of the miniature")
        held_out = arguments.validation_data
        expect(not arguments.validate or held_out, arguments, "validate", "--validation-data beside it")
        expect(arguments.validate or not held_out, arguments, "validation_data", "--validate beside it")

    if arguments.shard:
        expect("WORLD_SIZE" in os.environ, arguments, "shard", "to be started by torchrun")
        expect(arguments.stage in ("align", "instruct"), arguments, "shard", "--stage align or instruct beside it")
        expect(arguments.projector is None, arguments, "shard", "no --projector beside it")
        samplers = (None, "none", "focus", "vision", "text")  # others read layers that are not gathered
        expect(arguments.sampler in samplers, arguments, "sampler", "none, focus, vision or text beside --shard")

    stage = arguments.stage
    if stage != "router":
        for name in ("examples", "feedback", "keep_features", *RANKING):
            expect(getattr(arguments, name) is None, arguments, name, "--stage router beside it")
    else:
        expect(arguments.projector is None, arguments, "projector", "none, as --stage router trains the router alone")
        expect(arguments.feedback != "", arguments, "feedback", "the name of a folder")
        if arguments.examples is None:
            expect(arguments.keep_features is None, arguments, "keep_features", "--examples beside it")
        released = arguments.ranking == "released"
        expect(
            released or arguments.ranking_margin is None, arguments, "ranking_margin", "--ranking released beside it"
        )
    expect_numbers(arguments, 1, "examples")
    expect_numbers(arguments, 0, "keep_features", 1e6)
    if stage in ("granularities", "router"):
        expect(
            arguments.sampler in (None, "avg-llava"), arguments, "sampler", f"avg-llava, as --stage {stage} trains it"
        )
        expect(not arguments.sampler_dropout, arguments, "sampler_dropout", f"none with --stage {stage}")


def lora_of(arguments: argparse.Namespace, projector: bool, trained: bool) -> LoRA | None:
    """What --lora-… ask for. `projector`: a new one begins; `trained`: the language model has a learning rate."""
    if arguments.lora_rank is None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_merge"):
            expect(not getattr(arguments, name), arguments, name, "--lora-rank beside it")
        return None
    expect(not projector, arguments, "lora_rank", "no new projector beside it: it is trained first, by --stage align")
    expect(trained, arguments, "lora_rank", "a learning rate for what it adds to the language model, --lr-llm")
    targets = TARGETS if arguments.lora_targets is None else names(arguments.lora_targets, "lora-targets", TARGETS)
    alpha = 2.0 * arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha
    dropout = 0.05 if arguments.lora_dropout is None else arguments.lora_dropout
    try:
        return LoRA(arguments.lora_rank, alpha, dropout, tuple(name for name in TARGETS if name in targets))
    except minifocus.InputError as error:
        raise minifocus.InputError(f"--lora-{error}") from error


def names(text: str, flag: str, known: tuple[str, ...]) -> set[str]:
    found = {name.strip() for name in text.split(",") if name.strip()}
    if found - set(known):
        raise minifocus.InputError(f"--{flag}: expected some of {', '.join(known)}, got {shown(text)}")
    return found


def numbers(text: str, flag: str, count: int | None = None) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if not values or (count is not None and len(values) != count):
        wanted = f"{count} numbers" if count else "numbers"
        raise minifocus.InputError(f"--{flag}: expected {wanted} with commas between, got {shown(text)}")
    return values


def ranking_of(arguments: argparse.Namespace) -> Ranking:
    given = {field: getattr(arguments, name) for name, field in RANKING.items()}
    return Ranking(**{field: value for field, value in given.items() if value is not None})


def options_of_sampler(arguments: argparse.Namespace, fresh: set[str]) -> dict[str, Any]:
    """The sampler's own options. Refuses what the sampler would ignore, and what is drawn at random instead."""
    sampler = arguments.sampler
    given = {"window": arguments.window, "branches": arguments.branches, "thumbnail": arguments.thumbnail}
    own = {name: value for name, value in given.items() if value is not None}
    if arguments.printed_factor:
        own["straight_through"] = False
    options = {**read_options(arguments.option, own), **own}
    if minifocus.methods.METHODS[sampler].part != "selector":
        for name in own:
            flag = option("printed_factor" if name == "straight_through" else name)
            raise minifocus.InputError(f"{flag}: sampler {sampler!r} has no such option")
        for name in ("alpha", "scale_weights"):
            if getattr(arguments, name) is not None:
                raise minifocus.InputError(f"{option(name)}: sampler {sampler!r} has no selector to balance")
    if arguments.stage == "granularities":
        options.setdefault("granularity", "finest")  # of the answers that validate; all are trained
    new = minifocus.methods.new_part(sampler, Path(arguments.model), options, fresh)
    if arguments.selector_bias is not None and new != "selector":
        raise minifocus.InputError(
            "--selector-bias: expected a new selector to give it to, such as --fresh selector makes"
        )
    for name, drawn in {"gamma": "gamma", "layer": "layers"}.items() if sampler in ("focus", "text") else ():
        if name in options:
            raise minifocus.InputError(f"--option: {name} is drawn for every sample: expected its range as --{drawn}")
    return options


def new_projector_of(arguments: argparse.Namespace, fresh: set[str], trained: bool) -> NewProjector | None:
    """The projector that takes the place of the model's. `trained` says whether the run changes it."""
    if arguments.projector is None:
        return None
    start = arguments.projector_start or "random"
    if start == "random" and not trained:
        raise minifocus.InputError("--projector: random values have to be trained: expected a learning rate, got 0")
    if start == "pooling" and "projector" in fresh:
        raise minifocus.InputError(
            "--projector-start: expected no --fresh projector beside it, which is a random start"
        )
    options = read_options(arguments.projector_option or [], ("name",), "--projector-option")
    layers = None if arguments.vision_layers is None else whole_numbers(arguments.vision_layers, "vision-layers")
    return NewProjector({"name": arguments.projector, **options}, layers, start)


def whole_numbers(text: str, flag: str) -> tuple[int, ...]:
    found = tuple(word.strip() for word in text.split(","))
    if not all(re.fullmatch(r"[+-]?\d{1,9}", word, re.ASCII) for word in found):
        raise minifocus.InputError(f"--{flag}: expected whole numbers with commas between, got {shown(text)}")
    return tuple(map(int, found))
