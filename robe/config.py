"""The settings of a model and a training run. cli.py makes the command line from these classes."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from robe.errors import RobeError


class ConfigError(RobeError):
    """Settings that cannot be used, or do not fit the data."""


Pooling = Literal["sum", "mean", "max"]


@dataclass(frozen=True)
class DataSpec:
    """What a model has to know of a prepared data set.

    cardinalities: rows a full table would have, per categorical feature.
    dialect: `hash` (ids are raw 32-bit values), `modulo` or `dictionary` (ids are 0 .. cardinality - 1).
    fingerprint: changes with the columns and the meaning of their values.
    note: where the cardinalities come from, in words.
    pooling: how the vectors of the ids that a feature holds become one, per categorical feature; None where
        each feature has one id.
    kept_negatives: the probability with which rows without a click were kept for training, by which
        predictions are corrected; None where all were.
    """

    dense: int
    cardinalities: tuple[int, ...]
    dialect: Literal["hash", "modulo", "dictionary"]
    fingerprint: str
    note: str
    pooling: tuple[Pooling, ...] | None = None
    kept_negatives: float | None = None

    def __post_init__(self):
        if self.kept_negatives is not None and not 0 < self.kept_negatives <= 1:
            raise ConfigError(f"rows are kept with a probability up to 1, not {self.kept_negatives}")
        if self.pooling is not None and len(self.pooling) != len(self.cardinalities):
            raise ConfigError(
                f"there are {len(self.pooling)} ways of pooling for {len(self.cardinalities)} features"
            )
        if not (0 <= self.dense < 2**31 and all(1 <= count < 2**32 for count in self.cardinalities)):
            raise ConfigError("there must be 0 or more dense columns, and from 1 to 2^32 - 1 ids a feature")

    @classmethod
    def of(cls, manifest) -> "DataSpec":
        """That of a prepared folder, from its manifest."""
        ids = manifest.ids
        note = "distinct ids in the data" + ("" if ids.exact else ", estimated")
        note = "ids modulo that per feature" if ids.dialect == "modulo" else note
        dense, pooling = len(manifest.schema.dense), manifest.schema.poolings()
        kept = manifest.keep_negatives if manifest.keep_negatives < 1 else None
        return cls(dense, ids.cardinalities, ids.dialect, manifest.fingerprint(), note, pooling, kept)

    def require(self, fingerprint: str, where: str) -> None:
        """Raise ConfigError unless the data of that fingerprint can be fed to a model of this one's."""
        if fingerprint != self.fingerprint:
            raise ConfigError(
                f"{where}: its columns or ids do not mean what they meant in training; prepare the data as "
                "the training data were (the same --ids, --max-ind-range and --dense; for a dictionary the "
                "same folder)"
            )


@dataclass(frozen=True)
class Method:
    """What the settings have to know of a way to store embeddings.

    file: robe/embeddings/FILE.py declares its arrays and makes it.
    options: the fields of EmbeddingConfig that it uses; others are refused.
    ids: the dialects of ids that it can use.
    halves: whether it is trained in fp16 too; else that is for inference only.
    categorical: whether it uses the categorical features at all.
    captured: whether a step on a GPU can be one CUDA graph.
    averaged: whether the mean of its weights at several steps is the weights of such a model.
    """

    file: str
    options: tuple[str, ...]
    ids: tuple[str, ...] = ("hash", "modulo", "dictionary")
    halves: bool = False
    categorical: bool = True
    captured: bool = True
    averaged: bool = True


CODE_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "int1": 1}  # of a weight, besides scales and biases
LEAN = ("int8", "int4")  # of these, what --master none can train
SIZE = ("weights", "megabytes", "compression")
TABLE = ("init_bound", "memory")
ONE_ARRAY = (*TABLE, "master", "rounding")
SKETCH = ("importance", "half_life")
COUNTED_IDS = ("modulo", "dictionary")  # ids that count from 0, and so can number the rows of a table

METHODS = {
    "robe": Method(
        "robe",
        (*SIZE, *ONE_ARRAY, "block", "hash", "sign", "hash_seed"),
        halves=True,
    ),
    "hot": Method(
        "hot", (*SIZE, *TABLE, "block", "sign", "hash_seed", "hot_share", *SKETCH, "online"), halves=True
    ),
    "full": Method("full", ONE_ARRAY, ids=COUNTED_IDS),
    "mixed_precision": Method(
        "mixed_precision",
        ("init_bound", "bits", "cache", "policy", "rounding"),
        ids=COUNTED_IDS,
        averaged=False,
    ),
    "none": Method("full", (), categorical=False),
    "hashing": Method("modulo", (*SIZE, *ONE_ARRAY)),
    "quotient_remainder": Method("quotient_remainder", (*SIZE, *TABLE, "combine"), ids=COUNTED_IDS),
    # The order of ids modulo a number says nothing of their frequency.
    "frequency": Method("frequency", (*SIZE, *ONE_ARRAY), ids=("dictionary",)),
    # CuPy computes its products, by a cuBLAS that cannot be captured.
    "tensor_train": Method("tensor_train", (*SIZE, *TABLE), ids=COUNTED_IDS, captured=False),
    "compositional": Method("compositional", (*SIZE, *ONE_ARRAY, "chunks", "hash_seed")),
    "mixed_dimension": Method("mixed_dimension", (*SIZE, *TABLE, "alpha"), ids=COUNTED_IDS, captured=False),
    "cce": Method("cce", (*SIZE, *TABLE, "chunks", "hash_seed"), ids=COUNTED_IDS, averaged=False),
    # The host has to know how many rows change hands.
    "cafe": Method("cafe", (*SIZE, *TABLE, "hot_share", *SKETCH), captured=False, averaged=False),
    "adaembed": Method("adaembed", (*SIZE, *TABLE, *SKETCH), captured=False, averaged=False),
}
# Methods whose ids have to count from 0.
NUMBERED = tuple(name for name, method in METHODS.items() if "hash" not in method.ids)

# Interaction -> what it uses of ModelConfig besides.
OF_ANY_MODEL = ("preset", "width", "bottom", "top", "dropout", "bottom_dropout")
INTERACTIONS = {"dot": (), "cross": ("cross_layers", "cross_rank"), "none": ()}

SCHEDULE = ("lr", "embedding_lr", "schedule", "warmup_steps", "decay_start", "decay_steps")
DECAY = ("weight_decay", "l2", "embedding_l2")
OF_ANY = (*SCHEDULE, *DECAY, "clip_norm")  # what any optimizer uses of OptimizerConfig
# Optimizer -> what it uses of OptimizerConfig besides, in the order in which its kernels take it.
OPTIMIZERS = {
    "sgd": (),
    "adagrad": ("eps",),
    "rowwise_adagrad": ("eps",),
    "adam": ("beta1", "beta2", "eps"),
    "momentum": ("momentum",),
    "none": ("beta1", "beta2", "eps", "momentum"),  # a converted model keeps the settings it was trained with
}
ADD_UP = ("sgd", "adagrad", "rowwise_adagrad")  # of these, whose steps of several processes can be added up

# Recipe -> its settings, by part. What they leave at its default is that of the preset.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # Ours: few-bit weights (analysis/equal_bytes.py); Adam, a pass with a fresh embedding, and the mean of
    # the weights over the last fifth of it (analysis/recipes.py).
    "best": {
        "embedding": {"memory": "int3"},
        "optimizer": {"optimizer": "adam", "lr": 1e-3},
        "train": {"epochs": 2, "fresh_embeddings": True, "average": 0.9},
    },
    # facebookresearch/dlrm: bench/run_and_time.sh, the reference of MLPerf v1; ids are modulo 40,000,000.
    "mlperf_v1": {
        "model": {"preset": "mlperf"},
        "train": {"eval_every": 102_400, "target_auc": 0.8025},
    },
    # mlcommons/training: recommendation_v2/torchrec_dlrm, the reference of MLPerf v2 (target of its rules).
    # Its data have bags of synthetic ids: data_pipeline/torchrec.py reads them.
    "mlperf_v2": {
        "model": {"preset": "mlperf", "interaction": "cross"},
        "optimizer": {"optimizer": "adagrad", "lr": 0.005},
        "train": {"batch": 65_536, "eval_every": 3_200, "target_auc": 0.80275},
    },
    # facebookresearch/dlrm: bench/dlrm_s_criteo_kaggle.sh.
    "kaggle_dlrm": {"model": {"preset": "kaggle"}},
    # BARS, DLRM_criteo_x1 of 2022 (AUC 0.8138): an evaluation each pass. Left out are its batch norm, the
    # penalty of rows that a batch does not read, and that its rate stays at 1e-6 or more.
    "bars_criteo_x1": {
        "model": {"width": 10, "bottom": (400, 400, 400), "top": (400, 400, 400), "dropout": 0.2},
        "optimizer": {"optimizer": "adam", "lr": 1e-3, "embedding_l2": 1e-5, "schedule": "plateau"},
        "train": {"batch": 4096, "epochs": 100, "eval_every": 8058, "patience": 2},
    },
}

if TYPE_CHECKING:  # a type checker cannot read the keys of a dict
    MethodName = str
    OptimizerName = str
    RecipeName = str
    InteractionName = str
else:
    MethodName = Literal[*METHODS]
    OptimizerName = Literal[*OPTIMIZERS]
    RecipeName = Literal[*RECIPES]
    InteractionName = Literal[*INTERACTIONS]
Memory = Literal["fp32", "fp16", "int8", "int4", "int3", "int2", "int1"]


@dataclass(frozen=True)
class EmbeddingConfig:
    method: MethodName = "robe"
    """robe: one shared array read in hashed blocks; hot: such an array, and rows of their own for the most
    frequent values; full: one table per feature; mixed_precision: such tables in few bits, and a cache of
    float32 rows in which they are trained; none: no categorical features at all, a baseline. Rivals of robe:
    hashing: ids modulo the rows of a smaller table; quotient_remainder: two rows make a vector; frequency:
    rare values share a row; tensor_train: a vector is a product of three small matrices; compositional: each
    chunk of a vector is hashed by itself; mixed_dimension: rows are the shorter the more ids a feature has;
    cce: each chunk is the sum of a row that is learned by clustering and a hashed one; cafe: ids that a
    sketch finds to be hot have rows of their own, all others are hashed; adaembed: only such ids have rows,
    all others of a feature share one. Data prepared with --ids dictionary are needed by full,
    mixed_precision, quotient_remainder, frequency, tensor_train, mixed_dimension and cce. An option below
    that the method does not use is refused."""

    weights: int | None = None
    """Number of weights to store (M); rivals of robe store at most so many. Give one of weights,
    megabytes and compression."""

    megabytes: float | None = None
    """Instead of their number, the size of the stored weights in MB (10^6 bytes)."""

    compression: float | None = None
    """Instead of their number, how many times fewer they are than the rows * D of the full table. Default:
    100."""

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

    memory: Memory = "fp32"
    """What a weight is stored in. fp16, of robe, takes 2 bytes instead of 4; it is read as float32, and
    rounded at random when a step has changed it, up or down so that its mean is right. int8 to int1 are
    codes of so many bits, with a scale and a bias for 64 weights of robe or for a row of a table. Look-ups
    read the codes in training too, and steps change float32 weights behind them, which only training holds
    (--master). `convert` keeps the codes alone, and makes codes, or fp16 of any method, from other runs, for
    inference. mixed_precision has --bits instead."""

    master: Literal["fp32", "none"] = "fp32"
    """What stands behind the codes of int8 and int4 in training. fp32: weights that steps change, and whose
    codes look-ups read. none: nothing, and training takes few bytes too: a step changes the codes of the
    groups that it touches, rounded as --rounding says. Adagrad then keeps one sum for a group."""

    bits: Literal[4, 8, 16] = 8
    """Bits of a weight of mixed_precision: 4 or 8, with a scale and a bias per row, or 16 (a half)."""

    cache: float | None = None
    """Size of mixed_precision's cache as a share of all rows, 0 for none. Default: 0.01 with 4 bits, else
    0.05."""

    policy: Literal["lru", "lfu"] = "lfu"
    """Which row of a full set leaves the cache: the one used least recently, or least often since it came.
    lfu keeps the frequent rows where a batch wants more rows than the cache holds; lru follows a drift."""

    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How mixed_precision and --master none round: at random, so that the mean is right, or to the nearest,
    which loses small steps."""

    combine: Literal["multiply", "add"] = "multiply"
    """What quotient_remainder does to its two rows."""

    chunks: int = 4
    """Chunks of a vector of compositional and cce, each of D / chunks elements."""

    alpha: float = 0.3
    """How fast the width of the rows of mixed_dimension falls with the ids n of a feature: as n^-alpha. From
    0, all rows alike short, to 1."""

    hot_share: float | None = None
    """Share of the weights of hot that are rows of the most frequent values; of cafe, the sketch that finds
    them is in it. Default: 0.5 at a compression of 10 or less, 0.7 at 100, 0.8 at 1000, 0.9 at 10000 or more,
    and numbers between these between."""

    importance: Literal["gradient", "count"] = "gradient"
    """What makes an id hot: the norms of the gradients of its look-ups, or how many there were."""

    half_life: int = 1000
    """Steps after which a look-up counts half as much for what is hot."""

    online: bool = False
    """Find the ids of hot in the stream, by a sketch, although a dictionary knows the frequent ones. Without
    a dictionary it is always so."""


@dataclass(frozen=True)
class ModelConfig:
    preset: Literal["small", "kaggle", "tb10m", "mlperf"] = "small"
    """Sizes and recipe: small (the demonstration), kaggle (DLRM on Criteo Kaggle), tb10m (Criteo
    Terabyte, 10 million rows a table), mlperf (MLPerf v1). Options that you give besides override it."""

    width: int | None = None
    """Embedding width D."""

    bottom: tuple[int, ...] | None = None
    """Hidden layers of the bottom MLP; a last layer of width D follows."""

    top: tuple[int, ...] | None = None
    """Hidden layers of the top MLP; a last layer of width 1 follows."""

    dropout: float = 0.0
    """Share of the activations of the hidden layers of the top MLP that a training step drops, other ones at
    each step."""

    bottom_dropout: float = 0.0
    """The same of the bottom MLP."""

    interaction: InteractionName = "dot"
    """What the top MLP reads of the vectors of a row. dot: vector 0, of the bottom MLP, and the products of
    all pairs, as in the DLRM; cross: what the low-rank cross network of DCN v2 makes of all vectors, one
    behind the other, as in MLPerf v2; none: these vectors themselves."""

    cross_layers: int = 3
    """Layers of the cross network."""

    cross_rank: int = 512
    """Rank of the matrices of the cross network."""


@dataclass(frozen=True)
class OptimizerConfig:
    optimizer: OptimizerName | None = None
    """sgd, adagrad, rowwise_adagrad, which keeps one sum for a row of a table or 64 weights of robe, or adam
    and momentum (SGD's), which step of the embedding only the weights that a batch reads; none: a model that
    was converted for inference, and is not trained further."""

    lr: float | None = None
    """Learning rate."""

    embedding_lr: float | None = None
    """Learning rate of the embedding, which follows the same schedule. Default: --lr."""

    eps: float = 1e-8
    """Adagrad's and Adam's eps."""

    beta1: float = 0.9
    """How much of the mean of the gradients Adam keeps in a step."""

    beta2: float = 0.999
    """How much of the mean of their squares Adam keeps in a step."""

    momentum: float = 0.9
    """How much of its velocity v momentum keeps in a step: v = momentum * v + gradient, and the weight loses
    lr * v."""

    weight_decay: float = 0.0
    """Share of each weight that a step takes away, times the rate (decoupled, as AdamW's); of the embedding
    from weights that the batch reads, each once a step."""

    l2: float = 0.0
    """L2 penalty of the MLPs: so much times each weight is added to its gradient."""

    clip_norm: float | None = None
    """Longest gradient of all weights of the MLPs together; a longer one is shortened to it."""

    embedding_l2: float = 0.0
    """L2 penalty of the embedding, of the weights that a batch reads, each once a step."""

    schedule: Literal["polynomial", "linear", "cosine", "plateau", "constant"] = "polynomial"
    """How the rate falls, by the share s of --decay-steps that remains: polynomial: as s^2, and only where
    --decay-start is given (MLPerf's); linear: as s; cosine: as (1 - cos(pi s)) / 2. Without --decay-start,
    linear and cosine fall from the end of the warm-up to that of the training. plateau: to a tenth after each
    evaluation whose AUC is not above all before. constant: never."""

    warmup_steps: int = 0
    """Number of steps over which the rate rises linearly to --lr."""

    decay_start: int | None = None
    """Step at which the rate begins to fall."""

    decay_steps: int = 0
    """Number of steps over which the rate falls to 0, as --schedule says."""


@dataclass(frozen=True)
class TrainConfig:
    model: ModelConfig = ModelConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    batch: int | None = None
    """Rows per training step."""

    epochs: int = 1
    """Passes over the training days."""

    limit_rows: int | None = None
    """Train on the first so many of the training rows only, for a quick look. Evaluations are as ever."""

    loss: Literal["bce", "mse"] = "bce"
    """What training makes small. bce: the binary cross entropy; mse: the square of label less probability, as
    the debug runs of facebookresearch/dlrm. Metrics are the same."""

    teacher: str | None = None
    """A run of a larger model, trained on the same data, whose probabilities the model learns besides the
    clicks. They are computed once and kept beside the shards. The folder of the run is what is given; the
    settings of a run hold a digest of its teacher's weights instead."""

    teacher_weight: float = 0.9
    """How much the teacher's probabilities count in what is learned; the clicks count for the rest."""

    fresh_embeddings: bool = False
    """Begin each pass with new initial weights of the embedding, and new sums of its optimizer, while the
    MLPs go on: in later passes it would otherwise learn the training rows by heart."""

    recipe: RecipeName | None = None
    """A recipe, for all that you leave at its default: best (ours: few-bit weights, Adam, a second pass with
    a fresh embedding, and the mean of the last weights), or a published one: mlperf_v1 (MLPerf's reference:
    SGD 1.0, batch 2048, to an AUC of 0.8025), mlperf_v2 (its DCN v2: a cross network, Adagrad 0.005, batch
    65536, to 0.80275), kaggle_dlrm (facebookresearch/dlrm on Criteo Kaggle: SGD 0.1, batch 128),
    bars_criteo_x1 (BARS' DLRM on Criteo_x1: Adam, L2 of the embedding, dropout, falls of the rate on a
    plateau and patience, but no batch norm). Sources: docs/methods.md."""

    average: float | None = None
    """Average the weights from this share of the steps on: 0.5 for the second half of the training. The mean,
    of up to 200 steps at even distances, the last one among them, is evaluated at the end besides the last
    weights, and is the model of the folder RUN/averaged."""

    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""

    eval_every: int | None = None
    """Steps between evaluations on the validation half; default: 10 per epoch."""

    checkpoint_every: int | None = None
    """Steps between checkpoints; default: at every evaluation."""

    target_auc: float | None = None
    """Stop when the validation AUC reaches this."""

    patience: int | None = None
    """Stop after so many evaluations in a row without a better validation AUC. The weights of the best
    evaluation are then those of the model: they are kept, tested and reported."""

    staleness: int = 0
    """Where several processes (mpiexec) train tables (--method full) by SGD or Adagrad: how many steps of the
    others a row may lack that one of them reads. Each then steps the rows that it reads by itself, and a row
    is exchanged before it would lack more, so that fewer bytes travel. 0: all gradients are exchanged at each
    step. One process lacks nothing."""

    backend: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    """Where to compute: auto (a GPU if there is one, else cpu), reference (NumPy only), cpu, cuda."""

    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """What the matrix products of the dense layers are computed in; in bf16 activations and their gradients
    are kept so, too. All else stays float32. Without a GPU, tf32 and bf16 are emulated: slow, but they show
    what the precision does to the AUC."""

    deterministic: bool = False
    """On a GPU, add up gradients in a way that no order of additions changes, so that training repeats bit
    for bit; it takes twice the memory of the embedding's weights besides. On a CPU it always does."""


PARTS = ("model", "embedding", "optimizer")  # of a TrainConfig
# Of its settings, those that came after the format of checkpoints.
LATER = (
    *("fresh_embeddings", "patience", "teacher", "teacher_weight"),
    *("hot_share", *SKETCH, "online", "alpha", "master"),
    *("embedding_lr", "schedule", "average", "beta1", "beta2", "momentum", *DECAY, "clip_norm"),
    *("dropout", "bottom_dropout", "recipe", "limit_rows"),
    *("interaction", "cross_layers", "cross_rank", "loss", "staleness"),
)


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
MOST_WEIGHTS = 2**48  # of an embedding
LARGEST_LAYER = 2**20  # numbers that a layer or a vector has

# Settings that must be positive where they are given.
POSITIVE = {
    *("batch", "epochs", "eval_every", "checkpoint_every", "patience", "width", "bottom", "top", "lr", "eps"),
    *("embedding_lr", "clip_norm", "limit_rows"),
    *("weights", "megabytes", "compression", "block", "init_bound", "chunks", "half_life"),
}


def used_data(config: TrainConfig, data: DataSpec) -> DataSpec:
    """What the method of a configuration sees of the data."""
    if METHODS[config.embedding.method].categorical:
        return data
    return dataclasses.replace(data, cardinalities=(), note="no categorical features", pooling=None)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill what was left open from the recipe and the preset; raises ConfigError for values out of range."""
    config = follow(config)
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
                if value is not None and not 0 < value < math.inf:
                    raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {value}")
    for name, value, least, most in (
        ("seed", config.seed, 0, 2**63 - 1),
        ("hash-seed", config.embedding.hash_seed, 0, 2**63 - 1),
        ("batch", config.batch, 1, 2**31 - 1),
        ("epochs", config.epochs, 1, 2**31 - 1),
        ("eval-every", config.eval_every or 1, 1, 2**63 - 1),
        ("checkpoint-every", config.checkpoint_every or 1, 1, 2**63 - 1),
        ("teacher-weight", config.teacher_weight, 0, 1),
        ("patience", config.patience or 1, 1, 2**63 - 1),
        ("limit-rows", config.limit_rows or 1, 1, 2**63 - 1),
        ("staleness", config.staleness, 0, 2**31 - 1),
        ("average", config.average or 0, 0, 1),
        ("dropout", model.dropout, 0, 0.99),
        ("bottom-dropout", model.bottom_dropout, 0, 0.99),
        ("width", model.width, 1, LARGEST_LAYER),
        ("bottom", max(model.bottom, default=1), 1, LARGEST_LAYER),
        ("top", max(model.top, default=1), 1, LARGEST_LAYER),
        ("cross-layers", model.cross_layers, 1, 1000),
        ("cross-rank", model.cross_rank, 1, LARGEST_LAYER),
        ("weights", config.embedding.weights or 1, 1, MOST_WEIGHTS),
        ("megabytes", config.embedding.megabytes or 1, 0, 4 * MOST_WEIGHTS / 1e6),
        ("block", config.embedding.block, 1, MOST_WEIGHTS),
        ("chunks", config.embedding.chunks, 1, LARGEST_LAYER),
        ("alpha", config.embedding.alpha, 0, 1),
        ("half-life", config.embedding.half_life, 1, 2**31 - 1),
        # Larger numbers are endless in float32, and smaller ones 0.
        ("init-bound", config.embedding.init_bound or 1, 0, 1e38),
        ("lr", optimizer.lr, 0, 1e38),
        ("embedding-lr", optimizer.embedding_lr or 1, 0, 1e38),
        ("eps", optimizer.eps, 1e-37, 1e38),
        *((name.replace("_", "-"), getattr(optimizer, name), 0, 1e38) for name in DECAY),
        ("warmup-steps", optimizer.warmup_steps, 0, 2**63 - 1),
        ("decay-start", optimizer.decay_start or 0, 0, 2**63 - 1),
        ("decay-steps", optimizer.decay_steps, 0, 2**63 - 1),
        ("target-auc", config.target_auc or 1, 0, 1),
        ("cache", config.embedding.cache or 0, 0, 1),
        ("hot-share", config.embedding.hot_share or 0, 0, 1),
    ):
        if not least <= value <= most:
            raise ConfigError(f"--{name} must be from {least} to {most}, not {value}")
    if optimizer.decay_start is not None and optimizer.decay_steps < 1:
        raise ConfigError("--decay-start needs --decay-steps, the number of steps the rate takes to reach 0")
    if optimizer.decay_start is None and optimizer.decay_steps:
        raise ConfigError("--decay-steps needs --decay-start, the step at which the rate begins to fall")
    if (model.dropout or model.bottom_dropout) and config.precision == "bf16":
        raise ConfigError("--dropout and --bottom-dropout are not for --precision bf16; use tf32 or fp32")
    for name in ("beta1", "beta2", "momentum"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise ConfigError(f"--{name} must be at least 0, and less than 1, not {getattr(optimizer, name)}")
    falls = {"constant": "never falls", "plateau": "falls where the AUC does not rise"}
    if optimizer.schedule in falls and optimizer.decay_start is not None:
        how = f"--schedule {optimizer.schedule} {falls[optimizer.schedule]}"
        raise ConfigError(f"{how}; leave out --decay-start and --decay-steps")
    if config.teacher is None and config.teacher_weight != TrainConfig.teacher_weight:
        raise ConfigError(f"--teacher-weight {config.teacher_weight} needs --teacher, the run that teaches")
    if config.teacher is not None and config.loss != "bce":
        raise ConfigError(
            f"--loss {config.loss} is not for --teacher, whose probabilities are learned by bce"
        )
    if config.fresh_embeddings and config.epochs < 2:
        raise ConfigError("--fresh-embeddings needs --epochs of 2 or more; those of the first pass are fresh")
    for trouble in (no_mean(config), no_staleness(config)):
        if trouble is not None:
            raise ConfigError(trouble)
    refuse_unused(model, "interaction", {name: (*OF_ANY_MODEL, *own) for name, own in INTERACTIONS.items()})
    refuse_unused(config.embedding, "method", {name: method.options for name, method in METHODS.items()})
    require_lean(config.embedding)
    refuse_unused(optimizer, "optimizer", {name: (*OF_ANY, *own) for name, own in OPTIMIZERS.items()})
    return config


def follow(config: TrainConfig) -> TrainConfig:
    """The settings of a recipe for all that are at their defaults.

    With another optimizer than the recipe's, its rate is not taken, nor an average where there can be none.
    """
    recipe, chosen = RECIPES.get(config.recipe or "", {}), config.optimizer.optimizer
    if chosen not in (None, recipe.get("optimizer", {}).get("optimizer")):
        recipe = {part: values for part, values in recipe.items() if part != "optimizer"}
    followed = with_defaults(config, recipe)
    return dataclasses.replace(followed, average=config.average) if no_mean(followed) else followed


def with_defaults(config: TrainConfig, recipe: dict[str, dict[str, Any]]) -> TrainConfig:
    """Settings, in the form of RECIPES, for all that are at their defaults."""

    def filled(part: Any, values: dict[str, Any]) -> Any:
        defaults = vars(type(part)())
        return dataclasses.replace(
            part, **{name: value for name, value in values.items() if getattr(part, name) == defaults[name]}
        )

    parts = {name: filled(getattr(config, name), recipe[name]) for name in PARTS if name in recipe}
    return filled(dataclasses.replace(config, **parts), recipe.get("train", {}))


def no_mean(config: TrainConfig) -> str | None:
    """What is wrong with --average, if anything: of weights that have no mean, or a training of no known
    end."""
    if config.average is None:
        return None
    if config.embedding.master == "none":
        return "--average is for weights, and --master none has codes alone; use --master fp32"
    if not METHODS[config.embedding.method].averaged:
        takers = ", ".join(name for name, method in METHODS.items() if method.averaged)
        return (
            f"--average is not for --method {config.embedding.method}, whose weights are rounded or come to "
            f"stand for other ids; it is for {takers}"
        )
    for name in ("patience", "target_auc"):
        if getattr(config, name) is not None:
            return f"--average has to know where the training ends; leave out --{name.replace('_', '-')}"
    if config.fresh_embeddings and config.average < 1 - 1 / config.epochs:
        return (
            "--average would be of weights before and after --fresh-embeddings drew them anew; begin in the "
            f"last pass, at {1 - 1 / config.epochs:.3g} or later"
        )
    return None


def no_staleness(config: TrainConfig) -> str | None:
    """What is wrong with --staleness, if anything: what processes did to a row has to add up."""
    embedding, optimizer = config.embedding, config.optimizer
    if not config.staleness:
        return None
    if (embedding.method, embedding.memory) != ("full", "fp32"):
        memory = f" --memory {embedding.memory}" if embedding.memory != "fp32" else ""
        return f"--staleness is for --method full in fp32, not for --method {embedding.method}{memory}"
    if optimizer.optimizer not in ADD_UP:
        return (
            f"--staleness is for --optimizer {', '.join(ADD_UP)}, whose steps by several processes add up, "
            f"not for {optimizer.optimizer}"
        )
    if optimizer.weight_decay or optimizer.embedding_l2:
        return (
            "--weight-decay and --embedding-l2 are taken of a row once a step, but with --staleness each "
            "process would take them; leave them out"
        )
    return None


def require_lean(embedding: EmbeddingConfig) -> None:
    """Raise ConfigError for --master none of weights that are not trained in codes, or for --rounding of
    weights that are not rounded in training."""
    if embedding.master == "none" and embedding.memory not in LEAN:
        raise ConfigError(
            f"--master none is for --memory {' and '.join(LEAN)}, not {embedding.memory}: in fewer bits most "
            "steps are lost in the noise of rounding, and other memory has no weights behind it"
        )
    takes = embedding.master == "none" or "bits" in METHODS[embedding.method].options
    if embedding.rounding == "nearest" and not takes:
        raise ConfigError("--rounding nearest is for --method mixed_precision and for --master none")


def refuse_unused(part: Any, kind: str, options: dict[str, Sequence[str]]) -> None:
    """Raise ConfigError for an option that what `part` chooses does not use.

    kind: the field of `part` that chooses; options: choice -> the fields that it uses.
    """
    choice = getattr(part, kind)
    for name, value in unused(part, kind, options[choice]).items():
        option = f"--no-{name}" if value is False else f"--{name.replace('_', '-')} {value}"
        takers = ", ".join(other for other in options if name in options[other] and other != "none")
        raise ConfigError(f"{option} is not for --{kind} {choice}; it is for --{kind} {takers}")


def unused(part: Any, kind: str, used: Sequence[str]) -> dict[str, Any]:
    """Field -> value of what is not among the fields that are `used`, but is set.

    A field counts as set where its value is not the default, so that resolved settings can be resolved again.
    """
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    defaults = vars(type(part)())
    return {
        name: value for name, value in values.items() if name not in (kind, *used) and value != defaults[name]
    }


def require_trainable(config: TrainConfig) -> None:
    """Raise ConfigError for settings that only `convert` can produce: such models are for inference."""
    memory, method = config.embedding.memory, config.embedding.method
    untrained = config.optimizer.optimizer == "none"
    if untrained or (memory == "fp16" and not METHODS[method].halves):
        what = "--optimizer none" if untrained else f"--memory {memory}"
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
        if "block" not in METHODS[config.method].options:  # rows are of many widths, and so are their groups
            raise ConfigError(
                f"--megabytes does not count --memory {config.memory} of --method {config.method}; give "
                "--weights or --compression"
            )
        weights = 64 * (config.megabytes * 1e6 // (8 * CODE_BITS[config.memory] + 4))
    elif config.megabytes is not None:
        weights = config.megabytes * 1e6 / WEIGHT_BYTES[config.memory]
    else:
        weights = sum(cardinalities) * width / (config.compression or DEFAULT_COMPRESSION)
    if weights > MOST_WEIGHTS:
        raise ConfigError(f"an array of {weights:.0f} weights is too large; see what fits with `robe plan`")
    return int(weights)


def robe_weights(config: EmbeddingConfig, width: int, cardinalities: tuple[int, ...]) -> int:
    """Number of weights M of the shared array; raises ConfigError if sizes contradict."""
    weights = budget(config, width, cardinalities)
    if weights < config.block:
        raise ConfigError(
            f"an array of {weights} weights is smaller than one block of {config.block}; "
            "give more weights or a smaller --block"
        )
    return weights


def to_json(config: TrainConfig) -> dict:
    """What `from_json` rebuilds. The files of runs that do not use the settings of LATER are as they were
    before there were any."""

    def kept(part) -> dict:
        defaults = vars(type(part)())
        return {
            name: kept(value) if dataclasses.is_dataclass(value) else value
            for name, value in vars(part).items()
            if name not in LATER or value != defaults[name]
        }

    return kept(config)


def from_json(data: dict) -> TrainConfig:
    """Rebuild a configuration; raises ConfigError where a field is unknown, missing or of another type.

    A run that is older than the refusal of unused options may hold some, which are dropped.
    """

    def used(part, kind, options):
        defaults = vars(type(part)())
        return dataclasses.replace(part, **{name: defaults[name] for name in unused(part, kind, options)})

    try:
        config = msgspec.convert(data, TrainConfig)
        for values, part in ((data, config), *((data[name], getattr(config, name)) for name in PARTS)):
            if unknown := values.keys() - vars(part).keys():
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"not the configuration of a run of this version ({error})") from None
    embedding, optimizer = config.embedding, config.optimizer
    if optimizer.decay_start is None:
        optimizer = dataclasses.replace(optimizer, decay_steps=0)
    options = *OF_ANY, *OPTIMIZERS[optimizer.optimizer or "none"]
    return dataclasses.replace(
        config,
        embedding=used(embedding, "method", METHODS[embedding.method].options),
        optimizer=used(optimizer, "optimizer", options),
    )
