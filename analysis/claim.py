"""What the scripts of this folder share: from rows to a verdict, files and intervals.

A script holds one claim. Its docstring is the claim, its source and its conditions; then come

    bound(...)                       pure theory
    measure(quick, seed, ...)        rows, a list of dicts
    verdict(rows)                    a Verdict; it fails when the claim does, and when a wrong one would pass
    plot(rows)                       a figure, with the bound and the measurements on the same axes
    lacking()                        what it cannot do without and is not here, in words, where there is such

and at the end `main()`, the command line of a script that is run by itself.

Every file here that defines `verdict` is such a script: `robe analyze` finds it by that.
"""

import csv
import importlib
import inspect
import io
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy import stats

from data_pipeline.schema import DataError
from data_pipeline.whole_files import write_figure, write_whole
from robe.errors import RobeError

FOLDER = Path(__file__).parent
OUT = FOLDER / "out"

Rows = list[dict[str, Any]]

# Right formulas are allowed |z| < 5, which one in two million samples exceeds: a script has hundreds of them,
# with tails a little heavier than normal. Wrong ones must be off by more than 6.
RIGHT, WRONG = 5.0, 6.0


class Check(NamedTuple):
    """One thing that must hold, and what was found."""

    what: str
    holds: bool
    found: str


class Verdict(NamedTuple):
    holds: bool
    text: str
    checks: tuple[Check, ...] = ()


class Result(NamedTuple):
    """What a script found; `settings` are the arguments of `measure`, `seconds` what it took."""

    script: ModuleType
    settings: dict[str, Any]
    rows: Rows
    verdict: Verdict
    figure: Path
    seconds: float


def conclude(checks: Iterable[Check]) -> Verdict:
    """A claim holds if all its checks do; the text names those that do not."""
    checks = tuple(checks)
    failed = [f"{check.what} ({check.found})" for check in checks if not check.holds]
    text = "not so: " + "; ".join(failed) if failed else f"all {len(checks)} checks hold"
    return Verdict(bool(checks) and not failed, text, checks)


def scripts() -> list[str]:
    """The names of the scripts in this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef verdict(" in path.read_text())


def load(name: str) -> ModuleType:
    return importlib.import_module(f"analysis.{name}")


def carry_out(script: ModuleType, out: Path = OUT, **options) -> Result:
    """Measure, draw, write OUT/NAME.csv and OUT/NAME.png, and print the verdict in a line.

    options: for `measure`; those it does not know are left out, and so are those that are None.
    """
    known = inspect.signature(script.measure)
    options = {k: v for k, v in options.items() if k in known.parameters and v is not None}
    settings = known.bind(**options)
    settings.apply_defaults()
    name, started = Path(script.__file__).stem, time.perf_counter()
    rows = script.measure(**options)
    seconds = time.perf_counter() - started
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"{name}.csv", rows)
    write_figure(out / f"{name}.png", script.plot(rows), 100)
    verdict = Verdict(*script.verdict(rows))
    print(f"{'holds' if verdict.holds else 'FAILS'} {name}: {verdict.text} ({seconds:.1f} s)", flush=True)
    return Result(script, dict(settings.arguments), rows, verdict, out / f"{name}.png", seconds)


@dataclass(frozen=True)
class Options:
    """What every script can be asked for on its own command line."""

    quick: bool = False
    """Fewer and smaller measurements."""

    out: Path = OUT
    """The folder for the table and the figure."""


@dataclass(frozen=True)
class SeededOptions(Options):
    seed: int = 0
    """Of whatever is drawn."""


@dataclass(frozen=True)
class RunOptions(SeededOptions):
    run: Path | None = None
    """Use the trained table of this run, made with --method full."""


def asked(options: type[Options]) -> Result:
    """Carry out the script that Python was started with, as its command line says.

    Ends with code 2, and the reason in a line, where options or data cannot be used.
    """
    script = sys.modules["__main__"]
    given = vars(tyro.cli(options, description=script.__doc__.split("\n")[0]))
    try:
        return carry_out(script, **given)
    except (RobeError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main(options: type[Options] = SeededOptions) -> None:
    """The command line of a script; ends with code 1 if its claim fails."""
    sys.exit(not asked(options).verdict.holds)


def told(options: type[Options], summarise: Callable[[Rows], dict], tables: Callable[[dict], str]) -> None:
    """As `main`, for a study: also writes what `summarise` keeps of its rows, OUT/NAME.json, and prints the
    `tables` that are made of that, and each check."""
    result = asked(options)
    summary = json.dumps(summarise(result.rows), indent=1)
    write_whole(result.figure.with_suffix(".json"), summary + "\n")
    print(tables(json.loads(summary)))
    for check in result.verdict.checks:
        print(f"{'holds' if check.holds else 'FAILS'} {check.what}: {check.found}")
    sys.exit(not result.verdict.holds)


def write_csv(path: Path, rows: Rows) -> None:
    """Rows may lack columns that others have."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns(rows))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def where(rows: Rows, **values) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]


def figure(rows: int, across: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows * across,). Agg needs no screen; pyplot would pick a window system."""
    drawn = Figure(figsize=(5.4 * across, 4.1 * rows), layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.suptitle(title)
    axes = drawn.subplots(rows, across, squeeze=False).ravel()
    for ax in axes:
        ax.grid(alpha=0.3)
    return drawn, axes


def z_mean(samples: np.ndarray, mean: float) -> float:
    """How many standard errors the mean of the samples is from `mean`; 0 if all are equal to it."""
    error, deviation = samples.std() / np.sqrt(samples.size), samples.mean() - mean
    if abs(deviation) <= 1e-9 * max(1.0, abs(mean)):
        return 0.0
    return float(deviation / max(error, 1e-12 * max(1.0, abs(mean))))


def share_interval(hits: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a probability."""
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, hits, trials - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - tail, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)


def mean_interval(samples, level: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its interval (Student's)."""
    samples = np.asarray(samples, float)
    error = samples.std(ddof=1) / np.sqrt(samples.size)
    return float(samples.mean()), float(stats.t.ppf((1 + level) / 2, samples.size - 1) * error)


def ticks(axes, values) -> None:
    """Mark exactly these values on a logarithmic x axis."""
    axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    axes.minorticks_off()


def plain(axis) -> None:
    """Mark 1, 2, 5, 10, ... on a logarithmic axis, and write them out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
