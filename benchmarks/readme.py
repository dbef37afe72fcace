"""Write the measured figures into README.md and the pages of docs/, from the files in benchmarks/results/.

    python -m benchmarks.readme

What stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is what the function of that name returns;
PAGES says which page has it. Also draws docs/methods.png, docs/equal_bytes.png, docs/scale.png and
docs/staleness.png, and writes robe/rates.json, which `run.py plan` estimates with.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from analysis import equal_bytes as study
from analysis import scale as scale_study
from analysis import staleness as staleness_study
from analysis.recipes import table as recipes_table
from analysis.tradeoff import tables as tradeoff_tables
from analysis.tried import table as tried_table
from benchmarks.daily import table as daily_table
from benchmarks.gpu import FIRST, PARTS
from benchmarks.methods import plot
from benchmarks.methods import table as methods_table
from benchmarks.modules import table as modules_table
from benchmarks.quality import table as quality_table
from benchmarks.ranks import table as ranks_table
from benchmarks.rates import measured
from benchmarks.server import table as server_table
from robe.estimate import RATES
from robe.report import fewer_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demonstration() -> str:
    """What the default run reached: results/demonstration.json is its summary.json."""
    summary = json.loads((RESULTS / "demonstration.json").read_text())
    served = summary["averaged"]["test"]  # of the folder RUN/averaged
    without, bayes = summary["without_categories"], summary["bayes"]["test"]
    rows = [
        ("best possible (the generator knows it)", bayes["auc"], bayes["log_loss"], ""),
        (
            f"ROBE, {fewer_bytes(summary):.0f}x smaller than the full table",
            served["auc"],
            served["log_loss"],
            f"{summary['embedding_bytes']:,} B",
        ),
        ("the same DLRM without categories", without["test"]["auc"], without["test"]["log_loss"], "0 B"),
    ]
    trained, tested = summary["rows_trained"], summary["test"]["rows"]
    lines = [
        f"Synthetic data: {trained:,} rows trained in all passes, {tested:,} test rows. The full table is "
        f"that of {summary['compressed_from']}.",
        "",
        "| model | test AUC | test log loss | embeddings |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join(
        lines + [f"| {name} | {auc:.4f} | {loss:.4f} | {size} |" for name, auc, loss, size in rows]
    )


def prepare() -> str:
    """Speed and peak memory of `prepare`: results/prepare.json is what its benchmark wrote."""
    return prepare_table(json.loads((RESULTS / "prepare.json").read_text()))


def prepare_table(results: dict) -> str:
    """The readers beside each other, text and gzip."""
    lines = []
    for form, result in results.items():
        machine, polars = result["machine"], result["machine"]["versions"]["polars"]
        lines += [
            f"{result['rows']:,} rows, {result['megabytes_on_disk']:,} MB of {form}; {machine['cores']} "
            f"cores of {machine['cpu']}, Polars {polars}; medians of {result['rounds']} "
            f"rounds, while other programs used {result['cores_used_by_others']:.2f} cores.",
            "",
            "| reader | rows/s | times Polars (range) | peak memory |",
            "| --- | --- | --- | --- |",
        ]
        for reader, row in result["readers"].items():
            low, high = row["of_polars_range"]
            ratio = f"{row['of_polars']:.2f} ({low:.2f}-{high:.2f})"
            cells = READERS[reader], f"{row['rows_per_second']:,}", ratio, f"{row['peak_mib']:,} MiB"
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1])


READERS = {
    "polars": "bare Polars scan, nothing kept",
    "ours": "`prepare`, all written",
    "pyarrow": "pyarrow.csv, hexadecimal as text, nothing kept",
    "pandas": "pandas.read_csv, the same",
}

# Of the models, those at the batches of their recipes.
SHOWN = (["kaggle", 128], ["kaggle", 2048], ["tb10m", 2048], ["mlperf", 2048])
PEERS = re.compile(r"26 EmbeddingBags|published|PyTorch eager")


def shown(row: dict) -> bool:
    """Whether this row is told first: codes, or ROBE on uniform ids beside what PyTorch offers instead."""
    if row["what"].startswith(("mixed precision", "codes")):
        return True
    ours = "ROBE" in row["what"] and not row["what"].startswith("mlperf ids")
    return ours and PEERS.match(row["peer"]) is not None and row.get("model", SHOWN[0]) in SHOWN


def speed() -> str:
    """Our times beside those of peers and limits: results/cpu.json."""
    return speed_table(json.loads((RESULTS / "cpu.json").read_text()), shown)


def whole_speed() -> str:
    return speed_table(json.loads((RESULTS / "cpu.json").read_text()), lambda row: True)


def gpu() -> str:
    """The models on a GPU; nothing without results/gpu.json."""
    return gpu_section(RESULTS / "gpu.json", ("steps",))


def whole_gpu() -> str:
    return gpu_section(RESULTS / "gpu.json", PARTS)


def gpu_section(path: Path, parts: tuple[str, ...]) -> str:
    """A section with these parts of what `benchmarks.gpu` wrote."""
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    rows = [row for part in parts for row in results.get(part, {"rows": []})["rows"]]
    machine = next(iter(results.values()))["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "## On a GPU",
        "",
        f"{machine['device'].split(', ')[0]}; {versions}; {machine['date']}. Medians, and quartiles of the "
        "ratios. Of PyTorch's variants, the fastest of that run is told.",
        "",
        "| ours | time | rows/s | beside | time | times as fast | share of a copy's rate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "ratio" in row:
            low, high = row["ratio"]["quartiles"]
            ours, peer = (f"{1e3 * row[key]:.3g} ms" for key in ("seconds", "peer_seconds"))
            rate = f"{row['batch'] / row['seconds'] / 1e6:.3g} M" if "batch" in row else ""
            times = f"{row['ratio']['median']:.2f} ({low:.2f}-{high:.2f})"
            share = f"{row['of_limit']:.0%}" if "of_limit" in row else ""
            lines.append(f"| {' | '.join((row['what'], ours, rate, row['peer'], peer, times, share))} |")
        elif row.get("group") == FIRST or "of_copy" in row:  # figures that have no peer
            share = f"{row['of_copy']:.0%}" if "of_copy" in row else ""
            lines.append(
                f"| {row['group']}: {row['name']} | {1e3 * row['median']:.3g} ms | | | | | {share} |"
            )
    checks = [f"- {row['check']}: {row['text']}" for row in rows if "check" in row]
    return "\n".join([*lines, *(["", *checks] if checks else [])])


def speed_table(results: dict, shown: Callable[[dict], bool]) -> str:
    """The ratios of one results file that are `shown`, under what it was measured on."""
    machine = results["step"]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = {name: results[name] for name in ("embedding", "mixed", "codes", "step") if name in results}
    rows = [row for part in parts.values() for row in part["rows"] if "ratio" in row]
    repeats = sorted({row["ratio"]["repeats"] for row in rows})
    dates = "; ".join(f"{name}: {part['machine']['date']}" for name, part in parts.items())
    used = max(part["machine"]["cores_used_by_others"] for part in parts.values())
    lines = [
        f"{machine['device']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['os']}; {versions}. Measured in parts "
        f"({dates}). Medians, and quartiles of the ratio, over {' or '.join(map(str, repeats))} rounds, "
        f"while other programs used up to {used:.2f} cores.",
        "",
        "| ours | time | beside | time | times as fast | fastest turns | share of the limit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if shown(row):
            low, high = row["ratio"]["quartiles"]
            ours, peer = (f"{1e3 * row[key]:.3g} ms" for key in ("seconds", "peer_seconds"))
            share = f"{row['of_limit']:.0%}" if "of_limit" in row else ""
            cells = (
                row["what"],
                ours,
                row["peer"],
                peer,
                f"{row['ratio']['median']:.2f} ({low:.2f}-{high:.2f})",
            )
            lines.append(f"| {' | '.join(cells)} | {row['fastest']:.2f} | {share} |")
    return "\n".join(lines)


def loader() -> str:
    """Rows per second of batches, and the loader's peak memory: results/loader.json."""
    results = json.loads((RESULTS / "loader.json").read_text())
    speeds = {(row["name"], row["batch"]): row for row in results["rows"] if "name" in row}
    names, sizes = (list(dict.fromkeys(key)) for key in zip(*speeds, strict=True))
    lines = [
        f"| million rows per second, batches of | {' | '.join(f'{size:,}' for size in sizes)} |",
        f"| --- |{' --- |' * len(sizes)}",
    ]
    for name in names:
        cells = (speeds[name, size] for size in sizes)
        figures = (
            f"{row['median'] / 1e6:.1f} ({row['range'][0] / 1e6:.1f}-{row['range'][1] / 1e6:.1f})"
            for row in cells
        )
        lines.append(f"| {name} | {' | '.join(figures)} |")
    machine, memory = results["machine"], results["memory"]
    before, repeats = memory[0]["before_mib"], results["rows"][0]["repeats"]
    peaks = ", ".join(f"{row['peak_mib']} MiB for {row['rows']:,} rows" for row in memory)
    lines += [
        "",
        f"Medians and extremes of {repeats} turns. Peak memory of a process that reads batches of 2,048, "
        f"shuffled: {peaks}, of which {before} MiB before the first. {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['date']}, while other programs used "
        f"{machine['cores_used_by_others']:.2f} cores.",
    ]
    return "\n".join(lines)


def tradeoff() -> str:
    """Size against iterations: results/tradeoff.json is the analysis/out/tradeoff.json of a full study."""
    return tradeoff_tables(json.loads((RESULTS / "tradeoff.json").read_text()))


def equal_bytes() -> str:
    """AUC by stored bytes: results/equal_bytes.json is the analysis/out/equal_bytes.json of a full study.
    Nothing without it."""
    path = RESULTS / "equal_bytes.json"
    return study.overview(json.loads(path.read_text())) if path.exists() else ""


def whole_equal_bytes() -> str:
    path = RESULTS / "equal_bytes.json"
    return study.table(json.loads(path.read_text())) if path.exists() else ""


def scale() -> str:
    """CriteoTB's size with planted truth: results/scale.json is the analysis/out/scale.json of a study."""
    return scale_study.table(json.loads((RESULTS / "scale.json").read_text()))


def tried() -> str:
    """Ways to make more of an array: results/tried.json is the analysis/out/tried.json of a full study.
    Nothing without it."""
    path = RESULTS / "tried.json"
    return tried_table(json.loads(path.read_text())) if path.exists() else ""


def recipes() -> str:
    """What recipes are worth: results/recipes*.json are analysis/out/recipes.json of two studies."""
    names = "recipes", "recipes_demonstration"
    return "\n\n".join(recipes_table(json.loads((RESULTS / f"{name}.json").read_text())) for name in names)


def methods() -> str:
    """Ways to store embeddings at equal bytes: results/methods.json is what its benchmark wrote."""
    return methods_table(json.loads((RESULTS / "methods.json").read_text()))


def modules() -> str:
    """The modules for PyTorch: results/modules.json is what its benchmark wrote. Nothing without it."""
    path = RESULTS / "modules.json"
    return modules_table(json.loads(path.read_text())) if path.exists() else ""


def quality() -> str:
    """Mixed precision beside the table it stands for: results/quality.json is what its benchmark wrote."""
    return quality_table(json.loads((RESULTS / "quality.json").read_text()))


def staleness() -> str:
    """Rows exchanged when they have to be: results/staleness.json is the analysis/out/staleness.json of a
    full study."""
    return staleness_study.table(json.loads((RESULTS / "staleness.json").read_text()))


def daily() -> str:
    """A week of new days: results/daily.json is what its benchmark wrote."""
    return daily_table(json.loads((RESULTS / "daily.json").read_text()))


def ranks() -> str:
    """Two processes that train one model: results/ranks.json is of its benchmark. Nothing without it."""
    path = RESULTS / "ranks.json"
    return ranks_table(json.loads(path.read_text())) if path.exists() else ""


def server() -> str:
    """A server under load: results/server.json is what its benchmark wrote."""
    return server_table(json.loads((RESULTS / "server.json").read_text()))


PAGES = {
    ROOT / "README.md": (demonstration, equal_bytes, gpu),
    ROOT / "docs" / "speed.md": (speed, whole_gpu, prepare, loader, whole_speed),
    ROOT / "docs" / "daily.md": (daily,),
    ROOT / "docs" / "pytorch.md": (modules,),
    ROOT / "docs" / "cluster.md": (ranks,),
    ROOT / "docs" / "serving.md": (server,),
    ROOT / "docs" / "results.md": (
        *(whole_equal_bytes, recipes, tried, tradeoff, scale, methods, quality, staleness),
    ),
}


def fill(page: Path) -> str:
    """The text of a page with every table made anew."""
    text = page.read_text()
    for table in PAGES[page]:
        name = table.__name__
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m: f"{m[1]}{table()}\n{m[2]}", text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"{page} has no table {name}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page))
    RATES.write_text(json.dumps(measured(RESULTS), indent=1) + "\n")
    drawn = {"methods": plot, "equal_bytes": study.draw, "scale": scale_study.draw}
    for name, draw in (drawn | {"staleness": staleness_study.draw}).items():
        if (path := RESULTS / f"{name}.json").exists():
            draw(json.loads(path.read_text())).savefig(ROOT / "docs" / f"{name}.png", dpi=100)
