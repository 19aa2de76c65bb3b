"""The two exceptions that minifocus raises for a user's mistakes."""

# Longer texts lose their middle, so that no message repeats a whole picture that was passed in as text. What a message quotes
# is already short (`arguments.shown`); a library's own message, which some end in, may not be.
LONGEST = 6000


class _Brief(ValueError):
    def __init__(self, text: str):
        half = LONGEST // 2
        super().__init__(text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}")


class CheckpointError(_Brief):
    """A model folder cannot be used. The text names the file or key, what was expected and what was found."""


class InputError(_Brief):
    """An argument, picture or prompt cannot be used. The text names it, what was expected and what was given."""
