"""Awkward shapes on which every version of a look-up kernel must agree, for tests and benchmarks."""

from typing import NamedTuple

import numpy as np

from robe.kernels.admit import COUNTED, admit_reference
from robe.kernels.interaction import out_width
from robe.kernels.parts.cache import EMPTY, WAYS, hash_row, set_of
from robe.kernels.parts.codes import NO_ROW, Form, row_bytes
from robe.kernels.parts.groups import group_length, store_groups
from robe.kernels.parts.half import rounding_key
from robe.kernels.parts.hashing import SlotMap, slot_map, slots_reference
from robe.kernels.pool import POOLINGS
from robe.kernels.quantise import quantise_reference
from robe.kernels.sort_rows import sort_rows_reference
from robe.kernels.space_saving import EMPTY as NO_TOKEN
from robe.kernels.space_saving import WAYS as SKETCHED
from robe.kernels.space_saving import space_saving_reference

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "int1": 1}
# Operation -> its arguments that CUDA versions take as words of bfloat16, too.
WORDS = {
    "interaction": ("out",),
    "gather_interaction": ("out",),
    "cached_interaction": ("out",),
    "interaction_backward": ("d_out",),
    "interaction_scatter": ("d_out",),
    "gather_interaction_backward": ("d_out",),
    "bias_relu": ("bias", "out"),
    "bias_relu_backward": ("out",),
}


class Case(NamedTuple):
    name: str
    rows: int  # B
    features: int  # F
    width: int  # D
    block: int  # Z
    memory: int  # M
    family: str = "mix"
    signed: bool = True
    memory_type: str = "float32"  # or "float16", or one of BITS, of what a look-up reads
    ids: str = "random"  # or "repeated": every row the same; or "largest": all 2^32 - 1
    exact: int = 0  # rows of `hot` in front of its ring; half of the random ids name such a row

    def slot_map(self) -> SlotMap:
        return slot_map(self.family, self.width, self.block, self.memory, 7, self.signed, self.exact)

    def form(self) -> Form:
        """Of groups of codes, INT8 where the case has none."""
        return Form(BITS.get(self.memory_type, 8), False, int(group_length(self.slot_map())))

    def stored(self, memory: np.ndarray) -> np.ndarray:
        """Weights (M,) float32 as an array of the type that a look-up of this case reads."""
        if self.memory_type not in BITS:
            return memory.astype(self.memory_type)
        form = self.form()
        groups = np.zeros((-(-memory.size // form.width), row_bytes(form)), np.uint8)
        store_groups(memory, form, quantise_reference, groups)
        return groups

    def base(self) -> np.ndarray:
        """(F,) uint64: tokens are feature * 2^32 + id, but rows of a full table are counted on."""
        step = self.memory // (self.width * max(self.features, 1)) if self.family == "table" else 2**32
        return np.arange(self.features, dtype=np.uint64) * np.uint64(step)

    def draw_ids(self) -> np.ndarray:
        """(B, F) uint32, the same each time."""
        rng = np.random.default_rng([self.rows, self.features])
        shape = (self.rows, self.features)
        if self.ids == "largest":
            return np.full(shape, 2**32 - 1, np.uint32)
        limit = self.memory // (self.width * max(self.features, 1)) if self.family == "table" else 2**32
        limit = 2 * self.exact or limit
        ids = rng.integers(0, limit, shape, dtype=np.uint64).astype(np.uint32)
        return np.repeat(ids[:1], self.rows, axis=0) if self.ids == "repeated" else ids


CASES = [
    Case("Z = 1", rows=5, features=3, width=8, block=1, memory=50),
    Case("Z < D", rows=6, features=4, width=16, block=4, memory=1000),
    Case("Z = D", rows=6, features=4, width=16, block=16, memory=1000),
    Case("Z > D", rows=6, features=4, width=16, block=64, memory=1000),
    Case("Z does not divide D", rows=5, features=3, width=24, block=10, memory=509),
    Case("Z > 64: two sign words a block", rows=3, features=2, width=128, block=128, memory=4099),
    Case("Z > D, does not divide, two sign words", rows=7, features=2, width=48, block=100, memory=333),
    Case("M = Z: every block wraps", rows=4, features=3, width=32, block=32, memory=32),
    Case("M barely above Z", rows=4, features=3, width=32, block=30, memory=31),
    Case("D = 1", rows=4, features=3, width=1, block=1, memory=7),
    Case("one row, one feature", rows=1, features=1, width=16, block=8, memory=100),
    Case("one feature, whose rows are walked together", rows=19, features=1, width=8, block=4, memory=100),
    Case("empty batch", rows=0, features=3, width=16, block=8, memory=100),
    Case("no features", rows=4, features=0, width=16, block=8, memory=100),
    Case("repeated ids", rows=9, features=3, width=16, block=8, memory=200, ids="repeated"),
    Case("largest ids", rows=3, features=26, width=16, block=16, memory=997, ids="largest"),
    Case("unsigned", rows=6, features=4, width=16, block=8, memory=300, signed=False),
    Case("affine", rows=6, features=4, width=16, block=8, memory=300, family="affine", signed=False),
    Case("affine, signed", rows=6, features=4, width=16, block=8, memory=300, family="affine"),
    Case("affine, Z = M", rows=4, features=2, width=16, block=64, memory=64, family="affine", signed=False),
    Case(
        "affine, Z does not divide D",
        rows=4,
        features=2,
        width=20,
        block=8,
        memory=90,
        family="affine",
        signed=False,
    ),
    Case(
        "affine, largest ids",
        rows=3,
        features=26,
        width=16,
        block=16,
        memory=997,
        family="affine",
        signed=False,
        ids="largest",
    ),
    Case(
        "full table", rows=8, features=3, width=16, block=1, memory=3 * 10 * 16, family="table", signed=False
    ),
    Case("hot, Z = D", rows=6, features=4, width=16, block=16, memory=1000, family="hot", exact=20),
    Case(
        "hot, Z does not divide D, the ring is barely above Z, and weights before it are unused",
        rows=5,
        features=3,
        width=24,
        block=10,
        memory=203,
        family="hot",
        exact=7,
    ),
    Case(
        "hot, unsigned, Z > D",
        rows=5,
        features=3,
        width=16,
        block=40,
        memory=300,
        family="hot",
        signed=False,
        exact=9,
    ),
    Case("halves, Z = 1", rows=5, features=3, width=8, block=1, memory=50, memory_type="float16"),
    Case("halves, Z = D", rows=6, features=4, width=16, block=16, memory=1000, memory_type="float16"),
    Case(
        "halves, Z does not divide D",
        rows=5,
        features=3,
        width=24,
        block=10,
        memory=509,
        memory_type="float16",
    ),
    Case("halves, Z > 64", rows=3, features=2, width=128, block=128, memory=4099, memory_type="float16"),
    Case("INT8, Z = 1", rows=5, features=3, width=8, block=1, memory=150, memory_type="int8"),
    Case("INT8, Z = D", rows=6, features=4, width=32, block=32, memory=1000, memory_type="int8"),
    Case(
        "INT8, Z > 64, and the last group is not full",
        rows=3,
        features=2,
        width=128,
        block=128,
        memory=4099,
        memory_type="int8",
    ),
    Case(
        "INT8, full table, D odd",
        rows=8,
        features=3,
        width=33,
        block=1,
        memory=3 * 10 * 33,
        family="table",
        signed=False,
        memory_type="int8",
    ),
    Case("INT4, Z = 1", rows=5, features=3, width=8, block=1, memory=150, memory_type="int4"),
    Case("INT4, Z = D", rows=6, features=4, width=32, block=32, memory=1000, memory_type="int4"),
    Case("INT4, Z does not divide D", rows=5, features=3, width=45, block=19, memory=509, memory_type="int4"),
    Case("INT4, every block wraps", rows=4, features=3, width=70, block=70, memory=70, memory_type="int4"),
    Case(
        "INT4, unsigned",
        rows=4,
        features=3,
        width=150,
        block=150,
        memory=600,
        signed=False,
        memory_type="int4",
    ),
    Case(
        "INT4, full table, D odd",
        rows=8,
        features=3,
        width=33,
        block=1,
        memory=3 * 10 * 33,
        family="table",
        signed=False,
        memory_type="int4",
    ),
    Case("INT3, Z = 1", rows=5, features=3, width=8, block=1, memory=150, memory_type="int3"),
    Case("INT3, Z does not divide D", rows=5, features=3, width=45, block=19, memory=509, memory_type="int3"),
    Case("INT3, every block wraps", rows=4, features=3, width=70, block=70, memory=70, memory_type="int3"),
    Case("INT2, Z = D", rows=6, features=4, width=32, block=32, memory=1000, memory_type="int2"),
    Case("INT1, Z does not divide D", rows=5, features=3, width=45, block=19, memory=509, memory_type="int1"),
    Case(
        "INT3, hot, Z = 64, and only what wraps lies in a group of the ring",
        rows=3,
        features=3,
        width=64,
        block=64,
        memory=292,
        family="hot",
        memory_type="int3",
        exact=3,
    ),
    Case(
        "INT3, full table, D odd",
        rows=8,
        features=3,
        width=33,
        block=1,
        memory=3 * 10 * 33,
        family="table",
        signed=False,
        memory_type="int3",
    ),
    Case(
        "INT2, full table, D odd",
        rows=8,
        features=3,
        width=33,
        block=1,
        memory=3 * 10 * 33,
        family="table",
        signed=False,
        memory_type="int2",
    ),
    Case(
        "INT1, full table, D odd",
        rows=8,
        features=3,
        width=33,
        block=1,
        memory=3 * 10 * 33,
        family="table",
        signed=False,
        memory_type="int1",
    ),
]


class Call(NamedTuple):
    """Arguments of one call of an operation, by name; those in `outputs` are written, the rest only read."""

    arguments: dict
    outputs: tuple[str, ...]

    def copy(self) -> dict:
        """The arguments with outputs of their own."""
        return {n: a.copy() if n in self.outputs else a for n, a in self.arguments.items()}


def call(outputs: tuple[str, ...], **arguments) -> Call:
    """A call with these arguments, in the order of the operation's."""
    return Call(arguments, outputs)


def cached_calls(case: Case, rng) -> dict[str, Call]:
    """Calls on a quantised table with a cache of some of its rows, of the sizes of a case.

    INT8, or INT4 where the case has no signs; without a cache where its ids are the largest.
    """
    rows = max(1, case.memory // (case.width * max(case.features, 1)))  # of a feature
    total, bits = rows * max(case.features, 1), 8 if case.signed else 4
    form = Form(16 if case.memory_type == "float16" else bits, case.rows % 2 == 0, case.width)
    stored = form._replace(bits=min(form.bits, BITS.get(case.memory_type, 16)))
    table = np.empty((total, row_bytes(form)), np.uint8)
    weights, key = rng.standard_normal((total, case.width)).astype(np.float32), rounding_key(1, 0)
    numbers = np.arange(total, dtype=np.uint32)
    quantise_reference(weights, numbers, key, form, table)
    sets = 0 if case.ids == "largest" else 1 + total // (20 * WAYS)
    tags, filled = np.full((sets, WAYS), EMPTY), np.zeros(sets, int)
    for row in rng.permutation(total)[: 30 * sets].astype(np.uint32):
        s = set_of(hash_row(row), sets)
        if filled[s] < WAYS:
            tags[s, filled[s]] = row
            filled[s] += 1
    values = rng.standard_normal((sets * WAYS, case.width)).astype(np.float32)
    ids, base = case.draw_ids() % np.uint32(rows), np.arange(case.features, dtype=np.uint64) * np.uint64(rows)
    keys, order = np.empty((2, ids.size), np.uint32)
    sort_rows_reference(ids, base, keys, order)
    entry, before = np.empty((2, ids.size), np.int64)
    counters = np.ones((case.features, len(COUNTED)), np.int64)
    used = rng.integers(1, 5, (sets, WAYS)).astype(np.uint32)
    admission = call(
        ("tags", "used", "counters", "entry", "before"),
        keys=keys,
        order=order,
        ids=ids,
        base=base,
        least_used=case.rows % 2 == 0,
        step=7,
        tags=tags,
        used=used,
        counters=counters,
        entry=entry,
        before=before,
    )
    admitted = admission.copy()
    admit_reference(*admitted.values())
    looked_up = {"table": table, "form": form, "tags": tags, "values": values, "ids": ids, "base": base}
    shape, columns = (case.rows, case.features, case.width), out_width(1 + case.features, case.width)
    first = rng.standard_normal((case.rows, case.width)).astype(np.float32)
    return {
        "quantise": call(
            ("table",),
            rows=weights,
            numbers=np.where(numbers % 5, numbers[::-1], NO_ROW),
            key=key,
            form=stored,
            table=np.zeros((total, row_bytes(stored)), np.uint8),
        ),
        "sort_rows": call(("keys", "order"), ids=ids, base=base, keys=keys, order=order),
        "admit": admission,
        "cached_gather": call(("out",), **looked_up, out=np.full(shape, np.nan, np.float32)),
        "cached_interaction": call(
            ("out",), **looked_up, first=first, out=np.full((case.rows, columns), np.nan, np.float32)
        ),
        # Products here are exact, as in half_step.
        "cached_step": call(
            ("table", "values", "accumulator"),
            d_vectors=rng.integers(-4, 5, shape).astype(np.float32),
            order=order,
            entry=admitted["entry"],
            before=admitted["before"],
            ids=ids,
            base=base,
            rate=0.125,
            eps=1e-8,
            key=key,
            form=form,
            table=table,
            values=values,
            accumulator=weights[: total * (case.rows % 2), 0] ** 2,
        ),
    }


def sketch_calls(case: Case, rng) -> dict[str, Call]:
    """Calls on a sketch of hot ids, filled by an earlier batch; it has no set where ids are the largest."""
    sets = 0 if case.ids == "largest" else 1 + case.rows // 3
    ids, base = case.draw_ids() % np.uint32(40), case.base()
    keys, order = np.empty((2, ids.size), np.uint32)
    arrays = {
        "tags": np.full((sets, SKETCHED), NO_TOKEN),
        "importance": np.zeros((sets, SKETCHED), np.float32),
        "halved": np.zeros(sets, np.uint32),
        "moved": np.full(ids.size, 7),
    }
    # Squares here are exact, fused with a sum or not, so that all versions come to the same bits.
    batch = {
        "d_vectors": rng.integers(-4, 5, (case.rows, case.features, case.width)).astype(np.float32),
        "scale": rng.integers(0, 3, case.features).astype(np.float32),
        "by_count": case.rows % 2 == 0,
    }
    for earlier, period in ((ids // 2, 1), (ids, 3)):
        sort_rows_reference(earlier, base, keys, order)
        noted = call(
            tuple(arrays), keys=keys, order=order, ids=earlier, base=base, **batch, period=period, **arrays
        )
        if period == 1:
            space_saving_reference(*noted.arguments.values())
    return {
        "hot_rows": call(("out",), ids=ids, base=base, tags=arrays["tags"], out=np.zeros_like(ids)),
        "space_saving": noted,
    }


def bag_calls(case: Case, rng) -> dict[str, Call]:
    """Calls on bags of 0 to 3 rows, of small integers: so some maxima are attained more than once."""
    vectors = (case.rows, case.features, case.width)
    offsets = np.cumsum((0, *rng.integers(0, 4, case.rows * case.features)))
    count = int(offsets[-1])

    def numbers(*shape):
        return rng.integers(-4, 5, shape).astype(np.float32)

    bags = {
        "rows": numbers(count, case.width),
        "offsets": offsets,
        "weights": numbers(count * (case.rows % 2)),
        "modes": (np.arange(case.features) % len(POOLINGS)).astype(np.uint8),
    }
    d_rows = np.full((count, case.width), np.nan, np.float32)
    return {
        "pool": call(("out",), **bags, out=np.full(vectors, np.nan, np.float32)),
        "pool_backward": call(("d_rows",), d_vectors=numbers(*vectors), **bags, d_rows=d_rows),
    }


def calls(case: Case, seed: int = 0) -> dict[str, Call]:
    """Operation -> a call on the sizes of a case, with outputs full of NaN where they are only written."""
    rng = np.random.default_rng(seed)
    n, columns = 1 + case.features, out_width(1 + case.features, case.width)

    def numbers(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def nan(*shape):
        return np.full(shape, np.nan, np.float32)

    rows = {"ids": case.draw_ids(), "base": case.base(), "slot_map": case.slot_map()}
    vectors, interacted = (case.rows, case.features, case.width), (case.rows, n, case.width)
    memory, touched = numbers(case.memory), np.zeros(case.memory, np.float32)
    looked_up, form = case.stored(memory), case.form()
    grouped = np.pad(memory, (0, -memory.size % form.width), "edge").reshape(-1, form.width)
    stepped = form._replace(bits=max(4, form.bits), stochastic=True)
    codes = np.zeros((len(grouped), row_bytes(stepped)), np.uint8)
    store_groups(memory, stepped._replace(stochastic=False), quantise_reference, codes)
    slots, _ = slots_reference(rows["slot_map"], rows["base"] + rows["ids"].astype(np.uint64))
    touched[slots] = rng.integers(-4, 5, slots.shape)
    matrix = (case.rows, case.width)
    label = rng.integers(0, 2, case.rows).astype(np.float32)
    adam = {"rate": 0.1, "first": 1.5, "second": 2.5, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3}

    return {
        "gather": call(("out",), memory=looked_up, **rows, out=nan(*vectors)),
        "scatter_add": call(("out",), d_vectors=numbers(*vectors), **rows, scale=-0.1, out=memory),
        "adagrad_step": call(
            ("gradient", "accumulator", "out"),
            **rows,
            rate=0.1,
            eps=1e-8,
            gradient=touched,
            accumulator=memory**2,
            out=memory,
        ),
        "rowwise_step": call(
            ("gradient", "accumulator", "out"),
            **rows,
            rate=0.1,
            eps=1e-8,
            gradient=touched,
            accumulator=grouped[:, 0] ** 2,
            out=memory,
        ),
        "adam_step": call(
            ("gradient", "mean", "square", "out"),
            **rows,
            **adam,
            l2=0.25,
            decay=0.125,
            gradient=touched,
            mean=memory / 2,
            square=memory**2,
            out=memory,
        ),
        "momentum_step": call(
            ("gradient", "velocity", "out"),
            **rows,
            rate=0.1,
            momentum=0.75,
            l2=0.25,
            decay=0.125,
            gradient=touched,
            velocity=memory / 2,
            out=memory,
        ),
        "decayed_step": call(
            ("gradient", "accumulator", "out"),
            **rows,
            rate=0.1,
            eps=1e-8,
            l2=0.25,
            decay=0.125,
            gradient=touched,
            accumulator=memory[: case.memory * (case.rows % 2)] ** 2,
            out=memory,
        ),
        # Products here are exact, fused with a sum or not, so that all versions come to the same bits.
        "half_step": call(
            ("gradient", "accumulator", "out"),
            **rows,
            rate=0.125,
            eps=1e-8,
            key=rounding_key(seed, 5),
            gradient=touched,
            accumulator=touched[: case.memory * (case.rows % 2)] ** 2,
            out=memory.astype(np.float16),
        ),
        "quantise_touched": call(
            ("memory",),
            **rows,
            weights=grouped,
            memory=np.zeros((len(grouped), row_bytes(form)), np.uint8),
        ),
        # In 4 bits and 8, of other cases too; gradients of integers, as in half_step.
        "code_step": call(
            ("accumulator", "memory"),
            d_vectors=rng.integers(-4, 5, vectors).astype(np.float32),
            **rows,
            rate=0.125,
            eps=1e-8,
            key=rounding_key(seed, 5),
            form=stepped,
            accumulator=np.ones(len(grouped) * (case.rows % 2), np.float32),
            memory=codes,
        ),
        "interaction": call(("out",), vectors=numbers(*interacted), out=nan(case.rows, columns)),
        "interaction_backward": call(
            ("d_vectors",),
            d_out=numbers(case.rows, columns),
            vectors=numbers(*interacted),
            d_vectors=nan(*interacted),
        ),
        "gather_interaction": call(
            ("out",), memory=looked_up, **rows, first=numbers(*matrix), out=nan(case.rows, columns)
        ),
        "interaction_scatter": call(
            ("d_first", "out"),
            d_out=numbers(case.rows, columns),
            vectors=numbers(*interacted),
            **rows,
            scale=-0.1,
            d_first=nan(*matrix),
            out=memory,
        ),
        "gather_interaction_backward": call(
            ("d_first", "out"),
            d_out=numbers(case.rows, columns),
            memory=memory if case.memory_type in BITS else looked_up,  # codes are not trained
            **rows,
            first=numbers(*matrix),
            d_first=nan(*matrix),
            out=numbers(case.memory),
        ),
        "bias_relu": call(("out",), x=numbers(*matrix), bias=numbers(case.width), out=nan(*matrix)),
        "bias_relu_backward": call(
            ("d", "d_bias"),
            out=np.maximum(numbers(*matrix), 0),
            d=numbers(*matrix),
            d_bias=nan(case.width),
        ),
        "dropout": call(("out",), share=0.25, key=rounding_key(seed, 5), first=2**40, out=memory),
        "binary_cross_entropy": call(
            ("loss", "d_logits"),
            logits=numbers(case.rows),
            label=label,
            loss=nan(case.rows),
            d_logits=nan(case.rows),
        ),
        "sgd": call(("parameters",), gradient=numbers(case.memory), rate=0.1, parameters=memory),
        "adagrad": call(
            ("accumulator", "parameters"),
            gradient=numbers(case.memory),
            rate=0.1,
            eps=1e-8,
            accumulator=memory**2,
            parameters=memory,
        ),
        "adam": call(
            ("mean", "square", "out"),
            gradient=numbers(case.memory),
            **adam,
            mean=memory / 2,
            square=memory**2,
            out=memory,
        ),
        "momentum": call(
            ("velocity", "out"),
            gradient=numbers(case.memory),
            rate=0.1,
            momentum=0.75,
            velocity=memory / 2,
            out=memory,
        ),
        **cached_calls(case, rng),
        **sketch_calls(case, rng),
        **bag_calls(case, rng),
    }
