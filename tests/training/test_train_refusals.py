"""Arguments and files that examples/train.py refuses: one line, and exit status 2."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from checkpoints import add_tokenizer, build, save
from training_runs import ENVIRONMENT, ROOT, SHORT, command, train, trainer

from minifocus.samplers.selector_file import save_selector
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_run_cannot_end_with_is_refused_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a/curve.png").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/model").write_text("mine")
    for out, words in (("a/curve.png", "expected a file or nothing"), ("b/model", "expected a folder or nothing")):
        with mock.patch.object(trainer, "load_to_train", side_effect=AssertionError("loaded")):
            done = train("--out", (tmp_path / out).parent, *SHORT)
        assert done.code == 2 and f"--out: {tmp_path / out}: {words}" in done.err


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("refused")
    record = json.loads(data.read_text())[0] | {"id": "0"}
    for name, image in (("lost", "lost.png"), ("torn", "file"), ("away", str(folder / "file"))):
        (folder / f"{name}.json").write_text(json.dumps([record | {"image": image}]))
    llava = save(build("llava", seed=1), folder / "llava")
    silent = save(build("llava_next", seed=1), folder / "silent")
    save_selector(silent / "selector.safetensors", LinearSelector(16, 3), VisionGuidedOptions())
    add_tokenizer(llava)
    (folder / "file").write_text("")
    files = {name: folder / f"{name}.json" for name in ("lost", "torn", "away")}
    return SimpleNamespace(folder=folder, data=data, llava=llava, silent=silent, **files)


BAD: list[tuple[Sequence[Any], str]] = [
    (["--model", "nowhere"], "nowhere: expected the folder of a model, found nothing"),
    (["--model", "{silent}"], "silent has none"),
    (["--out", "{folder}/file"], "{folder}/file: cannot be written: Not a directory"),
    (["--device", "abacus"], "device: 'abacus' is not usable here"),
    (["--device", "cuda:99"], "device: 'cuda:99' is not usable here"),
    (["--data", "none.json"], "none.json: expected a JSON file, found nothing"),
    (["--data", "{data}", "--images", "none"], "none: expected a folder with pictures"),
    (["--data", "{lost}"], "lost.json: record 0: image: {folder}/lost.png: no such file"),
    (["--data", "{lost}", "--skip-unusable"], "lost.json: record 0: image: {folder}/lost.png: no such file"),
    (["--data", "{torn}"], "conversation '0': {folder}/file: not a picture that can be read: "),
    (["--data", "{torn}", "--workers", 1], "(skip_unusable leaves such a conversation out)"),
    (["--data", "{torn}", "--skip-unusable"], "data: expected a usable conversation, got 1 that are not"),
    (["--data", "{data}", "--max-tokens", 3], "; expected its answer to begin within 3 (skip_unusable"),
    (["--skip-unusable"], "--skip-unusable: expected --data beside it, got True"),
    (["--images-anywhere"], "--images-anywhere: expected --data beside it, got True"),
    (
        ["--data", "{away}"],
        "away.json: record 0: image: expected a name inside of {folder} (images_anywhere takes others)",
    ),
    (["--data", "{away}", "--images-anywhere"], "conversation '0': {folder}/file: not a picture that can be read: "),
    (
        ["--data", "{data}", "--validate", 1, "--validation-data", "{away}"],
        "away.json: record 0: image: expected a name",
    ),
    (["--data", "{data}", "--dense"], "--dense: expected no --data"),
    (["--data", "{data}", "--first-scene", 2], "--first-scene: expected no --data"),
    (["--data", "{data}", "--validate", 2], "--validate: expected --validation-data beside it, got 2"),
    (["--data", "{data}", "--validate", 2, "--validation-data", "none.json"], "none.json: expected a JSON file"),
    (
        ["--data", "{data}", "--validation-data", "{data}"],
        "--validation-data: expected --validate beside it, got {data}",
    ),
    (["--images", "."], "--images: expected --data beside it, got ."),
    (["--validation-data", "x"], "--validation-data: expected --data beside it, got x"),
    *(
        ([f"--{option}", value], f"--{option}: expected a number of at least {least}, got {value}")
        for least, options in (
            (1, "steps batch micro-batch max-turns max-tokens save-every log-every validate-every"),
            (0, "seed first-scene workers validate weight-decay final-lr lr-vision lr-projector lr-llm lr-selector"),
        )
        for option in options.split()
        for value in [least - 1 if least else "-1.0" if option.startswith(("lr", "weight", "final")) else -1]
    ),
    (["--lr-selector-bias", "-0.5"], "--lr-selector-bias: expected a number of at least 0, got -0.5"),
    (["--lr-llm", "nan"], "--lr-llm: expected a number of at least 0, got nan"),
    (["--lr-llm", "inf"], "--lr-llm: expected a number of at most 1e+06, got inf"),
    (["--warmup", "1.5"], "--warmup: expected a share from 0 to 1, got 1.5"),
    (["--warmup", "nan"], "--warmup: expected a share from 0 to 1, got nan"),
    (["--beta2", "1"], "--beta2: expected a number from 0 to below 1, got 1.0"),
    (["--max-grad-norm", "0"], "--max-grad-norm: expected a number above 0, got 0.0"),
    (["--selector-bias", "nan"], "--selector-bias: expected a number of at least -1e+06, got nan"),
    (["--selector-bias", "2"], "--selector-bias: expected a new selector"),
    (["--selector-bias", "2", "--sampler", "text"], "--selector-bias: expected a new selector"),
    (["--alpha", "0.5", "--stage", "align"], "--alpha: sampler 'none' has no selector"),
    (["--scale-weights", "1,1,1", "--sampler", "text"], "--scale-weights: sampler 'text' has no selector"),
    (["--batch", 5, "--micro-batch", 2], "batch: expected a multiple of micro_batch x processes = 2 x 1, got 5"),
    (["--freeze", "tower"], "--freeze: expected some of vision, projector, llm, selector, router, got 'tower'"),
    (["--freeze", "vision,projector,llm,selector"], "learning rates: expected at least one above 0"),
    (["--fresh", "llm"], "--fresh: expected some of projector, selector, router, got 'llm'"),
    (["--window", 5], "window: "),
    (["--window", 5, "--fresh", "selector"], "window: expected one of 1, 2, 4, 8, 12, got 5"),
    (["--branches", 5, "--fresh", "selector"], "branches: expected 3 or 7, got 5"),
    (["--thumbnail", "drop", "--sampler", "text"], "--thumbnail: sampler 'text' has no such option"),
    (["--printed-factor", "--sampler", "none"], "--printed-factor: sampler 'none' has no such option"),
    (["--lora-alpha", 8], "--lora-alpha: expected --lora-rank beside it, got 8.0"),
    (["--lora-merge"], "--lora-merge: expected --lora-rank beside it, got True"),
    (["--lora-rank", 0], "--lora-rank: expected a 64-bit whole number of at least 1, got 0"),
    (["--lora-rank", 9999], "rank: expected a whole number from 1 to 128, got 9999"),
    (["--lora-rank", 4, "--lora-alpha", "nan"], "--lora-alpha: expected a number above 0"),
    (["--lora-rank", 4, "--lora-dropout", 1], "--lora-dropout: expected a probability below 1, got 1.0"),
    (["--lora-rank", 4, "--lora-targets", "fc1"], "--lora-targets: expected some of q_proj, k_proj, v_proj, o_proj"),
    (["--lora-rank", 4, "--lora-targets", ","], "--lora-targets: expected some of q_proj"),
    (["--lora-rank", 4, "--fresh", "projector"], "--lora-rank: expected no new projector beside it"),
    (["--lora-rank", 4, "--stage", "align"], "--lora-rank: expected a learning rate for what it adds"),
    (["--lora-rank", 4, "--freeze", "llm"], "--lora-rank: expected a learning rate for what it adds"),
    (["--sampler", "fastv"], "sampler: FastV acts inside the language model and is not for training"),
    (["--sampler", "random", "--option", "window=2"], "window: not an option of sampler 'random'"),
    (
        ["--fresh", "selector", "--option", "gamma=0.5"],
        "--option: gamma is drawn for every sample: expected its range as",
    ),
    (["--sampler", "text", "--option", "layer=1"], "drawn for every sample: expected its range as --layers"),
    (["--fresh", "selector", "--option", "size=3"], "size: not an option of sampler 'focus'; its options: "),
    (["--fresh", "selector", "--sampler", "vision", "--option", "text=all"], "text: not an option of sampler 'vision'"),
    (["--window", "2", "--option", "window=4"], "--option: expected NAME=VALUE, each name once, got 'window=4'"),
    (["--thumbnail", "drop", "--model", "{llava}"], "thumbnail: LLaVA-1.5 has no thumbnail to drop"),
    (["--alpha", "-1"], "alpha: expected a number of at least 0 and at most 1e+06, got -1.0"),
    (["--gamma", "0.9"], "--gamma: expected 2 numbers with commas between, got '0.9'"),
    (["--gamma", "0.9,0.5"], "gamma: expected a range between 0 and 1, got 0.9 to 0.5"),
    (["--layers", "a,b"], "--layers: expected 2 numbers with commas between, got 'a,b'"),
    (["--layers", "0.5,1.5"], "layers: expected a range between 0 and 1, got 0.5 to 1.5"),
    (["--scale-weights", "1,one,1"], "--scale-weights: expected numbers with commas between, got '1,one,1'"),
    (["--scale-weights", "1,1"], "scale_weights: expected 3, one per scale, got 2"),
    (["--scale-weights", "1,1,inf"], "scale_weights: expected numbers of at least 0"),
    (["--sampler-dropout", "2"], "sampler_dropout: expected a probability, got 2.0"),
    (["--device", "meta"], "device: 'meta' is not usable here"),
    (["--fresh", "projector", "--seed", 10**20], "--seed: expected a number of at most 9.22337e+18, got 1000000"),
    (["--steps", 10**4000], "--steps: expected a number of at most 9.22337e+18, got a whole number of 13288 bits"),
    (["--batch", 10**30], "--batch: expected a number of at most 1.04858e+06"),
    (["--workers", 10**6], "--workers: expected a number of at most 1000"),
    (["--lr-llm", "1e38"], "--lr-llm: expected a number of at most 1e+06, got 1e+38"),
    (["--weight-decay", "1e400"], "--weight-decay: expected a number of at most 1e+06, got inf"),
    (["--selector-bias", "1e39"], "--selector-bias: expected a number of at most 1e+06, got 1e+39"),
    (["--alpha", "inf"], "alpha: expected a number of at least 0 and at most 1e+06, got inf"),
    (["--first-scene", 10**8], "seed: expected 0 to 99999999, a scene of the split, got 100000000"),
    (["--out", ""], "--out: expected the name of a folder, got"),
    (["--images", "a" * 5000], "--images: expected --data beside it, got aaaa"),
    (["--gamma", "a" * 5000], "--gamma: expected 2 numbers with commas between, got 'aaaa"),
    (["--freeze", "a" * 5000], "--freeze: expected some of vision, projector, llm, selector, router, got 'aaaa"),
    (["--model", "a" * 5000], "expected the folder of a model, found a name that cannot be used"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(map(str, arguments))[:50] for arguments, _ in BAD])
def test_bad_arguments(places: SimpleNamespace, tmp_path: Path, arguments: Sequence[Any], words: str) -> None:
    done = train("--out", tmp_path, "--steps", 1, *(str(word).format(**vars(places)) for word in arguments))
    assert done.code == 2 and not done.out
    assert done.err.startswith("error: ") and words.format(**vars(places)) in done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err and len(done.err) < 1000, done.err


@pytest.mark.parametrize("arguments", [["--stage", "tune"], ["--steps", "many"], ["--sampler", "best"], ["--unknown"]])
def test_what_argparse_refuses(tmp_path: Path, arguments: list[str]) -> None:
    done = train("--out", tmp_path, *arguments)
    assert done.code == 2 and f"error: {'argument ' * (arguments != ['--unknown'])}" in done.err
    assert arguments[0] in done.err and "Traceback" not in done.err


def test_as_a_command(tmp_path: Path) -> None:
    """The exit code and the line of an error as a shell sees them."""
    arguments = command(ROOT / "examples/train.py", "--out", "new", "--steps", 0)
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --steps: expected a number of at least 1, got 0\n"
    assert not list(tmp_path.iterdir())
