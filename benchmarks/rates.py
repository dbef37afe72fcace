"""The measured rates that `run.py plan` works with: robe/rates.json, made of benchmarks/results/.

An installed package has no benchmarks, so it carries what it needs of their results.
"""

import json
from pathlib import Path

from robe.estimate import UPDATED


def measured(results: Path) -> dict:
    """What robe/estimate.py needs of cpu.json, loader.json and prepare.json."""
    cpu, loader, prepare = (
        json.loads((results / f"{name}.json").read_text()) for name in ("cpu", "loader", "prepare")
    )
    step = cpu["step"]
    return {
        "cores": step["machine"]["cores"],
        "update": update_rate(cpu["embedding"]["rows"]),
        "prepare": {
            form: {key: of["readers"]["ours"][key] for key in ("rows_per_second", "peak_mib")}
            for form, of in prepare.items()
        },
        "loader": {
            "rows_per_second": next(
                row["median"]
                for row in loader["rows"]
                if (row.get("name"), row.get("batch")) == ("ours, shuffled", 2048)
            ),
            "mib": max(run["peak_mib"] - run["before_mib"] for run in loader["memory"]),
        },
        "steps": list(training_steps(step["rows"])),
    }


def update_rate(rows: list[dict]) -> float:
    """Bytes a second of the gradients by which an array of 100 MB is stepped, in blocks of 32."""
    for row in rows:
        if (row.get("group"), row.get("name")) == ("embedding, uniform", "ROBE 100 MB Z=32 update"):
            return row["rows"] * UPDATED / row["median"]
    raise ValueError("no update of ROBE was measured")


def training_steps(rows: list[dict]):
    """Of our own models: preset, batch, embedding, and the median of the seconds."""
    for row in rows:
        embedding, _, verb = row.get("name", "").partition(": ")
        if verb == "training step" and embedding.startswith(("ROBE", "full table")):
            preset = row["group"].split(", ")[0]
            yield {"preset": preset, "batch": row["batch"], "embedding": embedding, "seconds": row["median"]}
