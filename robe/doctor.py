"""Checks of an installation and of a data set; each that fails says what to do."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robe import metrics
from robe.backend import cuda_trouble, select, simulator
from robe.bags import bags_of, cut
from robe.config import METHODS, DataSpec, EmbeddingConfig, OptimizerConfig, TrainConfig, resolve
from robe.kernels.parts.disk_cache import folder as kernel_folder
from robe.kernels.workbench.cases import CASES
from robe.model import build
from robe.threads import THREAD_POLICY
from robe.train import versions

BATCH = 64  # rows to overfit
STEPS, MOST_STEPS = 200, 1000
UNREASONABLE = 100  # a loss that no first prediction has, unless numbers are far too large
LARGE = 1000  # of dense values: the logarithms of all counts are far below


class Check(NamedTuple):
    """One line of the report. ok: True, False, or None for a fact that cannot fail."""

    name: str
    ok: bool | None
    text: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'FAIL', None: ''}[self.ok]:5} {self.name}: {self.text}"


def installation(folder: Path) -> Iterator[Check]:
    """Facts and checks of this machine; `folder` is where runs and data will be written."""
    import numba
    import threadpoolctl

    yield Check("versions", None, ", ".join(f"{name} {number}" for name, number in versions().items()))
    backend = select("cpu")
    # The first parallel kernel starts the threads; their layer is known only then.
    yield Check("kernels agree", *_kernels_agree())
    yield Check("numba", None, f"{numba.get_num_threads()} threads, layer {numba.threading_layer()}")
    policy = {name: os.environ.get(name, "unset") for name in THREAD_POLICY}
    text = ", ".join(f"{name}={value}" for name, value in policy.items())
    good = policy == THREAD_POLICY
    yield Check("threads wait", good, text + ("" if good else "; unset them: idle threads take the cores"))
    for pool in threadpoolctl.threadpool_info():
        if pool["user_api"] == "blas":
            name, version, threads = pool["internal_api"], pool["version"], pool["num_threads"]
            yield Check("BLAS", None, f"{name} {version}, {threads} threads")
    trouble = cuda_trouble()
    chosen = None if trouble else select("cuda")
    yield Check("GPU", None, trouble or chosen.description)
    if chosen and chosen.graph:
        plain = ", ".join(name for name, method in METHODS.items() if not method.captured)
        yield Check("CUDA graphs", None, f"each step of a training is one, but not of {plain}")
    yield Check("CUDA simulator", None, "on" if simulator() else "off (NUMBA_ENABLE_CUDASIM=1 turns it on)")
    free = shutil.disk_usage(folder).free
    yield Check(
        "disk",
        free > 2e9,
        f"{free / 1e9:.1f} GB free in {folder.resolve()}" + ("" if free > 2e9 else "; free some space"),
    )
    rng = np.random.default_rng(0)
    data = DataSpec(13, (1000,) * 26, "hash", "", "random")
    batch = (
        rng.integers(0, 2, 64).astype(np.float32),
        rng.random((64, 13), np.float32),
        rng.integers(0, 2**32, (64, 26), dtype=np.uint32),
    )
    good, text = overfits(batch, data)
    yield Check("overfits one random batch", good, text + ("" if good else "; report this"))
    yield Check(
        "backend chosen by auto", None, backend.description if trouble else select("auto").description
    )


def data_set(
    label: np.ndarray,
    dense: np.ndarray,
    ids: Any,
    data: DataSpec,
    dense_names: Sequence[str],
    id_names: Sequence[str],
    rates: Mapping[str, float],
) -> Iterator[Check]:
    """Checks of rows drawn from a data set: label (N,), dense (N, n), ids (N, F) or bags.

    dense_names, id_names: of the columns; rates: the share of clicks among all rows of each split.
    """
    alike = " and ".join(split for split, rate in rates.items() if rate in (0, 1))
    text = ", ".join(f"{rate:.4f} of the {split} rows" for split, rate in rates.items())
    if alike:
        remedy = "name another label column, or another --split when preparing"
        text += f"; all labels to {alike} are the same: {remedy}"
    else:
        text += f"; predicting the rate of training costs {metrics.entropy(rates['train']):.4f}"
    yield Check("clicks", not alike, text)
    finite = bool(np.isfinite(dense).all())
    text = "yes" + _idle(dense.T, dense_names) if finite else "no; prepare the data again"
    yield Check("dense values finite", finite, text)
    columns = _columns(ids, len(id_names))
    counts = {name: len(np.unique(column)) for name, column in zip(id_names, columns, strict=True)}
    fewest, most = (choose(counts, key=counts.__getitem__) for choose in (min, max))
    spread = counts[most] > 1
    text = (
        f"{counts[fewest]:,} ({fewest}) to {counts[most]:,} ({most}) distinct values in {len(label):,} rows"
    )
    text += _idle(columns, id_names) + ("" if spread else "; name other columns, or train with --method none")
    yield Check("ids spread", spread, text)
    rows = min(BATCH, len(label))
    batch = *(np.ascontiguousarray(part[:rows]) for part in (label, dense)), cut(ids, 0, rows, len(label))
    good, text = overfits(batch, data)
    sizes = dict(zip(dense_names, np.abs(batch[1]).max(axis=0).tolist(), strict=True))
    if large := [f"{name} up to {size:.3g}" for name, size in sizes.items() if size > LARGE]:
        remedy = "prepare with --dense log1p, or scale them"
        text += f"; large numbers are hard to learn ({', '.join(large)}): {remedy}"
    elif not good:
        text += "; report this"
    yield Check("overfits one batch of it", good, text)


def overfits(batch, data: DataSpec) -> tuple[bool, str]:
    """Whether training on one batch alone brings its loss down, as it must when gradients are right.

    Good is what comes near the least loss that any model can have on these rows. Rows that are told apart by
    little differences of numbers are learned slowly, so the least by the ids alone will do too. But a loss
    that began beyond reason, and ends where predicting the base rate does, has learned nothing.
    """
    config = resolve(
        TrainConfig(
            embedding=EmbeddingConfig(weights=100_000),
            optimizer=OptimizerConfig("adagrad", 0.05),
            batch=len(batch[0]),
            backend="cpu",
        )
    )
    model, (label, dense, ids) = build(config, data, select("cpu")), batch
    fed = model.checked(ids, len(label))
    constant = metrics.entropy(float(label.mean(dtype=float))) + 0.0  # -0 becomes 0
    least, least_by_ids = attainable(label, dense, ids), attainable(label, dense[:, :0], ids)
    losses: list[float] = []

    def near(loss: float) -> bool:
        return losses[-1] <= loss + max(0.1 * (constant - loss), 0.01)

    with np.errstate(over="ignore", invalid="ignore"):  # of numbers that are far too large
        while len(losses) < STEPS or (len(losses) < MOST_STEPS and not near(least)):
            losses.append(float(model.step(label, dense, fed, config.optimizer.lr).mean()))
    learned = losses[0] < UNREASONABLE or losses[-1] < constant - 0.01
    good = learned and (near(least) or (losses[0] < UNREASONABLE and near(least_by_ids)))
    text = (
        f"loss {losses[0]:.3g} -> {losses[-1]:.5f} in {len(losses)} steps on {len(label)} rows; predicting "
        f"their base rate costs {constant:.5f}, and no model goes below {least:.5f}"
    )
    return good, text + (", as some rows differ in the label alone" if least > 0 and constant > 0 else "")


def attainable(label: np.ndarray, dense: np.ndarray, ids: Any) -> float:
    """The least mean log loss on some rows: that of predicting, for equal rows, their share of clicks."""
    if (bags := bags_of(ids)) is not None:  # rows of equal bags get one number
        parts = (cut(bags, row, row + 1, len(label)) for row in range(len(label)))
        keys = [tuple(b"" if array is None else array.tobytes() for array in part) for part in parts]
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        ids = np.array([number[key] for key in keys], np.uint32)[:, None]
    rows = np.concatenate([(dense + np.float32(0)).view(np.uint32), ids], axis=1)  # -0 equals 0
    _, group, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    clicks = np.bincount(group, label)
    return float(sum(n * metrics.entropy(c / n) for n, c in zip(counts, clicks, strict=True)) / len(label))


def _columns(ids: Any, features: int) -> Any:
    """The ids of each feature, of all rows."""
    if (bags := bags_of(ids)) is None:
        return ids.T
    return [bags.values[bags.features(features) == feature] for feature in range(features)]


def _idle(columns: Iterable[np.ndarray], names: Sequence[str]) -> str:
    """The columns that hold one value only, in words."""
    idle = [name for name, column in zip(names, columns, strict=True) if (column == column[:1]).all()]
    return f"; {', '.join(idle)}: one value only" if idle else ""


def _kernels_agree() -> tuple[bool, str]:
    """Whether the compiled look-up equals NumPy's on every case of the table, and a line that says so."""
    for case in CASES:
        memory = np.arange(case.memory, dtype=np.float32)
        arguments = (memory, case.draw_ids(), case.base(), case.slot_map())
        expected, out = np.empty((2, case.rows, case.features, case.width), np.float32)
        select("reference").kernels.gather(*arguments, expected)
        select("cpu").kernels.gather(*arguments, out)
        if not np.array_equal(expected, out):
            remedy = f"delete {kernel_folder()}, and report this if it stays"
            return False, f"the compiled look-up is wrong on the case {case.name!r}; {remedy}"
    return True, f"compiled look-up equals NumPy's on {len(CASES)} cases"
