"""The public model: load it from a folder, ask it, change its sampler, save it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import nn

from . import arguments, methods
from .errors import CheckpointError, InputError
from .files.reading import FILE, FOLDER, kind, named, read_bytes
from .generate import Generation
from .generation_options import GenerationOptions
from .inputs.image_processor import ImageProcessor
from .inputs.model_inputs import Sizes, check_ids, check_names, num_tiles, num_visual_tokens, split_pixels
from .inputs.processor import Images, Processor
from .inputs.prompt import Template
from .inputs.tokenizer import Tokenizer
from .loading.config import DTYPES, Config, load_config
from .loading.model_folder import LEARNED, Origin, finish_save, replacing, stamps
from .loading.weights import (
    Places,
    Progress,
    check_storable,
    open_weights,
    quantized_dtypes,
    save_model,
    shapes_of,
    without_values,
)
from .methods import SamplerOptions
from .model import LlavaNetwork
from .quantized import NAMES as QUANTIZED
from .quantized import exchange
from .samplers.hooks import Samplers
from .samplers.learned_file import save_learned
from .stream import Stream
from .trace import Answer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Llava(LlavaNetwork):
    """LLaVA-1.5 or LLaVA-NeXT as `load` returns it: the network with its folder's picture processor and tokenizer.

    processor  pictures and prompts → what the network reads
    origin     the folder, and what was in it
    """

    def __init__(self, config: Config, processor: Processor, origin: Origin | None = None):
        self.processor, self.origin = (
            processor,
            origin or Origin(),
        )  # before what is in `config`, which the processor holds
        super().__init__(config)

    @property
    def config(self) -> Config:
        """The config, which network and processor share."""
        return self.processor.config

    @config.setter
    def config(self, config: Config) -> None:
        self.processor.config = config

    @property
    def folder(self) -> Path:
        """The folder that the model was loaded from."""
        return self.origin.folder

    @property
    def image_processor(self) -> ImageProcessor:
        return self.processor.image_processor

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None for a folder without one: only text needs it."""
        return self.processor.tokenizer

    @property
    def template(self) -> Template:
        """The template of prompts: the folder's own chat template, or a name in `minifocus.inputs.prompt.TEMPLATES`."""
        return self.processor.template

    @template.setter
    def template(self, template: Template) -> None:
        self.processor.template, self.processor.guessed = template, False

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Tiles of a picture of (h, w), the thumbnail included."""
        return num_tiles(self.config, size)

    def num_visual_tokens(self, size: tuple[int, int]) -> int:
        """Uncompressed visual tokens, and so placeholders, of a picture of (h, w)."""
        return num_visual_tokens(self.config, size)

    def generate(self, image: Images, prompt: str, **options: Unpack[GenerationOptions]) -> Answer:
        """Answer one question about a picture, or about several; see `minifocus.generation_options.Options`."""
        return self.generate_batch([image], [prompt], **options)[0]

    def generate_batch(
        self, images: Sequence[Images], prompts: Sequence[str], **options: Unpack[GenerationOptions]
    ) -> list[Answer]:
        """Answer prompts[i] about images[i], all in one batch; the answers are those of `generate` one by one."""
        generation = Generation(self, self.processor, images, prompts, options)
        for _ in generation.tokens():
            pass
        return generation.answers()

    def stream(self, image: Images, prompt: str, **options: Unpack[GenerationOptions]) -> Stream:
        """Like `generate`, but iterate over the text as it is made; the whole answer is then in `.answer`."""
        return Stream(self, self.processor, image, prompt, options)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: Sizes = None,
        attention_mask: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        **unused: object,
    ) -> torch.Tensor:
        """Logits [B, S, vocabulary], inputs as transformers takes them.

        input_ids       [B, S] int64, with one placeholder per uncompressed visual token
        pixel_values    LLaVA-NeXT: [pictures, tiles, 3, side, side], zero tiles as padding, or the tiles of all pictures
                        without padding, [tiles, 3, side, side]; LLaVA-1.5: [pictures, 3, side, side]
        image_sizes     [pictures, 2], (h, w) in pixels, as a tensor or a list; LLaVA-NeXT only
        attention_mask  [B, S], 1 for tokens and 0 for padding, at either end of a row
        instruction_mask [B, S], 1 for the user's question, which guides the text-guided sampler; by default all text
                        after the row's first picture
        unused          what else a processor or tokenizer of transformers returns (`PROCESSOR_KEYS`), which says nothing more

        Rows of the result that stand for padding, or for visual tokens that a sampler took out, are NaN: no token is
        predicted there. A pooled token's logits are in the row of its window's first cell. Raises InputError.
        """
        check_names(unused)
        check_ids(self.config, input_ids, attention_mask, instruction_mask)
        tiles, sizes = split_pixels(self.config, pixel_values, image_sizes)
        ids, mask, instruction = (
            None if one is None else one.to(self.device) for one in (input_ids, attention_mask, instruction_mask)
        )
        assert ids is not None
        logits, rows = self.logits(ids, tiles, sizes, mask, instruction)
        if torch.equal(rows.source, torch.arange(ids.shape[1], device=self.device).expand_as(ids)):
            return logits
        placed = logits.new_full((*ids.shape, logits.shape[-1]), float("nan"))
        row, column = rows.valid.nonzero(as_tuple=True)
        placed[row, rows.source[row, column]] = logits[row, column]
        return placed

    def set_sampler(self, name: str, **options: Unpack[SamplerOptions]) -> None:
        """Use another method from now on; `name` and `options` are those of `load`. Raises InputError and CheckpointError."""
        method = methods.build(name, self.config, self.folder, options)
        part = methods.learned_part(name, options)
        if part is not None and options.get(part) is None and not self.origin.holds_weights():
            file = self.folder / f"{part}.safetensors"
            raise CheckpointError(f"{file}: is another model's: the weights beside it have changed")
        self._use(method)

    def begin_sampler(self, name: str, bias: float = 1.0, **options: Unpack[SamplerOptions]) -> None:
        """Use a method that learns, with new weights, to be trained. Random ones are drawn from torch's generator.

        bias  how far FocusLLaVA's selector leans to the finest scale. Raises InputError.
        """
        self._use(methods.begin(name, self.config, options, bias))

    def _use(self, method: Samplers) -> None:
        self.before_llm = None if method.before is None else method.before.to(self.device).eval()
        self.inside_llm = method.inside
        if self.before_llm is not None and self.config.quantized:
            self.before_llm.requires_grad_(False)  # as all the rest: quantised weights hand on no gradient

    def save(self, folder: str | PathLike[str], *, check_finite: bool = True) -> None:
        """Write the model as `load` takes it: weights, what a sampler has learned, and the other files as they were when it came.

        The files of a model that is there already, of whatever kind, make room for them; other files stay. The old ones are
        what loads until the new ones are whole and on the disk, whenever the process is killed (see `model_folder`).
        Without a learned selector or router the folder gets none; in the model's own, those that are there stay.

        `check_finite` refuses weights with NaN or infinity, as `load` would. Raises InputError for a folder that cannot be
        written and a model that `load` would not take again, and CheckpointError where one of the files that it came with
        could not be read.
        """
        target = arguments.path("folder", folder)
        if not self.origin.companions:
            raise InputError("model: expected one that was loaded from a folder, whose config.json it is saved with")
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("before_llm.")}
        expected = without_values(lambda: LlavaNetwork(self.config))
        layers = exchange(expected, self.config.quantized, self.config.tie_word_embeddings)
        check_storable(state, shapes_of(expected), quantized_dtypes(layers))
        try:
            with replacing(target) as fresh:
                save_model(state, self.origin.companions, fresh, self.config, check_finite)
                own = target.resolve() == self.folder.resolve()
                written = save_learned(self.before_llm, fresh)
                for name in LEARNED if own and self.origin.holds_weights() else ():
                    if name != written and kind(target / name) == FILE:
                        (fresh / name).write_bytes(read_bytes(target / name))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{named(target)}: expected a folder that can be written: {error}") from error
        if own:
            self.origin = replace(self.origin, stamps=stamps(self.folder))


def load(
    folder: str | PathLike[str],
    sampler: str = "focus",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    check_finite: bool = True,
    progress: Progress | None = None,
    **options: Unpack[SamplerOptions],
) -> Llava:
    """Load a LLaVA-1.5 or LLaVA-NeXT folder in Hugging Face's layout.

    sampler       "focus" (both of FocusLLaVA's), "vision", "text", "none", or one of the field's training-free methods
                  (`minifocus.methods.names()`); `options` are the sampler's own, such as gamma, layer, selector, ratio
    dtype         "float32", "bfloat16", "float16" or the torch dtype; None: the checkpoint's. "int8" or "int4": the decoder's
                  weights in so few bits, everything else in bfloat16 (docs/checkpoints.md). A folder whose weights are that
                  already takes no other
    check_finite  refuse weights with NaN or infinity (one pass over them, by a thread while the rest is made)
    progress      called with (bytes read, bytes in all)

    A folder without a tokenizer loads; only text asks for it. generation_config.json is followed but for sampling, beams and
    what else the log names: answers are greedy, unless `generate` is told otherwise. A save that was killed as it put its
    files in place is finished first. Raises CheckpointError for a bad folder and InputError for a bad argument.
    """
    return open_model(Llava, None, folder, sampler, device, dtype, check_finite, progress, options)


Model = TypeVar("Model", bound=Llava)


def open_model(
    build: Callable[[Config, Processor, Origin], Model],
    share: Callable[[nn.Module], Places] | None,
    folder: str | PathLike[str],
    sampler: str,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    check_finite: bool,
    progress: Progress | None,
    options: Mapping[str, object],
) -> Model:
    """What `load` does, with a model that `build` makes. `share`: see `open_weights`."""
    folder = arguments.path("folder", folder)
    if kind(folder) != FOLDER:
        raise CheckpointError(f"{named(folder)}: expected the folder of a model, found {kind(folder)}")
    resolved_dtype, quantized = _dtype(dtype)
    check_finite = arguments.flag("check_finite", check_finite)
    target = usable_device(device)
    finish_save(folder)
    origin = Origin.read(folder)
    config = load_config(folder)
    if config.quantized and dtype not in (None, config.quantized):
        raise InputError(
            f"dtype: {named(folder)} holds weights in {config.quantized}: expected {config.quantized!r} or None, got "
            f"{arguments.shown(dtype)}. Other dtypes, and training, take the model that it was made of"
        )
    quantize = config.quantized is None and quantized is not None
    if quantize:
        config = replace(config, quantized=quantized)
    if config.quantized:
        resolved_dtype = torch.bfloat16
    method = methods.build(sampler, config, folder, options)
    with open_weights(folder, config, target, resolved_dtype, check_finite, progress, quantize, share) as make:
        processor = Processor.from_folder(folder, config)
        model = cast(Model, make(lambda: build(config, processor, origin)))
    if stamps(folder) != origin.stamps:
        raise CheckpointError(f"{folder}: its files were changed while they were read: load it again")
    model._use(method)
    return model


def _dtype(given: str | torch.dtype | None) -> tuple[torch.dtype | None, str | None]:
    """The dtype of that name, or None for the checkpoint's; and what the decoder's weights are to be quantised to, or None."""
    if given is None:
        return None, None
    if isinstance(given, str) and given in QUANTIZED:
        return torch.bfloat16, given
    dtype = DTYPES.get(given) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise InputError(f"dtype: expected one of {', '.join((*DTYPES, *QUANTIZED))}, got {arguments.shown(given)}")
    return dtype, None


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises InputError where it cannot hold numbers."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which meta tensors, for one, do not have
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"device: {arguments.shown(name)} is not usable here: {reason}") from error
    return device
