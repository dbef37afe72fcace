"""Step of Adagrad (Duchi, Hazan, Singer, 2011), in place:

    accumulator += gradient^2;   parameters -= rate * gradient / (sqrt(accumulator) + eps)

    gradient, accumulator, parameters (N,) float; rate: the learning rate; eps: keeps 0 / 0 away

A gradient of exactly 0 changes nothing, which is why a step may pass over slots no row of a batch
touched (`adagrad_step.py`).
"""

import math

import numpy as np
from numba import cuda, prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel


def adagrad_cost(gradient, rate, eps, accumulator, parameters) -> Cost:
    """Gradient read, accumulator and parameter read and written; root and division count as one each."""
    return Cost(5 * parameters.nbytes, 7 * parameters.size)


def adagrad_reference(gradient, rate, eps, accumulator, parameters):
    number = parameters.dtype.type
    accumulator += gradient * gradient
    parameters -= number(rate) * gradient / (accumulator**0.5 + number(eps))


@register_jitable
def descent(i, gradient, rate, eps, accumulator):
    """What is taken from weight i; its accumulator grows by the gradient's square."""
    accumulator[i] += gradient * gradient
    return rate * gradient / (math.sqrt(accumulator[i]) + eps)


@register_jitable
def step_weight(i, gradient, rate, eps, accumulator, parameters):
    parameters[i] -= descent(i, gradient, rate, eps, accumulator)


@parallel()
def _adagrad(gradient, rate, eps, accumulator, parameters):
    for i in prange(parameters.size):
        step_weight(i, gradient[i], rate, eps, accumulator, parameters)


def adagrad_cpu(gradient, rate, eps, accumulator, parameters):
    number = parameters.dtype.type
    _adagrad(gradient, number(rate), number(eps), accumulator, parameters)


@cuda.jit(cache=True)
def _adagrad_kernel(gradient, rate, eps, accumulator, parameters):
    i, rate = np.uint64(cuda.grid(1)), value_of(rate)  # unsigned: see sgd.py
    while i < np.uint64(parameters.size):
        step_weight(i, gradient[i], rate, eps, accumulator, parameters)
        i += np.uint64(cuda.gridsize(1))


def adagrad_cuda(gradient, rate, eps, accumulator, parameters):
    numbers = typed(rate, parameters.dtype), parameters.dtype.type(eps)
    launch(_adagrad_kernel, parameters.shape, gradient, *numbers, accumulator, parameters)
