"""Step of stochastic gradient descent: parameters -= rate * gradient, in place.

gradient (N,) float, parameters (N,) float; rate: the learning rate
"""

from numba import cuda, njit, prange

from robe.kernels.launch import launch


def bytes_moved(size: int, itemsize: int = 4) -> int:
    """Bytes a step must move: gradient and parameter read, parameter written."""
    return 3 * size * itemsize


def flops(size: int) -> int:
    return 2 * size


def sgd_reference(gradient, rate, parameters):
    parameters -= parameters.dtype.type(rate) * gradient


@njit(parallel=True, nogil=True, cache=True)
def _sgd(gradient, rate, parameters):
    for i in prange(parameters.size):
        parameters[i] -= rate * gradient[i]


def sgd_cpu(gradient, rate, parameters):
    _sgd(gradient, parameters.dtype.type(rate), parameters)


@cuda.jit
def _sgd_kernel(gradient, rate, parameters):
    for i in range(cuda.grid(1), parameters.size, cuda.gridsize(1)):
        parameters[i] -= rate * gradient[i]


def sgd_cuda(gradient, rate, parameters):
    launch(_sgd_kernel, parameters.shape, gradient, parameters.dtype.type(rate), parameters)
