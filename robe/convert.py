"""Trained models made smaller, for inference: other memory for the same weights, or a ROBE array of a table.

Weights are rounded to the nearest. Codes that were trained in the bits that are asked for are copied, and
what training holds besides is left out. A mixed-precision table that keeps its bits is flushed: its codes are
copied, and what its cache held is rounded as in training. Besides source and target, one chunk of weights at
a time is in memory (for a ROBE array also a count for each of its weights); the source model is freed before
saving, because safetensors copies every array it writes.

The best ROBE array for a given table x of n weights has in each of its M slots the mean of the weights that
share it, each with its sign; what is read from it, x^, is then the projection of x on all tables that such
an array can stand for. For independent weights E ||x - x^||^2 / ||x||^2 = 1 - M occ / n, where occ, which is
1 - (1 - Z/M)^(n/Z), is the share of slots in use: nearly all is lost where n is much larger than M. A trained
array does not approximate a table; that is why it works and this does not.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from robe import checkpoint
from robe.config import (
    CODE_BITS,
    METHODS,
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    Memory,
    TrainConfig,
    budget,
    resolve,
)
from robe.embeddings import ArrayEmbedding, ComposedEmbedding, Embedding, MixedPrecisionEmbedding
from robe.model import build

CHUNK = 2**22  # weights
Target = Memory | Literal["robe"]
Part = ArrayEmbedding | MixedPrecisionEmbedding
Progress = Callable[[int, int], None]


def unwatched(done: int, total: int) -> None:
    pass


@dataclass
class Difference:
    """How far what is read after conversion is from the weights x, over all chunks so far."""

    energy: float = 0.0
    lost: float = 0.0
    largest: float = 0.0

    def add(self, x: np.ndarray, read: np.ndarray) -> None:
        self.energy += float(np.vdot(x, x.astype(np.float64)))
        error = (x.astype(np.float64) - read).ravel()
        self.lost += float(error @ error)
        self.largest = max(self.largest, float(abs(error).max(initial=0.0)))

    def summary(self) -> dict[str, float]:
        share = self.lost / self.energy if self.energy else 0.0
        return {
            "relative_rms_error": math.sqrt(share),
            "largest_error": self.largest,
            "energy_share_lost": share,
        }


def converted_config(
    config: TrainConfig, data: DataSpec, to: Target, compression: float | None, block: int | None
) -> TrainConfig:
    """The configuration of the new run; raises ConfigError where there is no such conversion."""
    settings = config.embedding
    method, options = settings.method, METHODS[settings.method].options
    if to != "robe" and (compression, block) != (None, None):
        raise ConfigError(f"--compression and --block are for --to robe; --to {to} keeps every weight")
    if not METHODS[method].categorical:
        raise ConfigError("a model without categorical features has no embedding to convert")
    if to == "robe":
        if "compression" in options:  # it keeps no row per id
            raise ConfigError(
                f"--to robe takes tables (--method full or mixed_precision), not --method {method}; train "
                "--method robe instead"
            )
        new = EmbeddingConfig("robe", compression=compression, block=block or EmbeddingConfig.block)
    elif "memory" not in options:
        new = EmbeddingConfig("full", memory=to)
    elif settings.memory == to and not (to in CODE_BITS and config.optimizer.optimizer != "none"):
        raise ConfigError(f"its embedding is stored in {to} already")
    else:
        new = dataclasses.replace(settings, memory=to, master="fp32", rounding="stochastic")
        if settings.megabytes is not None:  # which would be other weights now
            weights = budget(settings, config.model.width, data.cardinalities)
            new = dataclasses.replace(new, megabytes=None, weights=weights)
    optimizer = dataclasses.replace(config.optimizer, optimizer="none")
    return resolve(dataclasses.replace(config, embedding=new, optimizer=optimizer, staleness=0))


def convert(
    source: Path,
    new: TrainConfig,
    run: Path,
    progress: Progress = unwatched,
) -> dict:
    """Convert the newest checkpoint of the run `source` to one of configuration `new`, in the folder `run`.

    progress: is called with the number of weights that are done, and of all.
    Returns the summary of the new run, without what is known of its data.
    """
    trained, config, data, position = checkpoint.load_model(source, "cpu")
    model = build(new, data, trained.backend)
    model.dense_parameters[...] = trained.dense_parameters
    found = convert_embedding(trained.embedding, model.embedding, data, progress)
    before = trained.embedding.describe()
    del trained  # writing takes memory too
    checkpoint.save(run, model, new, data, position, "convert again")
    names = "method", "embedding_parameters", "embedding_bytes"
    return {
        "steps": position.step,
        "before": {name: before[name] for name in names} | {"memory": memory_of(config.embedding)},
        "memory": new.embedding.memory,
        **found,
        **model.embedding.describe(),
        "dense_parameters": int(model.dense_parameters.size),
    }


def memory_of(settings: EmbeddingConfig) -> str:
    """What a weight is stored in, as `--memory` would say it."""
    if "bits" in METHODS[settings.method].options:
        return "fp16" if settings.bits == 16 else f"int{settings.bits}"
    return settings.memory


def convert_embedding(
    source: Embedding, target: Embedding, data: DataSpec, progress: Progress = unwatched
) -> dict[str, float]:
    """Fill `target` with what `source` holds; returns what was lost."""
    difference, described = Difference(), source.describe()
    if isinstance(target, ArrayEmbedding) and target.method == "robe" != described["method"]:
        project(source, target, data, difference, progress)
        return difference.summary() | {"expected_energy_share_lost": expected_loss(target)}
    done, total = 0, described["embedding_parameters"]
    sources: Iterable[Part] = source.parts.values()
    assert not isinstance(target, MixedPrecisionEmbedding), "nothing is converted to a table that is trained"
    for one, other in zip(sources, target.parts.values(), strict=True):
        copied = one.copy_codes(other.memory)
        for name in other.carried:
            getattr(other, name)[...] = getattr(one, name)
        for start, weights in chunks(one):
            if not copied:
                other.write(start, weights)
            difference.add(weights, other.read(start, start + weights.size))
            done += weights.size
            progress(done, total)
    if isinstance(source, ComposedEmbedding) and isinstance(target, ComposedEmbedding):
        for name, array in source.beside.items():
            target.beside[name][...] = array
    return difference.summary()


def chunks(part: Part) -> Iterator[tuple[int, np.ndarray]]:
    """(slot of the first, weights (n,) float32) of all, whole groups or rows at a time."""
    step = part.unit * max(1, CHUNK // part.unit)
    for start in range(0, part.weights, step):
        yield start, part.read(start, min(start + step, part.weights))


def project(
    source, target: ArrayEmbedding, data: DataSpec, difference: Difference, progress: Progress
) -> None:
    """Fill a ROBE array with the means of the weights of tables that share its slots."""
    kernels, where, sums = target.backend.kernels, target.slot_map, target.memory
    counts, done = np.zeros_like(sums), 0
    sums[...] = 0
    for rows, x in table_rows(source, target, data):
        kernels.scatter_add(x, *rows, where, 1, sums)
        kernels.scatter_add(np.ones_like(x), *rows, where._replace(signed=False), 1, counts)
        done += x.size
        progress(done, 2 * target.table_weights)
    sums /= np.maximum(counts, 1)
    for rows, x in table_rows(source, target, data):
        found = np.empty_like(x)
        kernels.gather(target.memory, *rows, where, found)
        difference.add(x, found)
        done += x.size
        progress(done, 2 * target.table_weights)


def table_rows(source, target: ArrayEmbedding, data: DataSpec) -> Iterator[tuple]:
    """((ids (n, 1), base (1,) of `target`), vectors (n, 1, D)) of all rows of the tables, some at a time."""
    width, first = source.width, 0
    step = max(1, CHUNK // width)
    for f, count in enumerate(data.cardinalities):
        for start in range(0, count, step):
            ids = np.arange(start, min(start + step, count), dtype=np.uint32)[:, None]
            slot = (first + start) * width
            x = source.read(slot, slot + len(ids) * width)
            yield (ids, target.base[f : f + 1]), x.reshape(len(ids), 1, width)
        first += count


def expected_loss(target: ArrayEmbedding) -> float:
    """E ||x - x^||^2 / ||x||^2 for a table of independent weights."""
    m, block, n = int(target.slot_map.memory), int(target.slot_map.block), target.table_weights
    used = -math.expm1(n / block * math.log1p(-block / m)) if block < m else 1.0
    return 1 - m * used / n
