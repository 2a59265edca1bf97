"""What ends a command with one line."""

from __future__ import annotations

__all__ = ["CommandError", "UsageError"]


class CommandError(Exception):
    """One line for the user, that says what to do. The command ends with status 1."""


class UsageError(CommandError):
    """The arguments make no sense together. Said as the parser says it; status 2."""
