"""Short runs of the commands whose k-th call of a kind fails, for every k: `python tests/faults.py`.

faults.c, preloaded, fails the calls. Each run has to end in one line with code 2 (or to go on, where the call
does not matter), with nothing half written under its name. Then the same command, or `train --resume`, has to
complete with the files of a run that nothing disturbed. The commands run in forks of one process, which has
imported and compiled what they need.
"""

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Kind of call, as faults.c names it -> the errors that it fails with, in turn.
KINDS = {
    "open": (errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOSPC),
    "read": (errno.EIO,),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    "short": (0,),
    "sync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "rename": (errno.EIO, errno.EACCES, errno.ENOSPC),
    "mkdir": (errno.EIO, errno.EACCES, errno.ENOSPC),
    "remove": (errno.EIO,),
}
TINY = "--bottom 4 --width 2 --top 4 --batch 8"
# Commands are given in a folder beside `inputs`, and make a file or folder called `made`.
COMMANDS = {
    "synth": "synth --rows 30 --days 2 --out made",
    "packed": "synth --rows 30 --days 2 --gzip --out made",
    "prepare": "prepare ../inputs/raw --out made",
    "dictionary": "prepare ../inputs/raw --ids dictionary --out made",
    "single": "prepare ../inputs/bad --bad-rows skip --blocks 2 --out made",
    "train": f"train --data ../inputs/dictionary --method full {TINY} --out made",
    "baseline": f"train --data ../inputs/hash --block 2 {TINY} --baseline --out made",
    "resume": "train --resume made",
    "convert": "convert ../inputs/run --to int8 --out made",
    "predict": "predict ../inputs/run ../inputs/raw/day_1 --out made",
    "evaluate": "evaluate ../inputs/run",
}
INPUTS = (
    "synth --rows 60 --days 2 --out raw",
    "prepare raw --out hash",
    "prepare raw --ids dictionary --out dictionary",
    f"train --data dictionary --method full {TINY} --out run",
)


class Trouble(Exception):
    """What a command did that it must not do."""


def build(folder):
    """The compiled faults.c, or None where there is no C compiler."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        return None
    source, library = ROOT / "tests" / "faults.c", folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


class Laboratory:
    """Runs commands in forks of this process, undisturbed or with a fault below `folder`."""

    def __init__(self, folder, library):
        self.folder, self.trial, self.log = folder, folder / "trial", folder.with_name("log")
        self.faults = ctypes.CDLL(library)
        self.faults.fault_seen.restype = ctypes.c_long
        inputs = folder / "inputs"
        inputs.mkdir(parents=True)
        for command in INPUTS:
            if (ended := self.fork(command, inputs))[0] != 0:
                raise Trouble(f"{command}: ends with {ended}")
        text = (inputs / "raw" / "day_0").read_bytes()
        (inputs / "bad").write_bytes(b"bad\n" + text + b"bad\n")
        # What these need is then ready in every fork. Polars would not bear a fork after its first use.
        for name in ("baseline", "train", "convert"):
            self.clear()
            with contextlib.redirect_stdout(io.StringIO()):
                here(COMMANDS[name], self.trial)
        # A training that met a full disk when most of it was done.
        self.run("train", "sync", 2 * self.run("train")[1]["sync"] // 3, errno.ENOSPC)
        (self.trial / "made").rename(inputs / "begun")
        self.calls, self.expected = {}, {}
        for name in COMMANDS:
            if (ended := self.run(name))[0] != 0:
                raise Trouble(f"{name}: ends with {ended} undisturbed")
            self.calls[name], self.expected[name] = ended[1], contents(self.trial)

    def clear(self):
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir()

    def run(self, name, kind="open", k=0, number=0, anew=True):
        """(exit code, number of calls of each kind, standard error) of a command whose call k fails.

        anew: in an empty folder.
        """
        if anew:
            self.clear()
            if name == "resume":
                shutil.copytree(self.folder / "inputs" / "begun", self.trial / "made")
        return self.fork(COMMANDS[name], self.trial, kind, k, number)

    def fork(self, command, folder, kind="open", k=0, number=0):
        if (child := os.fork()) == 0:
            os._exit(self.in_fork(command, folder, list(KINDS).index(kind), k, number))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        text, _, calls = self.log.read_text().partition("calls ")
        return code, dict(zip(KINDS, map(int, calls.split()), strict=False)), text

    def in_fork(self, command, folder, kind, k, number):
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        faulthandler.dump_traceback_later(300, exit=True, file=log)  # compiling takes a while
        self.faults.fault_arm(os.fsencode(self.folder), kind, k, number)
        try:
            here(command, folder)
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
            code = 1
        os.write(log, b"calls " + b" ".join(b"%d" % self.faults.fault_seen(i) for i in range(len(KINDS))))
        return code

    def moments(self):
        """(command, kind, k, error) of every call that can fail."""
        for name, calls in self.calls.items():
            for kind, numbers in KINDS.items():
                yield from ((name, kind, k, numbers[k % len(numbers)]) for k in range(1, calls[kind] + 1))

    def attempt(self, name, kind, k, number):
        """What the command says if call k fails; raises Trouble if it, or the one after it, goes wrong."""
        code, _, text = self.run(name, kind, k, number)
        one_line = text.count("\n") == 1 and text.startswith("error: ")
        if not (code == 0 or (code == 2 and one_line and "None" not in text)):
            raise Trouble(f"ends with {code}: {text}")
        if code and kind == "short":
            raise Trouble(f"half a call is no failure: {text}")
        expected = self.expected[name]
        if name == "convert" and not code:  # the run is converted, but not evaluated, where its data fail
            summary = json.loads((self.trial / "made" / "summary.json").read_text())
            known = expected["made/summary.json"]
            expected = expected | {"made/summary.json": {k: v for k, v in known.items() if k in summary}}
        if found := list(broken(self.trial, expected)):
            raise Trouble(f"not whole: {found}; said {text}")
        if code:
            begun = (self.trial / "made" / "config.json").exists() and name in ("train", "baseline")
            again, _, said = self.run("resume" if begun else name, anew=False)
            if again:
                raise Trouble(f"said {text}but then ends with {again}: {said}")
        if (found := contents(self.trial)) != expected:
            differ = sorted(p for p in found.keys() | expected.keys() if found.get(p) != expected.get(p))
            raise Trouble(f"said {text}and then other files than undisturbed: {differ}")
        return text


def here(command, folder):
    from data_pipeline import synthetic
    from robe.cli import main

    synthetic.SAMPLE_CHUNKS = 1  # what costs most of the time of a small log
    os.chdir(folder)
    main(command.split())


def contents(folder):
    """Path -> what a file below the folder holds, without what every run measures anew."""
    found = {}
    for path in folder.rglob("*"):
        if ".made.partial" in path.parts and (folder / "made").exists():
            continue  # what a preparation no longer needed, and could not remove
        if path.is_dir():
            found[str(path.relative_to(folder))] = None
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            content = [timeless(json.loads(line)) for line in content.splitlines() if line.endswith(b"}")]
        elif path.name == "summary.json":
            content = timeless(json.loads(content))
        found[str(path.relative_to(folder))] = content
    return found


def broken(folder, expected):
    """The files that have a name and are neither those of an undisturbed run, nor on the way to them."""
    for path, content in contents(folder).items():
        if any(part.startswith(".") for part in Path(path).parts) or content == expected.get(path):
            continue
        if path.endswith("metrics.jsonl") and content == expected[path][: len(content)]:
            continue  # a log; the rest is still to come
        beside = (folder / path).parent
        if beside.parent.name == "checkpoints":  # one that an undisturbed run has removed again
            weights = hashlib.sha256((beside / "weights.safetensors").read_bytes()).hexdigest()
            if json.loads((beside / "state.json").read_text())["weights_sha256"] == weights:
                continue
        yield path


def timeless(value):
    if not isinstance(value, dict):
        return value
    return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "rows_per_second")}


def start(*arguments, **options):
    """This script in a process of its own, with the library preloaded; None where there is no C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        if (library := build(Path(folder))) is None:
            return None
        one = dict.fromkeys(("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        # Of Numba's ways to use threads, this one bears a fork.
        ours = one | {"NUMBA_THREADING_LAYER": "workqueue", "LD_PRELOAD": library, "PYTHONPATH": ROOT}
        command = [sys.executable, __file__, *arguments]
        return subprocess.run(command, env=os.environ | {k: str(v) for k, v in ours.items()}, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--only", nargs="*", default=[], help="commands or kinds of calls; default: all")
    parser.add_argument("--seconds", type=float, help="try moments at random, for so long")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at random")
    parser.add_argument("--messages", action="store_true", help="print what the commands said")
    given = parser.parse_args()
    library = os.environ.get("LD_PRELOAD", "")
    if not library.endswith("faults.so"):
        if (ended := start(*sys.argv[1:])) is None:
            sys.exit("no C compiler here: install cc or gcc")
        sys.exit(ended.returncode)
    tried, wrong, said = Counter(), 0, Counter()
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(Path(folder).resolve() / "work", library)
        moments = [m for m in laboratory.moments() if not given.only or {m[0], m[1]} & set(given.only)]
        if given.seconds is not None:
            random.Random(given.seed).shuffle(moments)
        started = time.monotonic()
        for name, kind, k, number in moments:
            if given.seconds is not None and time.monotonic() > started + given.seconds:
                break
            tried[kind] += 1
            try:
                said[laboratory.attempt(name, kind, k, number)] += 1
            except Trouble as trouble:
                wrong += 1
                print(f"{name}, {kind} {k} of {errno.errorcode.get(number, 'half')}: {trouble}", flush=True)
    if given.messages:
        for text, count in said.most_common():
            print(count, text.strip() or "(nothing)")
    counts = ", ".join(f"{count} {kind}" for kind, count in tried.items())
    print(f"{tried.total()} of {len(moments)} faults ({counts}): {wrong} went wrong, {said['']} went on")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
