"""The operations, and how their versions are found by name."""

import re
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

# Operation -> the file in this folder with OPERATION_reference, OPERATION_cpu, OPERATION_cuda and
# OPERATION_cost. OPERATION_cuda is what a model runs; OPERATION_cuda_WORD are other steps of its ladder.
OPERATIONS = {
    "gather": "gather",
    "scatter_add": "scatter_add",
    "adagrad_step": "adagrad_step",
    "rowwise_step": "rowwise_step",
    "adam_step": "adam",
    "momentum_step": "momentum",
    "decayed_step": "decayed_step",
    "half_step": "half_step",
    "quantise": "quantise",
    "quantise_touched": "quantise_touched",
    "code_step": "code_step",
    "sort_rows": "sort_rows",
    "admit": "admit",
    "hot_rows": "space_saving",
    "space_saving": "space_saving",
    "cached_gather": "cached_gather",
    "cached_interaction": "cached_interaction",
    "cached_step": "cached_step",
    "pool": "pool",
    "pool_backward": "pool",
    "interaction": "interaction",
    "interaction_backward": "interaction",
    "gather_interaction": "gather_interaction",
    "interaction_scatter": "interaction_scatter",
    "gather_interaction_backward": "interaction_scatter",
    "bias_relu": "bias_relu",
    "bias_relu_backward": "bias_relu",
    "dropout": "dropout",
    "binary_cross_entropy": "binary_cross_entropy",
    "sgd": "sgd",
    "adagrad": "adagrad",
    "adam": "adam",
    "momentum": "momentum",
}


def module(operation: str) -> ModuleType:
    return import_module(f"robe.kernels.{OPERATIONS[operation]}")


def version(operation: str, name: str) -> Callable:
    """One version of an operation, by a name that `versions` lists, or its `cost`."""
    return getattr(module(operation), f"{operation}_{name}")


def versions(operation: str) -> dict[str, Callable]:
    """All versions of an operation: `reference`, `cpu`, `cuda` and further ones such as `cuda_elements`."""
    pattern = rf"{operation}_(reference|cpu|cuda(_\w+)?)"
    found = ((re.fullmatch(pattern, name), function) for name, function in vars(module(operation)).items())
    return {match[1]: function for match, function in found if match}
