"""Learning rates, what each optimizer keeps and steps by, and the update of the dense parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from robe.backend import Backend
from robe.config import OPTIMIZERS, ConfigError, OptimizerConfig


@dataclass(frozen=True)
class Rule:
    """The kernels of an optimizer, and the arrays that it keeps.

    dense: the operation that steps an array: (gradient, rate, *options, *state, parameters); None where
        nothing is trained.
    touched: the one that steps the slots of a batch by the sums of their gradients, and clears these: (ids,
        base, slot_map, rate, *options, gradient, *state, out); None where gradients are added to weights at
        once.
    state: the names of what it keeps, each one number a parameter, 0 at first.
    rounded: whether half_step, cached_step and code_step, which step weights in few bits, know it.
    """

    dense: str | None = None
    touched: str | None = None
    state: tuple[str, ...] = ()
    rounded: bool = False


RULES = {
    "sgd": Rule(dense="sgd", rounded=True),
    "adagrad": Rule(dense="adagrad", touched="adagrad_step", state=("accumulator",), rounded=True),
    "none": Rule(rounded=True),
}


def kernel_options(config: OptimizerConfig) -> tuple[float, ...]:
    """The options of the optimizer's own, in the order in which its kernels take them."""
    return tuple(getattr(config, name) for name in OPTIMIZERS[config.optimizer])


def rounded_rule(config: OptimizerConfig) -> Rule:
    """The rule of an optimizer, for weights in few bits; ConfigError if their kernels do not know it."""
    rule = RULES[config.optimizer]
    if not rule.rounded:
        known = ", ".join(name for name, other in RULES.items() if other.rounded and other.dense)
        raise ConfigError(
            f"--optimizer {config.optimizer} cannot step weights in few bits (--memory fp16, --master "
            f"none, --method mixed_precision); choose of {known}"
        )
    return rule


# Schedule -> the share of the rate that is left where a share of the steps of its fall remains.
FALLS: dict[str, Callable[[float], float]] = {
    "polynomial": lambda remaining: remaining**2,
    "linear": lambda remaining: remaining,
    "cosine": lambda remaining: (1 - math.cos(math.pi * remaining)) / 2,
}


def learning_rate(config: OptimizerConfig, step: int, steps: int | None = None) -> float:
    """Rate of step 0, 1, ...: linear warm-up, constant, then a fall as the schedule says.

    steps: how many the training has; without it, ConfigError for a fall that ends with them.
    """
    rate, start, length = config.lr, config.decay_start, config.decay_steps
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    if start is None and config.schedule in ("linear", "cosine"):
        if steps is None:
            raise ConfigError(
                f"--schedule {config.schedule} has to know where the training ends; give --decay-start and "
                "--decay-steps"
            )
        start, length = config.warmup_steps, max(1, steps - config.warmup_steps)
    if start is not None and step >= start:
        rate *= FALLS[config.schedule](max(0.0, 1 - (step - start) / length))
    return rate


class DenseOptimizer:
    """The optimizer of N parameters in one flat array; `state` holds what it keeps, name -> (N,).

    pieces: where in the array they lie. What is between them is never stepped.
    """

    def __init__(self, config: OptimizerConfig, array: Any, pieces: list[slice], backend: Backend):
        rule, done = RULES[config.optimizer], 0
        self.options = kernel_options(config)
        count = sum(piece.stop - piece.start for piece in pieces)
        self.state = {name: backend.xp.zeros(count, array.dtype) for name in rule.state}
        self.step = getattr(backend.kernels, rule.dense) if rule.dense else None
        self.pieces: list[tuple[slice, list[Any]]] = []  # and state and parameters of each
        for piece in pieces:
            parameters = array[piece]
            state = [kept[done : done + parameters.size] for kept in self.state.values()]
            self.pieces.append((piece, [*state, parameters]))
            done += parameters.size

    def update(self, gradient, rate: float) -> None:
        """One step by the gradient, which lies as the parameters do, in place."""
        for piece, arrays in self.pieces:
            self.step(gradient[piece], rate, *self.options, *arrays)
