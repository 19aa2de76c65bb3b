"""The two exceptions a user of minifocus has to know."""


class CheckpointError(ValueError):
    """A model folder cannot be used: the text names the file or key, what was expected and what was found."""


class InputError(ValueError):
    """An argument, picture or prompt cannot be used: the text names it, what was expected and what came."""
