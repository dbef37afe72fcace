"""Dropout (Srivastava et al., 2014) of activations, in place, each by itself:

    out[i] = 0 with the probability `share`, else out[i] / (1 - share)

    share      from 0 on, below 1
    key        rounding_key(seed, step) of half.py
    first      number of the first activation; those of another layer have other numbers
    out (N,)   float

What is dropped is a hash of (key, first + i), so it is the same for any number of threads, in every version,
and in a training that goes on. The gradient needs no mask: activations are not negative, and what was dropped
is 0, where bias_relu_backward leaves no gradient; the rest of it is divided by (1 - share) too.
"""

import numpy as np
from numba import cuda, prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.hashing import U64, word_of
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import value_of
from robe.kernels.parts.parallel import parallel

ZERO = np.float32(0)


def dropout_cost(share, key, first, out) -> Cost:
    """Activation read and written; some ten operations for a hash."""
    return Cost(2 * out.nbytes, 11 * out.size)


@register_jitable
def kept(key, number, least):
    """Whether the upper half of a hash is at least so much; 1 or 0."""
    return (word_of(key, U64(number)) >> U64(32)) >= least


def _limits(share, first, dtype):
    """What hashes of kept activations reach, the first number, and the factor."""
    return U64(share * 2**32), U64(first), dtype.type(1 / (1 - share))


def dropout_reference(share, key, first, out):
    least, first, factor = _limits(share, first, out.dtype)
    stays = kept(key, first + np.arange(out.size, dtype=np.uint64), least)
    out[...] = np.where(stays, factor * out, 0)


@parallel()
def _dropout(key, least, first, factor, out):
    for i in prange(out.size):
        out[i] = factor * out[i] if kept(key, first + U64(i), least) else ZERO


def dropout_cpu(share, key, first, out):
    _dropout(key, *_limits(share, first, out.dtype), out)


@cuda.jit(cache=True)
def _dropout_kernel(key, least, first, factor, out):
    i, key = np.uint64(cuda.grid(1)), value_of(key)  # unsigned: see sgd.py
    while i < np.uint64(out.size):
        out[i] = factor * out[i] if kept(key, first + i, least) else ZERO
        i += np.uint64(cuda.gridsize(1))


def dropout_cuda(share, key, first, out):
    launch(_dropout_kernel, out.shape, key, *_limits(share, first, out.dtype), out)
