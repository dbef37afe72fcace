"""Checkpoints: a folder with `weights.safetensors` and `state.json`, written whole or not at all.

`weights.safetensors` holds every array of `DLRM.state()`. `state.json` holds the position in the data,
the configuration (hash family, seeds, schedule), what the data must look like, and the sha256 of the
weights. A folder is written under another name and renamed when the disk holds all of it; it loses its name
again before it is removed. So what is called `step_NNNNNNNN` is whole, and a reader to whom it vanishes takes
the newest of the run, which has gone on meanwhile.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data_pipeline.whole_files import make_folder, read_text, remedy, sync, sync_tree, write_json
from robe.backend import select
from robe.config import ConfigError, DataSpec, TrainConfig, from_json, resolve, to_json
from robe.errors import RobeError
from robe.model import DLRM, build, state_shapes
from robe.optim import SQUARES
from robe.version import __version__

T = TypeVar("T")
FORMAT, VERSION = "robe-dlrm-checkpoint", 1
PART = 2**28  # bytes read at a time
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16"},
    **{"I64": "int64", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}
STATE, WEIGHTS = "state.json", "weights.safetensors"
REMOVED = ".removed"  # what a checkpoint is called while it is removed
STEP = re.compile(r"step_\d+")
KEPT = 2  # checkpoints that stay when newer ones come; two, so that a damaged last one is no loss


class CheckpointError(RobeError):
    """A checkpoint that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Where training stands: `step` batches done in all, `epoch_step` of them in epoch `epoch`."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0

    def advance(self, steps_per_epoch: int) -> "Position":
        """The position after one more batch."""
        if self.epoch_step + 1 == steps_per_epoch:
            return Position(self.step + 1, self.epoch + 1, 0)
        return Position(self.step + 1, self.epoch, self.epoch_step + 1)


def save(
    run: Path,
    model: DLRM,
    config: TrainConfig,
    data: DataSpec,
    position: Position,
    again: str | None = None,
    stays: Sequence[int] = (),
) -> Path:
    """Write checkpoint `step_NNNNNNNN` of a run and drop all but the newest ones.

    again: what to do once there is room for it; default: go on with the run.
    stays: the newest checkpoint up to each of these steps stays too.
    """
    folder = run / "checkpoints"
    target, partial = of_step(run, position.step), folder / ".partial"
    weights = partial / "weights.safetensors"
    state = {
        "format": FORMAT,
        "version": VERSION,
        "program": __version__,
        "position": dataclasses.asdict(position),
        "config": to_json(config),
        "data": {name: value for name, value in dataclasses.asdict(data).items() if value is not None},
    }
    try:
        make_folder(folder)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        # Of a model that served a training, an inference needs fewer arrays than it has.
        needed, to_host = state_shapes(config, data), model.backend.to_host
        save_file({name: to_host(array) for name, array in model.state().items() if name in needed}, weights)
        state["weights_sha256"] = _sha256(weights)
        write_json(partial / "state.json", state)
        shutil.copymode(partial / "state.json", weights)  # safetensors leaves them to their owner alone
        sync_tree(partial)
        if target.exists():
            _remove(target)
        partial.rename(target)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        # The settings of a baseline are those of the run that it lies in.
        whole_run = run if (run / "config.json").exists() else run.parent
        cause = _cause(error)
        raise CheckpointError(
            f"{target}: cannot be written ({cause.strerror or error}); {remedy(cause)}, then "
            + (again or f"go on with `robe train --resume {whole_run}`")
        ) from None
    drop_old(run, *stays)
    return target


def drop_old(run: Path, *stays: int) -> None:
    """Remove all but the newest checkpoints, and what of others could not be removed before.

    stays: as of `save`.
    """
    staying = [newest_until(run, step) for step in stays]
    for old in saved(run)[:-KEPT]:
        if old not in staying:
            _remove(old)
    shutil.rmtree(run / "checkpoints" / REMOVED, ignore_errors=True)


def of_step(run: Path, step: int) -> Path:
    """The checkpoint that a run made, or is to make, at a step."""
    return run / "checkpoints" / f"step_{step:08d}"


def drop_newer(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps, the last first."""
    for newer in reversed([path for path in saved(run) if _step(path) > step]):
        _remove(newer)


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if STEP.fullmatch(path.name)), key=_step)


def newest_until(run: Path, step: int) -> Path | None:
    """The newest checkpoint of a run that is not of a later step; None if it has none."""
    return next((path for path in reversed(saved(run)) if _step(path) <= step), None)


def latest(run: Path) -> Path:
    """The newest checkpoint of a run; CheckpointError if it has none."""
    if not (found := saved(run)):
        raise CheckpointError(f"{run}: no checkpoint here; give the folder of a run made by `robe train`")
    return found[-1]


def read_state(checkpoint: Path) -> tuple[TrainConfig, DataSpec, Position]:
    """Configuration, data and position of a checkpoint, validated.

    Its arrays, too, have the types and shapes that these ask for, so a model of them takes no more memory
    than the file says.
    """
    path = checkpoint / STATE
    with _reading(path):
        state = msgspec.json.decode(read_text(path))
        if state["format"] != FORMAT or state["version"] != VERSION:
            raise CheckpointError(
                f"{path}: is {state['format']} version {state['version']}, this program reads {FORMAT} "
                f"version {VERSION}; train again, or use the version of the program that wrote it"
            )
        config = resolve(from_json(state["config"]))
        data, position = (
            _exactly(DataSpec, {"pooling": None, "kept_negatives": None} | state["data"]),
            _exactly(Position, state["position"]),
        )
        if not 0 <= position.epoch_step <= position.step < 2**32 or not 0 <= position.epoch <= position.step:
            raise ValueError(f"no training stands at {position}")
        if checkpoint.name != f"step_{position.step:08d}":
            raise ValueError(f"its folder is not called after step {position.step}")
        shapes = state_shapes(config, data)
    with _arrays(checkpoint, shapes):
        return config, data, position


def newest_state(run: Path) -> tuple[TrainConfig, DataSpec, Position]:
    """`read_state` of the newest checkpoint of a run."""
    return _of_newest(run, read_state)


def digest(run: Path) -> str:
    """A short hash of the model of a run: of the settings and the weights of its newest checkpoint."""

    def identity(newest: Path) -> str:
        config = to_json(read_state(newest)[0])
        return json.dumps([config, msgspec.json.decode(read_text(newest / STATE))["weights_sha256"]])

    return hashlib.sha256(_of_newest(run, identity).encode()).hexdigest()[:16]


def load_weights(checkpoint: Path, model: DLRM) -> None:
    """Copy the arrays of a checkpoint into a model of the same configuration.

    Raises CheckpointError unless they are those that were written, and hold what training can have left.
    """
    path = checkpoint / WEIGHTS
    with _reading(checkpoint / STATE):
        expected = msgspec.json.decode(read_text(checkpoint / STATE))["weights_sha256"]
    with _reading(path):
        if _sha256(path) != expected:
            raise CheckpointError(f"{path}: truncated or altered (sha256 differs); {_remedy(checkpoint)}")
    state = model.state()
    shapes = {name: (array.shape, str(array.dtype)) for name, array in state.items()}
    with _arrays(checkpoint, shapes) as parts:
        for name, part in parts.items():
            array = state[name]
            rows = max(1, PART * len(array) // max(1, array.nbytes))
            for start in range(0, len(array), rows):
                stop = min(start + rows, len(array))
                piece = part[start:stop]
                if (flaw := _flaw(name, piece)) is not None:
                    raise CheckpointError(f"{path}: {name} holds {flaw}; {_remedy(checkpoint)}")
                array[start:stop] = model.backend.to_device(piece)
    if (flaw := model.embedding.flaw()) is not None:
        raise CheckpointError(f"{path}: {flaw}; {_remedy(checkpoint)}")


def _flaw(name: str, piece: np.ndarray) -> str | None:
    """What a piece of an array of that name holds that training cannot have left, in words."""
    if piece.dtype.kind == "f" and not np.isfinite(piece).all():
        return "a value that is not finite"
    if name.endswith(SQUARES) and (piece < 0).any():
        return "a sum of squares that is negative"
    return None


def _exactly(kind: Any, values: Any) -> Any:
    """A dataclass of its fields in JSON; ValueError where one is missing, unknown or of another type."""
    made = msgspec.convert(values, kind)
    if different := values.keys() ^ {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"missing or unknown: {', '.join(sorted(different))}")
    return made


@contextmanager
def _arrays(checkpoint: Path, shapes: dict[str, tuple[tuple[int, ...], str]]) -> Iterator[dict[str, Any]]:
    """Name -> slices of the arrays of a checkpoint, which have to be of these (shape, dtype)."""
    path = checkpoint / WEIGHTS
    with _reading(path), safe_open(path, "numpy") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        if shapes != {
            name: (tuple(part.get_shape()), DTYPES.get(part.get_dtype())) for name, part in parts.items()
        }:
            raise CheckpointError(f"{path}: its arrays do not fit the configuration; {_remedy(checkpoint)}")
        yield parts


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise CheckpointError for a file of a checkpoint that is missing, damaged, or of another program."""
    try:
        yield
    except OSError as error:
        # Whatever keeps safetensors from opening a file, it says that there is none.
        mend = remedy(error) if path.exists() else _remedy(path.parent)
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); {mend}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or altered ({error}); {_remedy(path.parent)}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: damaged or foreign ({error}); {_remedy(path.parent)}") from None


def load_model(run: Path, backend: str, graph: bool = True) -> tuple[DLRM, TrainConfig, DataSpec, Position]:
    """The model of the newest checkpoint of a folder on a backend of that name, and what it was trained with.

    graph: as of backend.select. Raises CheckpointError if there is none, or it is damaged.
    """
    # Built first, as it takes longer than to read the files of a checkpoint that a training soon removes.
    config, data, _ = newest_state(run)
    model = build(config, data, select(backend, config.precision, config.deterministic, graph))

    def load(newest: Path) -> tuple[DLRM, TrainConfig, DataSpec, Position]:
        if (state := read_state(newest))[:2] != (config, data):
            raise CheckpointError(f"{run}: has become another run; try again")
        load_weights(newest, model)
        model.embedding.steps = state[2].step
        return model, *state

    return _of_newest(run, load)


def _of_newest(run: Path, use: Callable[[Path], T]) -> T:
    """What `use` makes of the newest checkpoint; of a newer one, if a training removed that meanwhile."""
    while True:
        newest = latest(run)
        try:
            return use(newest)
        except CheckpointError:
            if newest.exists():
                raise


def _remedy(checkpoint: Path) -> str:
    older = [path for path in saved(checkpoint.parent.parent) if _step(path) < _step(checkpoint)]
    delete = f"delete {checkpoint} to use the checkpoint before it, or " if older else ""
    return delete + "train again"


def _cause(error: Exception) -> OSError:
    """The error of the system; safetensors has it in its words alone."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint at one stroke for those who look for it, whatever comes between."""
    removed = checkpoint.with_name(REMOVED)
    shutil.rmtree(removed, ignore_errors=True)  # of a process that was killed
    checkpoint.rename(removed)
    try:
        shutil.rmtree(removed)
    except OSError as error:  # which names a file without its folder
        error.filename = str(removed)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
