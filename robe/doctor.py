"""Checks of an installation and of a data set; each that fails says what to do."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robe import metrics
from robe.backend import cuda_trouble, select, simulator
from robe.config import DataSpec, EmbeddingConfig, OptimizerConfig, TrainConfig, resolve
from robe.kernels.parts.disk_cache import folder as kernel_folder
from robe.kernels.workbench.cases import CASES
from robe.model import build
from robe.threads import THREAD_POLICY
from robe.train import versions


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
    policy = {name: os.environ[name] for name in THREAD_POLICY}
    text = ", ".join(f"{name}={value}" for name, value in policy.items())
    good = policy == THREAD_POLICY
    yield Check("threads wait", good, text + ("" if good else "; unset them: idle threads take the cores"))
    for pool in threadpoolctl.threadpool_info():
        if pool["user_api"] == "blas":
            name, version, threads = pool["internal_api"], pool["version"], pool["num_threads"]
            yield Check("BLAS", None, f"{name} {version}, {threads} threads")
    trouble = cuda_trouble()
    yield Check("GPU", None, trouble or select("cuda").description)
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
    yield Check("overfits one random batch", *overfits(batch, data))
    yield Check(
        "backend chosen by auto", None, backend.description if trouble else select("auto").description
    )


def data_set(label: np.ndarray, dense: np.ndarray, ids: np.ndarray, data: DataSpec) -> Iterator[Check]:
    """Checks of rows of a data set: label (N,), dense (N, n), ids (N, F)."""
    rate = float(label.mean())
    entropy = f"{rate:.4f} of {len(label):,} rows; predicting that rate costs {metrics.entropy(rate):.4f}"
    constant = f"every label is {rate:g}; the label column is not what it should be"
    yield Check("clicks", 0 < rate < 1, entropy if 0 < rate < 1 else constant)
    finite = bool(np.isfinite(dense).all())
    yield Check("dense values finite", finite, "yes" if finite else "no; prepare the data again")
    distinct = [len(np.unique(column)) for column in ids.T]
    constant = [f for f, count in enumerate(distinct) if count == 1]
    yield Check(
        "ids spread",
        len(constant) < len(distinct),
        f"{min(distinct)} to {max(distinct):,} distinct values per feature"
        + (f"; features {constant} hold one value only" if constant else ""),
    )
    batch = tuple(np.ascontiguousarray(part[:64]) for part in (label, dense, ids))
    yield Check("overfits one batch of it", *overfits(batch, data))


def overfits(batch, data: DataSpec) -> tuple[bool, str]:
    """Whether 200 steps on one batch bring its loss near 0, as they must when gradients are right."""
    config = resolve(
        TrainConfig(
            embedding=EmbeddingConfig(weights=100_000),
            optimizer=OptimizerConfig("adagrad", 0.05),
            batch=len(batch[0]),
            backend="cpu",
        )
    )
    model, (label, dense, ids) = build(config, data, select("cpu")), batch
    losses = [float(model.step(label, dense, ids, config.optimizer.lr).mean()) for _ in range(200)]
    good = losses[-1] < 0.1 * losses[0]
    return good, f"loss {losses[0]:.3f} -> {losses[-1]:.5f} in 200 steps" + ("" if good else "; report this")


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
