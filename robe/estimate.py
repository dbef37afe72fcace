"""What a large data set would take on 2 and on 16 cores, worked out from rates measured on small data.

`robe plan` prints each figure with its arithmetic. They are estimates: nobody has trained on such a data set
with this program. The rates come from benchmarks/results/; `python -m benchmarks.readme` copies what is
needed of them to rates.json.
"""

import json
from pathlib import Path
from typing import NamedTuple

from robe.config import ModelConfig, TrainConfig, resolve

RATES = Path(__file__).with_name("rates.json")
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
