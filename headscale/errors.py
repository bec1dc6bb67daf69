"""The exceptions a user can meet: one sentence, and a hint that says what to do about it."""

from __future__ import annotations


class HeadscaleError(Exception):
    """Something could not be computed (exit 3).

    Args:
        message: one sentence, lower case, literals in backticks, no full stop.
        hint: the one command or value that fixes it; may be empty.
    """

    exit_code = 3

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HeadscaleError):
    """An option or argument that cannot be taken as it is (exit 2)."""

    exit_code = 2


class NotFoundError(HeadscaleError):
    """A checkpoint, revision or file that is missing, gated, or out of reach offline."""


class UnreadableError(HeadscaleError):
    """A file that exists and cannot be trusted: truncated, corrupt, unsafe, not text, or not finite."""


class NoHeadError(HeadscaleError):
    """The checkpoint carries no trained MLM head; loading it would silently initialise one at random."""


class UnsupportedHeadError(HeadscaleError):
    """The head exists and cannot serve SPLADE, or cannot be rescaled by one factor; the message says why."""


class MemoryForecastError(HeadscaleError):
    """The computation would not fit, or did not fit, in the memory at hand."""
