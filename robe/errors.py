"""What a user can mend."""


class RobeError(Exception):
    """Something the user can mend: the message is one line that says what and how."""

    exit_code = 2


class ArrayError(RobeError, ValueError):
    """An array that does not fit the model."""
