"""Learning rate and update of the dense parameters."""

from typing import Any

from robe.backend import Backend
from robe.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, constant, then (remaining share of decay_steps)^2."""
    rate = config.lr
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    if config.decay_start is not None and step >= config.decay_start:
        rate *= max(0.0, 1 - (step - config.decay_start) / config.decay_steps) ** 2
    return rate


class DenseOptimizer:
    """SGD or Adagrad on one flat array of parameters (N,) and its gradient (N,)."""

    def __init__(self, config: OptimizerConfig, parameters: Any, backend: Backend):
        self.config, self.parameters, self.backend = config, parameters, backend
        self.accumulator = backend.xp.zeros_like(parameters) if config.optimizer == "adagrad" else None

    def update(self, gradient, rate: float) -> None:
        kernels = self.backend.kernels
        if self.accumulator is None:
            kernels.sgd(gradient, rate, self.parameters)
        else:
            kernels.adagrad(gradient, rate, self.config.eps, self.accumulator, self.parameters)
