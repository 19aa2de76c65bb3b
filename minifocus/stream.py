"""An answer as a stream of text, while it is made."""

from __future__ import annotations

from collections.abc import Iterator

from .generate import Generation
from .generation_options import GenerationOptions
from .inputs.processor import Images, Processor
from .inputs.tokenizer import StreamDecoder
from .model import LlavaNetwork
from .trace import Answer


class Stream(Iterator[str]):
    """Iterates, once, over one answer's text as it is made; `.answer` holds the whole when the iteration is over.

    The pieces joined, without white space at either end, are the answer's text.
    """

    def __init__(
        self, network: LlavaNetwork, processor: Processor, image: Images, prompt: str, given: GenerationOptions
    ):
        self._pieces = self._generate(Generation(network, processor, [image], [prompt], given))
        self.answer: Answer | None = None

    def __next__(self) -> str:
        return next(self._pieces)

    def _generate(self, generation: Generation) -> Iterator[str]:
        """A generator of its own, so that the caches are freed when the answer ends."""
        decoder = StreamDecoder(generation.tokenizer)
        for (token,) in generation.tokens():
            if token is not None and (piece := decoder.push(token)):
                yield piece
        if piece := decoder.flush():
            yield piece
        self.answer = generation.answers()[0]
