"""The training loop: steps, evaluations, checkpoints; and what uses the result.

    RUN/metrics.jsonl   one line per log or evaluation
    RUN/checkpoints/    the newest checkpoints
    RUN/averaged/       a run of the mean of the weights, with --average

Rows come from outside: any object with `count` and `batches(batch_size, seed, epoch, start_step)` that
yields `(label, dense, ids)`. Where rows have weights, these come behind the label, and with a teacher its
probabilities of the rows that train come in front of `dense`.

Several ranks (ranks.py) go through the same loop with the same rows and come to the same numbers. Rank 0
alone writes.
"""

import dataclasses
import json
import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypedDict
from zlib import crc32

import msgspec
import numpy as np

from data_pipeline.whole_files import make_folder, naming, new_file, read_text, remedy, sync, write_whole
from robe import checkpoint, metrics
from robe.bags import cut
from robe.checkpoint import Position
from robe.config import ConfigError, DataSpec, TrainConfig
from robe.errors import RobeError
from robe.model import DLRM, EVALUATION_BATCH
from robe.optim import learning_rate
from robe.progress import Listener, Update, unheard, unwatched
from robe.ranks import Alone
from robe.timeline import Phase, no_phase
from robe.version import __version__

AVERAGED = "averaged"
MOST_AVERAGED = 200  # steps whose weights are averaged
LOGS_PER_EVALUATION = 5
EVALUATIONS_PER_EPOCH = 10
# Log losses that are no lack of knowledge, as to predict 1/2 for every row costs 0.69. Models that know their
# training rows by heart come to more than the first of other rows alone, and to the second of none.
DIVERGED, ABSURD = 2 * math.log(2), 10


class TrainingError(RobeError):
    """Training that cannot go on: the input was fine, the numbers were not."""

    exit_code = 1


class Rows(Protocol):
    """Rows of one split of the data."""

    count: int

    def batches(
        self, batch_size: int, *, seed: int | None = None, epoch: int = 0, start_step: int = 0
    ) -> Generator: ...


# Overflow and NaN are looked for in the losses and weights, and reported with what to do.
@np.errstate(over="ignore", invalid="ignore")
def train(
    model: DLRM,
    config: TrainConfig,
    data: DataSpec,
    rows: Mapping[str, Rows],
    run: Path,
    progress: Update = unwatched,
    phase: Phase = no_phase,
    max_steps: int | None = None,
    weighted: bool = False,
    listener: Listener = unheard,
) -> dict:
    """Train a new model to the end of its configuration, from the newest checkpoint of `run` if it has one.

    rows: the splits `train`, `validation` and `test`; phase: times the parts of the loop; max_steps: ends it
    after this step, from where another call goes on; weighted: whether rows have weights; listener: gets each
    entry of the log. Returns the summary of the run; its `warnings`, a line each, tell what makes the model
    useless, and `diverged` whether that is because the losses grew. With `patience` the model, and the newest
    checkpoint, are then those of the best evaluation, `best_step`.
    Raises TrainingError if the loss or a weight is not finite, or the ranks have not the same weights; it is
    raised on all ranks. The last good checkpoint stays: the newest one up to an evaluation that found the
    model of use.
    """
    steps_per_epoch = math.ceil(rows["train"].count / config.batch)
    whole = steps_per_epoch * config.epochs
    total = min(whole, max_steps or whole)
    evaluate_every = config.eval_every or max(1, steps_per_epoch // EVALUATIONS_PER_EPOCH)
    checkpoint_every = config.checkpoint_every or evaluate_every
    log_every = max(1, evaluate_every // LOGS_PER_EVALUATION)

    ranks = model.backend.ranks
    writes = ranks.rank == 0
    newest, position = ranks.told(lambda: resumed(run, config, data, steps_per_epoch))
    if newest is not None:
        _load(newest, model, position.step)
    log, position = ranks.told(lambda: _reopened(run, config, position, steps_per_epoch))
    log.writes, log.listener = writes, listener
    if writes:
        checkpoint.drop_old(run, *log.stays(config))
    stopped, plateaus = log.stopped(config), log.plateaus(evaluate_every)

    started, loss, validation = time.perf_counter() - log.seconds(), math.nan, None
    # Read back for a log only, so that a GPU has its next step queued before it is done with this one.
    sums, counts = model.backend.xp.empty(min(log_every, total), "float64"), []
    more = ("weight",) * weighted + ("target",) * (config.teacher is not None)
    to_come = _to_come(rows["train"], config, position, weighted, ranks)
    began, seen = (position.step, time.perf_counter()), ""
    with closing(fed(model, to_come, config.batch, phase)) as batches:
        while not stopped and position.step < total:
            if config.fresh_embeddings and position.epoch and position.epoch_step == 0:
                model.settle()
                model.embedding.begin(position.epoch)
            if position.epoch_step == steps_per_epoch // 2:
                model.embedding.halfway()
            (position, batch_rows), (label, *arrays, dense, ids) = next(batches)
            step, at_end = position.step, position.step == total
            evaluates = step % evaluate_every == 0 or at_end
            saves = step % checkpoint_every == 0 or at_end
            rate = learning_rate(config.optimizer, step - 1, whole, plateaus)
            beside = dict(zip(more, arrays, strict=True))
            losses = model.step(label, dense, ids, rate, phase, **beside, whole=batch_rows)
            model.backend.xp.sum(losses, dtype="float64", out=sums[len(counts), ...])
            counts.append(len(label))
            if number := averaged_number(config, step, whole):
                model.average(number)
            if evaluates or saves:
                model.settle()
            if step % log_every == 0 or evaluates or saves:
                found = model.backend.to_host(sums[: len(counts)]), np.array(counts)
                for each in found:
                    ranks.add(each)
                loss = _mean_loss(*found, step, config, log)
                counts = []
                seconds = time.perf_counter() - started
                log.write(kind="train", step=step, loss=loss, lr=rate, seconds=seconds, **model.exchanged())
            progress(step * config.batch, total * config.batch, f"loss {loss:.4f}{seen}")
            if evaluates:
                with phase("evaluate"):
                    validation = metrics.summary(*predict(model, rows["validation"]))
                seconds = time.perf_counter() - started
                log.write(
                    kind="validation", step=step, seconds=seconds, **validation, **model.embedding.counts()
                )
                seen = _seen(validation)
                line = _milestone(step, total, config.batch, *began) + f", loss {loss:.4f}{seen}"
                progress(step * config.batch, total * config.batch, f"loss {loss:.4f}{seen}", line)
                stopped, plateaus = log.stopped(config), log.plateaus(evaluate_every)
                saves |= stopped is not None or log.kept_step(config) == step
            if saves:
                with phase("checkpoint"):
                    _check_finite(model, step, config, log)
                    _check_same(model, step, log)
                    if writes:
                        log.sync()
                        checkpoint.save(run, model, config, data, position, stays=log.stays(config))
    kept_step = log.kept_step(config) or position.step
    if kept_step < position.step:
        _load(checkpoint.of_step(run, kept_step), model, kept_step)
        if writes:
            checkpoint.drop_newer(run, kept_step)
        validation = None
    rows_trained = position.epoch * rows["train"].count + position.epoch_step * config.batch
    predicted = predict(model, rows["test"])
    test = metrics.summary(*predicted)
    # The last evaluation is of the final weights, but not made if there was nothing left to do.
    validation = validation or metrics.summary(*predict(model, rows["validation"]))
    training_loss = log.training_loss(kept_step)
    averaged = _averaged(model, config, data, rows, run, position) if position.step == whole else {}
    test_loss = math.inf if test["log_loss"] is None else test["log_loss"]
    diverged = test_loss > ABSURD or min(test_loss, training_loss) > DIVERGED
    ended = "all epochs done" if position.step == whole else f"--max-steps {total} reached"
    return {
        "stopped": stopped or ended,
        "steps": position.step,
        **({"best_step": kept_step} if config.patience else {}),
        "rows_trained": rows_trained,
        "seconds": log.seconds(),
        "rows_per_second": rows_trained / log.seconds(),
        "training_loss": training_loss,
        "test": test,
        "validation": validation,
        "reliability": metrics.reliability(*predicted),
        **averaged,
        "diverged": diverged,
        "warnings": _warnings({"test": test, "validation": validation}, training_loss, diverged, config, log),
        "dense_parameters": sum(array.size for array in model.parameters.values()),
        **model.embedding.describe(),
        **model.exchanged(),
        "backend": model.backend.description,
        "versions": versions(),
    }


def _seen(validation: dict) -> str:
    """What an evaluation found, behind the loss of the training rows."""
    found = [(name, validation[key]) for name, key in (("AUC", "auc"), ("log loss", "log_loss"))]
    known = [f"{name} {value:.4f}" for name, value in found if value is not None]
    return f", validation {', '.join(known)}" if known else ""


def _milestone(step: int, total: int, batch: int, first: int, began: float) -> str:
    """How far a training is, how fast it went since step `first` at time `began`, and when it may end."""
    seconds = time.perf_counter() - began
    left = timedelta(seconds=round(seconds / (step - first) * (total - step)))
    pace = f"{(step - first) * batch / seconds:,.0f} rows/s"
    return f"step {step:,} of {total:,}, {step * batch:,} rows, {pace}, {left} left"


def averaged_number(config: TrainConfig, step: int, total: int) -> int:
    """The how manieth of those that are averaged the weights after a step are, from 1 on; 0 for none of them.

    They are at even distances, the last one at the end of the training, which has `total` steps.
    """
    if config.average is None:
        return 0
    last = min(int(config.average * total), total - 1)  # step that is not averaged
    distance = -(-(total - last) // MOST_AVERAGED)
    if step <= last or (total - step) % distance:
        return 0
    return (total - last - 1) // distance - (total - step) // distance + 1


def _averaged(
    model: DLRM, config: TrainConfig, data: DataSpec, rows: Mapping[str, Rows], run: Path, position: Position
) -> dict[str, dict]:
    """What a summary says of the mean of the weights, if there is one, which is saved as a run for inference.

    The model has its last weights again afterwards.
    """
    if config.average is None:
        return {}
    model.use_averages()
    found = {split: metrics.summary(*predict(model, rows[split])) for split in ("test", "validation")}
    if model.backend.ranks.rank == 0:
        checkpoint.save(run / AVERAGED, model, averaged_config(config), data, position)
    _load(checkpoint.of_step(run, position.step), model, position.step)
    return {AVERAGED: found}


def averaged_config(config: TrainConfig) -> TrainConfig:
    """The settings of the run in RUN/averaged, which is not trained further."""
    optimizer = dataclasses.replace(config.optimizer, optimizer="none")
    return dataclasses.replace(config, optimizer=optimizer, average=None, staleness=0)


def resumed(
    run: Path, config: TrainConfig, data: DataSpec, steps_per_epoch: int
) -> tuple[Path | None, Position]:
    """The newest checkpoint of a run and where it stands; None, and the start, if there is none yet.

    Raises ConfigError if it is of other settings or data, or of epochs of another length.
    """
    if not checkpoint.saved(run):
        return None, Position()
    newest = checkpoint.latest(run)
    saved_config, saved_data, position = checkpoint.read_state(newest)
    if (saved_config, saved_data) != (config, data):
        raise ConfigError(f"{run} was trained with other settings or data; choose another --out")
    if divmod(position.step, steps_per_epoch) != (position.epoch, position.epoch_step):
        raise ConfigError(
            f"{newest}: stands at {position}, where no training of {steps_per_epoch} steps per epoch does; "
            "delete it to go on from the checkpoint before it"
        )
    return newest, position


def _load(saved: Path, model: DLRM, step: int) -> None:
    """Give a model the weights of a checkpoint, which is of this step."""
    checkpoint.load_weights(saved, model)
    model.embedding.steps = step


def _reopened(
    run: Path, config: TrainConfig, position: Position, steps_per_epoch: int
) -> tuple["Log", Position]:
    """The log of a run up to `position`, that of its newest checkpoint, and this position.

    Where a run with `patience` has ended, its newest checkpoint is the best: then all of the log, and where
    the training stood at its end.
    """
    make_folder(run)
    path, total = run / "metrics.jsonl", steps_per_epoch * config.epochs
    if config.patience and path.exists():
        whole = Log(path, total)
        last = max((entry["step"] for entry in whole.entries), default=0)
        if whole.best_step() == position.step and (last == total or whole.stopped(config)):
            return whole, Position(last, *divmod(last, steps_per_epoch))
    return Log(path, position.step), position


def predict(model: DLRM, rows: Rows) -> tuple[np.ndarray, ...]:
    """Labels (N,) uint8 and logits (N,) float32 of all rows, in file order; behind them weights (N,) float32,
    where rows have any."""
    label, logits = np.empty(rows.count, np.uint8), np.zeros(rows.count, np.float32)
    ranks, weights = model.backend.ranks, []

    def own() -> Generator:
        """The batches of this rank, of which the ranks have one after the other."""
        stop = 0
        for number, (batch_label, *weight, dense, ids) in enumerate(rows.batches(EVALUATION_BATCH)):
            start, stop = stop, stop + len(dense)
            label[start:stop] = batch_label
            weights.extend(each.copy() for each in weight)
            if number % ranks.size == ranks.rank:
                yield slice(start, stop), (dense, ids)

    for place, batch_logits in _logits(model, own()):
        logits[place] = batch_logits
    ranks.add(logits)
    return label, logits, *([np.concatenate(weights)] if weights else [])


def probabilities(model: DLRM, batches: Iterable) -> Iterator[np.ndarray]:
    """The probability of a click for every row, (n,) float64 of a batch on each rank at a time.

    batches: of anything whose last two parts are dense (B, n) and ids (B, F), at most EVALUATION_BATCH rows;
        all ranks have all of them.
    """
    ranks, read, done = model.backend.ranks, 0, 0

    def own() -> Generator:
        """The batches of this rank, of which the ranks have one after the other."""
        nonlocal read
        for *_, dense, ids in batches:
            read += 1
            if (read - 1) % ranks.size == ranks.rank:
                yield None, (dense, ids)

    for _, logits in _logits(model, own()):
        done += ranks.size
        yield metrics.probability(*ranks.joined(logits))
    if done < read:  # the last time, when there is none left for this rank
        yield metrics.probability(*ranks.joined(np.empty(0, np.float32)))


def as_lines(file: BinaryIO, parts: Iterable[np.ndarray]) -> None:
    """Write numbers as text, one a line."""
    for part in parts:
        file.write("".join(f"{p:.9g}\n" for p in part.tolist()).encode())


def write_probabilities(
    model: DLRM,
    batches: Iterable,
    out: Path,
    notice: Callable[[str], None] = lambda line: None,
    absent: Sequence[int] = (),
    write: Callable[[BinaryIO, Iterator[np.ndarray]], None] = as_lines,
) -> int:
    """Write the `probabilities`, on rank 0; returns how many. `out` appears whole.

    notice: is told, in a line, that they are all the same.
    absent: rows that have none, from 0 on and rising, as they are known when their batch comes; they are NaN.
    write: writes them, (n,) float64 in parts, to a file.
    Raises TrainingError for a probability that is not finite.
    """
    out = out.resolve()
    if out.exists() and not out.is_file():
        raise ConfigError(f"{out}: is not an ordinary file; choose another --out")
    if model.backend.ranks.rank > 0:
        return sum(map(len, probabilities(model, batches)))
    count, lowest, highest = 0, math.inf, -math.inf

    def found() -> Iterator[np.ndarray]:
        nonlocal count, lowest, highest
        for part in probabilities(model, batches):
            if not (finite := np.isfinite(part)).all():
                raise TrainingError(
                    f"row {count + np.argmin(finite)} (from 0): its probability is not finite; scale its "
                    "numbers, or use a model that was trained with a lower --lr"
                )
            lowest, highest = min(lowest, part.min()), max(highest, part.max())
            gaps = absent[bisect_left(absent, count) : bisect_left(absent, count + len(part))]
            part[np.array(gaps, int) - count] = np.nan
            count += len(part)
            yield part

    try:
        with new_file(out) as file:
            write(file, found())
        sync(out.parent)
    except OSError as error:
        if error.filename != str(out):  # of the rows that are read meanwhile
            raise
        mend = f"{remedy(error)}, or choose another --out"
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; {mend}") from None
    if count > 1 and metrics.all_alike(lowest, highest):
        notice(f"all {count:,} rows get the probability {lowest:.4g}; this model tells no row from another")
    return count


def versions() -> dict[str, str]:
    found = {"robe-dlrm": __version__, "python": platform.python_version()}
    of_cuda = "numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "nvmath-python"
    for package in ("numpy", "numba", *of_cuda, "polars", "safetensors"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Log:
    """`metrics.jsonl`: one JSON object per line. Reopened at a checkpoint, it forgets what came after."""

    def __init__(self, path: Path, step: int):
        found = read_log(path) if path.exists() else ()
        self.entries = [entry for entry in found if entry["step"] <= step]
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
        self.path, self.writes = path, True
        self.listener: Listener = unheard

    def write(self, **entry: Any) -> None:
        self.entries.append(entry)
        if self.writes:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.listener(entry)

    def sync(self) -> None:
        """Have the disk hold the entries, as a checkpoint relies on those up to it."""
        sync(self.path)

    def seconds(self) -> float:
        """Time spent up to the last entry, all sessions together."""
        return self.entries[-1]["seconds"] if self.entries else 0.0

    def training_loss(self, step: int) -> float:
        """The mean of the losses of training rows that were logged last, up to a step."""
        losses = [e["loss"] for e in self.entries if e["kind"] == "train" and e["step"] <= step]
        return float(np.mean(losses[-LOGS_PER_EVALUATION:]))

    def best_step(self) -> int:
        """The step of the first evaluation whose AUC no other exceeds; 0 if none has an AUC."""
        best = max(self._ranked(), key=itemgetter("auc"), default={"step": 0})
        return best["step"]

    def kept_step(self, config: TrainConfig) -> int:
        """The step of the best evaluation, where the settings ask to keep its weights; else 0."""
        return self.best_step() if config.patience else 0

    def stopped(self, config: TrainConfig) -> str | None:
        """What in the settings ends the training here, in words; None if nothing does."""
        if any(entry["auc"] >= (config.target_auc or math.inf) for entry in self._ranked()):
            return "target AUC reached"
        since, best = config.patience, self.best_step()
        if since and sum(entry["step"] > best for entry in self._ranked()) >= since:
            return f"no better validation AUC in {since} evaluation{'s' * (since > 1)}"
        return None

    def plateaus(self, every: int) -> int:
        """How many evaluations found no better AUC than all before, of those each `every` steps: one that is
        made because a training ends early is not made in a training that goes on."""
        found, best = 0, -math.inf
        for entry in self._ranked():
            if entry["step"] % every == 0:
                found += entry["auc"] <= best
                best = max(best, entry["auc"])
        return found

    def stays(self, config: TrainConfig) -> tuple[int, ...]:
        """Steps whose checkpoints stay beside the newest: of the last evaluation of use, and of the best."""
        return self.good_until(), self.kept_step(config)

    def good_until(self) -> int:
        """The step of the last evaluation that found the model of use; 0 if none did."""
        return max((e["step"] for e in self._evaluations() if metrics.trouble(e) is None), default=0)

    def _ranked(self) -> Iterator[dict]:
        """The evaluations that have an AUC: those of rows of both classes."""
        return (entry for entry in self._evaluations() if entry["auc"] is not None)

    def _evaluations(self) -> Iterator[dict]:
        return (entry for entry in self.entries if entry["kind"] == "validation")


def read_log(path: Path) -> Iterator[dict]:
    """The entries of a metrics.jsonl; what is none, as a last line cut short by a kill, is left out."""
    lines = read_text(path, errors="replace").splitlines()
    return (entry for entry in map(_parse, lines) if entry)


class _Trained(TypedDict):
    """What is read of an entry of kind `train`."""

    step: int
    seconds: float
    loss: float


class _Evaluated(TypedDict):
    """What is read of an entry of kind `validation`, besides what old runs lack."""

    step: int
    seconds: float
    auc: float | None
    log_loss: float | None
    normalised_entropy: float | None
    base_rate: float
    rows: int


def _parse(line: str) -> dict | None:
    """The entry of a line; None where it is none."""
    try:
        entry = json.loads(line)
        msgspec.convert(entry, {"train": _Trained, "validation": _Evaluated}[entry["kind"]])
        return entry
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _to_come(
    rows: Rows, config: TrainConfig, position: Position, weighted: bool, ranks: Alone
) -> Generator[tuple[tuple[Position, int], tuple]]:
    """This rank's part of the batches of all epochs after `position`, each behind the position that training
    it reaches, and the rows that it has on all ranks.

    With a teacher what is to be predicted comes in front of the dense columns.
    """
    steps_per_epoch, weight = math.ceil(rows.count / config.batch), np.float32(config.teacher_weight)
    while position.epoch < config.epochs:
        start = {"epoch": position.epoch, "start_step": position.epoch_step}
        with closing(rows.batches(config.batch, seed=config.seed, **start)) as batches:
            for batch in batches:
                label, *more, dense, ids = batch if ranks.size == 1 else _part(batch, ranks)
                position = position.advance(steps_per_epoch)
                # A baseline has no teacher, where its rows do.
                targets = [
                    label + weight * (probability - label)
                    for probability in more[weighted:]
                    if config.teacher is not None
                ]
                arrays = label, *more[:weighted], *targets, dense, ids
                yield (position, len(batch[0])), arrays


def _part(batch: Sequence, ranks: Alone) -> tuple:
    """The rows of a batch that are this rank's."""
    *arrays, ids = batch
    rows = len(arrays[0])
    part = ranks.part(rows)
    return *(array[part] for array in arrays), cut(ids, part.start, part.stop, rows)


def fed(model: DLRM, batches: Generator, rows: int, phase: Phase = no_phase) -> Generator:
    """Each (tag, arrays) with the arrays where the model computes, valid until the next; the last are ids.

    rows: the most rows of a batch.
    """
    return model.backend.feed(_checked(model, batches, phase), rows, phase)


def _checked(model: DLRM, batches: Generator, phase: Phase) -> Generator:
    """The ids as the model takes them."""
    with closing(batches):
        while True:
            with phase("load"):
                if (following := next(batches, None)) is None:
                    return
                tag, (*rest, ids) = following
                ids = model.checked(ids, len(rest[-1]))
            yield tag, (*rest, ids)


def _logits(model: DLRM, batches: Generator) -> Iterator[tuple[Any, np.ndarray]]:
    """Each (tag, (dense, ids)) as (tag, logits (B,) on the host), valid until the next."""
    arrived = fed(model, batches, EVALUATION_BATCH)
    results = ((tag, model.predict(*arrays)) for tag, arrays in arrived)
    return model.backend.fetch(results, EVALUATION_BATCH)


def _mean_loss(sums: np.ndarray, counts: np.ndarray, step: int, config: TrainConfig, log: Log) -> float:
    """Mean loss per row of the steps up to `step`, from the sum of the losses and the rows of each.

    Raises TrainingError if a sum is not finite.
    """
    for number, loss in enumerate(sums.tolist(), step - len(counts) + 1):
        if not math.isfinite(loss):
            raise TrainingError(_not_finite(f"the loss became {loss}", number, config, log))
    return float(sum(sums)) / int(sum(counts))


def _check_finite(model: DLRM, step: int, config: TrainConfig, log: Log) -> None:
    for name, array in model.state().items():
        if not bool(model.backend.xp.isfinite(array).all()):
            what = f"{name} holds a value that is not finite"
            raise TrainingError(_not_finite(what, step, config, log))


def _check_same(model: DLRM, step: int, log: Log) -> None:
    """Raise TrainingError unless all ranks have the same weights, and what their optimizer keeps of these."""
    ranks, checksum = model.backend.ranks, 0
    if ranks.size == 1:
        return
    for array in model.state().values():
        checksum = crc32(np.ascontiguousarray(model.backend.to_host(array)), checksum)
    checksums = ranks.numbers(checksum)
    for rank, found in enumerate(checksums):
        if found != checksums[0]:
            raise TrainingError(
                f"process {rank} of {ranks.size} holds other weights than process 0 after step {step}, so "
                f"memory, network or MPI of a machine fail; {_last_good(log)}. Go on with `robe train "
                f"--resume {log.path.parent}`, on others"
            )


def _not_finite(what: str, step: int, config: TrainConfig, log: Log) -> str:
    return (
        f"{what} in step {step}; {_last_good(log)}. Train again with a lower --lr (it was "
        f"{config.optimizer.lr:g}), or look for broken values with `robe doctor --data DIR`"
    )


def _last_good(log: Log) -> str:
    """Which checkpoint of the run can be relied on, in words."""
    run = log.path.parent
    kept, good = checkpoint.saved(run), checkpoint.newest_until(run, log.good_until())
    if not kept:
        return "there is no checkpoint yet"
    if good is None:
        return f"no checkpoint up to the newest, {kept[-1]}, was found better than predicting the base rate"
    newer = "" if good == kept[-1] else " (delete the newer ones to use it)"
    return f"the last good checkpoint is {good}{newer}"


def _warnings(
    evaluations: dict[str, dict], loss: float, diverged: bool, config: TrainConfig, log: Log
) -> list[str]:
    """What is wrong with the final model, in a line that says what to try; none if it is of use.

    evaluations: of the splits, the one that matters most first; loss: of its training rows.
    """
    lr = f"--lr (it was {config.optimizer.lr:g})"
    ignorant = {"bce": metrics.entropy, "mse": lambda rate: rate * (1 - rate)}[config.loss]
    for split, found in evaluations.items():
        if (trouble := metrics.trouble(found)) is None:
            continue
        if diverged:
            remedy = f"the training diverged, {_last_good(log)}; train again with a lower {lr}"
        elif loss < ignorant(found["base_rate"]) and not metrics.is_constant(found):
            remedy = (
                f"of the training rows something was learned (loss {loss:.4g}): try more rows, fewer "
                "--epochs, a smaller model, or `robe prepare --split` with parts that are more alike"
            )
        else:
            remedy = (
                f"nothing was learned: try another {lr}, wider layers (--bottom, --top), more --epochs, or "
                "more rows"
            )
        return [f"{split} rows: {trouble}; {remedy}"]
    return []
