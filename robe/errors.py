"""What a user can mend."""


class RobeError(Exception):
    """Something the user can mend: the message is one line that says what and how."""

    exit_code = 2
