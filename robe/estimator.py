"""Models of arrays of one's own, with the verbs of scikit-learn: `robe.DLRM`.

What is given is checked before a kernel sees it, and refused in one line that names the array, the row and
the column.
"""

import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import ArrayLike

from robe import checkpoint
from robe.backend import select
from robe.bags import Bags, cut
from robe.checkpoint import Position
from robe.config import (
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    ModelConfig,
    OptimizerConfig,
    Pooling,
    TrainConfig,
    require_trainable,
    resolve,
)
from robe.errors import ArrayError
from robe.kernels.pool import POOLINGS
from robe.model import DLRM as Network
from robe.model import EVALUATION_BATCH, buffer_rows, build
from robe.optim import learning_rate
from robe.train import TrainingError, fed, probabilities

# Settings of the loop over a prepared folder, which `fit` does not make.
LOOP = {
    "average",
    "teacher",
    "teacher_weight",
    "epochs",
    "fresh_embeddings",
    "limit_rows",
    "eval_every",
    "checkpoint_every",
    "target_auc",
    "patience",
    "staleness",
}
READ_EVERY = 100  # steps; to read a loss is to wait for a GPU


class DLRM:
    """A DLRM that learns from arrays: dense numbers and integer ids to the probability of a label.

    cardinalities: how many values each of the F categorical features has; ids are 0 .. cardinality - 1.
    dense: how many dense columns there are.
    hashed: ids are any 32 bits instead, and the cardinalities say about how many distinct ones there are; of
        the methods, `robe`, `hashing` and `compositional` take them.
    pooling: `sum`, `mean` or `max`, or a tuple of one for each feature: a feature holds any number of ids
        then, and ids are given as bags, (values (N,), offsets (B * F + 1,), weights (N,) or None), as
        robe.bags.Bags has them.
    settings: those of `robe train` by the same names, `-` being `_`: method, compression, weights, block,
        width, bottom, top, optimizer, lr, batch (the most rows `fit` takes at once), seed, backend, ...

    The same seed and the same batches give the same weights, bit for bit on a CPU. `losses` holds the mean
    loss of each step so far, before it; `model` is the robe.model.DLRM inside, `config` its settings.
    Raises ConfigError for a setting that does not exist or cannot be used.
    """

    def __init__(
        self,
        cardinalities: Iterable[int],
        dense: int,
        *,
        hashed: bool = False,
        pooling: Pooling | Iterable[Pooling] | None = None,
        **settings: Any,
    ):
        with in_keywords():
            config, data = described(cardinalities, dense, hashed, pooling, settings)
            learning_rate(config.optimizer, 0)  # which says if the schedule needs the end of the training
            model = build(config, data, select(config.backend, config.precision, config.deterministic))
        self.model, self.config, self.data, self.losses, self._steps = model, config, data, [], 0

    # Overflow and NaN are looked for in the losses, and reported with what to do.
    @np.errstate(over="ignore", invalid="ignore")
    def fit(self, batches: Iterable[tuple]) -> Self:
        """One optimizer step per batch; call it again to go on, with the next epoch for instance.

        batches: of (label (B,) 0 or 1, dense (B, n) finite numbers, ids (B, F) integers, or bags), read once.
            B is at most the larger of the setting `batch` and 2048. Where rows have weights, of (label,
            weight (B,) numbers of at least 0, dense, ids): each multiplies the loss of its row.
        Raises ArrayError for a batch that does not fit, TrainingError where the loss is not finite.
        """
        require_trainable(self.config)
        model, most = self.model, buffer_rows(self.config)
        sums, counts = [], []

        def checked() -> Generator[tuple]:
            parts = 3, 4
            for batch in batches:
                if not isinstance(batch, tuple | list) or len(batch) not in parts:
                    raise ArrayError(
                        "a batch must be (label, dense, ids), and fit takes an iterable of such, or of "
                        "(label, weight, dense, ids)"
                    )
                parts = (len(batch),)  # as a GPU has room for either
                label, *weight, dense, ids = batch
                label, weight = _label(label, most), [_weight(each, len(label)) for each in weight]
                yield None, (label, *weight, *_rows(self.data, dense, ids, len(label)))

        try:
            for _, (label, *weight, dense, ids) in fed(model, checked(), most):
                rate = learning_rate(self.config.optimizer, self._steps)
                with model.lock:
                    losses = model.step(label, dense, ids, rate, weight=weight[0] if weight else None)
                    sums.append(model.backend.xp.sum(losses, dtype="float64"))
                counts.append(len(label))
                self._steps += 1
                if len(counts) == READ_EVERY:
                    self._read(sums, counts)
        finally:
            self._read(sums, counts)
        return self

    def predict(self, dense: ArrayLike, ids: Any) -> np.ndarray:
        """Probabilities (N,) float64 of the label, for dense (N, n) numbers and ids (N, F) integers or bags.

        Raises ArrayError (a ValueError) that names what does not fit.
        """
        return predict(self.model, self.data, dense, ids)

    def save(self, folder: Path | str) -> Path:
        """Write the model to FOLDER/checkpoints, safetensors and JSON; returns the checkpoint's folder."""
        folder = Path(folder)
        if checkpoint.saved(folder) and checkpoint.newest_state(folder)[2].step > self._steps:
            raise ConfigError(f"{folder}: holds a model of more steps; choose another folder")
        return checkpoint.save(
            folder, self.model, self.config, self.data, Position(self._steps), "save again"
        )

    @classmethod
    def load(cls, folder: Path | str, backend: str = "auto") -> Self:
        """The model that `save` wrote, or a run's; `fit` goes on as if it had never stopped."""
        loaded = cls.__new__(cls)
        loaded.model, loaded.config, loaded.data, position = checkpoint.load_model(Path(folder), backend)
        loaded.losses, loaded._steps = [], position.step
        return loaded

    def _read(self, sums: list, counts: list[int]) -> None:
        """Move the losses of the last steps, on the device until now, to `losses`."""
        first = self._steps - len(counts) + 1
        means = [float(total) / count for total, count in zip(sums, counts, strict=True)]
        self.losses += means
        sums.clear()
        counts.clear()
        for step, mean in enumerate(means, first):
            if not np.isfinite(mean):
                raise TrainingError(
                    f"the loss became {mean} in step {step}; fit a new model with a lower lr (it was "
                    f"{self.config.optimizer.lr:g}), or scale the dense values"
                )


def predict(model: Network, data: DataSpec, dense: ArrayLike, ids: Any) -> np.ndarray:
    """Probabilities (N,) float64 for dense (N, n), ids (N, F) or bags; ArrayError for what does not fit."""
    return predicted(model, *_rows(data, dense, ids))


def predicted(model: Network, dense: np.ndarray, ids: np.ndarray | Bags) -> np.ndarray:
    """The same for arrays that fit: float32 and uint32. Threads that share the model take turns."""
    rows = len(dense)
    parts = ((s, min(s + EVALUATION_BATCH, rows)) for s in range(0, rows, EVALUATION_BATCH))
    batches = ((dense[start:stop], cut(ids, start, stop, rows)) for start, stop in parts)
    with model.lock:
        return np.concatenate([np.empty(0), *probabilities(model, batches)])


def _rows(data: DataSpec, dense, ids, rows: int | None = None) -> tuple[np.ndarray, np.ndarray | Bags]:
    """(dense (N, n) float32, ids (N, F) uint32 or bags); raises ArrayError for what does not fit the data."""
    if data.pooling is None:
        ids = _array("ids", ids, "iu", "integers", (rows, len(data.cardinalities)))
        rows = len(ids)
    dense = _array("dense", dense, "fiub", "numbers", (rows, data.dense))
    with np.errstate(over="ignore"):
        floats = np.ascontiguousarray(dense, np.float32)
    _require(dense, np.isfinite(floats), "dense", "must be a finite number below 3.4e38")
    last = np.array(data.cardinalities) - 1
    if data.dialect == "hash":
        last = np.full(len(last), 2**32 - 1)
    if data.pooling is not None:
        return floats, _bags(data.pooling, ids, len(dense), last)
    _require(ids, (ids >= 0) & (ids <= last), "ids", "must be from 0 to {}", last)
    return floats, np.ascontiguousarray(ids, np.uint32)


def _bags(pooling: tuple[str, ...], ids, rows: int, last: np.ndarray) -> Bags:
    """Bags of B rows, of ids up to those of `last` (F,); raises ArrayError for what are none."""
    if not isinstance(ids, tuple | list) or len(ids) not in (2, 3):
        raise ArrayError("ids: must be bags, (values, offsets, weights), since the features are pooled")
    values, offsets, weights = (*ids, None)[:3]
    values = _array("values of the bags", values, "iu", "integers", (None,))
    offsets = _array("offsets of the bags", offsets, "iu", "integers", (rows * len(last) + 1,))
    if weights is not None:
        weights = _array("weights of the bags", weights, "fiu", "numbers", (len(values),))
        weights = np.ascontiguousarray(weights, np.float32)
    bags = Bags(values.astype(np.uint32), offsets.astype(np.int64), weights)
    bags.check(rows, pooling)
    of = bags.features(len(last))
    if (bad := np.flatnonzero((values < 0) | (values > last[of]))).size:
        n = int(bad[0])
        raise ArrayError(
            f"values of the bags, number {n}: is {values[n]}, but those of feature {of[n]} must be from 0 to "
            f"{last[of[n]]}"
        )
    return bags


def _label(label, most: int) -> np.ndarray:
    """Labels (B,) float32 of a batch of 1 to `most` rows."""
    label = _array("label", label, "fiub", "numbers", (None,))
    if not 1 <= len(label) <= most:
        raise ArrayError(f"a batch has {len(label)} rows; give from 1 to {most}, or DLRM a larger batch=")
    _require(label, (label == 0) | (label == 1), "label", "must be 0 or 1")
    return np.ascontiguousarray(label, np.float32)


def _weight(weight, rows: int) -> np.ndarray:
    """Weights (B,) float32 of the rows of a batch."""
    weight = _array("weight", weight, "fiub", "numbers", (rows,))
    with np.errstate(over="ignore"):
        floats = np.ascontiguousarray(weight, np.float32)
    _require(weight, np.isfinite(floats) & (floats >= 0), "weight", "must be finite and at least 0")
    return floats


def _array(name: str, given, kinds: str, words: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """What was given as an array of one of these kinds of types, and of that shape; None is any length."""
    try:
        array = np.asarray(given)
    except (ValueError, TypeError) as error:
        raise ArrayError(f"{name}: is no array ({error})") from None
    fits = len(array.shape) == len(shape) and all(
        n in (None, m) for n, m in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = f"({', '.join('any' if n is None else str(n) for n in shape)}{',' * (len(shape) == 1)})"
        raise ArrayError(f"{name}: has shape {array.shape}, but must have {wanted}")
    if array.dtype.kind not in kinds:
        raise ArrayError(f"{name}: holds {array.dtype}, but must hold {words}")
    return array


def _require(array: np.ndarray, good: np.ndarray, name: str, rule: str, limits=None) -> None:
    """Raise ArrayError that names the first value that is not good."""
    if good.all():
        return
    row, *column = (int(i) for i in np.argwhere(~good)[0])
    where = f"row {row}" + "".join(f", column {c}" for c in column)
    rule = rule.format(*(limits[c] for c in column if limits is not None))
    raise ArrayError(f"{name}, {where}: is {array[row, *column]}, but {rule}")


def described(
    cardinalities: Iterable[int],
    dense: int,
    hashed: bool,
    pooling: Pooling | Iterable[Pooling] | None,
    settings: dict[str, Any],
) -> tuple[TrainConfig, DataSpec]:
    """The configuration of settings by their names, and the data that it is for; as of DLRM."""
    cardinalities = tuple(int(count) for count in cardinalities)
    if dense < 0 or not cardinalities or min(cardinalities) < 1:
        raise ConfigError("dense must be at least 0, and there must be cardinalities, each at least 1")
    each = None
    if pooling is not None:
        each = (pooling,) * len(cardinalities) if isinstance(pooling, str) else tuple(pooling)
        if strange := [way for way in each if way not in POOLINGS]:
            raise ConfigError(f"pooling must be of {', '.join(POOLINGS)}, not {strange[0]!r}")
    dialect: Literal["hash", "dictionary"] = "hash" if hashed else "dictionary"
    data = DataSpec(dense, cardinalities, dialect, "", "as they were given", each)
    return resolve(_config(settings)), data


def _config(settings: dict[str, Any]) -> TrainConfig:
    """Settings by their names alone, as a configuration; raises ConfigError for one that there is not."""
    parts = {"model": ModelConfig, "embedding": EmbeddingConfig, "optimizer": OptimizerConfig}
    owners = {field.name: part for part, kind in parts.items() for field in fields(kind)}
    own = {field.name for field in fields(TrainConfig)} - LOOP - parts.keys()
    known = owners.keys() | own
    config, given = TrainConfig(), {part: {} for part in (*parts, None)}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"{name} is no setting of a model; there are {', '.join(sorted(known))}")
        value = value.item() if isinstance(value, np.generic) else value
        value = tuple(value) if isinstance(value, list) else value
        part = owners.get(name)
        hint = get_type_hints(parts.get(part, TrainConfig))[name]
        if not _is(value, hint):
            raise ConfigError(f"{name} must be {_words(hint)}, not {value!r}")
        given[part][name] = value
    return replace(
        config, **{part: replace(getattr(config, part), **given[part]) for part in parts}, **given[None]
    )


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, of those that settings have."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(one, get_args(hint)[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(one) for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a tuple of {_words(get_args(hint)[0])}"
    return {int: "an integer", float: "a number", bool: "True or False"}[hint]


@contextmanager
def in_keywords() -> Iterator[None]:
    """Have a ConfigError name `hash_seed` for `--hash-seed` and `sign=False` for `--no-sign`, but for what
    stands in a command."""

    def keyword(found: re.Match) -> str:
        _, no, name = found.group(0, 1, 2)
        return name.replace("-", "_") + ("=False" if no else "") if name else found[0]

    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"`[^`]*`|--(no-)?([a-z][a-z-]*)", keyword, str(error))) from None
