"""What CriteoTB would take on 2 and on 16 cores, worked out from the rates in benchmarks/results/.

`run.py plan` prints it, each figure with its arithmetic: they are estimates, nobody has run it all.
"""

import json
from pathlib import Path

from data_pipeline.schema import (
    CRITEO,
    CRITEO_TB_GZIP_BYTES,
    CRITEO_TB_TEXT_BYTES,
    CRITEO_TB_TRAINING_ROWS,
    PUBLIC_DATA_SETS,
)
from robe.config import ModelConfig, TrainConfig, resolve

RESULTS = Path(__file__).parent / "results"
CORES = 16
ROW_BYTES = 4 * len(CRITEO.columns)
METHODS = {"robe": "ROBE", "none": "ROBE", "full": "full table"}


def criteo_tb(config: TrainConfig, memory: int) -> str:
    """Hours, memory and disk to prepare CriteoTB with hashed ids, and to train an epoch on it, as a table.

    config: resolved; memory: bytes that training it needs, by the plan.
    """
    rows, _ = PUBLIC_DATA_SETS["criteo-tb"]
    cpu, loader = (json.loads((RESULTS / name).read_text()) for name in ("cpu.json", "loader.json"))
    cores = cpu["step"]["machine"]["cores"]
    times = CORES // cores

    table = [("", f"{cores} cores", f"{CORES} cores", "arithmetic")]
    for (kind, (rate, peak)), size in zip(
        prepare_rates().items(), (CRITEO_TB_TEXT_BYTES, CRITEO_TB_GZIP_BYTES), strict=True
    ):
        reading, writing = size * rate / rows, ROW_BYTES * rate
        table += [
            (f"prepare {kind}", *hours(rows / rate, times), f"{rows:,} rows / {rate:,.0f} rows/s"),
            ("  memory", *(f"{n * peak:,.0f} MiB" for n in (1, times)), f"{times} days at a time"),
            (
                "  disk",
                *(f"{n * (reading + writing) / 1e6:,.0f} MB/s" for n in (1, times)),
                f"reads {reading / 1e6:,.0f}, writes {writing / 1e6:,.0f}",
            ),
        ]
    if step := step_time(config, cpu["step"]["rows"]):
        name, seconds = step
        rate = config.batch / seconds
        table += [
            (
                "train an epoch",
                *hours(CRITEO_TB_TRAINING_ROWS / rate, times),
                f"{CRITEO_TB_TRAINING_ROWS:,} rows / ({config.batch:,} rows / {seconds:.4f} s, {name})",
            ),
            (
                "  disk",
                *(f"{n * ROW_BYTES * rate / 1e6:,.1f} MB/s" for n in (1, times)),
                f"the loader can give {loader_rate(loader) * ROW_BYTES / 1e6:,.0f} on {cores} cores",
            ),
        ]
    else:
        table.append(("train an epoch", "?", "?", "no step of these sizes and this batch was measured"))
    needed, windows = memory / 2**20, max(m["peak_mib"] - m["before_mib"] for m in loader["memory"])
    disk = CRITEO_TB_TEXT_BYTES, CRITEO_TB_GZIP_BYTES, rows * ROW_BYTES
    table += [
        (
            "  memory",
            *2 * (f"{needed + windows:,.0f} MiB",),
            f"{needed:,.0f} as above, {windows:,.0f} for the loader",
        ),
        (
            "disk",
            *2 * (f"{(disk[0] + disk[2]) / 1e9:,.0f} GB",),
            "{:,.0f} of text (or {:,.0f} of gzip), {:,.0f} of shards".format(*(size / 1e9 for size in disk)),
        ),
    ]
    return "\n".join(
        [
            "Criteo Terabyte, an estimate from rates measured on small data:",
            *(f"  {what:<16}{some:>12}{many:>12}  {how}" for what, some, many, how in table),
            f"  {CORES} cores were not measured, but taken as {times} x {cores}: days are independent, and",
            "  products of a step at best shared evenly. Ids are hashed, and disks as fast as the lines say.",
        ]
    )


def hours(seconds: float, times: int) -> tuple[str, str]:
    return f"{seconds / 3600:,.1f} h", f"{seconds / times / 3600:,.1f} h"


def prepare_rates() -> dict[str, tuple[float, float]]:
    """Kind of file -> rows per second and peak MiB of `prepare`."""
    results = json.loads((RESULTS / "prepare.json").read_text())
    ours = {kind: result["readers"]["ours"] for kind, result in results.items()}
    return {kind: (reader["rows_per_second"], reader["peak_mib"]) for kind, reader in ours.items()}


def loader_rate(results: dict) -> float:
    """Rows per second of shuffled batches of 2048."""
    return next(
        r["median"] for r in results["rows"] if r.get("name") == "ours, shuffled" and r["batch"] == 2048
    )


def step_time(config: TrainConfig, rows: list[dict]) -> tuple[str, float] | None:
    """What was measured, and its seconds per training step; None if no step of this model and batch was."""
    preset = config.model.preset
    method = METHODS.get(config.embedding.method)
    if method is None or config.model != resolve(TrainConfig(ModelConfig(preset))).model:
        return None
    group = f"{preset}, batch {config.batch}"
    for row in rows:
        if row.get("group") == group and row["name"].startswith(method):
            name, verb = row["name"].split(": ")
            if verb == "training step":
                return f"{preset}, {name}", row["median"]
    return None
