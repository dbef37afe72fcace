"""ROBE DLRM: recommendation models whose embedding tables share one small array of weights."""

__version__ = "0.1.0"
