"""FocusLLaVA in plain PyTorch: a compact LLaVA / LLaVA-NeXT with vision-guided and text-guided token sampling."""

from . import methods, samplers
from .cpu_memory import want_huge_pages
from .errors import CheckpointError, InputError
from .load import Llava, load
from .trace import Answer, TokenCounts
from .version import __version__

__all__ = [
    "Answer",
    "CheckpointError",
    "InputError",
    "Llava",
    "TokenCounts",
    "__version__",
    "load",
    "methods",
    "samplers",
]

want_huge_pages()
