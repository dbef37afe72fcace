"""The operations, and how their versions are found by name."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

# Operation -> the file in this folder with OPERATION_reference, OPERATION_cpu, OPERATION_cuda, OPERATION_cost
# and the CUDA kernel _OPERATION_kernel.
OPERATIONS = {
    "gather": "gather",
    "scatter_add": "scatter_add",
    "adagrad_scatter": "adagrad_scatter",
    "interaction": "interaction",
    "interaction_backward": "interaction",
    "gather_interaction": "gather_interaction",
    "bias_relu": "bias_relu",
    "bias_relu_backward": "bias_relu",
    "binary_cross_entropy": "binary_cross_entropy",
    "sgd": "sgd",
    "adagrad": "adagrad",
}


def module(operation: str) -> ModuleType:
    return import_module(f"robe.kernels.{OPERATIONS[operation]}")


def version(operation: str, name: str) -> Callable:
    """One version of an operation: `reference`, `cpu`, `cuda` or `cost`."""
    return getattr(module(operation), f"{operation}_{name}")
