"""Which granularities an AVG-LLaVA chooses for the miniature's questions, beside those at which it answers with the least loss.

python -m experiments.systems.choices --model runs/avg-router/model --count 200

Every fourth scene is dense, as in training; the others have fewer things and shorter numbers. Per family of questions it prints
the share of each granularity (the paper's Figure 5) and the tokens; and of each scene it compares one question about small text
with one that is easier: whether a thing is there, how many there are, or the colour of a shape.
"""

from __future__ import annotations

from examples import command_line

if __name__ == "__main__":
    command_line.begin()

import json
from collections import defaultdict
from itertools import islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

import minifocus
from examples.command_line import expect_numbers
from minifocus import cards
from minifocus.training.examples import collate, encode
from minifocus.training.feedback import Feedback
from minifocus.training.granularities import granular
from minifocus.training.router import Ranking, RouterObjective

EASY = ("Is there ", "How many ", *(f"What colour is the {shape}?" for shape in cards.SHAPES))


@torch.no_grad()
def measure(model: minifocus.Llava, count: int, first: int) -> dict[str, Any]:
    """Over all questions about `count` scenes of the test split; shares are of what plain LLaVA reads."""
    sampler = granular(model)
    chosen: dict[str, list[int]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)  # of the tokens at the router's choice
    least: dict[str, list[float]] = defaultdict(list)  # of the tokens at the least loss
    regrets, pairs = [], {"coarser": 0, "equal": 0, "finer": 0}
    with TemporaryDirectory() as folder:
        feedback = Feedback(Path(folder), {}, len(sampler.granularities))
        objective = RouterObjective(model, Ranking(), feedback, 0, True)
        scenes = (scene for scene in cards.scenes("test", first) if scene.questions)
        for number, scene in enumerate(tqdm(islice(scenes, count), total=count, disable=None)):
            batch = collate([encode(model.processor, cards.conversation(scene), independent=True)], number)
            features = model.encode_pictures(batch.tiles, batch.sizes)
            [(losses, of_tokens)] = feedback.of(model, batch, features, True)
            picked = sampler.route(features[0].views, objective.questions(batch)[0]).argmax(dim=1).tolist()
            questions = scene.questions[: batch.num_turns]  # what does not fit into the context is left out
            for question, choice, loss in zip(questions, picked, losses, strict=True):
                chosen[question.family].append(choice)
                shares[question.family].append(float(of_tokens[choice]))
                least[question.family].append(float(of_tokens[int(loss.argmin())]))
                regrets.append(float(loss[choice] - loss.min()))
            asked = list(zip(questions, picked, strict=True))
            easy = [choice for question, choice in asked if question.question.startswith(EASY)]
            small = [choice for question, choice in asked if question.family == "read"]
            if easy and small:
                pairs["coarser" if easy[0] < small[0] else "finer" if easy[0] > small[0] else "equal"] += 1

    def distribution(choices: list[int]) -> dict[str, float]:
        return {str(tokens): choices.count(i) / len(choices) for i, tokens in enumerate(sampler.granularities)}

    found = [family for family in cards.FAMILIES if chosen[family]]
    return {
        "questions": len(regrets),
        "chosen": {family: distribution(own) for family, own in (("all", joined(chosen)), *chosen.items()) if own},
        "tokens": {"all": fmean(joined(shares)), **{family: fmean(shares[family]) for family in found}},
        "tokens_at_least_loss": {"all": fmean(joined(least)), **{family: fmean(least[family]) for family in found}},
        "regret": fmean(regrets),
        "pairs": pairs,
    }


def joined(families: dict[str, list[Any]]) -> list[Any]:
    return [value for own in families.values() for value in own]


@command_line.guarded
def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--model", required=True, help="folder with a router")
    parser.add_argument("--count", type=int, default=200, help="scenes, with all questions about them")
    parser.add_argument("--first", type=int, default=0, help="the test split's scene to begin with")
    parser.add_argument("--line", action="store_true", help="print the result on one line")
    arguments = parser.parse_args()
    expect_numbers(arguments, 1, "count")
    expect_numbers(arguments, 0, "first", cards.SPLIT_SIZE - 1)
    model = minifocus.load(arguments.model, "avg-llava")
    print(json.dumps(measure(model, arguments.count, arguments.first), indent=None if arguments.line else 1))


if __name__ == "__main__":
    command_line.run(main)
