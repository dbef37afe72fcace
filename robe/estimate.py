"""What a large data set would take on 2 and on 16 cores, worked out from rates measured on small data.

`robe plan` prints each figure with its arithmetic. They are estimates: nobody has trained on such a data set
with this program. The rates come from benchmarks/results/; `python -m benchmarks.readme` copies what is
needed of them to rates.json.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from robe.config import CODE_BITS, ConfigError, DataSpec, ModelConfig, TrainConfig, resolve, used_data
from robe.embeddings import Weights, declared
from robe.embeddings.sketched import SketchedWeights
from robe.model import parameter_shapes
from robe.optim import RULES
from robe.ranks import TRIPS

RATES = Path(__file__).with_name("rates.json")
UPDATED = 26 * 128 * 4  # bytes of gradients of a row, in the updates that benchmarks measure
CORES = 16
METHODS = {"robe": "ROBE", "none": "ROBE", "full": "full table"}


class DataSet(NamedTuple):
    """Sizes of a published data set.

    row_bytes: of a row in the shards; text_bytes, gzip_bytes: of the whole raw log in either form.
    """

    name: str
    rows: int
    training_rows: int
    row_bytes: int
    text_bytes: float
    gzip_bytes: float


def estimate(config: TrainConfig, memory: int, data: DataSet) -> str:
    """Hours, memory and disk to prepare a data set with hashed ids and to train an epoch on it, as a table.

    config: resolved; memory: bytes that training it needs, by the plan.
    """
    rates = json.loads(RATES.read_text())
    cores, loader = rates["cores"], rates["loader"]
    times = CORES // cores

    table: list[tuple[str, ...]] = [("", f"{cores} cores", f"{CORES} cores", "arithmetic")]
    for kind, size in (("text", data.text_bytes), ("gzip", data.gzip_bytes)):
        rate, peak = rates["prepare"][kind]["rows_per_second"], rates["prepare"][kind]["peak_mib"]
        reading, writing = size * rate / data.rows, data.row_bytes * rate
        table += [
            (f"prepare {kind}", *hours(data.rows / rate, times), f"{data.rows:,} rows / {rate:,.0f} rows/s"),
            ("  memory", *(f"{n * peak:,.0f} MiB" for n in (1, times)), f"{times} days at a time"),
            (
                "  disk",
                *(f"{n * (reading + writing) / 1e6:,.0f} MB/s" for n in (1, times)),
                f"reads {reading / 1e6:,.0f}, writes {writing / 1e6:,.0f}",
            ),
        ]
    if step := step_time(config, rates["steps"]):
        name, seconds = step
        rate, can_give = config.batch / seconds, loader["rows_per_second"] * data.row_bytes
        table += [
            (
                "train an epoch",
                *hours(data.training_rows / rate, times),
                f"{data.training_rows:,} rows / ({config.batch:,} rows / {seconds:.4f} s, {name})",
            ),
            (
                "  disk",
                *(f"{n * data.row_bytes * rate / 1e6:,.1f} MB/s" for n in (1, times)),
                f"the loader can give {can_give / 1e6:,.0f} on {cores} cores",
            ),
        ]
    else:
        table.append(("train an epoch", "?", "?", "no step of these sizes and this batch was measured"))
    needed, shards = memory / 2**20, data.rows * data.row_bytes
    text, gzip = (f"{size / 1e9:,.0f}" for size in (data.text_bytes, data.gzip_bytes))
    table += [
        (
            "  memory",
            *2 * (f"{needed + loader['mib']:,.0f} MiB",),
            f"{needed:,.0f} as above, {loader['mib']:,.0f} for the loader",
        ),
        (
            "disk",
            *2 * (f"{(data.text_bytes + shards) / 1e9:,.0f} GB",),
            f"{text} of text (or {gzip} of gzip), {shards / 1e9:,.0f} of shards",
        ),
    ]
    return "\n".join(
        [
            f"{data.name}, an estimate from rates measured on small data:",
            *(f"  {what:<16}{some:>12}{many:>12}  {how}" for what, some, many, how in table),
            f"  {CORES} cores were not measured, but taken as {times} x {cores}: days are independent, and",
            "  products of a step shared evenly at best. Ids are hashed, and disks as fast as the lines say.",
        ]
    )


def hours(seconds: float, times: int) -> tuple[str, str]:
    """So many seconds, and what is left of them on `times` as many cores."""
    return f"{seconds / 3600:,.1f} h", f"{seconds / times / 3600:,.1f} h"


def step_time(config: TrainConfig, steps: list[dict]) -> tuple[str, float] | None:
    """The name of the measured step of this model and batch, and its seconds; None if there is none."""
    preset = config.model.preset
    method = METHODS.get(config.embedding.method)
    if method is None or config.model != resolve(TrainConfig(ModelConfig(preset))).model:
        return None
    for step in steps:
        if (step["preset"], step["batch"]) == (preset, config.batch) and step["embedding"].startswith(method):
            return f"{preset}, {step['embedding']}", step["seconds"]
    return None


class Exchanged(NamedTuple):
    """Bytes of a step that several processes take together (exchange.py), where no two look-ups are of the
    same row: of the dense gradients, of all gradients of vectors by which the embedding is stepped, of what
    travels for this step, and the way it does."""

    dense: int
    vectors: int
    sent: int
    way: str

    def received(self, processes: int) -> float:
        """Bytes that each receives."""
        return (TRIPS * self.dense + self.sent) * (processes - 1) / processes


def exchanged(config: TrainConfig, data: DataSpec) -> Exchanged:
    dense = 4 * sum(map(math.prod, parameter_shapes(config, data).values()))
    weights, rule = declared(config, data), RULES[config.optimizer.optimizer]
    look_ups = config.batch * len(used_data(config, data).cardinalities)
    vectors = 4 * look_ups * config.model.width
    if any(isinstance(held, SketchedWeights) or not isinstance(held, Weights) for held in weights.values()):
        all_of_them = vectors + 4 * look_ups
        return Exchanged(dense, all_of_them, all_of_them, "look-ups")
    rows = vectors + 8 * look_ups
    array, open_to_it = weights.get(""), not rule.grouped and config.embedding.memory not in CODE_BITS
    both_ways = 4 + (2 if config.embedding.memory == "fp16" else 4)
    if isinstance(array, Weights) and open_to_it and both_ways * array.count < rows:
        return Exchanged(dense, 4 * array.count, both_ways * array.count, "array")
    return Exchanged(dense, rows, rows, "rows")


def of_cores() -> dict:
    """What `shared` needs of the rates of this package: steps, bytes of gradients that are stepped a second,
    and where they were measured."""
    rates = json.loads(RATES.read_text())
    return rates | {"where": f"the {rates['cores']} cores that were measured"}


def of_card(file: Path, precision: str) -> dict:
    """The same of what `python -m benchmarks.gpu` wrote on a card, for steps in this precision: those that
    are no graph, if any are, and updates in a fixed order, as several processes make them.

    Raises ConfigError for another file.
    """
    try:
        parts = json.loads(file.read_text())
        rows = [row for part in parts.values() for row in part["rows"] if "name" in row]
        times = {(row["group"], row["name"]): float(row["median"]) for row in rows}
        look_ups = next(row["rows"] for row in rows if row["group"] == "updates, uniform")
        update = times["updates, uniform", "ROBE 100 MB update, fixed order"]
        where = parts["updates"]["machine"]["device"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise ConfigError(
            f"{file}: has no steps and updates of a card; `python -m benchmarks.gpu` writes them on one"
        ) from None
    steps = []
    for how in (f"{precision}, no graph", precision):
        for (group, name), seconds in times.items():
            preset, _, batch = group.partition(", batch ")
            if name == f"ROBE 100 MB {how}: training step":
                step = {"preset": preset, "batch": int(batch), "embedding": "ROBE 100 MB", "seconds": seconds}
                steps.append(step)
    return {
        "steps": steps,
        "update": look_ups * UPDATED / update,
        "where": f"the {where} that was measured",
    }


def shared(config: TrainConfig, data: DataSpec, processes: int, link: float, rates: dict) -> str:
    """What a step is expected to take where up to so many processes share it, as a table.

    config: resolved; link: bytes a second that each process receives; rates: as of `of_cores`.
    """
    moved = exchanged(config, data)
    table: list[tuple[str, ...]] = [("processes", "rows each", "compute", "exchange", "times as fast")]
    step = step_time(config, rates["steps"])
    for count in sorted({2**i for i in range(1, processes.bit_length())} | {processes}):
        seconds = moved.received(count) / link
        compute, faster = "?", "?"
        if step:
            _, alone = step
            own = shared_compute(config, data, alone, rates["update"], moved, count)
            compute, faster = f"{1e3 * own:,.1f} ms", f"{alone / (own + seconds):,.2f}"
        table.append(
            (f"{count:,}", f"{config.batch / count:,.1f}", compute, f"{1e3 * seconds:,.1f} ms", faster)
        )
    how = f"{step[0]}, {step[1]:.4f} s" if step else "no step of these sizes was"
    return "\n".join(
        [
            f"a step of {config.batch:,} rows on several processes, an estimate (docs/cluster.md):",
            *("  " + "".join(f"{cell:>15}" for cell in row) for row in table),
            f"  Each of {processes:,} receives {moved.received(processes):,.0f} B at most: dense gradients, "
            f"{moved.dense:,} B,",
            f"  and those of vectors, {moved.sent:,} B as {moved.way}; at {link / 1e9:g} GB/s, without "
            "latencies.",
            f"  Each computes as {rates['where']} ({how}).",
        ]
    )


def shared_compute(
    config: TrainConfig, data: DataSpec, alone: float, rate: float, moved: Exchanged, processes: int
) -> float:
    """Seconds that each process computes in a step that takes one process `alone` seconds: its share, but of
    the embedding's step all, unless that is of an array. Gradients of so many bytes a second are stepped."""
    if moved.way == "array":
        return (alone + moved.vectors / rate) / processes
    own = 4 * config.batch * len(used_data(config, data).cardinalities) * config.model.width / rate
    return (alone - own) / processes + moved.vectors / rate
