"""Whether this revision and another one train to the same bytes.

    python -m benchmarks.same_bytes REVISION [--only NAME...]

Both train short runs of every method, optimizer and memory on the same synthetic rows by their own command
line, convert some of them, and predict. The files of the checkpoints and the probabilities must be equal byte
for byte, but for the version of the program that state.json names. Ends with code 1 where they are not.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.measure import BenchmarkError
from benchmarks.revision import ROOT, checked_out, environment

ROWS = 30_000
ROBE = "--method robe --compression 20"
INT8 = "--method mixed_precision --bits 8 --optimizer sgd"
INT4 = "--method mixed_precision --bits 4 --policy lru --optimizer adagrad"

# Name -> options of `train`.
TRAINED = {
    "robe, SGD": f"{ROBE} --optimizer sgd",
    "robe, Adagrad": f"{ROBE} --optimizer adagrad",
    "robe, SGD, fp16": f"{ROBE} --optimizer sgd --memory fp16",
    "robe, Adagrad, fp16": f"{ROBE} --optimizer adagrad --memory fp16",
    "robe, unsigned, Z = 1": f"{ROBE} --block 1 --no-sign",
    "robe, affine hash, Z = 32": f"{ROBE} --block 32 --hash affine --no-sign --hash-seed 1024",
    "full, SGD": "--method full --optimizer sgd",
    "full, Adagrad": "--method full --optimizer adagrad",
    "mixed_precision, INT8": f"{INT8} --cache 0.02",
    "mixed_precision, INT4": f"{INT4} --cache 0.02",
    "mixed_precision, INT8, no cache": f"{INT8} --cache 0 --rounding nearest",
    "hashing": "--method hashing --compression 20",
    "frequency": "--method frequency --compression 20",
    "compositional": "--method compositional --compression 20",
    "quotient_remainder": "--method quotient_remainder --compression 4",
    "quotient_remainder, add": "--method quotient_remainder --compression 4 --combine add",
    "tensor_train": "--method tensor_train --compression 4",
    "none": "--method none",
}
# Name -> the run it is made of, and the options of `convert`.
CONVERTED = {
    "robe to INT8": ("robe, Adagrad", "--to int8"),
    "robe to INT4": ("robe, unsigned, Z = 1", "--to int4"),
    "full to INT8": ("full, Adagrad", "--to int8"),
    "full to INT4": ("full, SGD", "--to int4"),
    "full to fp16": ("full, SGD", "--to fp16"),
    "full to robe": ("full, Adagrad", "--to robe --compression 20"),
}
DICTIONARY = ("full", "mixed_precision", "frequency", "quotient_remainder", "tensor_train")
PROGRAM = re.compile(rb'"program": "[^"]*"')  # in state.json: the version of what wrote it


def run(tree: Path, *words) -> None:
    """A command of a tree's run.py; BenchmarkError, with what it printed last, if it fails."""
    command = [sys.executable, tree / "run.py", *words]
    done = subprocess.run(command, env=environment(tree), cwd=tree, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise BenchmarkError(f"{tree}: run.py {' '.join(map(str, words))}: {' '.join(last)}")


def make_data(tree: Path, folder: Path) -> None:
    """The rows that all runs train on, once with hashed ids and once with a dictionary."""
    run(tree, "synth", "--out", folder / "raw", "--rows", str(ROWS))
    for ids in ("hash", "dictionary"):
        run(tree, "prepare", folder / "raw", "--out", folder / ids, "--ids", ids)


def make_run(tree: Path, name: str, data: Path, runs: Path) -> Path:
    """The folder of the run of this name, which `tree` trains or converts, with its probabilities."""
    source, options = CONVERTED.get(name, (name, TRAINED.get(name)))
    rows = data / ("dictionary" if source.startswith(DICTIONARY) else "hash")
    out = runs / name
    if name in CONVERTED:
        run(tree, "convert", runs / source, *options.split(), "--out", out)
    else:
        run(tree, "train", *options.split(), "--data", rows, "--out", out, "--backend", "cpu")
    run(tree, "predict", out, rows, "--out", out / "probabilities.txt", "--backend", "cpu")
    return out


def differences(here: Path, there: Path) -> Iterator[str]:
    """What differs in the checkpoints and probabilities of two folders of runs, a sentence a file."""
    ours, theirs = results(here), results(there)
    if not ours:
        yield f"{here} holds no checkpoint"
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs:
            yield f"{name} is there in one only"
            continue
        a, b = (PROGRAM.sub(b"", files[name].read_bytes()) for files in (ours, theirs))
        if a != b:
            yield f"{name} differs"


def results(run: Path) -> dict[str, Path]:
    """Name -> file, of what must not change in a run's folder."""
    files = [*(run / "checkpoints").rglob("*"), *run.glob("probabilities.txt")]
    return {str(path.relative_to(run)): path for path in files if path.is_file()}


def compare(revision: Annotated[str, tyro.conf.Positional], only: tuple[str, ...] = ()) -> None:
    """Train the same short runs with this tree and with that of another revision, and compare the bytes.

    Args:
        revision: What git calls the other one.
        only: Names of runs; default: all.
    """
    for name in only:
        if name not in TRAINED and name not in CONVERTED:
            raise BenchmarkError(f"no run {name!r}; choose of {'; '.join([*TRAINED, *CONVERTED])}")
    names = [name for name in (*TRAINED, *CONVERTED) if not only or name in only]
    wanted = {CONVERTED.get(name, (name,))[0] for name in names}
    names = [name for name in (*TRAINED, *CONVERTED) if name in names or name in wanted]
    differ = 0
    with (
        checked_out(revision) as other,
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(2) as pool,
    ):
        data, runs = Path(folder) / "data", (Path(folder) / "here", Path(folder) / "there")
        make_data(other, data)
        for name in names:
            pair = pool.map(lambda tree, to, name=name: make_run(tree, name, data, to), (ROOT, other), runs)
            found = list(differences(*pair))
            differ += bool(found)
            print(f"{name}: {'; '.join(found) or 'the same bytes'}", flush=True)
    print(f"{len(names)} runs compared with {revision}: {differ or 'none'} differ")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    try:
        tyro.cli(compare, prog="python -m benchmarks.same_bytes")
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
