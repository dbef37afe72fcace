"""Damage each array and each JSON field of checkpoints, runs and prepared folders, and look at what follows.

    python tests/fuzz_files.py [--sample N] [--only TEXT] [--seed S]

Each damage is done to a fresh copy, with the checksums made good, as a forger would. A command must then
refuse it in one line with exit code 2 (or 1, where a training cannot go on), or succeed. It must not end in a
traceback, in a signal, in a want of memory, or not at all. A process of its own carries the commands out, so
that whatever kills it is seen. The damages follow from the seed.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save

SECONDS = 60  # that a command may take
MEMORY = 24 * 2**30  # bytes of address space; arrays beyond cannot be made
TINY = "--width 4 --bottom 6 --top 6 --batch 64 --eval-every 4"
RUNS = {
    "mixed": ("dictionary", "--method mixed_precision --cache 0.1", None),
    "mixed16": ("modulo", "--method mixed_precision --bits 16 --policy lru", None),
    "robe": ("hash", "--method robe --memory fp16 --compression 20 --block 4 --no-sign --hash-seed 3", None),
    "index": ("dictionary", "--method cce --compression 3", None),
    "sketch": ("hash", "--method hot --memory int3 --compression 10 --block 4", None),
    "int8": ("hash", "--method hashing --compression 10", "int8"),
    "int4": ("hash", "--method robe --compression 10 --block 4", "int4"),
}
FOLDERS = ("hash", "dictionary", "modulo", "torchrec")
DELETED = object()
PER_FIELD = 6  # of VALUES are tried on each field
VALUES = [
    *(None, True, False, -1, 0, 1, 3, 1.5, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**400, -(2**63)),
    *(1e-300, 1e300, float("nan"), float("inf"), "", "x", "\x1b[31m\ud800", "../..", [], [None], [0], [[]]),
    *({}, {"x": 1}, [2**40] * 26, [-5, 5]),
]
TEXTS = [
    *(b"", b"{}", b"[]", b"null", b"1", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 4096),
]


class Damage(NamedTuple):
    """What is done to a copy of a folder.

    subject: the folder; name: what is done, in words; apply: does it.
    """

    subject: str
    name: str
    apply: Callable[[Path], None]


class Outcome(NamedTuple):
    """kind: `refused`, `same` (as without the damage), `other`, or what must not be; note: in words."""

    kind: str
    note: str


FINE = ("refused", "same", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, help="try so many, drawn from all")
    parser.add_argument("--only", default="", help="try those whose name holds this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        work(given.worker, given.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_subjects(Path(folder))
        trouble, counts = fuzz(Path(folder), given.seed, given.sample, given.only, sys.stderr)
    print(*trouble, sep="\n")
    print(f"{sum(counts.values())} commands: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    sys.exit(bool(trouble))


def fuzz(
    folder: Path, seed: int, sample: int | None = None, only: str = "", progress=None
) -> tuple[list[str], Counter]:
    """What must not be, a line each, and how often each kind of outcome came; of the subjects in `folder`."""
    names = [f"{damage.subject}: {damage.name}" for damage in damages(folder, seed)]
    numbers = [number for number, name in enumerate(names) if only in name]
    if sample is not None:
        numbers = sorted(random.Random(seed).sample(numbers, min(sample, len(numbers))))
    trouble, counts, worker = [], Counter(), None
    for done, number in enumerate(numbers, 1):
        worker = worker or Worker(folder, seed)
        for outcome in (outcomes := worker.outcomes(number)):
            counts[outcome.kind] += 1
            if outcome.kind not in FINE:
                trouble.append(f"{names[number]}: {outcome.kind}: {outcome.note}")
            if progress and (only or outcome.kind not in FINE):
                print(f"\n{names[number]}: {outcome.kind}: {outcome.note}", file=progress)
        if any(outcome.kind in ("killed", "hangs") for outcome in outcomes):
            worker = None
        if progress:
            print(f"\r{done:,} of {len(numbers):,} damages, {len(trouble)} wrong", end="", file=progress)
    if worker is not None:
        worker.close()
    return trouble, counts


class Worker:
    """A process that carries out the commands of one damage after the other."""

    def __init__(self, folder: Path, seed: int):
        command = [sys.executable, __file__, "--worker", str(folder), "--seed", str(seed)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)

    def outcomes(self, number: int) -> list[Outcome]:
        self.process.stdin.write(f"{number}\n")
        ready, _, _ = select.select([self.process.stdout], [], [], 4 * SECONDS)
        if not ready:
            self.process.kill()
            self.process.wait()
            return [Outcome("hangs", f"after {4 * SECONDS} s")]
        if not (line := self.process.stdout.readline()):
            return [Outcome("killed", f"exit status {self.process.wait()}")]
        return [Outcome(*outcome) for outcome in json.loads(line)]

    def close(self) -> None:
        self.process.communicate()


def work(folder: Path, seed: int) -> None:
    """Carry out the damages whose numbers come in, and write what came of each."""
    answers = sys.stdout
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")  # of NumPy: overflow, and what it thinks of odd headers
    # Figures are made, but their pixels are not, which would take most of the time of a small training.
    Figure.savefig = lambda figure, file, **options: None
    found, clean = list(damages(folder, seed)), {}
    for line in sys.stdin:
        damage = found[int(line)]
        if damage.subject not in clean:
            clean[damage.subject] = [
                result for _, _, result in attempt(folder, damage.subject, lambda copy: None)
            ]
        told = [
            judge(code, words, result, undamaged)
            for (code, words, result), undamaged in zip(
                attempt(folder, damage.subject, damage.apply), clean[damage.subject], strict=True
            )
        ]
        print(json.dumps(told), file=answers, flush=True)


def judge(code: Any, words: str, result: Any, undamaged: Any) -> Outcome:
    lines = words.strip().splitlines()
    if code == 0:
        return Outcome("same" if result == undamaged else "other", str(result))
    if code == 1 and all(line.startswith(("error: ", "warning: ")) for line in lines):
        return Outcome("refused", lines[0])  # a training that diverged; it says what it found
    if code == 2 and len(lines) == 1 and lines[0].startswith("error: "):
        return Outcome("wants memory" if "not enough memory" in words else "refused", lines[0])
    return Outcome("wrong", f"exit code {code}: {words.strip()[-600:]}")


def attempt(folder: Path, subject: str, apply: Callable[[Path], None]) -> Iterator[tuple[Any, str, Any]]:
    """(exit code, standard error, result) of each command on a copy of a subject."""
    with tempfile.TemporaryDirectory(dir=folder) as room:
        copy, out = Path(room) / subject, Path(room) / "out"
        for arguments, result in commands(folder, subject, copy, out):
            shutil.copytree(folder / subject, copy)
            apply(copy)
            code, words, printed = command(arguments)
            yield code, words, result(printed) if code == 0 else None
            shutil.rmtree(copy)
            shutil.rmtree(out, ignore_errors=True)


def command(arguments: list) -> tuple[Any, str, str]:
    """(exit code, standard error, standard output) of a command in this process."""
    from robe import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            code = traceback.format_exc()
    return code, err.getvalue(), out.getvalue()


def commands(
    folder: Path, subject: str, copy: Path, out: Path
) -> Iterator[tuple[list, Callable[[str], Any]]]:
    """The commands that read a subject, each with what its result is, from what it printed."""

    def metrics(printed: str) -> Any:
        found = json.loads(printed)
        return [found[name] for name in ("rows", "auc", "log_loss")]

    def summary(where: Path) -> Callable[[str], Any]:
        return lambda printed: json.loads((where / "summary.json").read_text())["test"]

    def weights(printed: str) -> Any:
        (file,) = out.glob("checkpoints/*/weights.safetensors")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    if subject in RUNS:
        to = "fp32" if RUNS[subject][2] else "int8"
        yield ["evaluate", copy], metrics
        yield ["convert", copy, "--to", to, "--out", out], weights
        if not RUNS[subject][2]:
            yield ["train", "--resume", copy], summary(copy)
    else:
        run = next((run for run in RUNS if RUNS[run][0] == subject and (folder / run).exists()), None)
        method = "robe" if subject in ("hash", "torchrec") else "full"
        yield ["train", "--data", copy, "--out", out, "--method", method, *TINY.split()], summary(out)
        yield ["prepare", "--verify", copy], lambda printed: None
        if run is not None:
            yield ["evaluate", folder / run, "--data", copy], metrics


def make_subjects(folder: Path, runs: Iterable[str] = tuple(RUNS)) -> None:
    """Small prepared folders, one as TorchRec writes it, and runs on them."""

    def do(words: str, *paths: Any) -> None:
        code, err, _ = command([*words.split(), *paths])
        assert code == 0, err

    do("synth --rows 600 --days 3 --out", folder / "raw")
    for ids in ("hash", "dictionary", "modulo"):
        most = "--max-ind-range 40" if ids == "modulo" else ""
        do(f"prepare --ids {ids} {most} --out", folder / ids, folder / "raw")
    shutil.copytree(folder / "dictionary", folder / "torchrec")
    for name in ("manifest.json", "dictionary.npy"):
        (folder / "torchrec" / name).unlink()
    for path in (folder / "torchrec").glob("*_sparse.npy"):
        np.save(path, np.asfortranarray(np.load(path).astype(np.int64)))
    for name in runs:
        data, options, to = RUNS[name]
        run = folder / (f"{name}-trained" if to else name)
        do(f"train {options} {TINY} --data {folder / data} --out", run)
        if to:
            do(f"convert --to {to} --out", folder / name, run)
        else:  # so that there is something to go on with
            shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])


def damages(folder: Path, seed: int) -> Iterator[Damage]:
    """All damages of all subjects."""
    rng = random.Random(seed)
    for subject in (*FOLDERS, *(run for run in RUNS if (folder / run).exists())):
        for path in sorted((folder / subject).rglob("*")):
            name = path.relative_to(folder / subject).as_posix()
            if subject not in RUNS and "day_1" in name:
                continue  # is read as day 0 is
            if path.name in ("config.json", "state.json", "manifest.json"):
                found = json_damages(path.read_bytes(), rng)
            elif path.suffix == ".npy":
                found = npy_damages(path.read_bytes(), rng)
            elif path.suffix == ".safetensors":
                found = weight_damages(path, rng)
            elif path.name == "metrics.jsonl":
                found = line_damages(path.read_bytes(), rng)
            else:
                continue
            for words, content in found:
                yield Damage(subject, f"{name}: {words}", writing(name, content))


def writing(name: str, made: Callable[[], bytes]) -> Callable[[Path], None]:
    """A function that writes a file of a folder anew; what tells its checksum is made to tell this one's."""

    def apply(copy: Path) -> None:
        path, content = copy / name, made()
        path.write_bytes(content)
        if path.name == "weights.safetensors":
            state = json.loads((path.parent / "state.json").read_text())
            state["weights_sha256"] = hashlib.sha256(content).hexdigest()
            (path.parent / "state.json").write_text(json.dumps(state))
        elif path.name == "dictionary.npy":
            manifest = json.loads((path.parent / "manifest.json").read_text())
            with contextlib.suppress(Exception):
                values = np.load(path, allow_pickle=False)
                manifest["dictionary_sha256"] = hashlib.sha256(values.data).hexdigest()
            (path.parent / "manifest.json").write_text(json.dumps(manifest))

    return apply


# Each of the functions below yields what it does, in words, and a function that makes the new content.
Contents = Iterator[tuple[str, Callable[[], bytes]]]


def byte_damages(content: bytes, rng: random.Random, until: int) -> Contents:
    """Other bytes altogether, fewer or more of them, or one changed among the first `until`."""
    for text in TEXTS:
        yield f"is {text[:8]!r} ({len(text)} bytes)", lambda text=text: text
    for _ in range(8):
        end = rng.randrange(len(content))
        yield f"ends after {end} bytes", lambda end=end: content[:end]
    yield "goes on", lambda: content + b"\0" * 100
    for _ in range(16):
        at, byte = rng.randrange(min(until, len(content))), bytes([rng.randrange(256)])
        yield f"byte {at} is {byte}", lambda at=at, byte=byte: content[:at] + byte + content[at + 1 :]


def json_damages(content: bytes, rng: random.Random) -> Contents:
    """Each field deleted, or of another type or value: some of VALUES each, and some near its own."""
    yield from byte_damages(content, rng, len(content))
    data = json.loads(content)
    for path, value in fields(data):
        more = []
        if isinstance(value, int | float) and not isinstance(value, bool):
            more = [value + 1, 2 * value, -value]
        elif isinstance(value, str):
            more = [f"{value}x", value[:-1]]
        elif isinstance(value, list) and value:
            more = [value[:-1], [*value, value[-1]], value[::-1]]
        for other in (DELETED, *rng.sample(VALUES, PER_FIELD), *more):
            if type(other) is not type(value) or other != value:
                words = "deleted" if other is DELETED else repr(other)[:40]
                yield f"{'.'.join(map(str, path))}: {words}", partial(json_with, data, path, other)


def line_damages(content: bytes, rng: random.Random) -> Contents:
    """A log whose lines say something else."""
    lines = content.splitlines(keepends=True)
    for number in (0, len(lines) - 1):
        for words, made in json_damages(lines[number], rng):
            yield f"line {number}, {words}", partial(lines_with, lines, number, made)


def lines_with(lines: list[bytes], number: int, made: Callable[[], bytes]) -> bytes:
    return b"".join([*lines[:number], made(), b"\n", *lines[number + 1 :]])


def json_with(data: Any, path: tuple, value: Any) -> bytes:
    return json.dumps(changed(data, path, value)).encode()


def fields(data: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, value) of every field; of a list the last."""
    keys: Any = ()
    if isinstance(data, dict):
        keys = data
    elif isinstance(data, list):
        keys = [len(data) - 1] if data else ()
    for key in keys:
        yield (*path, key), data[key]
        yield from fields(data[key], (*path, key))


def changed(data: Any, path: tuple, value: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return value
    key, *rest = path
    items = dict(data) if isinstance(data, dict) else dict(enumerate(data))
    if rest or value is not DELETED:
        items[key] = changed(items[key], tuple(rest), value)
    else:
        del items[key]
    return items if isinstance(data, dict) else list(items.values())


def npy_damages(content: bytes, rng: random.Random) -> Contents:
    """A shard whose header says something else, and one with other values."""
    yield from byte_damages(content, rng, 128)
    array = np.load(io.BytesIO(content))
    start = len(content) - array.nbytes
    header = {"descr": array.dtype.str, "fortran_order": np.isfortran(array), "shape": array.shape}
    rows, *columns = array.shape
    shapes = [
        (),
        (rows,),
        (-1, *columns),
        (2**40, *columns),
        (rows, 2**62),
        (2**63, 2**63),
        (rows // 2, *columns),
    ]
    shapes += [(0, *columns), tuple(array.shape[::-1]), (rows, *columns, 1), (rows, 1.5), "x", None]
    types = ["|O", ">i4", "<f8", "<i8", "<u4", "|u1", "|S4", "<M8[s]", [("a", "<i4")], "x", 5, None]
    for name, values in (("shape", shapes), ("descr", types), ("fortran_order", [True, False, 1, None, "x"])):
        for value in values:
            for version in ((1, 0), (2, 0)):
                text = f"{header | {name: value}}\n".encode()
                size = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
                before = b"\x93NUMPY" + bytes(version) + size + text
                yield (
                    f"{name} is {value}, version {version[0]}",
                    lambda before=before: before + content[start:],
                )
    for text in (b"(" * 9000, b"{'descr': " * 500, b"[" * 60000, b"\n" * 100, b"{1:2}", b"__import__('os')"):
        before = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text
        yield f"its header is {text[:8]!r}", lambda before=before: before + content[start:]
    for words, other in other_values(array, rng):
        yield words, partial(npy_of, other)


def npy_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def other_values(array: np.ndarray, rng: random.Random) -> Iterator[tuple[str, np.ndarray]]:
    """The array with one value, or all, that is extreme, and of other types and shapes."""
    if array.dtype.kind == "f":
        values = [np.nan, np.inf, -np.inf, np.finfo(array.dtype).max, np.finfo(array.dtype).min, -1, 0, 1e-40]
    else:
        values = [np.iinfo(array.dtype).max, np.iinfo(array.dtype).min, 0, 1, 2, 127]
    for value in values:
        for all_of_them in (False, True):
            other = array.copy(order="K")
            if array.size:
                other.flat[slice(None) if all_of_them else rng.randrange(array.size)] = value
            yield f"{'all' if all_of_them else 'one'} {value}", other
    for _ in range(3):
        shape = array.shape if array.ndim else (1,)
        words = np.frombuffer(rng.randbytes(array.nbytes), array.dtype).reshape(shape)
        yield "random bits", words
    yield "reversed", np.ascontiguousarray(array[::-1])
    for dtype in ("f8", "f4", "f2", "i8", "u4", "u1", "i4", "?"):
        if np.dtype(dtype) != array.dtype:
            with np.errstate(all="ignore"):
                yield f"of {dtype}", array.astype(dtype)
    yield "flat", array.reshape(-1)
    yield "one row less", array[:-1].copy()
    yield "a row twice", np.concatenate([array, array[-1:]])
    yield "empty", array[:0].copy()
    yield "transposed", np.ascontiguousarray(array.T)
    yield "column by column", np.asfortranarray(array)


def weight_damages(path: Path, rng: random.Random) -> Contents:
    """Other values, types and shapes of each array; other words in the header; cut short and extended."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    yield from byte_damages(content, rng, 8 + size)
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    some = {name: header[name] for name in sorted(header) if name != "__metadata__"}
    odd = (*VALUES, "F64", "BF16", "F8_E4M3", [2**63, 2**63], [2**32, 2**32], [0, 0], [2**64 - 1])
    for place, _ in fields(some):
        for other in (DELETED, *rng.sample(odd, PER_FIELD)):
            text = json_with(header, place, other)
            before = len(text).to_bytes(8, "little") + text
            words = f"{'.'.join(map(str, place))} is {str(other)[:30]}"
            yield f"header, {words}", lambda before=before: before + rest
    for length in (0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1):
        yield f"a header of {length} bytes", lambda length=length: length.to_bytes(8, "little") + content[8:]
    arrays = load_file(path)
    for name in sorted(arrays):
        others = [*other_values(arrays[name], rng), *tag_damages(name, arrays[name])]
        kept = {key: array for key, array in arrays.items() if key != name}
        yield f"{name}, missing", partial(save_of, kept)
        for words, other in others:
            yield f"{name}, {words}", partial(save_of, kept, {name: np.ascontiguousarray(other)})


def save_of(*arrays: dict[str, np.ndarray]) -> bytes:
    return save({name: array for part in arrays for name, array in part.items()})


def tag_damages(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Tags of a cache that are rows of the table, but not where they may be."""
    if not name.endswith("tags"):
        return
    yield "sets in another order", np.roll(array, 1, axis=0)
    yield "a set of one row", np.repeat(array[:, :1], array.shape[1], axis=1)
    yield "counted", np.arange(array.size, dtype=array.dtype).reshape(array.shape)


if __name__ == "__main__":
    main()
