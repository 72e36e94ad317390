"""The errors that users see.

Every one says what is wrong, where, what would be allowed, and what to do about it. The command line
prints the message alone, without a traceback, and exits with `exit_code`.
"""


class FewbitError(Exception):
    """Something a user can understand and mend; the message holds the remedy."""

    exit_code = 1


class UsageError(FewbitError):
    """The request itself is wrong (an unknown format name, a missing file): exit code 2."""

    exit_code = 2


class UnsupportedShape(FewbitError):
    """A tensor's shape does not fit a format; the plan leaves it unquantized and records this reason."""


class CorruptFile(FewbitError):
    """A file does not hold what it claims to hold."""


class NonFiniteWeights(FewbitError):
    """A weight holds NaN or infinity."""


class CannotLower(FewbitError):
    """A model that native programs do not know; the message says why."""


class EngineError(FewbitError):
    """An engine cannot give an answer: it was closed, its decoder failed, or the process was forked."""
