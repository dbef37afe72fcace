"""What is told of a run and of a plan: summary.json, curves.png, and a few lines of text."""

import json
import math
from pathlib import Path

from data_pipeline.whole_files import write_figure, write_whole
from robe.config import DataSpec, TrainConfig
from robe.embeddings import stored_weights
from robe.train import read_log

# What is kept to serve, of the embedding.
SERVED = ("weights", "cache", "index", "sketch")


def finish(run: Path, summary: dict) -> str:
    """Write summary.json and curves.png of a finished run; returns the summary in a few lines.

    summary: of robe.train.train, with `data` (a description), `bayes` (the best possible metrics per split,
    or None) and, where there is such a run in RUN/without_categories, its summary as `without_categories`.
    """
    write_summary(run, summary)
    draw_curves(run, summary)
    return text(summary)


def write_summary(run: Path, summary: dict) -> None:
    write_whole(run / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")


def converted_text(run: str, summary: dict) -> str:
    """What `convert` wrote to a folder of this name, its bytes, and how far its weights are off."""
    before, lost = summary["before"], summary["energy_share_lost"]
    sizes = [f"{part['method']} {part['memory']} {part['embedding_bytes']:,} B" for part in (before, summary)]
    lines = [
        f"{run}: written; embedding {sizes[0]} -> {sizes[1]}, "
        f"{summary['embedding_bytes'] / before['embedding_bytes']:.1%} of the bytes",
        f"weights: relative RMS error {summary['relative_rms_error']:.3g}, largest error "
        f"{summary['largest_error']:.3g}",
    ]
    if (expected := summary.get("expected_energy_share_lost")) is not None:
        stored, weights = summary["embedding_parameters"], before["embedding_parameters"]
        lines.append(
            f"share of the energy of the table that is lost: {lost:.4f}; expected of independent weights: "
            f"{expected:.4f}"
        )
        if weights > stored:
            lines.append(
                f"warning: {stored:,} weights cannot approximate a trained table of {weights:,}, whatever "
                "the hash; what works is to train in the array: train --method robe instead"
            )
    return "\n".join(lines)


def compared_text(before: dict, after: dict) -> str:
    """Test metrics of a run and of the one converted from it, in one line."""
    return (
        f"test ({after['rows']:,} rows): AUC {number(before['auc'])} -> {number(after['auc'])}, "
        f"log loss {number(before['log_loss'])} -> {number(after['log_loss'])}"
    )


def number(value: float | None, less: float | None = 0.0) -> str:
    """A metric, or how much it is above `less`; both are None where all labels were the same, or a prediction
    was not finite."""
    return "undefined" if value is None or less is None else f"{value - less:.4f}"


def text(summary: dict) -> str:
    """The summary in a few lines; for synthetic data also the best metrics that any model can reach."""
    test, validation = summary["test"], summary["validation"]
    best = f" (of step {summary['best_step']:,})" if "best_step" in summary else ""
    lines = [
        f"{summary['method']}: {summary['stopped']}; {summary['steps']:,} steps, "
        f"{summary['rows_trained']:,} rows in {summary['seconds']:.1f} s, evaluations included",
        f"test AUC {number(test['auc'])}, log loss {number(test['log_loss'])} ({test['rows']:,} rows, "
        f"base rate {test['base_rate']:.4f}); validation AUC {number(validation['auc'])}{best}",
    ]
    if (calibration := test.get("calibration")) is not None:
        lines.append(
            f"calibration: the mean prediction is {calibration:.3f} times the base rate; normalised entropy "
            f"{number(test['normalised_entropy'])}"
        )
    if averaged := summary.get("averaged"):
        lines.append(
            f"averaged weights: test AUC {number(averaged['test']['auc'])}, log loss "
            f"{number(averaged['test']['log_loss'])}; validation AUC {number(averaged['validation']['auc'])}"
        )
    if bayes := summary["bayes"]:
        bound = bayes["test"]
        lines.append(
            f"best possible on the test half (Bayes): AUC {bound['auc']:.4f}, "
            f"log loss {bound['log_loss']:.4f}; this run is {number(bound['auc'], test['auc'])} AUC below"
        )
    if other := summary.get("without_categories"):
        lines.append(
            f"the same model without categorical features: test AUC {number(other['test']['auc'])}; "
            f"this run is {number(test['auc'], other['test']['auc'])} AUC above"
        )
    if cache := summary.get("cache"):
        look_ups = cache["hits"] + cache["misses"]
        lines.append(
            f"embedding: {summary['embedding_bytes'] / 1e6:.3f} MB, of them a cache of "
            f"{cache['bytes'] / 1e6:.3f} MB; {summary['compression']:.2f}x less than the "
            f"{summary['compressed_from']}"
        )
        lines.append(
            f"cache: {cache['hits'] / max(1, look_ups):.1%} of {look_ups:,} look-ups in training hit; "
            f"{cache['evictions']:,} rows evicted, {cache['direct']:,} stepped in the table; "
            f"{cache['bytes_moved'] / 1e6:.1f} MB moved"
        )
    elif summary["compression"]:
        weights, size = summary["embedding_parameters"], summary["embedding_bytes"]
        in_bytes = f", {fewer_bytes(summary):.1f}x in bytes" if size < 4 * weights else ""
        lines.append(
            f"embedding: {size / 1e6:.3f} MB, {weights:,} weights, {summary['compression']:.1f}x fewer than "
            f"{summary['compressed_from']}{in_bytes}"
        )
    if shared := summary.get("processes"):
        ways = ", ".join(f"{way} in {count:,} steps" for way, count in shared["ways"].items())
        lines.append(
            f"{shared['count']} processes: {shared['bytes']:,} B received a step and process; gradients of "
            f"vectors as {ways or 'none'}"
        )
    lines.append(f"data: {summary['data']}")
    return "\n".join(lines)


def fewer_bytes(summary: dict) -> float:
    """How many times fewer bytes the embedding takes than the full table of float32 weights."""
    if "cache" in summary:
        return summary["compression"]  # which counts bytes
    return summary["compression"] * 4 * summary["embedding_parameters"] / summary["embedding_bytes"]


def draw_curves(run: Path, summary: dict) -> None:
    """Draw RUN/curves.png: log loss and AUC over the steps, with the baseline's and the best possible, and
    how far predictions for the test rows can be relied on."""
    # The Agg canvas needs no screen; pyplot would pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4))
    # A layout that fits itself to its labels takes longer than all the rest of the picture.
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.13, top=0.9, wspace=0.2)
    FigureCanvasAgg(figure)
    loss_axes, auc_axes, reliability_axes = figure.subplots(1, 3)
    curves = {"": run}
    if "without_categories" in summary:
        curves[", without categories"] = run / "without_categories"
    for index, (suffix, folder) in enumerate(curves.items()):
        log = list(read_log(folder / "metrics.jsonl"))
        color = f"C{index}"
        training = [(e["step"], e["loss"]) for e in log if e["kind"] == "train"]
        validation = [
            (e["step"], *(math.nan if e[name] is None else e[name] for name in ("log_loss", "auc")))
            for e in log
            if e["kind"] == "validation"
        ]
        if training:
            label = f"training{suffix}"
            loss_axes.plot(*zip(*training, strict=True), color=color, alpha=0.35, label=label)
        if validation:
            steps, losses, aucs = zip(*validation, strict=True)
            loss_axes.plot(steps, losses, color=color, marker=".", label=f"validation{suffix}")
            auc_axes.plot(steps, aucs, color=color, marker=".", label=f"validation{suffix}")
    if "best_step" in summary:
        for axes in (loss_axes, auc_axes):
            axes.axvline(summary["best_step"], color="C0", linestyle=":", linewidth=1, label="the model kept")
    if bayes := summary["bayes"]:
        line = {"color": "black", "linestyle": "--", "linewidth": 1, "label": "best possible, validation"}
        loss_axes.axhline(bayes["validation"]["log_loss"], **line)
        auc_axes.axhline(bayes["validation"]["auc"], **line)
    # Matplotlib takes seconds to look for the best corner of a legend on long curves, so each is told.
    # A second curve of AUC runs far below the first.
    for axes, ylabel, corner in (
        (loss_axes, "log loss (nats)", "upper right"),
        (auc_axes, "AUC", "lower right" if len(curves) == 1 else "center right"),
    ):
        axes.set(xlabel="training steps", ylabel=ylabel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc=corner)
    _draw_reliability(reliability_axes, summary)
    size = f", {fewer_bytes(summary):.0f}x smaller than the full table" if summary["compression"] else ""
    source = "SYNTHETIC data" if summary["data"].startswith("SYNTHETIC") else "real data"
    figure.suptitle(f"DLRM, {summary['method']} embeddings{size}, {source}")
    write_figure(run / "curves.png", figure, 120)


def _draw_reliability(axes, summary: dict) -> None:
    """The share of clicks in each part of the test rows, over the mean prediction there."""
    parts = summary["reliability"]
    predicted, came = ([part[name] for part in parts] for name in ("probability", "base_rate"))
    axes.plot(predicted, came, color="C0", marker=".", label="test rows, from low predictions to high")
    most = max([*predicted, *came], default=1)
    axes.plot([0, most], [0, most], color="black", linestyle="--", linewidth=1, label="as predicted")
    axes.set(xlabel="mean prediction", ylabel="share of clicks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")


def plan_text(plan: dict[str, dict[str, int]], config: TrainConfig, data: DataSpec) -> str:
    """The plan (of robe.plan) as a table, then the bytes of the full table and the compression against it."""
    lines = []
    for store, items in plan.items():
        lines += [f"{store}:"] + [f"  {item:<34}{size:>20,} B" for item, size in items.items()]
        lines.append(f"  {'in all':<34}{sum(items.values()):>20,} B")
    table = 4 * sum(data.cardinalities) * config.model.width
    lines.append(
        f"the full table: {sum(data.cardinalities):,} rows of {config.model.width} ({data.note}): {table:,} B"
    )
    stored = sum(plan["memory"].get(f"embedding {item}", 0) for item in SERVED)
    if "embedding cache" in plan["memory"]:
        lines.append(f"compression of the table and its cache against it: {table / stored:.2f}x in bytes")
    elif stored:
        fewer = table / 4 / stored_weights(config, data)
        lines.append(
            f"compression of the embedding weights against it: {fewer:.1f}x, {table / stored:.1f}x in bytes"
        )
    if "embedding master weights" in plan["memory"]:
        trained = sum(size for item, size in plan["memory"].items() if item.startswith("embedding "))
        lines.append(
            f"the embedding takes {trained:,} B in training; `convert --to {config.embedding.memory}` keeps "
            f"the {stored:,} B of its codes alone"
        )
    return "\n".join(lines)
