"""Loss of each row, and the gradient of their mean, from the logits:

loss    = max(x, 0) - x * y + log(1 + exp(-|x|))           no overflow, for any x
d_logit = (sigmoid(x) - y) / B

logits (B,) float; label (B,) float, 0 or 1, or a probability between, as a teacher gives it; loss (B,) and
d_logits (B,) are written in full
"""

import math

import numpy as np
from numba import cuda, prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch
from robe.kernels.parts.parallel import parallel

ZERO, ONE = np.float32(0), np.float32(1)


def binary_cross_entropy_cost(logits, label, loss, d_logits) -> Cost:
    """Logits and labels read, losses and gradients written; exponential and logarithm count as one each."""
    return Cost(4 * logits.nbytes, 12 * logits.size)


def binary_cross_entropy_reference(logits, label, loss, d_logits):
    small = np.exp(-np.abs(logits))
    loss[...] = np.maximum(logits, 0) - logits * label + np.log1p(small)
    d_logits[...] = (np.where(logits >= 0, 1, small) / (1 + small) - label) / len(logits)


@register_jitable
def _row(i, rows, logits, label, loss, d_logits):
    x, y = logits[i], label[i]
    small = math.exp(-abs(x))
    loss[i] = max(x, ZERO) - x * y + math.log1p(small)
    d_logits[i] = ((ONE if x >= ZERO else small) / (ONE + small) - y) / np.float32(
        rows
    )  # an integer would make it float64


@parallel()
def binary_cross_entropy_cpu(logits, label, loss, d_logits):
    for i in prange(logits.size):
        _row(i, logits.size, logits, label, loss, d_logits)


@cuda.jit(cache=True)
def _binary_cross_entropy_kernel(logits, label, loss, d_logits):
    i = np.uint64(cuda.grid(1))  # unsigned: see sgd.py
    while i < np.uint64(logits.size):
        _row(i, logits.size, logits, label, loss, d_logits)
        i += np.uint64(cuda.gridsize(1))


def binary_cross_entropy_cuda(logits, label, loss, d_logits):
    launch(_binary_cross_entropy_kernel, logits.shape, logits, label, loss, d_logits)
