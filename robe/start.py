"""Trainings that go on from the weights of another one, on other rows.

The new run begins with a checkpoint of step 0 that holds the weights, and from there it is like any other.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from robe import checkpoint
from robe.checkpoint import Position
from robe.config import METHODS, PARTS, ConfigError, DataSpec, TrainConfig, budget, resolve, with_defaults
from robe.model import DLRM
from robe.optim import RULES

KEPT = "batch", "loss"  # of the settings that are no part of PARTS


def started_config(given: TrainConfig, source: Path, data: DataSpec) -> TrainConfig:
    """The resolved settings of a training that goes on from the run `source` on such data.

    Model and embedding are those of the run, and so are batch, loss, optimizer and rate where they are left
    at their defaults. Raises ConfigError for another model, or data that it has no rows for.
    """
    before, learned, _ = checkpoint.newest_state(source)
    kept = {part: dict(vars(getattr(before, part))) for part in PARTS}
    config = resolve(with_defaults(given, kept | {"train": {name: getattr(before, name) for name in KEPT}}))
    for part in ("model", "embedding"):
        for name, value in vars(getattr(before, part)).items():
            if getattr(getattr(config, part), name) != value:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: is {value} in {source}, with whose model --start goes on; "
                    "leave it out"
                )
    settings = before.embedding
    if data.cardinalities == learned.cardinalities:
        return config
    if settings.method != "full" and (settings.method, settings.hash) != ("robe", "mix"):
        raise ConfigError(
            f"--start {source}: the dictionary has grown, and --method {settings.method} would read other "
            "rows for known ids; train anew, with --method robe or full, or on --ids hash"
        )
    if "weights" in METHODS[settings.method].options:
        weights = budget(settings, before.model.width, learned.cardinalities)
        settings = dataclasses.replace(settings, weights=weights, megabytes=None, compression=None)
    return dataclasses.replace(config, embedding=settings)


def begin(model: DLRM, config: TrainConfig, data: DataSpec, source: Path, fresh: bool, run: Path) -> None:
    """Give a new model the weights of the run `source`, and save it as step 0 of `run`.

    The sums of Adagrad go on as well, where both have them, unless `fresh`. The means of Adam begin anew, as
    its corrections do, which count its steps.
    """
    trained, before, learned, _ = checkpoint.load_model(source, "cpu")
    rule, ours = RULES[config.optimizer.optimizer], model.state()
    go_on = not fresh and not rule.corrections and before.optimizer.optimizer == config.optimizer.optimizer
    for name, array in trained.state().items():
        sums = name.rpartition(".")[2] in rule.state
        if name in ours and (go_on or not sums):
            found = _grown(array, ours[name], learned.cardinalities, data.cardinalities)
            ours[name][...] = model.backend.to_device(found)
    checkpoint.save(run, model, config, data, Position(), "train again")


def _grown(array: np.ndarray, target: Any, before: tuple[int, ...], now: tuple[int, ...]) -> np.ndarray:
    """An array as long as `target`: if that has more, it is of tables, and these keep what is in it for ids
    that are new."""
    if array.shape == target.shape:
        return array
    each, found = len(array) // sum(before), np.array(target)
    old = new = 0
    for rows, more in zip(before, now, strict=True):
        found[new : new + rows * each] = array[old : old + rows * each]
        old, new = old + rows * each, new + more * each
    return found
