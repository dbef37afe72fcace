"""Click logs in Criteo's raw format, drawn from a known law, so that the best possible score is known.

The rows are independent. The 26 categories of a row are ranks drawn from bounded Zipf laws, its 13 counts
have heavy tails, and it is clicked with probability sigmoid(logit), where

    logit = bias + dense part + sum_f effect[f, rank_f] + sum_{f<g} <latent[f, rank_f], latent[g, rank_g]>

that is, a linear model plus a factorisation machine (Rendle 2010). The columns are independent, and the
latent vectors have mean zero over the rows, so single columns say nothing of the sum over pairs: a model has
to learn embeddings and multiply them. The parameters of a category are a hash of (seed, feature, rank), so
memory does not grow with the number of categories or of rows.

With `bags`, some of the columns hold bags of up to BAG_IDS categories, whose effects and latent vectors are
added up, or averaged as the column has it. The files are then tables, with a header, and `schema.toml` beside
them says what their columns are.

`synthetic.json` beside the files tells the AUC and the log loss of the true probabilities on them. Apart from
chance, no model can do better.
"""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_pipeline.appearing import appearing
from data_pipeline.dialects import fmix32
from data_pipeline.schema import CRITEO, CRITEO_KAGGLE_CARDINALITIES, DataError, Pooling
from data_pipeline.whole_files import new_file, write_json, write_whole

FIGURES = "synthetic.json"
SCHEMA = "schema.toml"  # of files with bags
NOTE = "synthetic data: no click is real; the figures are those of the probabilities that drew the labels"

CHUNK_ROWS = 1 << 13  # each chunk has its own random stream, so another size would give another log
SAMPLE_CHUNKS = 32  # 2^18 rows set the bias; they leave the base rate a relative error of about 0.3%
AUC_BINS, AUC_LIMIT = 1 << 20, 32.0  # bins of logits from -32 to 32, each 6e-5 wide

MIN_CARDINALITY = 100  # so that a small scale does not make every feature trivial
# The features with latent vectors. Spread over all 325 pairs, the same variance is too thin to be learned.
PAIRED = slice(0, 26, 4)

# The features that are bags, if any are, and how many ids such a bag has at most: all numbers are as likely.
BAGS: dict[int, Pooling] = {0: "sum", 2: "mean", 4: "mean", 10: "sum", 12: "sum", 20: "mean"}
BAG_IDS = 5

# Median and spread of log(count), and the percentage of empty cells, close to Criteo Kaggle's. The widest
# spreads are narrowed: the logistic law has longer tails than the real counts.
LOG_MEDIAN = np.array([0.4, 1.3, 2.0, 1.5, 7.8, 3.7, 1.3, 2.0, 3.7, -0.7, 0.4, -0.7, 1.7])
LOG_SPREAD = np.array([0.9, 1.2, 1.0, 0.6, 1.2, 1.2, 1.2, 0.9, 1.1, 0.5, 0.7, 0.5, 0.8])
DENSE_MISSING = np.array([45, 0, 21, 22, 3, 22, 4, 0, 4, 45, 4, 77, 22])
IDS_MISSING = np.array([0, 0, 3, 3, 0, 12] + 5 * [0] + [3, 0, 0, 0, 3, 0, 0, 44, 44, 3, 76, 0, 3, 44, 44])
LOWEST = np.array([0, -3] + 11 * [0])  # Criteo's second count starts below zero
LARGEST = 2**31 - 1

# The two characters of each byte in hexadecimal, as one number: (256,) uint16.
HEX = np.frombuffer(bytes(range(256)).hex().encode(), np.uint16)

# Beyond these the arithmetic of the law breaks down, or there is nothing left to learn.
LIMITS = {
    "scale": (1e-9, LARGEST // max(CRITEO_KAGGLE_CARDINALITIES)),
    "base_rate": (1e-4, 0.9999),
    "zipf": (0, 10),
    "decay": (0, 10),
    "dense": (0, 100),
    "effects": (0, 100),
    "pairs": (0, 100),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class SyntheticConfig:
    out: Path
    """Folder to write; it must not exist yet, or be empty."""
    rows: int = 1_000_000
    """Rows in all; where they do not divide, the first days get one more."""
    days: int = 7
    """Number of files: day_0, day_1, ..."""
    scale: float = 0.001
    """Number of categories per feature, as a multiple of Criteo Kaggle's (33,762,577 in all)."""
    base_rate: float = 0.25
    """Share of clicks: 0.25 is like Criteo Kaggle, 0.032 like Criteo Terabyte."""
    zipf: float = 1.2
    """Exponent of the Zipf laws; a larger one puts more rows on the frequent categories."""
    decay: float = 0.5
    """The parameters of a category shrink as rank^-decay, as those of rare categories cannot be learned."""
    dense: float = 0.3
    """Standard deviation of the logit over the rows, as far as it comes from the counts."""
    effects: float = 1.1
    """The same, as far as it comes from single categories."""
    pairs: float = 0.8
    """The same, as far as it comes from pairs of categories."""
    seed: int = 0
    """Draws the law as well as the rows; the same settings give the same bytes."""
    gzip: bool = False
    """Write day_N.gz instead of day_N."""
    bags: bool = False
    """Write day_N.tsv, tables some of whose columns hold bags of categories, and their schema.toml."""


class Chunk(NamedTuple):
    """Rows before they become text."""

    label: np.ndarray  # (rows,) bool
    dense: np.ndarray  # (rows, 13) float64, whole numbers, NaN where missing
    # 1 for the most frequent category of a feature, 0 where missing: (rows, 26) uint32; with bags
    # (rows, BAG_IDS, 26), in which all but the first of a feature that is no bag are 0.
    ranks: np.ndarray
    logit: np.ndarray  # (rows,) float64, of the true probability


class Law:
    """The law of the rows: `draw` gives rows, `values` the 32 bits that stand for a rank in the files.

    Raises DataError for settings that no log can have.
    """

    def __init__(self, config: SyntheticConfig):
        kaggle = np.array(CRITEO_KAGGLE_CARDINALITIES)
        for name, (least, most) in LIMITS.items():
            if not least <= (value := getattr(config, name)) <= most:
                raise DataError(f"--{name} {value}: must be from {least} to {most}".replace("_", "-"))
        floor = np.minimum(kaggle, MIN_CARDINALITY)
        self.cardinalities = np.maximum(kaggle * config.scale, floor).astype(np.int64)
        self.zipf, self.decay, self.seed = config.zipf, config.decay, config.seed
        words = self._stream(0)
        self.dense_weights = words.random_raw(13).view(np.int64) / 2.0**63  # in [-1, 1)
        self.parameter_keys = words.random_raw(26)
        self.value_keys = (words.random_raw(26) >> np.uint64(32)).astype(np.uint32) | np.uint32(1 << 31)

        # A sample sets what depends on the laws of all columns: means, deviations and the base rate.
        sample = [self._columns(self._stream(1, i), CHUNK_ROWS) for i in range(SAMPLE_CHUNKS)]
        self.centre = np.mean([self._parameters(ranks).mean(axis=0) for *_, ranks in sample], axis=0)
        parts = np.concatenate([self._parts(dense, ranks) for _, dense, ranks in sample])
        self.part_weights = np.array([config.dense, config.effects, config.pairs]) / parts.std(axis=0)
        self.bias = bias_of(parts @ self.part_weights, config.base_rate)

    def draw(self, rows: int, *key: int) -> Chunk:
        """The rows that belong to a key, any tuple of integers from 0 on: the same key, the same rows."""
        uniform, dense, ranks = self._columns(self._stream(2, *key), rows)
        logit = self._parts(dense, ranks) @ self.part_weights + self.bias
        return Chunk(uniform < sigmoid(logit), dense, ranks, logit)

    def values(self, ranks: np.ndarray) -> np.ndarray:
        """The hash values (..., 26) uint32 of ranks (..., 26): distinct in each feature, and never 0.

        `fmix32` is one to one and maps only 0 to 0. It never sees a 0, as the top bit is set in every key and
        in no rank.
        """
        return fmix32(ranks ^ self.value_keys)

    def _stream(self, *key: int) -> np.random.PCG64:
        return np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key))

    def _columns(self, stream: np.random.PCG64, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A uniform number (rows,) to draw the label with, the counts (rows, 13), the ranks (rows, 26)."""
        # One word per column: 40 bits say how large it is, the other 24 whether it is missing.
        words = stream.random_raw((rows, 40))
        uniform = ((words >> np.uint64(24)) + 0.5) / 2.0**40
        percent = (words & np.uint64(0xFFFFFF)) * (100 / 2**24)
        missing = percent < np.concatenate([[0], DENSE_MISSING, IDS_MISSING])
        dense = counts_of(uniform[:, 1:14])
        dense[missing[:, 1:14]] = np.nan
        ranks = zipf_ranks(uniform[:, 14:], self.cardinalities, self.zipf)
        ranks[missing[:, 14:]] = 0
        return uniform[:, 0], dense, ranks

    def _parameters(self, ranks: np.ndarray) -> np.ndarray:
        """Effect (1) and latent vector (3) of each category, before centring: (..., 26, 1 + 3) float32."""
        # The 64 bits of one hash are the four numbers of one category.
        words = _mix(ranks * np.uint64(0x9E3779B97F4A7C15) + self.parameter_keys)
        numbers = words.astype("<u8", copy=False).view("<i2").reshape(*ranks.shape, 4)
        strength = np.maximum(ranks, 1).astype(np.float32) ** np.float32(-self.decay) / np.float32(1 << 15)
        return numbers * strength[..., None]

    def _parts(self, dense: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """What counts, categories and pairs add to the logit, before scaling: (rows, 3) float64."""
        parameters = self._parameters(ranks) - self.centre
        effects, latent = parameters[:, :, 0], parameters[:, PAIRED, 1:]
        counts = np.log1p(np.maximum(np.nan_to_num(dense), 0)) @ self.dense_weights
        # sum_{f<g} <u_f, u_g> = (|sum_f u_f|^2 - sum_f |u_f|^2) / 2
        pairs = ((latent.sum(axis=1) ** 2).sum(axis=1) - (latent**2).sum(axis=(1, 2))) / 2
        return np.stack([counts, effects.sum(axis=1), pairs], axis=1, dtype=np.float64)


class BagLaw(Law):
    """The law of rows of which the features in BAGS are bags."""

    def _columns(self, stream: np.random.PCG64, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As without bags, but ranks (rows, BAG_IDS, 26): those of a bag are its first ones, the others 0."""
        uniform, dense, single = super()._columns(stream, rows)
        features = list(BAGS)
        numbers = (stream.random_raw((rows, 1 + BAG_IDS, len(features))) >> np.uint64(24)) / 2.0**40
        there = np.arange(BAG_IDS)[:, None] < np.floor(numbers[:, :1] * (BAG_IDS + 1))
        ranks = np.zeros((rows, BAG_IDS, single.shape[1]), np.uint32)
        ranks[:, 0] = single
        ranks[:, :, features] = zipf_ranks(numbers[:, 1:], self.cardinalities[features], self.zipf) * there
        return uniform, dense, ranks

    def _parameters(self, ranks: np.ndarray) -> np.ndarray:
        """Those of each feature, pooled over its bag: (rows, 26, 1 + 3) float32."""
        share = (ranks > 0).astype(np.float32)
        for feature, pooling in BAGS.items():
            if pooling == "mean":
                share[:, :, feature] /= np.maximum(1, share[:, :, feature].sum(axis=1, keepdims=True))
        single = np.delete(np.arange(ranks.shape[2]), list(BAGS))
        share[:, 0, single] = 1  # a missing category has parameters too
        return (super()._parameters(ranks) * share[..., None]).sum(axis=1)


def write(config: SyntheticConfig, progress: Callable[[int, int], None] | None = None) -> dict:
    """Write the files and `synthetic.json` to the folder `config.out`, and return what the latter holds.

    progress: called with the rows done and the rows in all, after each chunk.

    The folder appears whole or not at all. The bytes depend on nothing but the settings (and on how the
    machine's NumPy rounds exp and log, which moves a count or a label once in a great many rows).
    Raises DataError if the settings are unusable or the folder is taken.
    """
    if not 1 <= config.days <= config.rows // 2:
        raise DataError(f"rows {config.rows}, days {config.days}: there must be a day, and two rows in each")
    law = (BagLaw if config.bags else Law)(config)
    suffix = ".tsv" * config.bags + ".gz" * config.gzip
    files, done = {}, 0
    with appearing(config.out, lambda: done / config.rows) as folder:
        for day, day_rows in enumerate(_shares(config.rows, config.days)):
            path = folder / f"day_{day}{suffix}"
            halves = []
            with _create(path, config.gzip) as file:
                if config.bags:
                    file.write(("\t".join(CRITEO.columns) + "\n").encode())
                for half, rows in enumerate(_shares(day_rows, 2)):
                    tally = _Tally()
                    for start in range(0, rows, CHUNK_ROWS):
                        chunk = law.draw(min(CHUNK_ROWS, rows - start), day, half, start)
                        file.write(to_text(chunk, law.values(chunk.ranks)))
                        tally.add(chunk.label, chunk.logit)
                        done += len(chunk.label)
                        if progress is not None:
                            progress(done, config.rows)
                    halves.append(tally)
            first, second = halves
            files[path.name] = {
                "bytes": path.stat().st_size,
                "all": (first + second).figures(),
                "first_half": first.figures(),
                "second_half": second.figures(),
            }
        settings = {name: value for name, value in asdict(config).items() if name != "out"}
        if config.bags:
            write_whole(folder / SCHEMA, schema_text())
        else:  # as before there were any
            del settings["bags"]
        report = {"note": NOTE, "config": settings, "files": files}
        write_json(folder / FIGURES, report)
    return report


def schema_text() -> str:
    """The schema of files with bags, as TOML."""
    names = [CRITEO.categorical[feature] for feature in BAGS]
    return "\n".join(
        [
            'name = "synthetic bags"',
            f'label = "{CRITEO.label}"',
            f"dense = {list(CRITEO.dense)}",
            "[categorical]",
            *(f'{name} = "hex"' for name in CRITEO.categorical),
            "[bags]",
            *(f'{name} = {{ pooling = "{BAGS[f]}" }}' for name, f in zip(names, BAGS, strict=True)),
            "",
        ]
    )


def to_text(chunk: Chunk, values: np.ndarray) -> bytes:
    """The lines of a chunk whose categories have the given hash values, uint32 of the shape of its ranks.

    Every number is set in a field of 12 bytes: sign, or | between the ids of a bag, ten digits, tab. What a
    number does not fill stays a zero byte, and all of these go at the end.
    """
    rows, each = len(chunk.label), chunk.ranks.size // max(1, 26 * len(chunk.label))
    ranks, values = (
        array.reshape(rows, each, 26).swapaxes(1, 2).reshape(rows, 26 * each)
        for array in (chunk.ranks, values)
    )
    cells = np.zeros((rows, 14 + 26 * each, 12), np.uint8)
    cells[:, 0, 10] = ord("0") + chunk.label

    missing = np.isnan(chunk.dense)
    rest = np.abs(np.where(missing, 0, chunk.dense)).astype(np.uint32)
    cells[:, 1:14, 0] = np.where(chunk.dense < 0, ord("-"), 0)
    cells[:, 1:14, 10] = np.where(missing, 0, ord("0") + rest % 10)
    for digit in range(9, 0, -1):
        rest //= 10
        cells[:, 1:14, digit] = np.where(rest > 0, ord("0") + rest % 10, 0)

    octets = values.astype(">u4").view(np.uint8).reshape(rows, 26 * each, 4)
    cells[:, 14:, 0] = np.where(np.arange(26 * each) % each > 0, ord("|"), 0)
    cells[:, 14:, 3:11] = HEX[octets].view(np.uint8)
    cells[:, 14:][ranks == 0] = 0

    cells[:, :14, 11] = cells[:, 13 + each :: each, 11] = ord("\t")
    cells[:, -1, 11] = ord("\n")
    return cells.tobytes().translate(None, b"\0")


def counts_of(uniform: np.ndarray) -> np.ndarray:
    """The counts (rows, 13) float64 that uniform numbers (rows, 13) stand for, none of them missing."""
    # The log of the odds of a uniform number is logistic, so the count's log is, too.
    odds = uniform / (1 - uniform)
    return np.minimum(np.floor(np.exp(LOG_MEDIAN) * odds**LOG_SPREAD) + LOWEST, LARGEST)


def zipf_ranks(uniform: np.ndarray, cardinalities: np.ndarray, exponent: float) -> np.ndarray:
    """Ranks 1 ... cardinality, P(rank) ~ rank^-exponent, as uint32, from uniform numbers (rows, features).

    There is no table: the numbers go through the inverse distribution function of the continuous power law on
    [1/2, cardinality + 1/2] and are rounded. So rank k has the mass of [k - 1/2, k + 1/2], which differs from
    k^-exponent by a factor of 1 + O(1/k^2).
    """
    power = 1 - exponent or 1e-6  # exponent 1 has a logarithm here, the limit for small powers
    low, high = 0.5**power, (cardinalities + 0.5) ** power
    position = (low + uniform * (high - low)) ** (1 / power)
    return np.clip(np.rint(position), 1, cardinalities).astype(np.uint32)


class _Tally:
    """Sums from which AUC, log loss and base rate follow, in memory that does not grow with the rows."""

    def __init__(self):
        self.counts = np.zeros((2, AUC_BINS), np.int64)  # of negatives and positives, per bin of the logit
        self.loss = 0.0

    def add(self, label: np.ndarray, logit: np.ndarray) -> None:
        """Take in rows: label (rows,) bool, logit (rows,) float64."""
        bins = ((logit / AUC_LIMIT + 1) / 2 * AUC_BINS).clip(0, AUC_BINS - 1).astype(np.int64)
        np.add.at(self.counts, (label.astype(np.int64), bins), 1)
        self.loss += float(np.logaddexp(0, np.where(label, -logit, logit)).sum())

    def __add__(self, other: "_Tally") -> "_Tally":
        total = _Tally()
        total.counts, total.loss = self.counts + other.counts, self.loss + other.loss
        return total

    def figures(self) -> dict:
        """Rows, AUC (None if all labels are the same), log loss and base rate.

        Two rows in one bin count as a tie, which puts the AUC off by at most half the share of such pairs:
        less than 1e-5, unless the logits are all but equal.
        """
        negatives, positives = self.counts
        rows, clicks = int(self.counts.sum()), int(positives.sum())
        ordered = float(positives @ (np.cumsum(negatives) - negatives / 2))
        return {
            "rows": rows,
            "auc": ordered / (clicks * (rows - clicks)) if 0 < clicks < rows else None,
            "log_loss": self.loss / rows,
            "base_rate": clicks / rows,
        }


def _shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` as equal as can be, the larger first (as np.array_split cuts)."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _mix(z: np.ndarray) -> np.ndarray:
    """The last step of splitmix64, a bijection that makes counters look random."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def bias_of(logit: np.ndarray, base_rate: float) -> float:
    """What to add to the logits so that the mean of their probabilities is the base rate; by bisection."""
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(logit + middle).mean() < base_rate else (low, middle)
    return middle


@contextmanager
def _create(path: Path, compress: bool) -> Iterator[BinaryIO | gzip.GzipFile]:
    """A new file to write bytes to; gzip stores no name and time, so the same rows give the same bytes."""
    with new_file(path) as file:
        if compress:
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
                yield packed
        else:
            yield file
