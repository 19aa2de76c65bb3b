"""benchmarks/compare.py runs, and its counts are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts_as_modules import scripts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import minifocus

ROOT = Path(__file__).resolve().parent.parent
compare, flops = scripts("benchmarks", "compare flops")
TINY = ROOT / "weights/tiny"


def test_flops_are_torch_s_count_of_the_same_forward_pass() -> None:
    """PyTorch counts every product of matrices, and of attention the whole square of both."""
    model = minifocus.load(TINY, "none")
    tokens, tiles = 77, 3
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):  # of other kernels' operations it knows nothing on a CPU
        with FlopCounterMode(display=False) as counter:
            features = model.multi_modal_projector(model.vision_tower(torch.randn(tiles, 3, 112, 112)))
        assert len(features) == tiles
        assert counter.get_total_flops() == flops.vision_flops(model.config, tiles)
        x = torch.randn(1, tokens, model.config.text.hidden_size)
        cos, sin = model.language_model.model.rope(torch.arange(tokens)[None], x.dtype)
        with FlopCounterMode(display=False) as counter:
            for layer in model.language_model.model.decoder_layers():
                x = layer(x, cos, sin)
            model.language_model.lm_head(x[:, -1])
    assert counter.get_total_flops() == flops.decoder_flops(
        model.config, [tokens] * model.config.text.num_hidden_layers
    )


def test_every_training_free_method_is_compared() -> None:
    compared = {*compare.KNOWN, *compare.SEARCHED, "vision", "avgpool", "maxpool"} - set(compare.VARIANTS)
    assert compared | {"none"} == set(minifocus.samplers.names())


def test_quick_run(tmp_path: Path) -> None:
    file = tmp_path / "compare.json"
    command = [sys.executable, "benchmarks/compare.py", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    results = {one["method"]: one for one in record["results"]}
    assert set(results) == {"none", "focus", "fastv", "random"}
    for name, one in results.items():
        budget = 1.0 if name == "none" else 0.39
        # Of focus it depends on the four scenes that a quick run asks about; of the others on their options alone.
        assert one["tokens"]["equivalent"] == pytest.approx(budget, abs=0.2 if name == "focus" else 0.02)
        assert 0 < one["gflops"] <= results["none"]["gflops"]
        assert one["prefill_seconds"] > 0 and one["decode_seconds_per_token"] > 0
        assert 0 <= one["accuracy"] <= 1 and set(one["families"]) <= {"read", "perceive", "reason", "relate"}
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert file.with_suffix(".md").read_text(encoding="utf-8") == compare.table(record["results"])
