"""Errors a user can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and says what is accepted. The CLI prints it bare."""
