"""LoRA: what it trains, that a run goes on, and that its files are PEFT's: merged by hand, here, and by peft itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from example_scripts import example
from random_examples import close
from safetensors.torch import load_file, save_file
from training_runs import SHORT, TINY, changed, figures, largest_difference, train, trainer, weights

import minifocus
from minifocus import cards
from minifocus.training import loop
from minifocus.training.adapter_file import merge_adapter
from minifocus.training.lora import LoRA, LoRALinear, add_lora

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = [*SHORT, "--lora-rank", 4, "--lora-alpha", 6, "--lora-targets", "down_proj,q_proj", "--lr-llm", 1e-2]
WHERE = [f"language_model.model.layers.{n}.{m}" for n in range(4) for m in ("mlp.down_proj", "self_attn.q_proj")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    done = train("--out", out, *LORA, "--lora-merge")
    assert done.code == 0, done.err
    return out


def merged_by_hand(start: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """W + alpha / r · B A, read off PEFT's names."""
    stored = load_file(adapter / "adapter_model.safetensors")
    merged = dict(start)
    for name, value in stored.items():
        name = name.removeprefix("base_model.model.model.")
        if "lora" not in name:
            merged[name] = value
        elif name.endswith("lora_B.weight"):
            a = stored["base_model.model.model." + name.replace("lora_B", "lora_A")]
            place = name.replace("language_model", "language_model.model", 1).replace("lora_B.weight", "weight")
            merged[place] = merged[place] + 6 / 4 * value @ a
    return merged


def test_what_a_run_leaves(run: Path) -> None:
    """The adapter is of the matrices it was asked for; merged into the model, nothing else differs, bit for bit."""
    start, trained = weights(TINY), weights(run / "model")
    expected = {f"{name}.weight" for name in WHERE}
    moved = changed(start, trained)
    assert {n for n in moved if n.startswith("language_model.")} == expected
    others = {n for n in moved - expected if not n.startswith("selector.")}
    assert others == {name for name in start if name.startswith("multi_modal_projector.")}
    assert torch.equal(trained["selector.bias"], load_file(run / "adapter/selector.safetensors")["bias"])
    assert "selector.bias" in moved
    by_hand = merged_by_hand({n: v for n, v in start.items() if not n.startswith("selector.")}, run / "adapter")
    assert largest_difference(by_hand, {n: v for n, v in trained.items() if not n.startswith("selector.")}) <= 1e-6
    assert max(float((trained[n] - start[n]).abs().max()) for n in expected) > 1e-3
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 6, ["multi_modal_projector"])
    assert set(torch.load(run / "checkpoint.pt", weights_only=True)["parameters"]) == {
        *(f"model.{name}.lora_{which}.weight" for name in WHERE for which in "AB"),
        *(f"model.{name}" for name in start if name.startswith("multi_modal_projector.")),
        *(f"model.before_llm.selector.{name}" for name in ("weight", "bias")),
    }


def test_merged_is_what_was_trained(run: Path) -> None:
    """The trained network, its products beside its matrices, gives the merged folder's logits."""
    trained = minifocus.load(TINY, "none")
    add_lora(trained, LoRA(4, 6, 0.5, ("q_proj", "down_proj")), 0, torch.device("cpu"))
    ids = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(trained(ids), minifocus.load(TINY, "none")(ids))  # B begins at 0, and no dropout acts on answers
    state = torch.load(run / "checkpoint.pt", weights_only=True)["parameters"]
    own = {name.removeprefix("model."): value for name, value in state.items() if "before_llm" not in name}
    assert not trained.load_state_dict(own, strict=False).unexpected_keys
    merged = minifocus.load(run / "model", "none")(ids)
    assert (trained(ids) - merged).abs().max() <= 1e-4 * merged.std()
    assert (merged - minifocus.load(TINY, "none")(ids)).abs().max() > 0.01 * merged.std()


def test_a_run_goes_on(run: Path, tmp_path: Path) -> None:
    """After one of its two steps, with other memory, and to the same weights: dropout is drawn by the step."""
    save = loop.save_checkpoint

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with mock.patch.object(loop, "save_checkpoint", save_and_die):
        assert train("--out", tmp_path, *LORA, "--save-every", 1).code == 130
    done = train("--out", tmp_path, *LORA)
    assert done.code == 0 and str(tmp_path / "adapter") in done.out, done.err
    assert not (tmp_path / "model").exists()
    for name in ("adapter_config.json", "adapter_model.safetensors", "selector.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    assert figures(tmp_path) == figures(run)
    done = train("--out", tmp_path, *LORA, "--lora-rank", 5)
    assert done.code == 2 and "lora_rank: 4 there, 5 here" in done.err
    shutil.rmtree(tmp_path)
    done = train("--out", tmp_path, *LORA, "--gradient-checkpointing")
    assert done.code == 0, done.err
    ours, theirs = (load_file(place / "adapter/adapter_model.safetensors") for place in (tmp_path, run))
    assert largest_difference(ours, theirs) <= 1e-5


def test_frozen_weights_take_half_the_memory(tmp_path: Path) -> None:
    """With --bf16 they are bfloat16, while what is trained begins as it is stored; merging is into the stored weights."""
    seen: dict[str, torch.Tensor] = {}
    fit = trainer.fit

    def watched(task: Any, *arguments: Any, **options: Any) -> float:
        seen.update({name: p.detach().clone() for name, p in task.named_parameters()})
        return fit(task, *arguments, **options)

    with mock.patch.object(trainer, "fit", watched):
        done = train("--out", tmp_path, *LORA, "--bf16", "--lora-merge")
    assert done.code == 0, done.err
    start, merged = weights(TINY), weights(tmp_path / "model")
    for name, value in seen.items():
        of_file = start.get(name.removeprefix("model."))
        trained = ".lora_" in name or "projector" in name or "before_llm" in name
        assert value.dtype == (torch.float32 if trained else torch.bfloat16), name
        assert of_file is None or torch.equal(value, of_file.to(value.dtype))
    assert not changed(start, merged) & {"language_model.lm_head.weight", "image_newline"}
    assert {f"{name}.weight" for name in WHERE} <= changed(start, merged)


def test_what_cannot_be_merged(run: Path, tmp_path: Path) -> None:
    """One line that names file and key; the model is left as it was."""
    model = minifocus.load(TINY, "none")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    a = next(name for name in tensors if "lora_A" in name)
    b = a.replace("lora_A", "lora_B")
    odd: list[tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = [
        ({"peft_type": "LOHA"}, {}, "adapter_config.json: peft_type: expected one of LORA, got 'LOHA'"),
        ({"use_dora": True}, {}, "adapter_config.json: use_dora: expected nothing beyond plain LoRA, got True"),
        ({"alpha_pattern": {"q_proj": 2}}, {}, "alpha_pattern: expected nothing beyond plain LoRA"),
        ({"bias": "all"}, {}, "bias: expected nothing beyond plain LoRA, got 'all'"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights: expected nothing"),
        ({"r": 0}, {}, "r: expected a whole number from 1"),
        ({"r": 3}, {}, "expected floating-point values of shape"),
        ({"lora_alpha": None}, {}, "lora_alpha: expected a positive number"),
        ({}, {b: None}, f"{b}: expected floating-point values of shape (128, 4), got no such tensor"),
        ({}, {a: tensors[a][:, 1:].contiguous()}, f"{a}: expected floating-point values of shape"),
        ({}, {a: tensors[a] * torch.nan}, f"{a}: expected finite values"),
        ({}, {a: tensors[a].long()}, "got (4, 352) of torch.int64"),
        ({}, {a.replace("down_proj", "side_proj"): tensors[a]}, "side_proj.lora_A.weight: expected tensors that the"),
        ({}, {a.replace("mlp.down_proj", "input_layernorm"): tensors[a]}, "expected one for a matrix"),
        ({}, {a.replace("base_model.", ""): tensors[a]}, "expected tensors that the model has a place for"),
        ({}, dict.fromkeys(tensors), "expected an adapter's tensors, found none"),
    ]
    for members, changes, words in odd:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | members))
        kept = {name: value.clone() for name, value in {**tensors, **changes}.items() if value is not None}
        save_file(kept, tmp_path / "adapter_model.safetensors")
        with pytest.raises(minifocus.CheckpointError) as error:
            merge_adapter(model, tmp_path)
        assert words in str(error.value) and str(tmp_path) in str(error.value), words
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merger = example("merge_lora")
    arguments = ["merge_lora.py", "--model", str(TINY), "--adapter", str(tmp_path), "--out", str(tmp_path / "out")]
    with mock.patch("sys.argv", arguments):
        assert merger.main() == 2 and not (tmp_path / "out").exists()


def test_the_command_merges_as_the_run_does(run: Path, tmp_path: Path) -> None:
    merger = example("merge_lora")
    arguments = ["--model", str(TINY), "--adapter", str(run / "adapter"), "--out", str(tmp_path / "out")]
    with mock.patch("sys.argv", ["merge_lora.py", *arguments]):
        assert not merger.main()
    for file in (run / "model").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_rank_stabilised_scale(run: Path, tmp_path: Path) -> None:
    """PEFT's use_rslora divides by the rank's root: 6 / √4 is 12 / 4."""
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    found = []
    for members in ({"use_rslora": True}, {"lora_alpha": 12}):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | members))
        model = minifocus.load(TINY, "none")
        merge_adapter(model, tmp_path / "adapter")
        found.append(model.state_dict())
    assert not changed(*found)


def test_dropout_is_of_what_the_products_read() -> None:
    linear = torch.nn.Linear(64, 8).eval()
    lora = LoRALinear(linear, LoRA(2, 4.0, 0.25), torch.device("cpu"))
    torch.nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(5, 64)
    assert not lora.training  # in the mode of what it replaces
    lora.train()
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.25)
    torch.manual_seed(3)
    expected = linear(x) + 2.0 * ((x * mask) @ lora.lora_A.weight.T @ lora.lora_B.weight.T)
    assert torch.allclose(lora(x), expected, atol=1e-5)
    assert torch.allclose(
        lora.eval()(x), linear(x) + 2.0 * (x @ lora.lora_A.weight.T @ lora.lora_B.weight.T), atol=1e-5
    )


def test_peft_reads_and_writes_the_same(run: Path, tmp_path: Path) -> None:
    """peft itself gives the merged logits; what it saves is merged to the same again. In an environment of its own."""
    peft = pytest.importorskip("peft", reason="needs peft: make test_peft")
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    image, question, _, _ = next(iter(cards.questions("test", 1, seed=5000)))
    processor = AutoProcessor.from_pretrained(TINY, backend="pil")
    inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    adapted = peft.PeftModel.from_pretrained(LlavaNextForConditionalGeneration.from_pretrained(TINY), run / "adapter")
    names = ("input_ids", "pixel_values", "image_sizes", "attention_mask")
    with torch.inference_mode():
        theirs = adapted(**inputs).logits
        ours = minifocus.load(run / "model", "none")(*(inputs[name] for name in names))
    plain = minifocus.load(TINY, "none")(*(inputs[name] for name in names))
    assert close(ours, theirs, 2e-6)  # of the largest logit: the merged matrix is rounded, the sum beside one is not
    assert (plain - theirs).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again, model = minifocus.load(TINY, "none"), minifocus.load(run / "model", "none")
    merge_adapter(again, tmp_path)
    assert largest_difference(again.state_dict(), model.state_dict()) <= 1e-6
