"""The two exceptions a user of minifocus has to know."""

# Longer texts lose their middle. A message names what came (`arguments.shown`); it is never a picture written as text, and
# neither is a library's own message that it ends in.
LONGEST = 6000


class _Brief(ValueError):
    def __init__(self, text: str):
        half = LONGEST // 2
        super().__init__(text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}")


class CheckpointError(_Brief):
    """A model folder cannot be used: the text names the file or key, what was expected and what was found."""


class InputError(_Brief):
    """An argument, picture or prompt cannot be used: the text names it, what was expected and what came."""
