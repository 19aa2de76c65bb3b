"""Two processes that share a decoder answer as one does that holds it all, and refuse together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import python
from safetensors.torch import load_file, save_file
from several import Several
from sharing_program import CARDS, QUESTION, TINY, ask_all, logits_of

import minifocus
from minifocus.loading.config import load_config
from minifocus.loading.weights import HEAD, shapes_of, without_values
from minifocus.model import LlavaNetwork

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def random_folder(folder: Path, tied: bool = False, **text: Any) -> None:
    """The embedded model's folder with another decoder, whose biases are as large as what they are added to."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": tied, **text}
    config["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, shape in shapes_of(without_values(lambda: LlavaNetwork(load_config(folder)))).items():
        value = torch.randn(shape, generator=generator)
        values[name] = 1 + 0.2 * value if "norm" in name else value / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
    if tied:
        del values[HEAD]
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def run(count: int, script: str | Path, *arguments: Any) -> list[tuple[int, str, str]]:
    """Status, output and errors of so many processes with what torchrun would tell them."""
    with Several(count, script, *arguments) as processes:
        return [(code, processes.out(rank), processes.err(rank)) for rank, code in enumerate(processes.wait())]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders to load, and what two processes found (sharing_program.py)."""
    folders = tmp_path_factory.mktemp("shared")
    random_folder(folders / "grouped", num_key_value_heads=2, vocab_size=515)  # 258 words and 257
    random_folder(folders / "tied", tied=True, vocab_size=515)
    random_folder(folders / "one key head", num_key_value_heads=1)
    shutil.copytree(TINY, folders / "nan")
    tensors = load_file(TINY / "model.safetensors")
    tensors["language_model.model.layers.1.mlp.down_proj.weight"][0, -1] = torch.nan  # of the second process alone
    save_file(tensors, folders / "nan/model.safetensors", {"format": "pt"})
    for code, _, errors in run(2, Path(__file__).with_name("sharing_program.py"), folders):
        assert code == 0, errors
    return folders


@pytest.fixture(scope="module")
def found(folders: Path) -> list[dict[str, Any]]:
    return [json.loads((folders / f"found-{rank}.json").read_text()) for rank in range(2)]


def test_answers_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    """Tokens, and what every method kept of the picture: with its own heads alone, or their mean, a process would keep others."""
    model = minifocus.load(TINY, "none")
    alone = json.loads(json.dumps(ask_all(model)))
    for own in found:
        assert {name: own[name] for name in alone} == alone
    assert found[0]["sampled"] == found[1]["sampled"]  # without a seed
    assert found[0]["afterwards"] == model.generate(CARDS, QUESTION, max_new_tokens=8).text


def test_logits_of_other_decoders(folders: Path) -> None:
    """Grouped key heads, biases on everything, a vocabulary that does not divide evenly, a head that is the embeddings."""
    for name in ("grouped", "tied"):
        with torch.inference_mode():
            alone = logits_of(minifocus.load(folders / name, "text", gamma=0.5))
        first, second = (torch.load(folders / f"{name}-{rank}.pt") for rank in range(2))
        assert torch.equal(first, second) and first.shape == alone.shape == (2, 515)
        assert (first - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_each_holds_a_half(found: list[dict[str, Any]]) -> None:
    width, config = 128, load_config(TINY).text
    layer = 4 * width * width + 3 * width * config.intermediate_size
    for own in found:
        assert own["parameters"] == {
            "model.layers.1.": layer // 2 + 2 * width,
            "lm_head": config.vocab_size * width // 2,
        }


def test_all_refuse_together(found: list[dict[str, Any]], folders: Path) -> None:
    """What only one process finds, too; none waits for the others for ever, and all can go on."""
    words = {
        "heads": "InputError: tensor parallel: 1 num_key_value_heads cannot be shared evenly by 2 processes: expected a "
        "number that divides it, such as 1",
        "int8": "InputError: tensor parallel: expected a floating-point dtype, got int8",
        "folder": f"CheckpointError: {folders / 'nowhere'}: expected the folder of a model, found nothing",
        "nan": "language_model.model.layers.1.mlp.down_proj.weight: holds NaN or infinite values (as torch.float32)",
        "samplers": "InputError: folder, sampler and dtype: expected the same in all processes, got ",
        "prompts": "InputError: prompts and options: expected the same in all processes, got (['What is 0?']",
        "pictures": "InputError: prompts and pictures: expected the same in all processes, got ",
        "sampler": "InputError: sampler: expected the same in all processes, got ('text', {}), ('none', {})",
        "save": "InputError: save: expected a model that one process holds, got a share of one",
    }
    for own in found:
        assert own["refused"].keys() == words.keys()
        for name, said in own["refused"].items():
            assert words[name] in said, (name, said)


def test_the_command(tmp_path: Path) -> None:
    """The first process prints, and writes the figure; by itself the command says who should start it."""
    options = ["--json", "--prompt", QUESTION, "--sampler", "focus", "--tensor-parallel"]
    first, second = run(2, "generate", *options, "--figure", tmp_path / "a.png")
    assert (first[0], second[0]) == (0, 0) and second[1] == "", first[2] + second[2]
    told = json.loads(first[1])
    expected = minifocus.load(TINY).generate(CARDS, QUESTION)
    assert told["token_ids"] == expected.token_ids and told["visual_tokens"] == vars(expected.tokens)
    assert (tmp_path / "a.png").is_file()

    done = python("examples/generate.py", *options)
    assert done.returncode == 2 and "--tensor-parallel: expected to be started by torchrun" in done.stderr
    assert done.stderr.count("\n") == 1
