"""Learning rates, what each optimizer keeps and steps by, and the update of the dense parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.config import OPTIMIZERS, ConfigError, OptimizerConfig


@dataclass(frozen=True)
class Rule:
    """The kernels of an optimizer, and the arrays that it keeps.

    dense: the operation that steps an array: (gradient, rate, *corrections, *options, *state, parameters);
        None where nothing is trained.
    touched: the one that steps the slots of a batch by the sums of their gradients, and clears these: (ids,
        base, slot_map, rate, *corrections, *options, gradient, *state, out); None where gradients are added
        to weights at once.
    decayed: the one that does so with L2 penalty and weight decay, which it takes behind the options; None
        where there is none.
    state: the names of what it keeps, each one number a parameter, 0 at first.
    rounded: whether half_step, cached_step and code_step, which step weights in few bits, know it.
    corrections: how many numbers there are of `corrections`.
    grouped: whether the embedding keeps one number of each for a group of weights (kernels/parts/groups.py).
    """

    dense: str | None = None
    touched: str | None = None
    state: tuple[str, ...] = ()
    rounded: bool = False
    decayed: str | None = None
    corrections: int = 0
    grouped: bool = False


RULES = {
    "sgd": Rule("sgd", rounded=True, decayed="decayed_step"),
    "adagrad": Rule("adagrad", "adagrad_step", ("accumulator",), rounded=True, decayed="decayed_step"),
    "rowwise_adagrad": Rule("adagrad", "rowwise_step", ("accumulator",), grouped=True),
    "adam": Rule("adam", "adam_step", ("mean", "square"), decayed="adam_step", corrections=2),
    "momentum": Rule("momentum", "momentum_step", ("velocity",), decayed="momentum_step"),
    "none": Rule(rounded=True),
}
# Of what rules keep: sums and means of squares, which are never negative, and have no sign to be hashed.
SQUARES = ("accumulator", "square")


def kernel_options(config: OptimizerConfig) -> tuple[float, ...]:
    """The options of the optimizer's own, in the order in which its kernels take them."""
    return tuple(getattr(config, name) for name in OPTIMIZERS[config.optimizer])


def corrections(config: OptimizerConfig, step: int, dtype: Any) -> tuple[Any, ...]:
    """What kernels of the optimizer take behind the rate in step 1, 2, ... of a training, in that dtype.

    Of Adam: 1 / (1 - beta1^step) and 1 / sqrt(1 - beta2^step), which scale the means of few gradients.
    """
    if not RULES[config.optimizer].corrections:
        return ()
    number = np.dtype(dtype).type
    return number(1 / (1 - config.beta1**step)), number(1 / math.sqrt(1 - config.beta2**step))


def touched_step(config: OptimizerConfig) -> tuple[str | None, tuple[float, ...]]:
    """The operation that steps the slots of a batch, and its options; None where gradients are added at once.

    Raises ConfigError for L2 penalty or weight decay that no operation knows.
    """
    rule, options, decay = RULES[config.optimizer], kernel_options(config), decays(config)
    always = rule.touched is not None and rule.touched == rule.decayed
    if not (rule.dense and (always or any(decay))):
        return rule.touched, options
    if rule.decayed is None:
        known = ", ".join(name for name, other in RULES.items() if other.decayed)
        raise ConfigError(
            f"--weight-decay and --embedding-l2 are not for --optimizer {config.optimizer}; choose of {known}"
        )
    return rule.decayed, (*(options or (config.eps,)), *decay)  # of SGD, which needs no eps


def decays(config: OptimizerConfig) -> tuple[float, float]:
    """The L2 penalty of the embedding and its weight decay, as kernels take them."""
    return config.embedding_l2, config.weight_decay


def rounded_rule(config: OptimizerConfig) -> Rule:
    """The rule of an optimizer, for weights in few bits; ConfigError if their kernels do not know it."""
    rule = RULES[config.optimizer]
    if rule.dense and any(decays(config)):
        raise ConfigError(
            "--weight-decay and --embedding-l2 do not reach weights in few bits (--memory fp16, --master "
            "none, --method mixed_precision); train in fp32, then `robe convert`"
        )
    if not rule.rounded:
        known = ", ".join(name for name, other in RULES.items() if other.rounded and other.dense)
        raise ConfigError(
            f"--optimizer {config.optimizer} cannot step weights in few bits (--memory fp16, --master "
            f"none, --method mixed_precision); choose of {known}"
        )
    return rule


PLATEAU = 10.0  # what the rate is divided by
# Schedule -> the share of the rate that is left where a share of the steps of its fall remains.
FALLS: dict[str, Callable[[float], float]] = {
    "polynomial": lambda remaining: remaining**2,
    "linear": lambda remaining: remaining,
    "cosine": lambda remaining: (1 - math.cos(math.pi * remaining)) / 2,
}


def learning_rate(
    config: OptimizerConfig, step: int, steps: int | None = None, plateaus: int | None = None
) -> float:
    """Rate of step 0, 1, ...: linear warm-up, constant, then a fall as the schedule says.

    steps: how many the training has; without it, ConfigError for a fall that ends with them.
    plateaus: how many evaluations before the step were no better than all before; without it, ConfigError for
    a schedule that asks.
    """
    rate, start, length = config.lr, config.decay_start, config.decay_steps
    if config.schedule == "plateau":
        if plateaus is None:
            raise ConfigError(
                "--schedule plateau has to know what evaluations find, and there are none; choose another"
            )
        rate /= PLATEAU**plateaus
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
        self.config, self.options, self.xp = config, kernel_options(config), backend.xp
        count = sum(piece.stop - piece.start for piece in pieces)
        self.state = {name: backend.xp.zeros(count, array.dtype) for name in rule.state}
        self.step = getattr(backend.kernels, rule.dense) if rule.dense else None
        self.pieces: list[tuple[slice, list[Any]]] = []  # and state and parameters of each
        for piece in pieces:
            parameters = array[piece]
            state = [kept[done : done + parameters.size] for kept in self.state.values()]
            self.pieces.append((piece, [*state, parameters]))
            done += parameters.size

    def update(self, gradient, rate: float, corrected: tuple = ()) -> None:
        """One step by the gradient, which lies as the parameters do, in place.

        corrected: of `corrections`. The gradient is overwritten.
        """
        l2, decay = self.config.l2, self.config.weight_decay
        if self.config.clip_norm is not None:
            self._clip(gradient, self.config.clip_norm)
        for piece, (*state, parameters) in self.pieces:
            if l2:
                gradient[piece] += l2 * parameters
            if decay:
                parameters -= rate * decay * parameters
            self.step(gradient[piece], rate, *corrected, *self.options, *state, parameters)

    def _clip(self, gradient, longest: float) -> None:
        """Shorten a gradient that is longer, in place; what lies between the pieces is 0."""
        length = self.xp.sqrt(self.xp.sum(gradient * gradient))
        gradient *= self.xp.minimum(longest / self.xp.maximum(length, 1e-30), 1)
