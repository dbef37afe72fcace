"""Embeddings that are one array of weights and a map from (feature, id, element) to a slot of it.

The ROBE array and tables differ only in the map, in the initial weights and in which rows stand for an id.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError, OptimizerConfig
from robe.embeddings.declared import Array, Declared
from robe.kernels.parts.codes import Form, code_bytes
from robe.kernels.parts.groups import expanded, form_of, group_length, quantised, store_groups
from robe.kernels.parts.half import key_from, rounding_key
from robe.kernels.parts.hashing import FAMILIES, SlotMap, slot_map
from robe.optim import RULES, corrections, touched_step

LARGEST_HALF = 65504
FLAWS_AT_ONCE = 2**20  # rows


def check_rows(ids: np.ndarray, rows: np.ndarray | None, features: np.ndarray | None = None) -> None:
    """Raise ConfigError if an id (B, F) is not below rows (F,); None where any id has a row.

    features: of each id, where these are (N, 1).
    """
    if rows is None:
        return
    below = rows if features is None else rows[features][:, None]
    if (ids >= below).any():
        b, column = np.argwhere(ids >= below)[0]
        f = column if features is None else features[b]
        raise ConfigError(
            f"feature {f} has {rows[f]} rows, but an id of the data is {ids[b, column]}; the shards are "
            "not those of the manifest, prepare the data again"
        )


def flawed_codes(table, form: Form, backend: Backend) -> str | None:
    """What is wrong with a table (R, S) of codes: a scale, bias or half that is not finite."""
    for start in range(0, len(table), FLAWS_AT_ONCE):
        rows = table[start : start + FLAWS_AT_ONCE, 0 if form.bits == 16 else code_bytes(form) :]
        halves = np.ascontiguousarray(backend.to_host(rows)).view(np.float16)
        scales = halves[:, :0] if form.bits == 16 else halves[:, :1]
        if (bad := np.flatnonzero(~np.isfinite(halves).all(axis=1) | (scales < 0).any(axis=1))).size:
            return f"row {start + bad[0]} of its codes has a scale, a bias or a half that no training leaves"
    return None


@dataclass
class ArrayEmbedding(Declared):
    """`memory` (M,) read through `slot_map`; a row is token = base[f] + id.

    Where it is trained in codes, `memory` (R, S) is what look-ups read, and gradients go straight through to
    the weights behind it, `master`; after each step the groups that it touched are quantised again. Where
    nothing is behind the codes, a step changes them, rounded as `rounding` says.

    arrays: of Weights.arrays; those besides `memory` are made here.
    weights: how many are stored.
    table_weights: weights of the full table this stands for, and `table_note` says which table that is.
    rows: ids of each feature; None where any 32-bit id has a row.
    row_of: (ids (B, F), features) -> the rows (B, F * chunks) that stand for them; None where they are these
        rows. `features` indexes what it keeps of each feature: it is all of them, a slice, or (N, 1) of ids
        (N, 1), and what it picks broadcasts with the ids.
    chunks: rows that make a vector, one behind the other.
    draw: number of a pass, from 0 on -> its initial weights in pieces, (first slot, (n,) float32); None for
        weights in codes, which a converted checkpoint brings.
    rounding: of codes that are trained alone, stochastic or nearest; else None.
    seed, steps: what halves and codes are rounded by; steps, the updates so far, is set by who resumes a
        training.
    held: what `changing` gives, in arrays (1,) on the device, where an update is to read them there.
    """

    method: str
    memory: Any  # (M,) float, or float16; or (R, S) uint8 of kernels/parts/groups.py
    arrays: dict[str, Array]
    weights: int
    base: Any  # (F,) uint64
    slot_map: SlotMap
    optimizer: OptimizerConfig
    backend: Backend
    table_weights: int
    table_note: str
    rows: np.ndarray | None = None  # (F,)
    row_of: Callable[[Any, Any], Any] | None = None
    chunks: int = 1
    draw: Callable[[int], Iterator[tuple[int, np.ndarray]]] | None = None
    rounding: str | None = None
    seed: int = 0
    steps: int = field(init=False, default=0)
    held: Sequence = field(init=False, default=())
    master: Any = field(init=False, default=None)  # (R, G) float32, the last group filled up; None without
    stepped: Any = field(init=False)  # (M,) the weights that the optimizer steps: `memory`, or of `master`
    lean: Form | None = field(init=False, default=None)  # of codes that are trained alone
    # (M,) sum of squared gradients for Adagrad, or (R,) of groups: of codes that are trained alone, and where
    # the optimizer keeps one for each; else (0,)
    accumulator: Any = field(init=False)
    gradient: Any = field(init=False)  # (M,) scratch, all 0 between steps, where sums come first; else (0,)

    counts_look_ups: ClassVar[bool] = False

    def __post_init__(self):
        self.make_arrays()
        self.origin = self.backend.xp.zeros(self.chunks, "uint64")  # the base of tokens
        # Tokens of tables are their rows, mostly few enough for the kernels that ids have.
        where = self.slot_map
        few = where.family == FAMILIES["table"] and where.memory // where.width < 2**32
        self.token = "uint32" if few else "uint64"
        self.stepped = self.memory if self.master is None else self.master.reshape(-1)[: self.weights]
        self.rule = RULES[self.optimizer.optimizer]
        self.touched, self.options = touched_step(self.optimizer)
        self.sums = {name: getattr(self, name) for name in self.rule.state}
        self.halves = self.memory.dtype == "float16"
        if self.rounding is not None:
            form = form_of(self.memory, self.slot_map)
            self.lean = form._replace(stochastic=self.rounding == "stochastic")
        # Whether gradients are added to weights at once, with nothing between sum and step; and whether these
        # weights are `memory`, with nothing to do after it.
        self.adds_up = self.touched is None and not self.halves and self.lean is None
        self.adds = self.adds_up and self.master is None
        if self.draw is not None:
            self.begin(0)

    def begin(self, number: int) -> None:
        """Draw the weights that a pass of this number begins with, and forget what the optimizer kept."""
        self.restart(self.draw(number))

    def restart(self, pieces: Iterable[tuple[int, np.ndarray]]) -> None:
        """Go on with other weights, (first slot, (n,)) each, and forget what the optimizer kept."""
        for start, drawn in pieces:
            if self.lean is not None:
                self.write(start, drawn)
                continue
            drawn = drawn.astype(self.stepped.dtype, copy=False)
            self.stepped[start : start + drawn.size] = self.backend.to_device(drawn)
        for kept in self.sums.values():
            kept[...] = 0
        if self.master is not None:
            self._fill_up()
            groups = self.backend.to_device(np.arange(len(self.master), dtype=np.uint32))
            form = form_of(self.memory, self.slot_map)
            self.backend.kernels.quantise(self.master, groups, rounding_key(0, 0), form, self.memory)

    @property
    def dtype(self):
        """What a weight is read as."""
        return "float32" if self.halves or quantised(self.memory) else self.memory.dtype

    @property
    def features(self) -> int:
        return len(self.base) // self.chunks

    @property
    def width(self) -> int:
        return self.chunks * int(self.slot_map.width)

    @property
    def parts(self) -> dict[str, "ArrayEmbedding"]:
        """As of ComposedEmbedding: itself alone."""
        return {"": self}

    @property
    def looks_up_by(self) -> str | None:
        """The operation that a look-up is, over `operands`; None where it takes more."""
        return "gather" if self.chunks == 1 else None

    def operands(self, ids, features=None) -> tuple:
        return self.memory, *self.slots(ids, features)

    def slots(self, ids, features=None) -> tuple:
        """Where the weights of `ids` (B, F) lie, for a kernel: (rows (B, F * chunks), base, slot_map).

        Of ids (N, 1) of features (N,) these are their tokens, and base is 0.
        """
        if features is None:
            return ids if self.row_of is None else self.row_of(ids, slice(None)), self.base, self.slot_map
        rows = ids if self.row_of is None else self.row_of(ids, features[:, None])
        tokens = self.base.reshape(-1, self.chunks)[features] + rows
        return tokens.astype(self.token, copy=False), self.origin, self.slot_map

    def check(self, ids: np.ndarray, features: np.ndarray | None = None) -> None:
        """Raise ConfigError if an id (B, F), still on the host, has no row: kernels would read elsewhere."""
        check_rows(ids, self.rows, features)

    def lookup(self, ids, out, features=None) -> None:
        """Write the vectors of `ids` (B, F) to `out` (B, F, D)."""
        self.backend.kernels.gather(*self.operands(ids, features), self._in_chunks(out))

    def update(self, ids, d_vectors, rate: float, features=None) -> None:
        """One optimizer step on the weights that `ids` (B, F) touch; d_vectors (B, F, D)."""
        kernels, slots, d_vectors = (
            self.backend.kernels,
            self.slots(ids, features),
            self._in_chunks(d_vectors),
        )
        if self.lean is not None:
            (key,), state = self.held or self.changing(), (self.accumulator, self.memory)
            kernels.code_step(d_vectors, *slots, rate, self.optimizer.eps, key, self.lean, *state)
        elif self.adds_up:
            kernels.scatter_add(d_vectors, *slots, -rate, self.stepped)
        else:
            kernels.scatter_add(d_vectors, *slots, 1, self.gradient)
            self._step(slots, rate)
        if self.master is not None:
            self._fill_up()
            kernels.quantise_touched(*slots, self.master, self.memory)
        self.steps += 1

    def _fill_up(self) -> None:
        """Fill the last group of the master weights with copies of the last one, as `store_groups` does."""
        flat, count = self.master.reshape(-1), self.weights
        if flat.size > count:
            flat[count:] = flat[count - 1 : count]

    def _step(self, slots: tuple, rate: float, part: slice = slice(None)) -> None:
        """Step the slots that a batch touched by the sums in `gradient`, which are 0 afterwards; part: as of
        `step`."""
        kernels, gradient, stepped = self.backend.kernels, self.gradient[part], self.stepped[part]
        if self.halves:
            (key,), state = self.held or self.changing(), (gradient, self.accumulator[part], stepped)
            if part.start:
                key = key_from(key, part.start)
            kernels.half_step(*slots, rate, self.optimizer.eps, key, *state)
        else:
            corrected = (self.held or self.changing())[: self.rule.corrections]
            # Of SGD `decayed_step` takes an accumulator, an empty one, too.
            sums = [kept[part] for kept in self.sums.values() or (self.accumulator,)]
            numbers = rate, *corrected, *self.options
            getattr(kernels, self.touched)(*slots, *numbers, gradient, *sums, stepped)

    def changing(self) -> tuple:
        """What the next update takes that is another number each time: the key of rounding, if it rounds,
        or the corrections of the optimizer, if it has any."""
        if self.halves or self.lean is not None:
            return (rounding_key(self.seed, self.steps),)
        return corrections(self.optimizer, self.steps + 1, self.stepped.dtype)

    @property
    def summable(self) -> bool:
        """Whether `step` may take the place of `update`."""
        return self.rule.dense is not None and not quantised(self.memory)

    def make_sums(self) -> None:
        """Have a `gradient` for `step` where `update` does without."""
        if self.adds:
            self.gradient = self.backend.xp.zeros_like(self.memory)

    def add_up(self, ids, d_vectors, features=None) -> None:
        """Add gradients to the sums in `gradient`; arguments as of `update`."""
        slots = self.slots(ids, features)
        self.backend.kernels.scatter_add(self._in_chunks(d_vectors), *slots, 1, self.gradient)

    def step_part(self, part: slice, rate: float) -> None:
        """The optimizer's part of `update` for these weights, whose sums in `gradient` are 0 afterwards."""
        xp, count = self.backend.xp, part.stop - part.start
        whole = slot_map("table", count, 1, count, signed=False)
        self.step((xp.zeros((1, 1), "uint32"), xp.zeros(1, "uint64"), whole), rate, part)

    def step(self, slots: tuple, rate: float, part: slice = slice(None)) -> None:
        """The optimizer's part of `update`: by the sums of a batch in `gradient`, which are 0 afterwards.

        part: of all weights, those in which `slots` are."""
        if self.adds:
            self.backend.kernels.sgd(self.gradient[part], rate, self.memory[part])
            self.gradient[part] = 0
        else:
            self._step(slots, rate, part)
        self.steps += 1

    def _in_chunks(self, vectors):
        """Vectors (B, F, D) as the chunks they are made of, a view."""
        if self.chunks == 1:
            return vectors
        return vectors.reshape(len(vectors), vectors.shape[1] * self.chunks, int(self.slot_map.width))

    @property
    def unit(self) -> int:
        """Weights can be read and written from multiples of this on."""
        return int(group_length(self.slot_map))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Weights (stop - start,) float32 as look-ups read them; `start` begins a group."""
        memory = self.memory
        if not quantised(memory):
            return memory[start:stop].astype(np.float32)
        form = form_of(memory, self.slot_map)
        rows = slice(start // int(form.width), -(-stop // int(form.width)))
        return expanded(memory, rows, form).reshape(-1)[: stop - start]

    def write(self, start: int, weights: np.ndarray) -> None:
        """Store weights (n,) float32, to the nearest, from a slot on that begins a group."""
        memory = self.memory
        if quantised(memory):
            form = form_of(memory, self.slot_map)
            groups = memory[start // int(form.width) :]
            store_groups(weights, form, self.backend.kernels.quantise, groups, self.backend.to_device)
        else:
            if memory.dtype == np.float16:
                weights = np.clip(weights, -LARGEST_HALF, LARGEST_HALF)
            memory[start : start + weights.size] = weights

    def copy_codes(self, memory) -> bool:
        """Write the codes to an array of the same bits; whether it is one, and there are any."""
        if not quantised(self.memory) or memory.shape != self.memory.shape:
            return False
        memory[...] = self.memory
        return True

    def flaw(self) -> str | None:
        """What is wrong with the codes, if anything; floats tell themselves whether they are finite."""
        if not quantised(self.memory):
            return None
        return flawed_codes(self.memory, form_of(self.memory, self.slot_map), self.backend)

    def counts(self) -> dict[str, int]:
        return {}

    def describe(self) -> dict:
        """Numbers for the summary; `compression` is against the table that `compressed_from` names."""
        return description(self, self.weights, int(self.memory.nbytes))


def description(embedding, stored: int, size: int) -> dict:
    """`describe` of an embedding that stores so many weights in so many bytes."""
    table = embedding.table_weights
    return {
        "method": embedding.method,
        "embedding_parameters": stored,
        "embedding_bytes": size,
        "compression": table / stored if stored else None,
        "compressed_from": f"{table:,} weights: {embedding.table_note}, width {embedding.width}",
    }
