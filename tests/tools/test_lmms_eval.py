"""lmms-eval itself runs the adapter of examples/lmms_eval on drawn cards; skipped where that package is not installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval: see examples/lmms_eval/README.md")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

import minifocus
from examples.lmms_eval import run as registration  # noqa: F401  makes lmms-eval know "minifocus"
from examples.lmms_eval.minifocus_lmms import Minifocus, generation_options
from minifocus import cards

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ROOT / "examples/lmms_eval"
TINY = ROOT / "weights/tiny"

pytestmark = pytest.mark.usefixtures("one_thread")

UTILS = """
def pictures(document):
    return document["pictures"]

def score(document, results):
    return {"accuracy": float(results[0] == document["answer"])}
"""
TASK = """
task: minifocus_cards
output_type: generate_until
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: cards.parquet
test_split: test
doc_to_visual: !function utils.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
process_results: !function utils.score
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""
Document = dict[str, Any]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Questions about one picture; and, with no right answer, some about none and about two, at three lengths."""
    asked = list(cards.questions("test", 16, seed=5000))
    documents = [{"pictures": [image], "question": question, "answer": answer} for image, question, answer, _ in asked]
    for place, count in ((3, 0), (9, 2), (12, 0)):
        question = "How many stars are there?" + " What colour is the card?" * place
        documents.insert(place, {"pictures": [asked[i][0] for i in range(count)], "question": question, "answer": "?"})
    return documents


@pytest.fixture(scope="module")
def expected(documents: list[Document]) -> list[str]:
    """What direct calls answer with both samplers, one by one."""
    return answer_directly(documents)


@pytest.fixture(scope="module")
def folder(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of tasks as `--include_path` takes it."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    folder = tmp_path_factory.mktemp("tasks")
    features = Features(pictures=List(Picture()), question=Value("string"), answer=Value("string"))
    Dataset.from_list(documents, features=features).to_parquet(folder / "cards.parquet")
    (folder / "utils.py").write_text(UTILS)
    (folder / "cards.yaml").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(scope="module")
def tasks(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks: TaskManager, model_args: str) -> dict[str, Any]:
    return simple_evaluate(
        "minifocus",
        f"pretrained={TINY},device=cpu,{model_args}",
        tasks=["minifocus_cards"],
        task_manager=tasks,
        batch_size=7,
    )


def answer_directly(documents: list[Document], **options: Any) -> list[str]:
    model = minifocus.load(TINY, **options)
    return [model.generate(one["pictures"], one["question"], max_new_tokens=16).text for one in documents]


def right(texts: list[str], documents: list[Document]) -> int:
    return sum(text == one["answer"] for text, one in zip(texts, documents, strict=True))


@pytest.mark.parametrize(
    ("model_args", "options"),
    [
        ("sampler=none", {"sampler": "none"}),
        ("sampler=focus,gamma=0.5,layer=1", {"sampler": "focus", "gamma": 0.5, "layer": 1}),
        ("sampler=focus,keep=9,selector=variance", {"sampler": "focus", "keep": 9, "selector": "variance"}),
    ],
)
def test_lmms_eval_gets_the_answers_of_direct_calls(
    tasks: TaskManager, documents: list[Document], model_args: str, options: dict[str, Any]
) -> None:
    results = evaluate(tasks, model_args)
    samples = {sample["doc_id"]: sample["filtered_resps"][0] for sample in results["samples"]["minifocus_cards"]}
    expected = answer_directly(documents, **options)
    assert samples == dict(enumerate(expected))
    accuracy = right(expected, documents) / len(documents)
    assert results["results"]["minifocus_cards"]["accuracy,none"] == pytest.approx(accuracy)
    share = results["throughput"]["avg_visual_tokens_equivalent"]
    if options["sampler"] == "none":
        assert share == 1 and right(expected, documents) >= 11  # of 16: each question came with its own picture
    else:
        assert share < 0.8


@pytest.mark.parametrize("processes", [1, 2])
def test_command_line(
    processes: int, folder: Path, documents: list[Document], expected: list[str], tmp_path: Path
) -> None:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command = [
        *(sys.executable, *launcher, "-m", "examples.lmms_eval.run", "--model", "minifocus", "--batch_size", "4"),
        *("--model_args", f"pretrained={TINY},sampler=focus", "--tasks", "minifocus_cards"),
        *("--include_path", str(folder), "--output_path", str(tmp_path), "--log_samples"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("Running on rank 1 " in done.stdout) == (processes == 2)
    (results,) = tmp_path.rglob("*_results.json")
    (samples,) = tmp_path.rglob("*_samples_minifocus_cards.jsonl")
    accuracy = right(expected, documents) / len(documents)
    assert json.loads(results.read_text())["results"]["minifocus_cards"]["accuracy,none"] == pytest.approx(accuracy)
    answers = {one["doc_id"]: one["filtered_resps"] for one in map(json.loads, samples.read_text().splitlines())}
    assert answers == dict(enumerate(expected))


# ---- the adapter by itself ----


@pytest.fixture
def adapter(documents: list[Document]) -> Minifocus:
    model = Minifocus(pretrained=str(TINY), sampler="focus", device="cpu", batch_size=4)
    model.task_dict["cards"] = {"test": documents}
    return model


def pictures(document: Document) -> list[Image.Image]:
    return document["pictures"]


def request(
    number: int, question: str, given: dict[str, Any], visual: Callable[[Document], Any] = pictures
) -> Instance:
    metadata = {"task": "cards", "doc_id": number, "repeats": 1}
    return Instance("generate_until", (question, given, visual, number, "cards", "test"), 0, metadata)


def test_requests_with_different_options_keep_their_order(
    adapter: Minifocus, documents: list[Document], expected: list[str]
) -> None:
    """Some are cut at a text, some after one token, some not: they cannot share batches, and come back where they belong."""
    model = minifocus.load(TINY)
    requests, wanted = [], []
    for i, (one, text) in enumerate(zip(documents, expected, strict=True)):
        given: dict[str, Any] = {"max_new_tokens": 16, "until": ["\n\n"], "temperature": 0.0, "num_beams": 1}
        if i % 3 == 1 and len(text) > 1:
            given["until"] = ["not there", text[1:]]
            text = text.partition(text[1:])[0]
        elif i % 3 == 2:
            given = {"max_new_tokens": 1}
            text = model.generate(one["pictures"], one["question"], max_new_tokens=1).text
        requests.append(request(i, one["question"], given))
        wanted.append(text)
    assert len(set(wanted)) > 3 and wanted != expected
    assert adapter.generate_until(requests) == wanted
    assert adapter.generate_until([]) == []


def test_sampling_follows_the_seed_and_repeats_differ(adapter: Minifocus, documents: list[Document]) -> None:
    given = {"max_new_tokens": 4, "do_sample": True, "temperature": 9.0, "top_p": 0.9}
    requests = [request(0, documents[0]["question"], given)] * 6
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(adapter.generate_until(requests))
    assert runs[0] == runs[1] != runs[2] and len(set(runs[0])) > 1


def test_template(documents: list[Document]) -> None:
    adapter = Minifocus(pretrained=str(TINY), sampler="none", device="cpu", template="raw")
    adapter.task_dict["cards"] = {"test": documents}
    question = f"USER: <image>\n{documents[0]['question']} ASSISTANT:"
    assert adapter.generate_until([request(0, question, {})]) == answer_directly(documents[:1], sampler="none")


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": None, "pretraned": "x"}, r"pretrained=FOLDER, got only \['pretraned'\]"),
        ({"gama": 0.5}, "model_args .*: gama: not an option of sampler 'focus'"),
        ({"sampler": "none", "gamma": 0.5}, "gamma: not an option of sampler 'none'"),
        ({"gamma": 2.0}, "gamma: expected a number above 0"),
        ({"sampler": "fokus"}, "sampler: expected one of focus.*got 'fokus'"),
        ({"template": "alpaca"}, "template: expected one of 'vicuna'.*got 'alpaca'"),
        ({"dtype": "int8"}, "dtype: expected one of .*got 'int8'"),
        ({"device": "nowhere"}, "nowhere"),
        ({"batch_size": "auto"}, "batch_size: expected a whole number of at least 1, got 'auto'"),
        ({"batch_size": 0}, "batch_size: .*got 0"),
    ],
)
def test_bad_model_args(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(minifocus.InputError, match=message):
        Minifocus(**{"pretrained": str(TINY), "device": "cpu"} | arguments)


def test_bad_model_args_through_lmms_eval(tasks: TaskManager) -> None:
    with pytest.raises(minifocus.InputError, match="gama: not an option"):
        evaluate(tasks, "gama=0.5")
    with pytest.raises(minifocus.CheckpointError, match="nowhere"):
        simple_evaluate("minifocus", "pretrained=nowhere", tasks=["minifocus_cards"], task_manager=tasks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 5}, "num_beams: expected 1.*got 5"),
        ({"repetition_penalty": 1.2}, r"generation_kwargs: expected some of .*got \['repetition_penalty'\]"),
        ({"until": 3}, "until: expected a text or a list"),
        ({"until": [""]}, "until: .*none empty"),
    ],
)
def test_bad_generation_options(adapter: Minifocus, given: dict[str, Any], message: str) -> None:
    with pytest.raises(minifocus.InputError, match=message):
        adapter.generate_until([request(0, "How many?", given)])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ({"max_new_tokens": 1024, "temperature": 0.0}, [])),
        ({"temperature": 0, "top_p": 0, "until": "\n\n"}, ({"max_new_tokens": 1024, "temperature": 0.0}, [])),
        ({"do_sample": False, "temperature": 0.2, "until": None}, ({"max_new_tokens": 1024, "temperature": 0.0}, [])),
        ({"temperature": 0.2}, ({"max_new_tokens": 1024, "temperature": 0.2, "top_p": 1.0}, [])),
        (
            {"do_sample": True, "top_p": 0.5, "until": ["a", "\n\n"], "max_new_tokens": 3},
            ({"max_new_tokens": 3, "temperature": 1.0, "top_p": 0.5}, ["a"]),
        ),
    ],
)
def test_generation_options(given: dict[str, Any], expected: tuple[dict[str, Any], list[str]]) -> None:
    assert generation_options(given) == expected


def test_other_kinds_of_tasks_are_refused(adapter: Minifocus) -> None:
    with pytest.raises(minifocus.InputError, match="generate_until_multi_round: expected a task of single questions"):
        adapter.generate_until_multi_round([])
    with pytest.raises(minifocus.InputError, match="loglikelihood: expected a task of output_type generate_until"):
        adapter.loglikelihood([])


def test_what_is_no_picture_is_refused(adapter: Minifocus) -> None:
    with pytest.raises(minifocus.InputError, match=r"cards, document 0: expected pictures \(PIL\), got str"):
        adapter.generate_until([request(0, "How many?", {}, visual=lambda one: ["film.mp4"])])
    with pytest.raises(
        minifocus.InputError, match="among the documents cards 0: prompt: expected one <image> for each"
    ):
        adapter.generate_until([request(0, "<image> and <image>?", {})])


def test_one_picture_without_a_list(adapter: Minifocus, documents: list[Document], expected: list[str]) -> None:
    asked = request(0, documents[0]["question"], {"max_new_tokens": 16}, lambda one: one["pictures"][0])
    assert adapter.generate_until([asked]) == expected[:1]


# ---- the README ----


def test_tasks_of_the_readme_are_lmms_eval_s() -> None:
    """They exist, they ask for text, and they ask for it with options that the adapter takes."""
    names = set(re.findall(r"--tasks ([a-z_]+)", (ADAPTER / "README.md").read_text()))
    assert names >= {"textvqa_val", "mme", "scienceqa_img", "gqa", "pope", "mmvet", "mmbench_en_dev"}
    known = TaskManager()
    for name in [*names, "mmbench_en_dev_static"]:
        assert name in known.all_tasks
        config = load_yaml_config(known.task_index[name]["yaml_path"], mode="simple")
        assert config["output_type"] == "generate_until"
        generation_options(config["generation_kwargs"])
