"""The commands: `python run.py COMMAND` in a clone, `robe COMMAND` where the package is installed."""

from robe.threads import share_cores

share_cores()  # before anything that loads NumPy

import dataclasses
import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

# Options are named after their fields alone: --block, not --config.embedding.block.
from tyro.conf import OmitArgPrefixes as Flat
from tyro.conf import Positional as Argument

# What loads Polars or Numba is imported by the commands that use it: to read options takes a tenth of that.
from data_pipeline.chunk import BadRows
from data_pipeline.dialects import Dialect
from data_pipeline.folders import open_folder
from data_pipeline.job import PrepareConfig
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.names import shown
from data_pipeline.ranks import Ranks
from data_pipeline.schema import (
    CRITEO,
    CRITEO_TB_GZIP_BYTES,
    CRITEO_TB_TEXT_BYTES,
    CRITEO_TB_TRAINING_ROWS,
    PUBLIC_DATA_SETS,
    DataError,
    Schema,
    load_schema,
)
from data_pipeline.synthetic import SyntheticConfig
from data_pipeline.whole_files import told
from robe.config import (
    NUMBERED,
    PARTS,
    PRESETS,
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    ModelConfig,
    OptimizerConfig,
    Preset,
    TrainConfig,
    require_trainable,
    resolve,
)
from robe.errors import RobeError
from robe.ranks import ALONE, Alone, Mpi
from robe.terminal import prepare_streams, require_usable
from robe.version import __version__

BackendName = Literal["auto", "reference", "cpu", "cuda"]

# A schema is given as the TOML file that holds it.
SchemaFile = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="FILE.toml",
    instance_from_str=lambda words: load_schema(words[0]),
    is_instance=lambda value: isinstance(value, Schema),
    str_from_instance=lambda schema: [schema.name],
)

PROGRAM = "robe" if Path(sys.argv[0]).stem == "robe" else "run.py"
DESCRIPTION = (
    f"The command line of ROBE DLRM. `{PROGRAM} COMMAND --help` explains each command; `{PROGRAM} --version` "
    "tells the version."
)
DEMO, DEMO_ROWS = Path("data/demo"), 1_000_000
WITHOUT = "without_categories"  # folder, in that of a run, of the baseline
GRACE = 3  # seconds in which rank 0 may tell an error that others find too
DEMO_COMPRESSION = 11  # in codes of three bits as many bytes as float32 weights take at 100x


def show_presets(kind: type) -> None:
    """Have the help of settings that are left to the preset tell what each preset sets."""
    for name in (field.name for field in dataclasses.fields(Preset)):
        if name in kind.__annotations__:
            values = {preset: getattr(found, name) for preset, found in PRESETS.items()}
            words = (f"{k} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in values.items())
            hint = tyro.conf.arg(help_behavior_hint=f"(default: of the preset; {'; '.join(words)})")
            kind.__annotations__[name] = Annotated[kind.__annotations__[name], hint]


def synth(config: Flat[SyntheticConfig]) -> None:
    """Write synthetic raw files in Criteo's format, and the best scores any model can reach on them."""
    from data_pipeline.synthetic import write
    from robe.progress import progress_bar

    with progress_bar("synth", "rows") as update:
        write(config, update)
    print(shown(f"{config.out}: {config.rows:,} SYNTHETIC rows in {config.days} files"))


@dataclasses.dataclass(frozen=True)
class PrepareArguments(PrepareConfig):
    inputs: Argument[tuple[Path, ...]]
    out: Path | None = None
    schema: Annotated[Schema, SchemaFile] = CRITEO


def prepare(config: Flat[PrepareArguments], verify: Path | None = None) -> None:
    """Turn raw Criteo logs, or tables of your own, into the shards that training reads; `mpiexec` shares it.

    Args:
        verify: Write nothing, but check the bytes and values of this prepared folder.
    """
    from data_pipeline.dialects import report
    from data_pipeline.folders import against_published
    from data_pipeline.folders import verify as check
    from data_pipeline.parse_days import REJECTED
    from data_pipeline.prepare import prepare
    from robe.progress import progress_bar

    if verify is not None:
        if config.inputs or config.out:
            raise ConfigError("--verify checks a folder that is there; give neither logs nor --out")
        manifest = check(verify)
        good = "all shards are as they were written, and all values possible"
        print(shown(f"{verify}: {manifest.describe()}; {good}"))
    else:
        if config.out is None:
            raise ConfigError("--out: name the folder to write")
        first = Ranks().rank == 0
        with progress_bar("prepare", "bytes") if first else nullcontext() as update:
            try:
                manifest = prepare(config, update)
            except KeyboardInterrupt:
                sys.exit("interrupted; the same command goes on with the day or feature that was begun")
        if not first:
            return
        if manifest is None:
            done = f"days {config.days} are done; without --days the same command finishes it"
            print(shown(f"{config.out}: {done}"))
            return
        print(shown(f"{config.out}: {manifest.describe()}"))
        print(*report(manifest), sep="\n")
        if rejected := sum(day.rejected for day in manifest.days):
            print(shown(f"{rejected:,} bad lines were left out; see {config.out / REJECTED}"))
    if published := against_published(manifest):
        print(published)


def schema(file: Argument[Path], rows: int = 10_000) -> None:
    """Propose a schema for your own data, in TOML, to correct and to give to `prepare --schema`.

    Doubts, and what is no feature, stand in comments. A label that no name decides on is left to you.

    Args:
        file: A table: Parquet, Arrow, CSV with a header, or JSON lines; text also packed (.gz, .zst, ...).
            It may lie in a store (s3://, gs://, az://, hf://).
        rows: Look at so many rows, the first ones.
    """
    from data_pipeline.proposal import propose, unfilled

    text = propose(file, rows)
    print(text, end="", flush=True)
    if unfilled(text):
        print(
            "the label is left to you: fill in its line at the top, as the comment there says",
            file=sys.stderr,
        )


def describe(
    data: Argument[Path],
    rows: int = 1_000_000,
    everything: Annotated[bool, tyro.conf.arg(name="all")] = False,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Print and draw what stands in the columns of a prepared folder.

    Args:
        data: A folder made by `prepare`.
        rows: How many rows to draw a sample of; memory is up to 10 bytes for each value in them.
        everything: Count clicks and zeros, means and extremes over all rows, not only over the sample.
        seed: Of the sample.
        out: The figure; default: DATA/describe.png.
    """
    from data_pipeline import describe
    from robe.progress import progress_bar

    out = out or data / "describe.png"
    with progress_bar("describe", "values") as update:
        found = describe.describe(open_folder(data), rows, everything=everything, seed=seed, progress=update)
    print(describe.text(found))
    with progress_bar("draw", ""):
        describe.save(describe.draw(found), out)
    print(shown(f"{out}: drawn"))


def train(
    config: Flat[TrainConfig],
    data: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    start: Path | None = None,
    fresh_optimizer: bool = False,
    baseline: bool = False,
    profile: bool = False,
    graph: bool = True,
    max_steps: int | None = None,
    tensorboard: Path | None = None,
) -> None:
    """Train, evaluate and save a model; without --data, on synthetic data made for the purpose.

    A terminal shows a bar; a file or a pipe gets a line for each evaluation. `mpiexec` shares it: each
    process takes its part of every batch, and the first one tells what is found.

    Args:
        data: A folder made by `prepare`. Without one, --baseline is on; and unless you choose the model,
            the embedding, the optimizer, the passes or a recipe, it is `--recipe best --compression 11`.
        out: The new folder of the run; default: runs/TIME-METHOD.
        resume: Go on with the run in this folder as if it had never stopped.
        start: Begin with the weights of this run, and train on the rows of --data that it has not learned: a
            day that `prepare --append` added, or other data prepared alike. Model and embedding are the
            run's; so are optimizer, rate, batch and loss where you give no others.
        fresh_optimizer: With --start, begin with none of the sums of squares that Adagrad has of the run.
        baseline: Train the same model without categorical features too, for comparison.
        profile: Print where the time goes, phase by phase, beside what this machine's speed of copies and
            products would allow, and write RUN/trace.json for chrome://tracing. It takes no graphs.
        graph: On a GPU, start a whole step as one CUDA graph. Without, each kernel is launched by itself, as
            debuggers want it; the results are the same.
        max_steps: End after this step, with an evaluation and a checkpoint; --resume goes on from there.
        tensorboard: Write losses and evaluations for TensorBoard into a folder of the run's name in this one,
            too; needs the extra `tensorboard`.
    """
    from data_pipeline.batches import Rows
    from robe import report, run_folder
    from robe.backend import agreed, among, select
    from robe.files import alone
    from robe.model import build
    from robe.progress import progress_bar, unheard
    from robe.start import begin, started_config
    from robe.tensorboard import scalars
    from robe.timeline import Timeline, no_phase
    from robe.train import TrainingError, resumed

    if resume is not None:
        if config != TrainConfig() or out is not None or baseline or start is not None:
            raise ConfigError(
                "--resume goes on with the settings of the run; give no others besides --data. For more "
                "--epochs than it began with, or other settings, train anew with another --out"
            )
        config, trained_on, baseline, teacher, _ = run_folder.read(resume)
        data = data or trained_on
    else:
        if start is not None and data is None:
            raise ConfigError(f"--start {start} needs --data, the folder with rows that it has not learned")
        if fresh_optimizer and start is None:
            raise ConfigError("--fresh-optimizer is for --start; a training begins with no sums anyway")
        if data is None:
            config = demonstrated(config)
        if start is None:
            config = resolve(config)
        baseline, teacher = baseline or data is None, None
        if config.teacher is not None:
            teacher = Path(config.teacher)
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps must be at least 1, not {max_steps}")
    if data is None and ranks().size > 1:
        raise ConfigError("--data: several processes train on a prepared folder; name it")
    data = data or demo_data("dictionary" if config.embedding.method in NUMBERED else "hash")
    manifest = open_folder(data) if resume is None else run_folder.opened(resume, data)
    if start is not None:
        manifest = run_folder.continued(start, manifest)
        config = started_config(config, start, DataSpec.of(manifest))
    require_trainable(config)
    run = resume or out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.embedding.method}"
    print(shown(f"data: {data}: {manifest.describe()}"))
    if resume is not None and not manifest.same_rows(run_folder.learned_data(run)):
        raise ConfigError(
            f"{data}: not the rows {run} was trained on; name the folder that holds them with --data, or "
            "train anew on these, with another --out"
        )
    # Whatever is refused is refused here, before there is a folder of the run.
    with progress_bar("check", "rows") as update:
        rows = {split: Rows(manifest, split, checking=update) for split in SPLITS}
        rows["train"] = rows["train"].first(config.limit_rows)
        if resume is not None:
            resumed(run, config, DataSpec.of(manifest), rows["train"].steps(config.batch))
        notices = run_folder.before_training(rows)
    warn(notices)
    where = agreed(config.backend, ranks())
    if teacher is not None:
        with progress_bar("teach", "rows") as update:
            known = config.teacher if resume else None
            digest, taught = run_folder.taught(teacher, manifest, where, update, known)
            rows["train"] = taught.first(config.limit_rows)
        config = dataclasses.replace(config, teacher=digest)
    graph = graph and not profile and ranks().size == 1
    backend = among(select(where, config.precision, config.deterministic, graph), ranks())
    timeline = Timeline(backend.synchronize)
    model = build(config, DataSpec.of(manifest), timeline.counted(backend) if profile else backend)
    beside = nullcontext(unheard) if tensorboard is None else scalars(tensorboard / run.resolve().name)
    if resume is None:
        first = partial(begin, model, config, DataSpec.of(manifest), start, fresh_optimizer)
        run_folder.create(run, config, manifest, baseline, teacher, start, first if start else None)
    print(shown(f"run: {run}"), flush=True)

    def fit(config, model, run, phase=no_phase, listener=unheard):
        with progress_bar(f"train {config.embedding.method}", "rows") as update:
            return run_folder.fit(model, config, manifest, rows, run, update, phase, max_steps, listener)

    with alone(run), beside as listener:
        ranks().lead("train", run, data, max_steps, where)
        try:
            summary = fit(config, model, run, timeline if profile else no_phase, listener)
            if profile:
                from robe.kernels.workbench.inspection import limits

                timeline.write(run / "trace.json")
                print(timeline.text(limits(backend)))
            if baseline:
                plain = without_categories(config)
                model = build(plain, DataSpec.of(manifest), backend)
                try:
                    summary[WITHOUT] = fit(plain, model, run / WITHOUT)
                except TrainingError as error:
                    summary["warnings"].append(f"the same model without categorical features: {error}")
            print(report.finish(run, summary), flush=True)
            warn(summary["warnings"])
        except TrainingError as error:
            report.write_summary(run, {"stopped": str(error), "diverged": True, "warnings": [str(error)]})
            raise
        except KeyboardInterrupt:
            sys.exit(as_started(shown(f"interrupted; go on with `robe train --resume {run}`")))
        except OSError as error:
            if error.filename is None:  # of the output, not of a file
                raise
            fail(f"{told(error)}, then go on with `robe train --resume {run}`")
    if summary["diverged"]:
        raise TrainingError(f"{run}: the training diverged, and its model is of no use")


def without_categories(config: TrainConfig) -> TrainConfig:
    """The settings of the same model without categorical features."""
    chosen = "average", "recipe", "staleness", "target_auc", "teacher", "teacher_weight"
    own = {name: getattr(TrainConfig, name) for name in chosen}
    return dataclasses.replace(config, embedding=EmbeddingConfig("none"), **own)


def follow(ranks: Mpi) -> None:
    """Take part in what rank 0 begins, without a word."""
    from robe import run_folder
    from robe.train import TrainingError

    for asked in (signal.SIGINT, signal.SIGTERM):  # of which rank 0 tells, as it ends all
        signal.signal(asked, signal.SIG_IGN)
    what, *task = ranks.follow()
    try:
        if what == "evaluate":
            run_folder.evaluate(*task, ranks=ranks)
        elif what == "predict":
            predicted(*task, ranks=ranks)
        else:
            train_along(ranks, *task)
    except TrainingError:  # of which rank 0 tells, too
        pass
    except Exception:
        # What is wrong with the data rank 0 finds as well, and ends all before this is told twice.
        time.sleep(GRACE)
        raise


def train_along(ranks: Mpi, run: Path, data: Path, max_steps: int | None, where: str) -> None:
    """The part of another rank in a training; where: the backend that all have agreed on."""
    from data_pipeline.batches import Rows
    from robe import run_folder
    from robe.backend import among, select
    from robe.model import build
    from robe.train import train as fit

    config, _, baseline, teacher, _ = run_folder.read(run)
    manifest = run_folder.opened(run, data)
    rows = {split: Rows(manifest, split) for split in SPLITS}
    if teacher is not None:
        _, rows["train"] = run_folder.taught(teacher, manifest, where, digest=config.teacher)
    rows["train"] = rows["train"].first(config.limit_rows)
    backend = among(select(where, config.precision, config.deterministic, graph=False), ranks)
    spec, weighted = DataSpec.of(manifest), manifest.schema.weight is not None
    trainings = {run: config} | ({run / WITHOUT: without_categories(config)} if baseline else {})
    for folder, each in trainings.items():
        model = build(each, spec, backend)
        fit(model, each, spec, rows, folder, max_steps=max_steps, weighted=weighted)


def evaluate(
    run: Argument[Path],
    data: Path | None = None,
    split: Literal["test", "validation", "all"] = "test",
    group_by: str | None = None,
    backend: BackendName = "auto",
    graph: bool = True,
) -> None:
    """Print the metrics of a trained model as JSON, with its speed and the share of the time that was not
    spent waiting for data (`busy`). `mpiexec` shares it.

    `calibration` is the mean prediction over the base rate, `normalised_entropy` the log loss over that of
    the base rate, and `reliability` tells what was predicted and what came, from low predictions to high.
    Where rows have weights, all of these count each row by its weight; `rows` is the number of rows.

    Args:
        run: The folder of a run.
        data: A folder made by `prepare`; default: the one of the run.
        split: Which rows; the line that describes the data says which these are. all: every row of the
            folder, such as those of later days that were prepared by themselves.
        group_by: A categorical column, such as a user's: the mean of the AUCs of the rows of each of its
            values, weighted by their number; values that have one class of rows alone are left out.
        backend: Where to compute.
        graph: On a GPU, start an inference as one CUDA graph; as of `train`.
    """
    from data_pipeline.batches import Rows
    from robe import metrics, run_folder
    from robe.backend import agreed

    what = run, data, split, agreed(backend, ranks()), graph, group_by
    ranks().lead("evaluate", *what)
    manifest, pace, found = watched_evaluation(*what, ranks=ranks())
    description = {"folder": str(manifest.folder), "description": manifest.describe()}
    result = {"run": str(run), "data": description, "split": split} | pace | found
    print(json.dumps(result, indent=1, allow_nan=False), flush=True)
    if (trouble := metrics.trouble(found)) is not None:
        warn([f"{split} rows: {trouble}"])
    if found["base_rate"] in (0, 1):
        warn(run_folder.one_class({split: Rows(manifest, split)}))


def watched_evaluation(*what: Any, ranks: Alone = ALONE) -> tuple[Manifest, dict, dict]:
    """`run_folder.evaluate` under a progress bar."""
    from robe import run_folder
    from robe.progress import progress_bar

    with progress_bar("evaluate", "rows") as update:
        return run_folder.evaluate(*what, update=update, ranks=ranks)


def predict(
    run: Argument[Path],
    files: Argument[tuple[Path, ...]],
    out: Path,
    schema: Path | None = None,
    bad_rows: BadRows = "error",
    backend: BackendName = "auto",
    graph: bool = True,
) -> None:
    """Write one click probability per input row, in the order of the input. `mpiexec` shares it.

    Args:
        run: The folder of a run.
        files: Raw logs or tables, with or without their label column, one behind the other; patterns such as
            'day_*'; such in a store (s3://, gs://, az://, hf://); - for what comes from standard input; or
            one prepared folder.
        out: The file to write: Parquet or Arrow if it is called .parquet, .arrow, .ipc or .feather, with a
            column `probability`; else text, one number a line.
        schema: A schema of the same columns, where these files have other texts for missing values, or
            quotes, than those of the training; default: that of the training.
        bad_rows: skip: a row that breaks the rules gets no probability (nan, or a missing value).
        backend: Where to compute.
        graph: On a GPU, start an inference as one CUDA graph; as of `train`.
    """
    from robe.backend import agreed
    from robe.progress import progress_bar

    if out == Path("-"):
        raise ConfigError("--out -: probabilities are written to a file that appears whole; name one")
    if not files:
        raise ConfigError("name the files to predict for, or - for standard input")
    if Path("-") in files and ranks().size > 1:
        raise ConfigError("-: mpiexec loses what comes faster than it is read; write it to a file first")
    notices: list[str] = []
    what = run, files, out, schema, bad_rows == "skip", agreed(backend, ranks()), graph
    ranks().lead("predict", *what)
    with progress_bar("predict", "rows") as update:
        count = predicted(*what, update=update, notice=notices.append, ranks=ranks())
    warn(notices)
    print(shown(f"{out}: {count:,} probabilities"))


def predicted(
    run: Path,
    files: tuple[Path, ...],
    out: Path,
    schema: Path | None,
    skip: bool,
    backend: str,
    graph: bool,
    *,
    ranks: Alone,
    **watched: Any,
) -> int:
    """`run_folder.predict_files` as one of these ranks; watched: its `update` and `notice`."""
    from data_pipeline.input_files import matched, standard_input
    from robe import run_folder

    reading = None if schema is None else load_schema(schema)
    with ExitStack() as spool:
        inputs = [
            spool.enter_context(standard_input()) if path == Path("-") else path for path in matched(files)
        ]
        return run_folder.predict_files(
            run, inputs, out, backend, graph=graph, schema=reading, skip=skip, ranks=ranks, **watched
        )


def serve(
    run: Argument[Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    max_rows: int = 10_000,
    max_bytes: int = 16_000_000,
    backend: BackendName = "auto",
) -> None:
    """Answer questions over HTTP: JSON rows in, click probabilities out, until SIGTERM or Ctrl-C.

    POST /predict takes {"rows": [{"column": value, ...}, ...]}; GET /health and /metrics tell how it is.
    Whoever reaches the port may ask: there are no passwords and no TLS, so leave these to a proxy.

    Args:
        run: The folder of a run.
        host: The address to listen at; the default is this machine alone.
        port: The port to listen at; 0 takes a free one, and the first line tells which.
        max_rows: The most rows of a request.
        max_bytes: The most bytes of the body of a request.
        backend: Where to compute.
    """
    from robe import run_folder
    from robe.serve import serve

    serve(run_folder.load(run, backend), host, port, max_rows, max_bytes)


def convert(
    run: Argument[Path],
    to: Literal["fp32", "fp16", "int8", "int4", "int3", "int2", "int1", "robe"],
    out: Path,
    compression: float | None = None,
    block: int | None = None,
) -> None:
    """Make a new run of a trained one, for inference: its embedding in other memory, or as a ROBE array.

    Args:
        run: The folder of a run.
        to: fp32, fp16, or int8 to int1 (codes of so many bits): what a weight is stored in. robe: the ROBE
            array nearest to the tables.
        out: The new folder.
        compression: Of --to robe: the weights of the tables are divided by this; default: 100.
        block: Of --to robe: block length Z; default: 16.
    """
    from robe import report, run_folder
    from robe.progress import progress_bar

    compared = ""

    def judged(folder: Path) -> dict:
        nonlocal compared
        bar.close()
        try:
            before, after = (watched_evaluation(one, None, "test", "auto")[2] for one in (run, folder))
        except (DataError, RobeError, OSError) as error:
            reason = told(error) if isinstance(error, OSError) else str(error)
            compared = as_started(shown(f"not evaluated: {reason}"))
            return {}
        compared = report.compared_text(before, after)
        _, reliability = (found.pop("reliability") for found in (before, after))
        return {"test": after, "test_before": before, "reliability": reliability}

    with ExitStack() as bar:
        update = bar.enter_context(progress_bar("convert", "weights"))
        summary = run_folder.convert(run, to, out, compression, block, update, judged)
    print(report.converted_text(shown(out), summary), compared, sep="\n")


def export(run: Argument[Path], to: Literal["onnx", "torch", "fbgemm"], out: Path) -> None:
    """Write a trained model as a file that other programs compute with.

    Args:
        run: The folder of a run.
        to: onnx: a graph of standard operators, hash and all, its weights stored as in the run. It gets its
            name once ONNX Runtime computes the run's own probabilities from it. torch: a state dict of
            PyTorch, by the names of the DLRM, of an array or of full tables; `import` reads it back. fbgemm:
            tables in codes of 8, 4 or 2 bits as FBGEMM's fused rows, and the MLPs, in safetensors.
        out: The new file.
    """
    from robe import run_folder
    from robe.progress import progress_bar

    with progress_bar("export", ""):
        found = run_folder.export(run, to, out)
    said = f"{shown(out)}: {found['bytes']:,} B, "
    if to == "onnx":
        within = f"{found['largest_difference']:.2g}"
        print(f"{said}{found['nodes']} nodes; its probabilities are those of the run to within {within}")
    else:
        print(f"{said}{found['tensors']} tensors")


def import_(
    file: Argument[Path], data: Path, out: Path, block: int | None = None, hash_seed: int | None = None
) -> None:
    """Make a run, for inference, of weights that others have published: the state dict of a DLRM, with full
    tables or a ROBE array.

    Args:
        file: .safetensors, or a file of PyTorch, of which only tensors are loaded.
        data: A folder made by `prepare`, whose ids mean what they meant in that training.
        out: The new folder.
        block: Of a ROBE array: block length Z; default: 1, as in its code.
        hash_seed: Of a ROBE array: seed of its hash; default: 1024, as in its code.
    """
    from robe import run_folder
    from robe.progress import progress_bar

    with progress_bar("import", ""):
        found = run_folder.import_weights(file, data, out, block, hash_seed)
    weights = (
        f"{found['dense_parameters']:,} dense weights and {found['embedding_parameters']:,} of embeddings"
    )
    print(as_started(shown(f"{out}: {weights}; `robe evaluate {out}` judges them")))


def plan(
    config: Flat[TrainConfig],
    data: Path | None = None,
    public: Literal["criteo-kaggle", "criteo-tb"] = "criteo-tb",
    processes: int | None = None,
    link: float = 1.0,
    card: Path | None = None,
) -> None:
    """Print how many bytes a training needs, item by item, without allocating them (with --backend cuda on a
    GPU, though there need be none); and for Criteo Terabyte estimate the time, from measured rates.

    Args:
        data: Take the sizes of this folder made by `prepare`.
        public: Without --data, take the published sizes of this data set.
        processes: Estimate too what a step takes where up to so many share it (mpiexec).
        link: GB/s that each of these processes receives.
        card: What `python -m benchmarks.gpu` wrote on a card (benchmarks/results/gpu.json): each of them
            computes on such a one. Default: on cores of a CPU.
    """
    if processes is not None and processes < 2:
        raise ConfigError(f"--processes must be at least 2, not {processes}")
    if not 0 < link < math.inf:
        raise ConfigError(f"--link must be positive, not {link}")
    if card is not None and processes is None:
        raise ConfigError("--card is for the estimate of several processes; add --processes")
    from robe import report
    from robe.backend import chosen_by
    from robe.plan import plan

    config = resolve(config)
    config = dataclasses.replace(config, backend=cast(BackendName, chosen_by(config.backend)))
    if data is not None:
        manifest = open_folder(data)
        spec, rows = DataSpec.of(manifest), sum(day.rows for day in manifest.days)
    else:
        rows, cardinalities = PUBLIC_DATA_SETS[public]
        dialect: Dialect = "dictionary" if config.embedding.method in NUMBERED else "hash"
        spec = DataSpec(13, cardinalities, dialect, "", f"published cardinalities of {public}")
    found = plan(config, spec, rows)
    print(report.plan_text(found, config, spec))
    if processes is not None:
        from robe.estimate import of_card, of_cores, shared

        rates = of_cores() if card is None else of_card(card, config.precision)
        print(shared(config, spec, processes, 1e9 * link, rates))
    if data is None and public == "criteo-tb":
        from robe.estimate import DataSet, estimate

        terabyte = DataSet(
            name="Criteo Terabyte",
            rows=rows,
            training_rows=CRITEO_TB_TRAINING_ROWS,
            row_bytes=4 * len(CRITEO.columns),
            text_bytes=CRITEO_TB_TEXT_BYTES,
            gzip_bytes=CRITEO_TB_GZIP_BYTES,
        )
        print(estimate(config, sum(found["memory"].values()), terabyte))


def kernels(
    action: Argument[Literal["list", "show", "check", "bench"]],
    name: Argument[str | None] = None,
    form: Annotated[
        Literal["source", "ptx", "sass", "asm", "llvm", "registers"], tyro.conf.arg(name="as")
    ] = "source",
    cc: str = "9.0",
) -> None:
    """Look into the kernels: list them, show their code, check every version, time them.

    Args:
        action: list: operations, versions, cost. show NAME: its code. check: every version against the
            reference, on the case table. bench: times of the CPU versions, as shares of a plain copy.
        name: The operation to show or check, as `list` calls it; default of check: all.
        form: source; asm or llvm (of the CPU version); ptx, sass (machine code) or registers (with spills,
            shared memory and occupancy) of the CUDA kernels, which need the extra `inspect`.
            registers without a name: those of all kernels, for several compute capabilities.
        cc: Compute capability to compile for; no GPU is needed.
    """
    from robe.kernels.workbench import inspection

    if name is not None and action in ("list", "bench"):
        raise ConfigError(f"kernels {action} takes no name, so not {name!r}")
    if action == "list":
        lines = inspection.listing()
    elif action == "show":
        lines = [inspection.show(name, form, cc)]
    elif action == "check":
        lines = inspection.checking(name)
    else:
        lines = inspection.timing()
    for line in lines:
        print(line, flush=True)


def analyze(
    names: Argument[tuple[str, ...]] = (),
    quick: bool = False,
    out: Path = Path("analysis/out"),
    seed: int | None = None,
    data: Path | None = None,
    run: Path | None = None,
) -> None:
    """Hold the theory against measurements: a figure, a table and a verdict per claim, and OUT/report.html.

    Args:
        names: The scripts in analysis/ to carry out; default: all.
        quick: Fewer and smaller measurements.
        out: The folder to write to.
        seed: Of whatever is drawn.
        data: Use real rows where a claim is about data: a folder made by `prepare` (hash_quality also takes a
            raw log).
        run: Use the trained table of this run, made with --method full, where a claim is about one.
    """
    from analysis import claim, report

    if unknown := set(names) - set(claim.scripts()):
        raise ConfigError(f"no analysis {', '.join(sorted(unknown))}; there are {', '.join(claim.scripts())}")
    options = {"quick": quick, "seed": seed, "data": data, "run": run}
    scripts = {name: claim.load(name) for name in names or claim.scripts()}
    for name in [] if names else list(scripts):
        if trouble := getattr(scripts[name], "lacking", lambda: None)():
            print(f"{name} is left out: {trouble}")
            del scripts[name]
    results = [claim.carry_out(script, out, **options) for script in scripts.values()]
    print(shown(report.write(results, out)))
    if not all(result.verdict.holds for result in results):
        sys.exit(1)


def doctor(data: Path | None = None) -> None:
    """Check the installation, and a prepared data set if one is given, and say what to mend.

    Args:
        data: A folder made by `prepare`.
    """
    from data_pipeline.batches import Rows
    from data_pipeline.folders import verify
    from robe import doctor

    def checks():
        yield from doctor.installation(Path("."))
        if data is not None:
            manifest = verify(data)
            yield doctor.Check("data", None, f"{data}: {manifest.describe()}; all checksums hold")
            rates = {split: Rows(manifest, split).base_rate for split in SPLITS}
            # Drawn from all over the log, which may be sorted.
            batch = next(Rows(manifest, "train").batches(100_000, seed=0, prefetch=0))
            names = manifest.schema.dense, manifest.schema.categorical
            arrays = batch.label, batch.dense, batch.ids
            yield from doctor.data_set(*arrays, DataSpec.of(manifest), *names, rates)

    fine = True
    for check in checks():
        print(shown(check), flush=True)
        fine &= check.ok is not False
    if not fine:
        sys.exit(1)


def demonstrated(config: TrainConfig) -> TrainConfig:
    """The settings of the best recipe, if nothing of what it is about was chosen."""
    chosen = *PARTS, "epochs", "fresh_embeddings", "recipe"
    if any(getattr(config, name) != getattr(TrainConfig(), name) for name in chosen):
        return config
    print(f"no model chosen, so it is trained as with --recipe best --compression {DEMO_COMPRESSION}")
    embedding = EmbeddingConfig(compression=DEMO_COMPRESSION)
    return dataclasses.replace(config, recipe="best", embedding=embedding)


def demo_data(dialect: Dialect) -> Path:
    """A small synthetic data set with z-scored numbers, made where there is none yet."""
    raw, prepared = DEMO / "raw", DEMO / f"{dialect}_zscore"
    if not raw.exists():
        print(f"no --data given: making a small SYNTHETIC data set in {raw}", flush=True)
        synth(SyntheticConfig(out=raw, rows=DEMO_ROWS))
    if not prepared.exists():
        prepare(PrepareArguments(inputs=(raw,), out=prepared, ids=dialect, dense="zscore"))
    return prepared


for kind in (TrainConfig, ModelConfig, OptimizerConfig):
    show_presets(kind)
COMMANDS = {
    f.__name__.rstrip("_"): f
    for f in (
        *(train, evaluate, predict, serve, convert, export, import_, synth, schema, prepare, describe),
        *(plan, doctor, kernels, analyze),
    )
}


@cache
def ranks() -> Alone:
    """The processes that `mpiexec` started for a command that they share, or this one alone."""
    comm = Ranks().comm
    return ALONE if comm is None else Mpi(comm)


def main(arguments: list[str] | None = None) -> None:
    """Carry out a command; without arguments those of this process, and help where there are none."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    prepare_streams()
    # Asked to stop, the commands tidy up as they do for Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments[0] not in ("train", "evaluate", "predict"):
        return carry_out(arguments)
    try:
        shared = ranks()
    except DataError as error:
        fail(str(error))
    try:
        carry_out(arguments, shared)
    except BaseException as error:
        shared.end(error)
        raise


def carry_out(arguments: list[str], shared: Alone = ALONE) -> None:
    """Carry out a command, or a rank's part of it; what goes wrong ends this process after a line."""
    try:
        if isinstance(shared, Mpi) and shared.rank > 0:
            return follow(shared)
        require_usable()
        if arguments == ["--version"]:
            print(f"robe-dlrm {__version__}")
        else:
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog=PROGRAM, description=DESCRIPTION, args=arguments
            )
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has gone; without this Python complains once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except MemoryError as error:
        fail(f"not enough memory: {error}; `robe plan` tells what is needed")
    except (DataError, RobeError) as error:
        fail(str(error), getattr(error, "exit_code", 2))
    except OSError as error:
        fail(told(error))


def warn(lines: list[str]) -> None:
    for line in lines:
        print(as_started(shown(f"warning: {line}")), file=sys.stderr)


def fail(message: str, code: int = 2) -> None:
    print(as_started(shown(f"error: {message}")), file=sys.stderr)
    sys.exit(code)


def as_started(message: str) -> str:
    """Messages name commands as `robe COMMAND`, which is right in Python and where the package is installed;
    whoever started run.py can paste them too."""
    return message if PROGRAM == "robe" else message.replace("`robe ", "`python run.py ")
