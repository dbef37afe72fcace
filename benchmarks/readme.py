"""Write the measured figures into README.md, from the files in benchmarks/results/.

    python -m benchmarks.readme

A block between `<!-- begin NAME -->` and `<!-- end NAME -->` is what the function of that name returns.
"""

import json
import re
from pathlib import Path

from analysis.tradeoff import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demonstration() -> str:
    """What the default run reached: results/demonstration.json is its summary.json."""
    summary = json.loads((RESULTS / "demonstration.json").read_text())
    without, bayes = summary["without_categories"], summary["bayes"]["test"]
    rows = [
        ("best possible (the generator knows it)", bayes["auc"], bayes["log_loss"], ""),
        (
            f"ROBE, {summary['compression']:.0f}x smaller than the full table",
            summary["test"]["auc"],
            summary["test"]["log_loss"],
            f"{summary['embedding_bytes']:,} B",
        ),
        ("the same DLRM without categories", without["test"]["auc"], without["test"]["log_loss"], "0 B"),
    ]
    trained, tested = summary["rows_trained"], summary["test"]["rows"]
    lines = [
        f"Synthetic data: {trained:,} training rows, {tested:,} test rows. The full table is that of "
        f"{summary['compressed_from']}.",
        "",
        "| model | test AUC | test log loss | embeddings |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join(
        lines + [f"| {name} | {auc:.4f} | {loss:.4f} | {size} |" for name, auc, loss, size in rows]
    )


def prepare_memory() -> str:
    """Peak resident memory of `prepare`: results/prepare_memory.jsonl is what its benchmark printed."""
    results = [json.loads(line) for line in (RESULTS / "prepare_memory.jsonl").read_text().splitlines()]
    lines = ["| rows | file | peak memory |", "| --- | --- | --- |"]
    for result in results:
        kind = "gzip" if result["gzip"] else "text"
        lines.append(f"| {result['rows']:,} | {result['file_mib']:,} MiB {kind} | {result['peak_mib']} MiB |")
    return "\n".join(lines)


def tradeoff() -> str:
    """Size against iterations: results/tradeoff.json is the analysis/out/tradeoff.json of a full study."""
    return tables(json.loads((RESULTS / "tradeoff.json").read_text()))


def fill(text: str) -> str:
    """The README with every block made anew."""
    for block in (demonstration, prepare_memory, tradeoff):
        name = block.__name__
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m: f"{m[1]}{block()}\n{m[2]}", text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"README.md has no block {name}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
