"""Saving: at every moment the old model, the new one or none; no file of another is lost; what is saved loads again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import killed_saves
import pytest
import torch
from checkpoints import add_tokenizer, build, make_inputs, save
from forked import python
from killed_saves import OTHERS, contents, with_others
from safetensors.torch import load_file

import minifocus
from minifocus.samplers.selector_file import load_selector, save_selector
from minifocus.samplers.vision_guided import LinearSelector, VisionGuidedOptions, VisionGuidedSampler

HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def make(folder: Path, seed: int, shards: int = 1, **changes: Any) -> Path:
    """A model with a selector and a tokenizer; every file differs from those of another seed."""
    save(build("llava", seed=seed, text_rope_theta=1000.0 + seed, **changes), folder, shards=shards)
    add_tokenizer(folder)
    for name in ("tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps({**fields, "_seed": seed} if name != "tokenizer.json" else fields, indent=seed)
        )
    selector = LinearSelector(16, 3)
    torch.nn.init.normal_(selector.weight, generator=torch.Generator().manual_seed(seed))
    save_selector(folder / "selector.safetensors", selector, VisionGuidedOptions())
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards, and with companions that the other model has not."""
    folder = make(tmp_path_factory.mktemp("models") / "old", 1, shards=2)
    for name in (
        "added_tokens.json",
        "video_preprocessor_config.json",
        "special_tokens_map.json",
    ):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("old")
    return folder


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("models") / "new", 2)
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_anywhere_leaves_one_model(old: Path, new: Path, tmp_path: Path) -> None:
    """Of another, what it found; between the two nothing loads in transformers, and `load` finishes it."""
    done = python(killed_saves.__file__, old, new, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [100, 5000, 60_000])
def test_a_full_disk_leaves_the_old_model(old: Path, new: Path, tmp_path: Path, limit: int) -> None:
    """In the first file, the config or the weights; and nothing where there was none."""
    import resource

    with_others(old, tmp_path / "target")
    model = minifocus.load(new)
    before, limits = contents(tmp_path / "target"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for target in ("target", "not/yet/there"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(minifocus.InputError, match=f"{target}: expected a folder that can be written: .*arge"):
                model.save(tmp_path / target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "target") == before and list(tmp_path.iterdir()) == [tmp_path / "target"]


def test_a_failure_in_the_middle_is_undone(old: Path, new: Path, tmp_path: Path) -> None:
    """Whichever file it is that cannot be moved, by an error or Ctrl-C; what cannot be undone either, `load` finishes."""
    model, target = minifocus.load(new), with_others(old, tmp_path / "target")
    before, replace = contents(target), Path.replace
    moves = 0

    def failing(self: Path, other: Path) -> Any:
        nonlocal moves
        moves += 1
        if moves in fails:
            raise fails[moves]
        return replace(self, other)

    with mock.patch.object(Path, "replace", failing):
        for number in range(1, 40):
            moves, fails = 0, {number: [OSError("no"), KeyboardInterrupt()][number % 2]}
            try:
                model.save(target)
                break
            except (minifocus.InputError, KeyboardInterrupt):
                assert contents(target) == before and not (target / ".minifocus-save").exists()
        assert number == 21 and contents(target) == contents(new) | OTHERS  # 12 files and their folder out, 7 in

        shutil.rmtree(target)
        with_others(old, target)
        moves, fails = 0, {18: OSError("no"), 20: OSError("nor back")}
        with pytest.raises(minifocus.InputError, match="cut short, and not undone: nor back. Loading the folder"):
            model.save(target)
    assert not (target / "config.json").exists()
    with (
        mock.patch.object(Path, "replace", side_effect=PermissionError("not yours")),
        pytest.raises(minifocus.CheckpointError, match=r"target: a save into it was cut short, .* in place: not yours"),
    ):
        minifocus.load(target)
    minifocus.load(target)
    assert contents(target) == contents(new) | OTHERS


def test_what_is_to_be_finished_does_not_lead_out_of_the_folder(new: Path, tmp_path: Path) -> None:
    """A folder from anywhere may hold such links."""
    mine = shutil.copytree(new, tmp_path / "mine")
    before = contents(mine)
    for name in (".minifocus-save", ".minifocus-save/ready", ".minifocus-save/leaving", ".minifocus-save/lock"):
        hostile = shutil.copytree(new, tmp_path / "hostile")
        if name != ".minifocus-save":
            shutil.copytree(new, hostile / ".minifocus-save/ready")
        else:
            shutil.copytree(new, mine / "ready")
        shutil.rmtree(hostile / name, ignore_errors=True)
        (hostile / name).symlink_to(mine / "config.json" if name.endswith("lock") else mine)
        with pytest.raises(minifocus.CheckpointError, match=r"hostile: a save into it was cut short, and what it left"):
            minifocus.load(hostile)
        shutil.rmtree(mine / "ready", ignore_errors=True)
        shutil.rmtree(hostile)
    assert contents(mine) == before


def test_saves_and_loads_at_once(old: Path, new: Path, tmp_path: Path) -> None:
    """Into one folder: the last one's is whole. A load gets one of the two or says that they change under it."""
    models, target = [minifocus.load(old), minifocus.load(new)], tmp_path / "target"
    models[0].save(target)
    states, done = [contents(old), contents(new)], []
    errors: list[BaseException] = []

    def saver(model: minifocus.Llava) -> None:
        try:
            for _ in range(12):
                model.save(target)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=saver, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(minifocus.CheckpointError):
            done.append(minifocus.load(target))
    assert not errors
    of_old = {name: content for name, content in states[0].items() if "-of-" not in name and "index" not in name}
    found = contents(target)
    assert found == states[1] or found.keys() == of_old.keys() | {"model.safetensors"}
    for loaded in done:
        own = models[loaded.config.text.rope.rope_theta == 1002]
        theirs = own.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
        assert loaded.origin.companions == own.origin.companions


def test_a_folder_that_changes_while_it_is_loaded(old: Path, new: Path, tmp_path: Path) -> None:
    folder, model = shutil.copytree(old, tmp_path / "a"), minifocus.load(new)
    with pytest.raises(
        minifocus.CheckpointError, match="a: its files were changed while they were read: load it again"
    ):
        minifocus.load(folder, progress=lambda done, total: model.save(folder) if done == total else None)


def test_links_are_replaced_and_not_written_through(old: Path, new: Path, tmp_path: Path) -> None:
    away, target = shutil.copytree(old, tmp_path / "away"), tmp_path / "target"
    target.mkdir()
    for file in away.iterdir():  # a hub cache, a Kubernetes volume
        (target / file.name).symlink_to(file)
    (target / "tokenizer.model").symlink_to(tmp_path / "nowhere")
    os.mkfifo(target / "merges.txt")
    before = contents(away)
    (tmp_path / "link").symlink_to(target)
    model = minifocus.load(new)
    model.save(tmp_path / "link")
    assert contents(away) == before and (tmp_path / "link").is_symlink()
    assert contents(target) == contents(new) and not any(file.is_symlink() for file in target.iterdir())

    minifocus.load(away, "none").save(tmp_path / "link")
    assert (target / "additional_chat_templates/rag.jinja").read_bytes() == b"old"


def test_where_no_folder_can_be(new: Path, tmp_path: Path) -> None:
    model = minifocus.load(new)
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "holds/config.json").mkdir(parents=True)
    (tmp_path / "holds/config.json/mine").write_text("mine")
    before = contents(tmp_path)
    for bad in (
        *(None, 3, "", b"x", "a\0b", "n" * 300, "n" * 100_000, tmp_path / "file", tmp_path / "file/below"),
        *(
            tmp_path / "fifo",
            tmp_path / "loop",
            tmp_path / "dangling",
            tmp_path / "holds",
            "/dev/null",
            "/proc/nothing",
        ),
    ):
        with pytest.raises(minifocus.InputError) as caught:
            model.save(bad)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 500, bad
    assert contents(tmp_path) == before and not (tmp_path / "holds/.minifocus-save").exists()


def test_files_are_as_readable_as_any_that_the_user_makes(new: Path, tmp_path: Path) -> None:
    """safetensors writes such as only the user may read."""
    mask = os.umask(0o027)
    try:
        minifocus.load(new).save(tmp_path / "a")
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a").iterdir()} == {0o640}


# ---- what is saved ----


def test_a_saved_folder_says_the_dtype_of_its_weights(tmp_path: Path) -> None:
    """In every key that names one: transformers and `load` go by them."""
    folder = save(build(dtype=torch.float32), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "torch_dtype": "float32", "text_config": {**config["text_config"], "dtype": "float32"}}
    (folder / "config.json").write_text(json.dumps(config))
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        minifocus.load(folder, "none", dtype=dtype).save(tmp_path / name)
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["dtype"] == saved["torch_dtype"] == saved["text_config"]["dtype"] == name
        assert minifocus.load(tmp_path / name, "none").dtype == dtype
    assert saved == config
    minifocus.load(folder, "none", dtype="bfloat16").save(folder)
    assert minifocus.load(folder, "none").dtype == torch.bfloat16


def test_saving_from_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build(), tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = minifocus.load("a", "none")
    monkeypatch.chdir("elsewhere")
    model.save("b")
    minifocus.load("b", "none")
    (tmp_path / "a").rename(tmp_path / "away")
    model.save("c")  # of the folder it came from it needs nothing any more
    assert contents(Path("c")) == contents(Path("b"))


def test_saving_replaces_weights_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(build(), tmp_path / "a", shards=3)
    model = minifocus.load(folder, "none")
    (folder / "model_ema.safetensors").write_text("another's")
    save_selector(folder / "selector.safetensors", LinearSelector(16, 3), VisionGuidedOptions())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    with monkeypatch.context() as patched:  # the disk is full after the first shard
        patched.setattr("minifocus.loading.weights.save_file", mock.Mock(side_effect=[None, OSError("no space left")]))
        patched.setattr("minifocus.loading.weights.save_model.__defaults__", (2000,))
        with pytest.raises(minifocus.InputError, match=f"{folder}: expected a folder that can be written: no space"):
            model.save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    model.save(folder)
    assert {file.name for file in folder.iterdir()} == {
        name for name in before if not name.startswith("model-") and "index" not in name
    } | {"model.safetensors"}
    assert (folder / "model_ema.safetensors").read_text() == "another's"
    minifocus.load(folder, "focus").save(tmp_path / "b")
    assert (tmp_path / "b/selector.safetensors").exists()
    model.save(tmp_path / "b")  # another model's folder: its selector was not this model's
    assert not (tmp_path / "b/selector.safetensors").exists()

    (tmp_path / "file").write_text("")
    with pytest.raises(minifocus.InputError, match="file: expected a folder that can be written"):
        model.save(tmp_path / "file")


def test_a_model_is_saved_with_the_files_that_it_came_with(old: Path, new: Path, tmp_path: Path) -> None:
    """Whatever lies in its folder by then; there too, and as often as one likes."""
    folder, model = shutil.copytree(old, tmp_path / "a"), minifocus.load(old, "none")
    mine = minifocus.load(folder, "none")
    mine.save(folder)
    assert contents(folder).keys() >= {"selector.safetensors", "additional_chat_templates/rag.jinja"}  # its own stay
    mine.set_sampler("vision")
    mine.set_sampler("none")
    minifocus.load(new).save(folder)
    with pytest.raises(minifocus.CheckpointError, match=r"selector\.safetensors: is another model's"):
        mine.set_sampler("focus")
    for _ in range(2):  # the selector there is another's by now
        mine.save(folder)
        model.save(tmp_path / "b")
        assert contents(folder) == contents(tmp_path / "b")
        assert not (folder / "selector.safetensors").exists()
    shutil.rmtree(folder)
    os.mkfifo(tmp_path / "b/vocab.json")  # which minifocus does not read
    held = minifocus.load(tmp_path / "b", "none")
    with pytest.raises(minifocus.CheckpointError, match=r"b/vocab\.json: expected a file, found a FIFO"):
        held.save(folder)
    assert not folder.exists()
    with pytest.raises(minifocus.InputError, match="model: expected one that was loaded from a folder"):
        minifocus.Llava(model.config, model.processor).save(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_whatever_shares_memory_is_saved_whole(tmp_path: Path, tied: bool) -> None:
    """And a head that is tied no more keeps its values, in transformers too."""
    from transformers import LlavaForConditionalGeneration

    model = minifocus.load(save(build("llava", seed=1, tie_word_embeddings=tied), tmp_path / "a"), "none")
    decoder = model.language_model
    assert (decoder.lm_head.weight is decoder.model.embed_tokens.weight) == tied
    if tied:
        decoder.lm_head.weight = torch.nn.Parameter(decoder.lm_head.weight * 2)
    else:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    up = decoder.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.T.contiguous().T)
    norm = decoder.model.norm
    norm.weight = torch.nn.Parameter(torch.ones(1).expand(32), requires_grad=False)
    decoder.model.layers[0].input_layernorm.weight = torch.nn.Parameter(decoder.model.embed_tokens.weight.data[5])
    model.save(tmp_path / "b")
    again = minifocus.load(tmp_path / "b", "none")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    oracle = LlavaForConditionalGeneration.from_pretrained(tmp_path / "b").eval()
    inputs = make_inputs(model, [[(30, 40)]])
    with torch.inference_mode():
        logits = model(**inputs.arguments())
        assert (oracle(**inputs.arguments()).logits - logits).abs().max() <= 1e-5
        assert torch.equal(again(**inputs.arguments()), logits)


def test_float64_is_saved_as_float32_where_nothing_is_lost(new: Path, tmp_path: Path) -> None:
    model = minifocus.load(new, "focus")
    model.double().save(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(new)
    with torch.no_grad():
        model.language_model.model.norm.weight[3] += 2**-40
    with pytest.raises(minifocus.InputError, match=r"norm\.weight: holds float64 values that are none of float32"):
        model.save(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(new)
    model.float().save(tmp_path / "a")
    model.language_model.half()
    model.save(tmp_path / "a")  # in half precision but for the tower and the projector
    stored = load_file(tmp_path / "a/model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16, torch.float32}
    assert minifocus.load(tmp_path / "a").dtype == torch.float16


def _nested(model: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    old = getattr(module, name.rpartition(".")[2])
    delattr(module, name.rpartition(".")[2])
    setattr(module, name.rpartition(".")[2], torch.nn.Parameter(change(old.data), requires_grad=False))


def _overflow(value: torch.Tensor) -> torch.Tensor:
    return torch.full_like(value, 1e6)


UNSAVED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nan": (lambda m: _nested(m, HEAD, lambda v: v * torch.nan), f"{HEAD}: holds NaN or infinite"),
    "overflow": (
        lambda m: (m.language_model.half(), _nested(m, "vision_tower.pre_layrnorm.bias", _overflow)),
        "pre_layrnorm.bias: holds NaN or infinite values .as torch.float16",
    ),
    "meta": (lambda m: _nested(m, HEAD, lambda v: v.to("meta")), f"not dense .*{HEAD} .torch.float32, .*on meta"),
    "float8": (lambda m: _nested(m, HEAD, lambda v: v.to(torch.float8_e4m3fn)), f"{HEAD} .torch.float8_e4m3fn"),
    "int": (lambda m: _nested(m, HEAD, lambda v: v.int()), f"{HEAD} .torch.int32"),
    "complex": (lambda m: _nested(m, HEAD, lambda v: v.cfloat()), f"{HEAD} .torch.complex64"),
    "sparse": (lambda m: _nested(m, HEAD, lambda v: v.to_sparse()), f"{HEAD} .*sparse"),
    "grown": (lambda m: _nested(m, EMBEDDINGS, lambda v: v.repeat(2, 1)), f"wrong shape: {EMBEDDINGS}"),
    "added": (lambda m: m.language_model.register_module("extra", torch.nn.Linear(2, 2)), "unexpected: .*extra.bias"),
    "wrapped": (lambda m: torch.nn.utils.parametrizations.weight_norm(m.language_model.lm_head), "missing: .*lm_head"),
    "selector": (lambda m: m.before_llm.selector.bias.data.fill_(torch.inf), "selector.bias: expected finite"),
    "branches": (
        lambda m: setattr(m.before_llm, "selector", LinearSelector(16, 7)), "selector: expected one of 3 branches"
    ),
    "sampler": (
        lambda m: setattr(m, "before_llm", VisionGuidedSampler(torch.nn.Linear(2, 2), VisionGuidedOptions())),
        "before_llm: expected a LinearSelector, or nothing that has parameters, got Linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAVED)
def test_what_would_not_load_again_is_not_saved(old: Path, new: Path, tmp_path: Path, name: str) -> None:
    """Least of all over a model that does."""
    target, model = shutil.copytree(old, tmp_path / "target"), minifocus.load(new, "focus")
    change, words = UNSAVED[name]
    change(model)
    for folder in (target, tmp_path / "not/there"):
        with pytest.raises(minifocus.InputError, match=f"(?s){words}"):
            model.save(folder)
    assert contents(target) == contents(old) and not (tmp_path / "not").exists()
    if name == "nan":
        model.save(target, check_finite=False)
        minifocus.load(target, check_finite=False)


def test_equal_selectors_are_equal_files(tmp_path: Path) -> None:
    found = set()
    for number in range(12):
        save_selector(tmp_path / f"{number}", LinearSelector(16, 7), VisionGuidedOptions(window=8, branches=7))
        found.add((tmp_path / f"{number}").read_bytes())
    assert len(found) == 1
    selector, options = load_selector(tmp_path / "0", 16, {})
    assert selector.weight.shape == (7, 16) and (options.window, options.branches) == (8, 7)
