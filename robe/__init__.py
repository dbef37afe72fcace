"""ROBE DLRM: recommendation models whose embedding tables share one small array of weights.

    robe.load(run)     the model of a run's folder, for predictions and vectors (run_folder.py)
    robe.DLRM(...)     a model of arrays of one's own (estimator.py)

Both are imported when they are first asked for: this module itself loads neither NumPy nor Numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from robe.errors import RobeError
from robe.version import __version__

if TYPE_CHECKING:
    from robe.estimator import DLRM
    from robe.run_folder import load

__all__ = ["DLRM", "RobeError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in (offered := {"DLRM": "robe.estimator", "load": "robe.run_folder"}):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(offered[name]), name)
