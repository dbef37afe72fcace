"""ROBE DLRM: recommendation models whose embedding tables share one small array of weights.

    robe.load(run)     the model of a run's folder, for predictions and vectors (run_folder.py)
    robe.DLRM(...)     a model of arrays of one's own (estimator.py)

Both are imported when they are first asked for: this module itself loads neither NumPy nor Numba.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["DLRM", "RobeError", "load"]


class RobeError(Exception):
    """Something the user can mend: the message is one line that says what and how."""

    exit_code = 2


def __getattr__(name: str) -> Any:
    if name not in (offered := {"DLRM": "robe.estimator", "load": "robe.run_folder"}):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(offered[name]), name)
