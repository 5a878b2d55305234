"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """What the user gave is wrong: the entry points print it as one line and exit 2."""
