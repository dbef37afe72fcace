"""Step of stochastic gradient descent: parameters -= rate * gradient, in place.

gradient (N,) float, parameters (N,) float; rate: the learning rate
"""

import numpy as np
from numba import cuda, prange

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel


def sgd_cost(gradient, rate, parameters) -> Cost:
    """Gradient and parameter read, parameter written; a product and a sum."""
    return Cost(3 * parameters.nbytes, 2 * parameters.size)


def sgd_reference(gradient, rate, parameters):
    parameters -= parameters.dtype.type(rate) * gradient


@parallel()
def _sgd(gradient, rate, parameters):
    for i in prange(parameters.size):
        parameters[i] -= rate * gradient[i]


def sgd_cpu(gradient, rate, parameters):
    _sgd(gradient, parameters.dtype.type(rate), parameters)


@cuda.jit(cache=True)
def _sgd_kernel(gradient, rate, parameters):
    # Unsigned: a signed sum is taken not to wrap, so NVVM unrolls the loop and divides to count its rounds.
    i, rate = np.uint64(cuda.grid(1)), value_of(rate)
    while i < np.uint64(parameters.size):
        parameters[i] -= rate * gradient[i]
        i += np.uint64(cuda.gridsize(1))


def sgd_cuda(gradient, rate, parameters):
    launch(_sgd_kernel, parameters.shape, gradient, typed(rate, parameters.dtype), parameters)
