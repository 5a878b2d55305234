"""The exceptions that entry points print as one line."""


class InputError(ValueError):
    """What the user gave is wrong: the entry points print it as one line and exit 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on: the entry points print it as one line and exit 1."""
