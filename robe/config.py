"""The settings of a model and a training run. cli.py makes the command line from these classes."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from robe import RobeError


class ConfigError(RobeError):
    """Settings that cannot be used, or do not fit the data."""


@dataclass(frozen=True)
class DataSpec:
    """What a model has to know of a prepared data set.

    cardinalities: rows a full table would have, per categorical feature.
    dialect: `hash` (ids are raw 32-bit values), `modulo` or `dictionary` (ids are 0 .. cardinality - 1).
    fingerprint: changes with the columns and the meaning of their values.
    note: where the cardinalities come from, in words.
    """

    dense: int
    cardinalities: tuple[int, ...]
    dialect: str
    fingerprint: str
    note: str

    @classmethod
    def of(cls, manifest) -> "DataSpec":
        """That of a prepared folder, from its manifest."""
        ids = manifest.ids
        note = "distinct ids in the data" + ("" if ids.exact else ", estimated")
        note = "ids modulo that per feature" if ids.dialect == "modulo" else note
        return cls(len(manifest.schema.dense), ids.cardinalities, ids.dialect, manifest.fingerprint(), note)

    def require(self, fingerprint: str, where: str) -> None:
        """Raise ConfigError unless the data of that fingerprint can be fed to a model of this one's."""
        if fingerprint != self.fingerprint:
            raise ConfigError(
                f"{where}: its columns or ids do not mean what they meant in training; prepare the data as "
                "the training data were (the same --ids, --max-ind-range and --dense; for a dictionary the "
                "same folder)"
            )


@dataclass(frozen=True)
class EmbeddingConfig:
    method: Literal[
        *("robe", "full", "mixed_precision", "none"),
        *("hashing", "quotient_remainder", "frequency", "tensor_train", "compositional"),
    ] = "robe"
    """robe: one shared array read in hashed blocks; full: one table per feature; mixed_precision: such tables
    in few bits, and a cache of float32 rows in which they are trained; none: no categorical features at all,
    a baseline. Rivals of robe: hashing: ids modulo the rows of a smaller table; quotient_remainder: two rows
    make a vector; frequency: rare values share a row; tensor_train: a vector is a product of three small
    matrices; compositional: each chunk of a vector is hashed by itself. All but robe, none, hashing and
    compositional need data prepared with --ids dictionary."""

    weights: int | None = None
    """Weights to store (M), of rivals at most. Give one of weights, megabytes, compression."""

    megabytes: float | None = None
    """The same in MB (10^6 bytes), as they are stored."""

    compression: float | None = None
    """The same as rows * D of the full table divided by this. Default: 100."""

    block: int = 16
    """Block length Z: how many consecutive elements are hashed, and read, as one. From 1 to M."""

    hash: Literal["mix", "affine"] = "mix"
    """mix: a 64-bit mixer, circular; affine: the hash of the published implementation, with whose
    weights it is compatible (add --no-sign --hash-seed 1024)."""

    sign: bool = True
    """Give every element a hashed sign, which removes the bias of colliding weights."""

    hash_seed: int = 0
    """Seed of the hash."""

    init_bound: float | None = None
    """Weights start uniform in (-a, a). Default of full: a = 1/sqrt(rows) per table, as in DLRM. Of
    robe: a = sqrt(features / rows of all tables), which gives the virtual table the same energy."""

    memory: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    """What a weight is stored in. fp16, of robe, takes 2 bytes instead of 4; it is read as float32, and
    rounded at random when a step has changed it, up or down so that its mean is right. int8 and int4, and
    fp16 of other methods, are for inference: `convert` makes them of a trained run."""

    bits: Literal[4, 8, 16] = 8
    """Of a weight of mixed_precision: 4 or 8 with a scale and a bias a row, or 16 (a half)."""

    cache: float | None = None
    """Size of mixed_precision's cache as a share of all rows, 0 for none. Default: 0.01 with 4 bits, else
    0.05."""

    policy: Literal["lru", "lfu"] = "lfu"
    """Which row of a full set leaves the cache: the one used least recently, or least often since it came.
    lfu keeps the frequent rows where a batch wants more rows than the cache holds; lru follows a drift."""

    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How mixed_precision rounds: at random, so that the mean is right, or to the nearest."""

    combine: Literal["multiply", "add"] = "multiply"
    """What quotient_remainder does to its two rows."""

    chunks: int = 4
    """Chunks of a vector of compositional, each of D / chunks elements."""


@dataclass(frozen=True)
class ModelConfig:
    preset: Literal["small", "kaggle", "tb10m", "mlperf"] = "small"
    """Sizes and recipe: small (the demonstration), kaggle (DLRM on Criteo Kaggle), tb10m (Criteo
    Terabyte, 10 million rows a table), mlperf (MLPerf v1). What you give besides overrides it."""

    width: int | None = None
    """Embedding width D."""

    bottom: tuple[int, ...] | None = None
    """Hidden layers of the bottom MLP; a last layer of width D follows."""

    top: tuple[int, ...] | None = None
    """Hidden layers of the top MLP; a last layer of width 1 follows."""


@dataclass(frozen=True)
class OptimizerConfig:
    optimizer: Literal["sgd", "adagrad", "none"] | None = None
    """sgd or adagrad; none: a model that was converted for inference, and is not trained further."""

    lr: float | None = None
    """Learning rate."""

    eps: float = 1e-8
    """Adagrad's eps."""

    warmup_steps: int = 0
    """The rate rises linearly over so many steps."""

    decay_start: int | None = None
    """Step at which the rate begins to fall; never, if not given."""

    decay_steps: int = 0
    """Over so many steps the rate falls to 0, as (remaining share)^2."""


@dataclass(frozen=True)
class TrainConfig:
    model: ModelConfig = ModelConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    batch: int | None = None
    """Rows per training step."""

    epochs: int = 1
    """Passes over the training days."""

    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""

    eval_every: int | None = None
    """Steps between evaluations on the validation half; default: 10 per epoch."""

    checkpoint_every: int | None = None
    """Steps between checkpoints; default: at every evaluation."""

    target_auc: float | None = None
    """Stop when the validation AUC reaches this."""

    backend: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    """Where to compute: auto (a GPU if there is one, else cpu), reference (NumPy only), cpu, cuda."""

    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """What the matrix products of the dense layers are computed in; all else stays float32. Without a
    GPU, tf32 and bf16 are emulated: slow, but they show what the precision does to the AUC."""

    deterministic: bool = False
    """On a GPU, add up gradients in a fixed order, so that training repeats bit for bit, at a cost not
    measured yet. On a CPU it always does."""


@dataclass(frozen=True)
class Preset:
    width: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    optimizer: str
    lr: float
    batch: int


# Sizes and recipes of facebookresearch/dlrm (bench/) and of the MLPerf training reference, v1.
PRESETS = {
    "small": Preset(16, (64, 32), (64, 32), "adagrad", 0.03, 256),
    "kaggle": Preset(16, (512, 256, 64), (512, 256), "sgd", 0.1, 128),
    "tb10m": Preset(64, (512, 256), (512, 512, 256), "sgd", 0.1, 2048),
    "mlperf": Preset(128, (512, 256), (1024, 1024, 512, 256), "sgd", 1.0, 2048),
}

DEFAULT_COMPRESSION = 100.0
WEIGHT_BYTES = {"fp32": 4, "fp16": 2}  # of the embedding
CODE_BITS = {"int8": 8, "int4": 4}  # of a weight of it, besides scales and biases

# Methods whose ids have to count from 0.
NUMBERED = ("full", "mixed_precision", "quotient_remainder", "frequency", "tensor_train")

# Settings that must be positive where they are given.
POSITIVE = {
    *("batch", "epochs", "eval_every", "checkpoint_every", "width", "bottom", "top", "lr", "eps"),
    *("weights", "megabytes", "compression", "block", "init_bound", "chunks"),
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill what was left open from the preset; raises ConfigError for values out of range."""
    preset = PRESETS[config.model.preset]

    def fill(part, **values):
        return dataclasses.replace(
            part, **{name: value for name, value in values.items() if getattr(part, name) is None}
        )

    model = fill(config.model, width=preset.width, bottom=preset.bottom, top=preset.top)
    optimizer = fill(config.optimizer, optimizer=preset.optimizer, lr=preset.lr)
    config = fill(dataclasses.replace(config, model=model, optimizer=optimizer), batch=preset.batch)
    for part in (config, model, config.embedding, optimizer):
        for name in POSITIVE & vars(part).keys():
            values = getattr(part, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and not (value > 0 and math.isfinite(value)):
                    raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {value}")
    for name, value, least, most in (
        ("seed", config.seed, 0, 2**63 - 1),
        ("hash-seed", config.embedding.hash_seed, 0, 2**63 - 1),
        ("batch", config.batch, 1, 2**31 - 1),
        ("weights", config.embedding.weights or 1, 1, 2**48),
        # Smaller numbers are 0 in float32.
        ("eps", optimizer.eps, 1e-37, math.inf),
        ("warmup-steps", optimizer.warmup_steps, 0, math.inf),
        ("decay-start", optimizer.decay_start or 0, 0, math.inf),
        ("target-auc", config.target_auc or 1, 0, 1),
        ("cache", config.embedding.cache or 0, 0, 1),
    ):
        if not least <= value <= most:
            raise ConfigError(f"--{name} must be from {least} to {most}, not {value}")
    memory, method = config.embedding.memory, config.embedding.method
    if memory != "fp32" and method in ("mixed_precision", "none"):
        raise ConfigError(
            f"--memory {memory} is not for --method {method}, "
            + ("whose memory is set by --bits" if method == "mixed_precision" else "which stores nothing")
        )
    if optimizer.decay_start is not None and optimizer.decay_steps < 1:
        raise ConfigError("--decay-start needs --decay-steps, the number of steps the rate takes to reach 0")
    return config


def require_trainable(config: TrainConfig) -> None:
    """Raise ConfigError for what is made by converting, and only looked up in."""
    memory, method = config.embedding.memory, config.embedding.method
    if memory in CODE_BITS or (memory == "fp16" and method != "robe") or config.optimizer.optimizer == "none":
        what = "--optimizer none" if config.optimizer.optimizer == "none" else f"--memory {memory}"
        raise ConfigError(
            f"{what} of --method {method} is for inference; train in fp32, then `robe convert "
            f"RUN --to {memory} --out NEW`, whose result is not trained further"
        )


def budget(config: EmbeddingConfig, width: int, cardinalities: tuple[int, ...]) -> int:
    """Number of weights to store; raises ConfigError if sizes contradict."""
    given = [x for x in (config.weights, config.megabytes, config.compression) if x is not None]
    if len(given) > 1:
        raise ConfigError("give one of --weights, --megabytes and --compression, not several")
    if config.weights is not None:
        weights = config.weights
    elif config.megabytes is not None and config.memory in CODE_BITS:
        raise ConfigError(
            f"--megabytes does not count --memory {config.memory}; give --weights or --compression"
        )
    elif config.megabytes is not None:
        weights = int(config.megabytes * 1e6 / WEIGHT_BYTES[config.memory])
    else:
        weights = int(sum(cardinalities) * width / (config.compression or DEFAULT_COMPRESSION))
    if weights > 2**48:
        raise ConfigError(f"an array of {weights} weights is too large; see what fits with `robe plan`")
    return weights


def robe_weights(config: EmbeddingConfig, width: int, cardinalities: tuple[int, ...]) -> int:
    """Number of weights M of the shared array; raises ConfigError if sizes contradict."""
    weights = budget(config, width, cardinalities)
    if weights < config.block:
        raise ConfigError(
            f"an array of {weights} weights is smaller than one block of {config.block}; "
            "give more weights or a smaller --block"
        )
    return weights


def from_json(data: dict) -> TrainConfig:
    """Rebuild a configuration; raises ConfigError where a field is unknown or missing."""

    def build(kind, values):
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    try:
        parts = {
            "model": build(ModelConfig, data["model"]),
            "embedding": build(EmbeddingConfig, data["embedding"]),
            "optimizer": build(OptimizerConfig, data["optimizer"]),
        }
        return build(TrainConfig, {**data, **parts})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"not the configuration of a run of this version ({error})") from None
