"""The messages of errors from torch, Pyro and user programs, shortened for our own messages."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, without its final punctuation.

    torch appends values of tensors to a message, and Pyro the shapes of all sites. The whole
    message remains in the ``__cause__`` of the error that quotes it.

    Example:
        >>> first_line(ValueError("sizes differ:\n Trace Shapes: ..."))
        'sizes differ'
        >>> first_line(KeyError())
        'KeyError'
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:,") if lines else type(error).__name__
