"""generate.py --file and evaluate.py, by one process and by several: the same answers in the same order, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from example_scripts import example
from several import Several

import minifocus
from minifocus.load import Llava

ROOT = Path(__file__).resolve().parents[2]
generate, evaluation, draw_cards = example("generate"), example("evaluate"), example("draw_cards")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of drawn scenes, with a picture, two or none; one picture is damaged."""
    folder = tmp_path_factory.mktemp("questions")
    draw_cards.write_json(folder, "test", 2, seed=3)
    records = json.loads((folder / "cards.json").read_text())
    (folder / "torn.png").write_bytes((folder / records[0]["image"]).read_bytes()[:300])
    lines: list[dict[str, Any]] = []
    for record in records:
        asked = [turn["value"].replace("<image>\n", "") for turn in record["conversations"][::2]]
        lines += [{"id": f"{record['id']}/{n}", "image": record["image"], "question": q} for n, q in enumerate(asked)]
    lines[5]["image"] = "torn.png"
    lines[7]["image"] = [one["image"] for one in records]
    lines[9] = {"question_id": 9, "text": "What is red?"}
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:24]))
    return file


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    return int(script.main())


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_questions(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    options = ["--file", questions, "--batch-size", 2, "--max-new-tokens", 12]
    assert run(monkeypatch, generate, *options, "--out", one) == 1
    said = capsys.readouterr()
    assert said.out.startswith("23 of 24 questions answered, in ") and said.err.startswith(
        f"error: 1 of 24 questions could not be asked: {questions}: line 6: {questions.parent / 'torn.png'}: not"
    )
    asked, answers = read(questions), read(one)
    assert [line["id"] for line in answers] == [line.get("id", line.get("question_id")) for line in asked]
    assert answers[5].keys() == {"id", "images", "question", "error"} and len(answers[7]["images"]) == 2
    model = minifocus.load(ROOT / "weights/tiny", "focus")
    for number in (0, 4, 7, 9, 23):  # 4 was in a batch with the damaged one
        line = answers[number]
        images = [questions.parent / name for name in line["images"]]
        alone = model.generate(images, line["question"], max_new_tokens=12)
        assert (line["answer"], line["finish"], line["visual_tokens"]) == (alone.text, alone.finish, vars(alone.tokens))

    # Two processes, of which one is killed.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples/generate.py"), *map(str, options), "--out", str(two)]
    torchrun = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 300
        while len(lines := [part.read_text() for part in two.parent.glob("two.jsonl.run/part-*")]) < 2:
            assert torchrun.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        workers = psutil.Process(torchrun.pid).children()
        victim = next(one for one in workers if one.environ()["RANK"] == "1")
        victim.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        out, err = torchrun.communicate(timeout=60)
    finally:
        torchrun.kill()
    assert torchrun.returncode == 1 and time.monotonic() - begun < 30 and not two.exists() and not out
    assert (
        f"Signal 9 (SIGKILL) received by PID {victim.pid}" in err and "rank      : 1 " in err and "error: " not in err
    ), err

    # The rest by one process: what is answered is not asked again, and a line that was cut off is no answer.
    parts = sorted(two.parent.glob("two.jsonl.run/part-*"))
    before = [json.loads(line) for part in parts for line in part.read_text().splitlines() if line.endswith("}")]
    assert 1 < len(before) < 24 and len(lines) == 2
    whole = json.dumps({"number": 23, **answers[23], "answer": "cut off"})
    parts[0].write_text(parts[0].read_text() + whole[:-1])
    with mock.patch.object(Llava, "generate_batch", autospec=True, side_effect=Llava.generate_batch) as asking:
        assert run(monkeypatch, generate, *options, "--out", two) == 1
    pairs = {
        (*(str(file.relative_to(questions.parent)) for file in images), prompt)
        for call in asking.call_args_list
        for images, prompt in zip(*call.args[1:], strict=True)
    }
    unanswered = {line["id"] for line in answers} - {line["id"] for line in before if "answer" in line}
    assert pairs == {(*line["images"], line["question"]) for line in answers if line["id"] in unanswered}
    assert two.read_bytes() == one.read_bytes()
    assert [file.name for file in sorted(tmp_path.glob("*/*"))] == ["run.json", "run.json"]

    # Done: only what has no answer is asked again, and nothing with other options.
    with mock.patch.object(minifocus, "load", wraps=minifocus.load) as loaded:
        assert run(monkeypatch, generate, *options, "--out", two) == 1 and loaded.call_count == 1
        (questions.parent / "torn.png").write_bytes((questions.parent / asked[0]["image"]).read_bytes())
        assert run(monkeypatch, generate, *options, "--out", two) == 0
        assert run(monkeypatch, generate, *options, "--out", two) == 0 and loaded.call_count == 2
    mended = read(two)
    assert "answer" in mended.pop(5) and mended == [line for line in answers if "answer" in line]
    content = two.read_bytes()
    capsys.readouterr()
    refused = f"error: {two}.run/run.json: of another run; name another file or delete this one. "
    assert run(monkeypatch, generate, *options, "--out", two, "--seed", 1) == 2
    assert capsys.readouterr().err == f"{refused}seed: None there, 1 here\n"
    with Several(2, "generate", *options, "--out", two, "--gamma", 0.5) as both:  # of which one says why
        assert sorted(both.wait()) == [1, 2]
        assert "".join(both.all_said()) == f"{refused}options: {{}} there, {{'gamma': 0.5}} here\n"
    (tmp_path / "two.jsonl.run/run.json").unlink()
    assert run(monkeypatch, generate, *options, "--out", two) == 2
    assert f"error: {two}: is there already, without run.json that says what made it" in capsys.readouterr().err
    assert two.read_bytes() == content


def test_what_is_wrong_in_the_folder_of_a_run(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.run/part-0.jsonl"
    arguments = ["--file", questions, "--out", out]
    with mock.patch.object(minifocus, "load", side_effect=minifocus.InputError("enough")):
        assert run(monkeypatch, generate, *arguments) == 2
        assert "enough" in capsys.readouterr().err and [file.name for file in part.parent.iterdir()] == ["run.json"]
        for content, words in (
            ('{"number": 24, "answer": ""}', "line 1: expected the number of one of 24 questions, got 24"),
            ('{"number": true, "answer": ""}', "got True"),
            ('{"number": 0}', "line 1: expected an answer or an error"),
            ("[]", "line 1: expected an answer or an error"),
            ("nonsense", "line 1: not readable as JSON"),
        ):
            part.write_text(content + "\n")
            assert run(monkeypatch, generate, *arguments) == 2
            assert f"{part}: " in (err := capsys.readouterr().err) and words in err and err.count("\n") == 1
        part.unlink()
        out.write_text('{"answer": ""}\n')
        assert run(monkeypatch, generate, *arguments) == 2 and "expected 24 lines, got 1" in capsys.readouterr().err
        (part.parent / "run.json").write_text("{")
        assert run(monkeypatch, generate, *arguments) == 2 and "says nothing of a run" in capsys.readouterr().err


REFUSED: list[tuple[list[Any], str]] = [
    (["--out", "a.jsonl"], "--out is of no use without --file"),
    (["--batch-size", 2], "--batch-size is of no use without --file"),
    (["--images-anywhere"], "--images-anywhere is of no use without --file"),
    (["--file", "q.jsonl"], "--out: expected the name of a file for the answers"),
    (["--file", "q.jsonl", "--out", "./q.jsonl"], "--out: expected another file than --file"),
    (["--file", "q.jsonl", "--out", "."], "--out: expected a file, got ., which is something else"),
    (["--file", "q.jsonl", "--out", "a.jsonl", "--prompt", "a"], "--prompt is for a question of the command line"),
    (["--file", "q.jsonl", "--out", "a.jsonl", "--json"], "--json is for a question of the command line"),
    (["--file", "q.jsonl", "--out", "a.jsonl", "--batch-size", 0], "--batch-size: expected a number of at least 1"),
    (["--file", "none.jsonl", "--out", "a.jsonl"], "none.jsonl: expected a JSON file, found nothing"),
    (["--file", "q.jsonl", "--out", "a.jsonl"], "q.jsonl: line 1: image: none.png: no such file"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"image": "none.png", "question": "?"}\n')
    monkeypatch.setattr(minifocus, "load", mock.Mock(side_effect=AssertionError("loaded")))
    assert run(monkeypatch, generate, *arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and words in said.err and said.err.count("\n") == 1 and not said.out
    assert [file.name for file in tmp_path.iterdir()] == ["q.jsonl"]


def test_evaluation_by_several(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of one process, with a file of answers and without."""
    options = ["--data", questions.parent / "cards.json", "--batch", 2, "--count", 16, "--json"]
    assert run(monkeypatch, evaluation, *options) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected.pop("samples_per_second") > 0 and expected["count"] == 16
    with Several(2, "evaluate", *options) as two:
        assert two.wait() == [0, 0], two.all_said()
        found = json.loads(two.out(0))
        assert not two.out(1)
    assert found.pop("samples_per_second") > 0 and found == expected

    out = tmp_path / "answers.jsonl"
    for rate in (True, False):  # the second time nothing is asked
        assert run(monkeypatch, evaluation, *options, "--out", out) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found.pop("samples_per_second") is not None) == rate and found == expected
    right = [line["answer"] == line["expected"] for line in read(out)]
    assert sum(right) / len(right) == expected["accuracy"]
