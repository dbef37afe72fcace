"""The commands: `python run.py COMMAND` in a clone, `robe COMMAND` where the package is installed."""

import robe.threads  # noqa: F401, I001  (before anything that loads NumPy)

import dataclasses
import json
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_pipeline.batches import Rows
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.prepare import PrepareConfig
from data_pipeline.schema import CRITEO, PUBLIC_DATA_SETS, DataError, Schema, load_schema
from data_pipeline.synthetic import SyntheticConfig
from robe import RobeError
from robe.config import (
    NUMBERED,
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    TrainConfig,
    from_json,
    require_trainable,
    resolve,
)
from robe.timeline import Timeline, no_phase

# Options are named after their fields alone: --block, not --config.embedding.block.
Flat = tyro.conf.OmitArgPrefixes
Argument = tyro.conf.Positional
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
DESCRIPTION = f"The command line of ROBE DLRM. `{PROGRAM} COMMAND --help` explains each command."
DEMO, DEMO_ROWS = Path("data/demo"), 1_000_000


def synth(config: Flat[SyntheticConfig]) -> None:
    """Write synthetic raw files in Criteo's format, and the best scores any model can reach on them."""
    from data_pipeline.synthetic import write
    from robe.progress import progress_bar

    with progress_bar("synth", "rows") as update:
        write(config, update)
    print(f"{config.out}: {config.rows:,} SYNTHETIC rows in {config.days} files")


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
    from data_pipeline.prepare import REJECTED, against_published, prepare
    from data_pipeline.prepare import verify as check
    from data_pipeline.ranks import Ranks
    from robe.progress import progress_bar

    if verify is not None:
        if config.inputs or config.out:
            raise ConfigError("--verify checks a folder that is there; give neither logs nor --out")
        manifest = check(verify)
        print(
            f"{verify}: {manifest.describe()}; all shards are as they were written, and all values possible"
        )
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
            print(f"{config.out}: days {config.days} are done; without --days the same command finishes it")
            return
        print(f"{config.out}: {manifest.describe()}")
        print(*report(manifest), sep="\n")
        if rejected := sum(day.rejected for day in manifest.days):
            print(f"{rejected:,} bad lines were left out; see {config.out / REJECTED}")
    if published := against_published(manifest):
        print(published)


def schema(file: Argument[Path], rows: int = 10_000) -> None:
    """Propose a schema for your own data, in TOML, to correct and to give to `prepare --schema`.

    Args:
        file: A table: .parquet, .arrow, .ipc, .feather, or .csv or .tsv with a header, or these as .gz.
        rows: Look at so many rows, the first ones.
    """
    from data_pipeline.proposal import propose

    print(propose(file, rows), end="")


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
        rows: How many rows to draw a sample of; memory is up to 400 bytes for each.
        everything: Count clicks and zeros, means and extremes over all rows, not only over the sample.
        seed: Of the sample.
        out: The figure; default: DATA/describe.png.
    """
    from data_pipeline import describe
    from robe.progress import progress_bar

    out = out or data / "describe.png"
    with progress_bar("describe", "rows") as update:
        found = describe.describe(
            Manifest.load(data), rows, everything=everything, seed=seed, progress=update
        )
    print(describe.text(found))
    describe.save(describe.draw(found), out)
    print(f"{out}: drawn")


def train(
    config: Flat[TrainConfig],
    data: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    baseline: bool = False,
    profile: bool = False,
) -> None:
    """Train, evaluate and save a model; without --data, on synthetic data made for the purpose.

    Args:
        data: A folder made by `prepare`. Without one, --baseline is on.
        out: The new folder of the run; default: runs/TIME-METHOD.
        resume: Go on with the run in this folder as if it had never stopped.
        baseline: Train the same model without categorical features too, for comparison.
        profile: Print where the time goes, phase by phase, beside what this machine's speed of copies and
            products would allow, and write RUN/trace.json for chrome://tracing.
    """
    from robe import report
    from robe.backend import select
    from robe.files import alone
    from robe.model import build

    if resume is not None:
        if config != TrainConfig() or out is not None or baseline:
            raise ConfigError("--resume goes on with the settings of the run; give no others besides --data")
        run, config, settings = resume, *read_run(resume)
        data, baseline = data or Path(settings["data"]), settings["baseline"]
    else:
        config = resolve(config)
        run = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.embedding.method}"
        baseline = baseline or data is None
    require_trainable(config)
    data = data or demo_data("dictionary" if config.embedding.method in NUMBERED else "hash")
    manifest = Manifest.load(data)
    print(f"data: {data}: {manifest.describe()}")
    if resume is not None and not manifest.same_rows(Manifest.load(run / "data")):
        raise ConfigError(
            f"{data}: not the rows {run} was trained on; name the folder that holds them with --data"
        )
    # Whatever is refused is refused here, before there is a folder of the run.
    rows = {split: Rows(manifest, split) for split in SPLITS}
    backend = select(config.backend, config.precision, config.deterministic)
    timeline = Timeline(backend.synchronize)
    model = build(config, DataSpec.of(manifest), timeline.counted(backend) if profile else backend)
    if resume is None:
        create_run(run, config, manifest, baseline)
    print(f"run: {run}", flush=True)

    with alone(run):
        try:
            summary = fit(model, config, manifest, rows, run, timeline if profile else no_phase)
            if profile:
                from robe.kernels.workbench.inspection import limits

                timeline.write(run / "trace.json")
                print(timeline.text(limits(backend)))
            if baseline:
                plain = dataclasses.replace(config, embedding=EmbeddingConfig("none"), target_auc=None)
                model = build(plain, DataSpec.of(manifest), backend)
                without = fit(model, plain, manifest, rows, run / "without_categories")
                summary["without_categories"] = without
            print(report.finish(run, summary))
        except KeyboardInterrupt:
            sys.exit(f"interrupted; go on with `python run.py train --resume {run}`")


def evaluate(
    run: Argument[Path],
    data: Path | None = None,
    split: Literal["test", "validation"] = "test",
    backend: BackendName = "auto",
) -> None:
    """Print the metrics of a trained model as JSON, with its speed and the share of the time that was not
    spent waiting for data (`busy`).

    Args:
        run: The folder of a run.
        data: A folder made by `prepare`; default: the one of the run.
        split: Which rows; the line that describes the data says which these are.
        backend: Where to compute.
    """
    manifest, pace, found = evaluation(run, data, split, backend)
    description = {"folder": str(manifest.folder), "description": manifest.describe()}
    result = {"run": str(run), "data": description, "split": split} | pace | found
    print(json.dumps(result, indent=1, allow_nan=False))


def predict(run: Argument[Path], file: Argument[Path], out: Path, backend: BackendName = "auto") -> None:
    """Write one click probability per input row, in the order of the input, as text.

    Args:
        run: The folder of a run.
        file: A raw log or a table, with or without its label column; or a prepared folder.
        out: The file to write.
        backend: Where to compute.
    """
    from data_pipeline.batches import raw_batches
    from robe.progress import Watched, progress_bar
    from robe.train import EVALUATION_BATCH, write_probabilities

    model, spec = load_model(run, backend)
    if out.exists() and file.exists() and out.samefile(file):
        raise ConfigError(f"{out}: is the input; choose another --out")
    if file.is_dir():
        manifest = Manifest.load(file)
        spec.require(manifest.fingerprint(), str(file))
        rows = Rows(manifest, None)
        batches, total = rows.batches, rows.count
    else:
        batches, total = partial(raw_batches, file, Manifest.load(run / "data")), None
    with progress_bar("predict", "rows") as update:
        count = write_probabilities(model, Watched(batches, total, update).batches(EVALUATION_BATCH), out)
    print(f"{out}: {count:,} probabilities")


def convert(
    run: Argument[Path],
    to: Literal["fp32", "fp16", "int8", "int4", "robe"],
    out: Path,
    compression: float | None = None,
    block: int | None = None,
) -> None:
    """Make a new run of a trained one, for inference: its embedding in other memory, or as a ROBE array.

    Args:
        run: The folder of a run.
        to: fp32, fp16, int8, int4: what a weight is stored in. robe: the ROBE array nearest to the tables.
        out: The new folder.
        compression: Of --to robe: the weights of the tables are divided by this; default: 100.
        block: Of --to robe: block length Z; default: 16.
    """
    from data_pipeline.appearing import appearing
    from robe import checkpoint, report
    from robe.convert import convert, converted_config
    from robe.progress import progress_bar

    newest, (_, settings) = checkpoint.latest(run), read_run(run)
    config, spec, position = checkpoint.read_state(newest)
    new = converted_config(config, spec, to, compression, block)
    with appearing(out, lambda: 0.0) as folder:
        shutil.copytree(run / "data", folder / "data")
        described = {"converted_from": str(run.resolve()), "data": Manifest.load(run / "data").describe()}
        with progress_bar("convert", "weights") as update:
            summary = described | convert(newest, config, new, spec, position, folder, update)
        write_settings(folder, new, settings["data"], False)
        report.write_summary(folder, summary)
    print(report.converted_text(out, summary), flush=True)
    try:
        before, after = (evaluation(folder, None, "test", "auto")[2] for folder in (run, out))
    except (DataError, RobeError) as error:
        print(f"not evaluated: {error}")
        return
    report.write_summary(out, summary | {"test": after, "test_before": before})
    print(report.compared_text(before, after))


def plan(
    config: Flat[TrainConfig],
    data: Path | None = None,
    public: Literal["criteo-kaggle", "criteo-tb"] = "criteo-tb",
) -> None:
    """Print how many bytes a training needs, item by item, without allocating them; and for Criteo
    Terabyte estimate the time, from measured rates.

    Args:
        data: Take the sizes of this folder made by `prepare`.
        public: Without --data, take the published sizes of this data set.
    """
    from robe import report
    from robe.plan import plan

    config = resolve(config)
    if data is not None:
        manifest = Manifest.load(data)
        spec, rows = DataSpec.of(manifest), sum(day.rows for day in manifest.days)
    else:
        rows, cardinalities = PUBLIC_DATA_SETS[public]
        dialect = "dictionary" if config.embedding.method in NUMBERED else "hash"
        spec = DataSpec(13, cardinalities, dialect, "", f"published cardinalities of {public}")
    found = plan(config, spec, rows)
    print(report.plan_text(found, config, spec))
    if data is None and public == "criteo-tb":
        from benchmarks.estimate import criteo_tb

        print(criteo_tb(config, sum(found["memory"].values())))


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
        name: The operation to show, as `list` calls it.
        form: source; asm or llvm (of the CPU version); ptx, sass (machine code) or registers (with spills,
            shared memory and occupancy) of the CUDA kernels, which need the extra `inspect`.
            registers without a name: those of all kernels, for several compute capabilities.
        cc: Compute capability to compile for; no GPU is needed.
    """
    from robe.kernels.workbench import inspection

    if action == "list":
        lines = inspection.listing()
    elif action == "show":
        lines = [inspection.show(name, form, cc)]
    elif action == "check":
        lines = inspection.checking()
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
    results = [claim.carry_out(claim.load(name), out, **options) for name in names or claim.scripts()]
    print(report.write(results, out))
    if not all(result.verdict.holds for result in results):
        sys.exit(1)


def doctor(data: Path | None = None) -> None:
    """Check the installation, and a prepared data set if one is given, and say what to mend.

    Args:
        data: A folder made by `prepare`.
    """
    from data_pipeline.prepare import verify
    from robe import doctor

    checks = list(report_checks(doctor.installation(Path("."))))
    if data is not None:
        manifest = verify(data)
        print(f"      data: {data}: {manifest.describe()}; all checksums hold")
        batch = next(Rows(manifest, "train").batches(100_000, prefetch=0))
        checks += report_checks(doctor.data_set(*batch, DataSpec.of(manifest)))
    if not all(checks):
        sys.exit(1)


def report_checks(checks):
    """Print each check as it comes; yields whether it is fine."""
    for check in checks:
        print(f"{ {True: 'ok', False: 'FAIL', None: ''}[check.ok]:5} {check.name}: {check.text}", flush=True)
        yield check.ok is not False


def fit(
    model, config: TrainConfig, manifest: Manifest, rows: dict[str, Rows], run: Path, phase=no_phase
) -> dict:
    """Train a model, or go on where `run` stands; returns the summary with what is known of the data."""
    from robe.progress import progress_bar
    from robe.train import train

    with progress_bar(f"train {config.embedding.method}", "rows") as update:
        summary = train(model, config, DataSpec.of(manifest), rows, run, update, phase)
    bayes = manifest.synthetic and manifest.synthetic["bayes"]
    return summary | {"data": manifest.describe(), "bayes": bayes}


def create_run(run: Path, config: TrainConfig, manifest: Manifest, baseline: bool) -> None:
    """Make the folder of a run, with all that using it later needs of the data."""
    from data_pipeline.appearing import appearing
    from data_pipeline.dialects import DICTIONARY

    if (run / "config.json").exists():
        raise ConfigError(f"{run}: exists; choose another --out, or go on with it by --resume {run}")
    with appearing(run, lambda: 0.0) as folder:
        (folder / "data").mkdir()
        manifest.save(folder / "data")
        if manifest.dictionary_sha256 is not None:
            shutil.copy(manifest.folder / DICTIONARY, folder / "data" / DICTIONARY)
        write_settings(folder, config, str(manifest.folder.resolve()), baseline)


def write_settings(folder: Path, config: TrainConfig, data: str, baseline: bool) -> None:
    settings = {"config": dataclasses.asdict(config), "data": data, "baseline": baseline}
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def read_run(run: Path) -> tuple[TrainConfig, dict]:
    """The configuration of a run, and all its settings."""
    path = run / "config.json"
    try:
        settings = json.loads(path.read_text())
        Path(settings["data"]), bool(settings["baseline"])
        return resolve(from_json(settings["config"])), settings
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: not the settings of a run ({error}); give the folder of a run") from None


def evaluation(run: Path, data: Path | None, split: str, backend: str) -> tuple[Manifest, dict, dict]:
    """(the data, speed, metrics) of a run on a split of a folder, or of that of the run."""
    from robe import metrics
    from robe.progress import Watched, progress_bar
    from robe.train import predict

    model, spec = load_model(run, backend)
    manifest = Manifest.load(data or read_run(run)[1]["data"])
    spec.require(manifest.fingerprint(), str(manifest.folder))
    if data is None and not manifest.same_rows(Manifest.load(run / "data")):
        raise ConfigError(
            f"{manifest.folder}: no longer the rows of {run}; if they are meant, name it with --data"
        )
    rows = Rows(manifest, split)
    with progress_bar("evaluate", "rows") as update:
        watched = Watched(rows.batches, rows.count, update)
        label, logits = predict(model, watched)
        return manifest, watched.pace(), metrics.summary(label, logits)


def load_model(run: Path, backend: str):
    """The model of the newest checkpoint of a run, and what its data must look like."""
    from robe import checkpoint
    from robe.backend import select
    from robe.model import build

    newest = checkpoint.latest(run)
    config, spec, _ = checkpoint.read_state(newest)
    model = build(config, spec, select(backend, config.precision))
    checkpoint.load_weights(newest, model)
    return model, spec


def demo_data(dialect: str) -> Path:
    """A small synthetic data set, made where there is none yet."""
    raw, prepared = DEMO / "raw", DEMO / dialect
    if not raw.exists():
        print(f"no --data given: making a small SYNTHETIC data set in {raw}", flush=True)
        synth(SyntheticConfig(out=raw, rows=DEMO_ROWS))
    if not prepared.exists():
        prepare(PrepareConfig(inputs=(raw,), out=prepared, ids=dialect))
    return prepared


COMMANDS = {
    f.__name__: f
    for f in (
        *(train, evaluate, predict, convert, synth, schema, prepare, describe),
        *(plan, doctor, kernels, analyze),
    )
}


def main(arguments: list[str] | None = None) -> None:
    # Asked to stop, the commands tidy up as they do for Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=PROGRAM, description=DESCRIPTION, args=arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has gone; without this Python complains once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except MemoryError as error:
        fail(f"not enough memory: {error}; `python run.py plan` tells what is needed")
    except (DataError, RobeError) as error:
        fail(str(error), getattr(error, "exit_code", 2))
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror}; check the path, the rights and the space")


def fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
