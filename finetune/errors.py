"""Exceptions whose message is for the user: they end a command without a traceback."""

from collections.abc import Sequence

EXIT_FAILED = 1

EXIT_USER_ERROR = 2


def list_some(items: Sequence[str], most: int, *, separator: str = "; ") -> str:
    """The first `most` items and how many more there are, for a message: "a; b; and 3 more", "a, b and 3 more"."""
    listed = separator.join(items[:most])
    if len(items) <= most:
        return listed
    return f"{listed}{'' if separator == ', ' else separator.rstrip()} and {len(items) - most} more"


class UserError(Exception):
    """Arguments, data or files that cannot be used as given.

    Args:
        faults: One message or several; each names the value that was given, what is
            allowed, and what to do. All faults that can be found at once are reported
            at once.
    """

    def __init__(self, faults: str | Sequence[str]):
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class RunError(Exception):
    """A run that cannot go on, for a reason that its arguments do not show; ends a command with exit code 1.

    Args:
        message: What happened, what is still good, and what to do.
    """


class Interrupted(Exception):
    """A termination signal arrived; what the message names was saved before."""
