"""The errors v2m raises for its users; anything else that escapes is a bug."""

__all__ = ["InputError", "NonFiniteLossError"]


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names what was given, what was expected and what to do. The command line prints it
    and ends with exit code 2.
    """


class NonFiniteLossError(RuntimeError):
    """The training loss or its gradient is no longer finite; the weights were not touched.

    The command line prints the message and ends with exit code 3.
    """
