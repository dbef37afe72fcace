"""Commands whose power is cut at random moments: `python tests/power_loss.py`, as root on Linux.

An ext4 image on a loop device is what the disk holds. While a command works in it, it is stopped at a random
moment, or right after its end, and the image is copied: what was not synced is not in the copy. Just before,
another program may sync a file of its own, which commits names, but not what unsynced files contain. The copy
is then mounted, as after a loss of power. Whatever has a name has to be whole; after the end all has to be
there. Before that the same command, or `train --resume`, has to complete with the files of a run that
nothing disturbed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from faults import COMMANDS, INPUTS, TINY, broken, contents

ROOT = Path(__file__).parents[1]
CUT = {name: COMMANDS[name] for name in ("synth", "prepare", "dictionary", "train", "convert")}
CUT["train"] = f"train --data ../inputs/hash --block 2 {TINY} --epochs 5 --checkpoint-every 2 --out made"


def command(line, folder, **options):
    arguments = [sys.executable, str(ROOT / "run.py"), *line.split()]
    return subprocess.Popen(arguments, cwd=folder, stdout=subprocess.DEVNULL, **options)


def complete(line, folder):
    process = command(line, folder, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate()
    assert process.returncode == 0, f"{line}: {errors}"


def shell(line):
    subprocess.run(line, shell=True, check=True, capture_output=True, text=True)


@contextmanager
def mounted(image, folder):
    # Nothing is committed by the clock, only by whoever syncs.
    shell(f"mount -o loop,commit=600 {image} {folder}")
    try:
        yield folder
    finally:
        shell(f"umount {folder}")


class Disk:
    """A folder with the inputs, and an empty image to begin each trial with."""

    def __init__(self, folder):
        self.folder, self.image, self.copy = folder, folder / "image", folder / "copy"
        for name in ("inputs", "trial", "after"):
            (folder / name).mkdir()
        shell(f"truncate -s 64M {folder}/empty && mkfs.ext4 -q -F {folder}/empty")
        shell(f"cp {folder}/empty {self.image}")
        with mounted(self.image, folder / "trial"):
            pass  # raises where mounting is not allowed

    def prepare(self, names):
        """Make the inputs, and what an undisturbed run of each of these commands makes of them."""
        for line in INPUTS if "convert" in names else INPUTS[:2]:
            complete(line, self.folder / "inputs")
        self.expected = {}
        for name in names:
            (self.folder / name).mkdir()
            complete(CUT[name], self.folder / name)
            self.expected[name] = contents(self.folder / name)

    def cut(self, name, after, commit):
        """Cut the power `after` so many seconds of work, None: after the end; returns how far it was."""
        shell(f"cp --sparse=always {self.folder}/empty {self.image}")
        with mounted(self.image, self.folder / "trial") as trial:
            shutil.rmtree(trial / "lost+found")
            process = command(CUT[name], trial)
            while after is not None and process.poll() is None and not any(trial.iterdir()):
                time.sleep(0.002)
            try:
                ended = process.wait(after) == 0
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGSTOP)
                ended = False
            if commit:
                with open(trial / "other", "wb") as file:
                    file.write(b"other")
                    file.flush()
                    os.fsync(file.fileno())
            shell(f"cp --sparse=always {self.image} {self.copy}")
            process.kill()
            process.wait()
        with mounted(self.copy, self.folder / "after") as trial:
            (trial / "other").unlink(missing_ok=True)
            shutil.rmtree(trial / "lost+found", ignore_errors=True)
            expected = self.expected[name]
            assert not (found := list(broken(trial, expected))), f"not whole: {found}"
            visible = (trial / "made").exists()
            if not ended and not (visible and name != "train"):
                begun = name == "train" and (trial / "made" / "config.json").exists()
                complete("train --resume made" if begun else CUT[name], trial)
            found = contents(trial)
            assert found == expected, sorted(p for p in found | expected if found.get(p) != expected.get(p))
        return "ended" if ended else "appeared" if visible else "not there"


def trials(names, moments):
    """Yield (command, how far it was) for the end of each command and so many moments before.

    Raises CalledProcessError where mounting is not allowed, and AssertionError for what must not be.
    """
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder).resolve())
        disk.prepare(names)
        for name in names:
            for moment in range(moments + 1):
                after = random.expovariate(3) if moment else None
                try:
                    yield name, disk.cut(name, after, commit=bool(moment % 2))
                except AssertionError as error:
                    raise AssertionError(f"{name}, power cut after {after} s: {error}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--only", nargs="*", default=list(CUT), choices=list(CUT), help="which commands")
    parser.add_argument("--moments", type=int, default=10, help="of each command, besides its end")
    given = parser.parse_args()
    for (name, how), count in Counter(trials(given.only, given.moments)).items():
        print(f"{name}, {how}: {count}")


if __name__ == "__main__":
    main()
