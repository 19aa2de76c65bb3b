"""FocusLLaVA's two samplers (paper §3.2 and §3.3), and the hooks through which they and every other method act."""

from .hooks import BeforeLLM, InsideLLM, PictureFeatures, Samplers, Selection, VisualTokens, uncompressed

__all__ = ["BeforeLLM", "InsideLLM", "PictureFeatures", "Samplers", "Selection", "VisualTokens", "uncompressed"]
