"""ROBE DLRM: recommendation models whose embedding tables share one small array of weights."""

__version__ = "0.1.0"


class RobeError(Exception):
    """Something the user can mend: the message is one line that says what and how."""

    exit_code = 2
