"""The picture of a training run."""

from pathlib import Path

from robe.train import read_log


def draw(run: Path, title: str, levels: dict[str, dict], others: dict[str, Path] | None = None) -> Path:
    """Draw RUN/curves.png from RUN/metrics.jsonl: log loss and AUC over the steps.

    levels: name -> {"auc", "log_loss"}, drawn as horizontal lines, such as the best possible values.
    others: name -> the folder of another run, drawn beside this one.
    """
    # The Agg canvas needs no screen; pyplot would pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, auc_axes = figure.subplots(1, 2)
    for index, (name, folder) in enumerate({"": run, **(others or {})}.items()):
        log = list(read_log(folder / "metrics.jsonl"))
        suffix = f", {name}" if name else ""
        color = f"C{index}"
        training = [(e["step"], e["loss"]) for e in log if e["kind"] == "train"]
        validation = [(e["step"], e["log_loss"], e["auc"]) for e in log if e["kind"] == "validation"]
        if training:
            label = f"training, mean since the point before{suffix}"
            loss_axes.plot(*zip(*training, strict=True), color=color, alpha=0.35, label=label)
        if validation:
            steps, losses, aucs = zip(*validation, strict=True)
            loss_axes.plot(steps, losses, color=color, marker=".", label=f"validation{suffix}")
            auc_axes.plot(steps, aucs, color=color, marker=".", label=f"validation{suffix}")
    for name, level in levels.items():
        loss_axes.axhline(level["log_loss"], color="black", linestyle="--", linewidth=1, label=name)
        auc_axes.axhline(level["auc"], color="black", linestyle="--", linewidth=1, label=name)
    for axes, ylabel in ((loss_axes, "log loss (nats)"), (auc_axes, "AUC")):
        axes.set(xlabel="training steps", ylabel=ylabel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    path = run / "curves.png"
    figure.savefig(path, dpi=120)
    return path
