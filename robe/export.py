"""A trained model as an ONNX graph, for other runtimes: the hash, the look-up, the interaction and both MLPs.

    dense (B, n) float32, ids (B, F) int64 -> probability (B,) float32

B is any number of rows; ids are those of a prepared folder, raw 32-bit values from 0 to 2^32 - 1 or the
numbers of a dictionary. Where the data have pooling, bags (bags.py) take the place of ids:

    values (N,) int64, offsets (B * F + 1,) int64, weights (N,) float32, or (0,) where all are 1

The graph has operators of the standard set alone (opset 18). Weights lie in the file as in the run, floats,
halves or codes, and only what a batch reads of them becomes float32.

The hash is that of kernels/parts/hashing.py, whose functions run on the values of a graph as they do on
arrays: each operation becomes a node. ONNX Runtime multiplies no uint64, so a word is the int64 of the same
bits, whose sums and products have the same bits too; only to shift it right it is made unsigned.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from robe.bags import Bags, modes
from robe.config import ConfigError, DataSpec, ModelConfig, TrainConfig
from robe.embeddings import ArrayEmbedding
from robe.embeddings.sketched import SketchedEmbedding
from robe.errors import RobeError
from robe.estimator import predict
from robe.kernels.parts.codes import code_bytes
from robe.kernels.parts.groups import form_of, group_length, quantised
from robe.kernels.parts.hashing import (
    AFFINE,
    HOT,
    LOW32,
    ONE,
    TABLE,
    U64,
    WORD_BITS,
    P,
    SlotMap,
    multiply_high,
    sign_bits,
    word_of,
)
from robe.kernels.pool import MAX, MEAN
from robe.model import DLRM
from robe.packages import extra
from robe.version import __version__

OPSET, IR = 18, 8  # the oldest that have BitwiseAnd
LARGEST_FILE = 2**31 - 2**20  # bytes: a protobuf has fewer than 2^31
CHECKED = 2000  # rows
# Probabilities differ by the order in which float32 products are summed, the more the larger these are: so
# much is allowed, times the largest logit where that is above 1.
AGREEMENT = 1e-6


class ExportError(RobeError):
    """A graph that does not compute what the model does."""

    exit_code = 1


def packages() -> tuple[Any, Any]:
    """The modules onnx and onnxruntime; ConfigError that names the extra if one is missing."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"--to onnx needs {error.name}: {extra('onnx')}") from None
    return onnx, onnxruntime


# NumPy's function -> the operator.
OPERATORS: dict[Any, str] = {
    **{np.add: "Add", np.subtract: "Sub", np.negative: "Neg", np.multiply: "Mul", np.matmul: "MatMul"},
    **{np.floor_divide: "Div", np.remainder: "Mod", np.bitwise_and: "BitwiseAnd"},
    **{np.bitwise_xor: "BitwiseXor", np.less: "Less", np.greater_equal: "GreaterOrEqual"},
    **{np.minimum: "Min", np.true_divide: "Div", np.where: "Where"},
}


class Value(NDArrayOperatorsMixin):
    """What a node gives, or an input. NumPy's operators on values add nodes to their graph."""

    def __init__(self, graph: "Graph", name: str):
        self.graph, self.name = graph, name

    def __array_ufunc__(self, ufunc, method, *inputs, **options) -> "Value":
        if ufunc is not np.right_shift:
            return self.graph.add(OPERATORS[ufunc], *inputs)
        unsigned = (self.graph.cast(each, "UINT64") for each in inputs)
        return self.graph.cast(self.graph.add("BitShift", *unsigned, direction="RIGHT"), "INT64")

    def __array_function__(self, function, kinds, inputs, options) -> "Value":
        return self.graph.add(OPERATORS[function], *inputs)


class Graph:
    """The nodes and constants of a graph, as they are added."""

    def __init__(self, onnx):
        self.onnx, self.types = onnx, onnx.TensorProto
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, *inputs: Any, **attributes: Any) -> Value:
        """The value of a new node; inputs that are no values become constants."""
        names = [each.name if isinstance(each, Value) else self.constant(each) for each in inputs]
        self.nodes.append(self.onnx.helper.make_node(kind, names, [f"v{len(self.nodes)}"], **attributes))
        return Value(self, f"v{len(self.nodes) - 1}")

    def constant(self, values: Any, name: str | None = None) -> str:
        """The name of new constants; integers are words, but bytes."""
        array = np.asarray(values)
        if array.dtype.kind in "iu" and array.itemsize > 1:
            array = array.astype(np.int64)
        name = name or f"c{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weights(self, array: np.ndarray, name: str) -> Value:
        return Value(self, self.constant(array, name))

    def cast(self, value: Any, kind: str) -> Value:
        return self.add("Cast", value, to=getattr(self.types, kind))


def to_onnx(model: DLRM, config: TrainConfig, data: DataSpec, names: dict[str, Any]) -> tuple[bytes, int]:
    """The file of a model on the CPU, and how many nodes it has; raises ConfigError for one that cannot be
    exported.

    names: of the columns `dense` and `categorical`; empty where they have none.
    """
    onnx, _ = packages()
    embedding = exportable(model, config)
    graph, features = Graph(onnx), len(data.cardinalities)
    types = graph.types
    first = mlp(graph, model, "bottom", Value(graph, "dense"))
    if data.pooling is None:
        inputs = {"ids": (types.INT64, ["rows", features])}
        vectors = look_up(graph, embedding, Value(graph, "ids"))
    else:
        inputs = {"values": (types.INT64, ["ids"]), "offsets": (types.INT64, ["bags and 1"])}
        inputs["weights"] = types.FLOAT, ["weights"]
        vectors = pooled(graph, embedding, data.pooling, *(Value(graph, name) for name in inputs))
    vectors = graph.add("Concat", graph.add("Unsqueeze", first, [1]), vectors, axis=1)
    interacted = interactions(graph, model, config.model, first, vectors)
    logits = graph.add("Squeeze", mlp(graph, model, "top", interacted), [1])
    if model.shift is not None:
        logits = logits + graph.weights(np.array([model.shift], np.float32), "shift")
    graph.nodes.append(onnx.helper.make_node("Sigmoid", [logits.name], ["probability"]))
    made = onnx.helper.make_tensor_value_info
    inputs = {"dense": (types.FLOAT, ["rows", data.dense])} | inputs
    body = onnx.helper.make_graph(
        graph.nodes,
        "robe-dlrm",
        [made(name, *what) for name, what in inputs.items()],
        [made("probability", types.FLOAT, ["rows"])],
        graph.constants,
    )
    if (size := body.ByteSize()) > LARGEST_FILE:
        raise ConfigError(
            f"an ONNX file has less than 2 GB, and this one would have {size:,} bytes; make it smaller first "
            "with `robe convert RUN --to int8 --out NEW`"
        )
    opset = onnx.helper.make_opsetid("", OPSET)
    proto = onnx.helper.make_model(
        body, opset_imports=[opset], ir_version=IR, producer_name="robe-dlrm", producer_version=__version__
    )
    onnx.helper.set_model_props(proto, facts(config, data, names))
    onnx.checker.check_model(proto)
    return proto.SerializeToString(), len(graph.nodes)


def facts(config: TrainConfig, data: DataSpec, names: dict[str, Any]) -> dict[str, str]:
    """What the metadata of a file tell of a model; names: of `to_onnx`."""
    settings = config.embedding
    told = names | {"dialect": data.dialect, "cardinalities": data.cardinalities}
    told |= {"method": settings.method, "memory": settings.memory}
    told |= {"pooling": data.pooling} if data.pooling else {}
    return {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in told.items()}


def difference(file: Path, model: DLRM, data: DataSpec) -> float:
    """The largest difference between the probabilities of a file in ONNX Runtime and the model's own, over
    random rows of any ids there can be; raises ExportError where it is no rounding."""
    _, onnxruntime = packages()
    rng, hashed = np.random.default_rng(0), data.dialect == "hash"
    counts = np.array([2**32] * len(data.cardinalities) if hashed else data.cardinalities)
    ids = random_bags(rng, counts, data.pooling) if data.pooling else random_ids(rng, counts)
    dense = rng.standard_normal((CHECKED, data.dense), np.float32)
    expected = predict(model, data, dense, ids)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = ids._asdict() if isinstance(ids, Bags) else {"ids": ids}
    (found,) = session.run(["probability"], {"dense": dense, **given})
    largest = float(abs(found - expected).max())
    bounded = np.clip(expected, 1e-7, 1 - 1e-7)  # no probability is so certain that all would do
    logit = float(abs(np.log(bounded / (1 - bounded))).max())
    if not largest <= AGREEMENT * max(1.0, logit):
        raise ExportError(
            f"the graph gives other probabilities than the model, by up to {largest:.2g}, so nothing was "
            "written; please report it with the run's config.json"
        )
    return largest


def random_ids(rng: np.random.Generator, counts: np.ndarray) -> np.ndarray:
    """Ids (CHECKED, F) below `counts` (F,), the lowest and the highest among them."""
    ids = rng.integers(0, counts, (CHECKED, len(counts)))
    ids[:2] = np.zeros_like(counts), counts - 1
    return ids


def random_bags(rng: np.random.Generator, counts: np.ndarray, pooling: tuple[str, ...]) -> Bags:
    """The same in bags of 0 to 3 ids, with weights where there can be any."""
    lengths = rng.integers(0, 4, (CHECKED, len(counts)))
    owners = np.tile(np.arange(len(counts)), CHECKED).repeat(lengths.reshape(-1))
    values = rng.integers(0, counts[owners])
    values[::20], values[1::20] = 0, counts[owners[1::20]] - 1
    weights = np.where(modes(pooling)[owners] == MAX, 1, rng.random(len(values))).astype(np.float32)
    return Bags(values, np.append(0, lengths.cumsum()), weights)


def exportable(model: DLRM, config: TrainConfig) -> ArrayEmbedding:
    """The embedding of a model; ConfigError unless the graph can look it up."""
    embedding, method = model.embedding, config.embedding.method
    if (
        not isinstance(embedding, ArrayEmbedding)
        or isinstance(embedding, SketchedEmbedding)
        or embedding.chunks > 1
        or not embedding.features
    ):
        raise ConfigError(
            f"--to onnx is not for runs of `robe train --method {method}`; it is for robe, full, hashing, "
            "frequency, and for hot on the ids of a dictionary; of mixed_precision convert the run first, "
            "`robe convert RUN --to fp16 --out NEW`"
        )
    return embedding


def mlp(graph: Graph, model: DLRM, part: str, x: Value) -> Value:
    """x (B, in) -> (B, out) of the MLP `bottom`, or of `top`, whose last layer has no rectifier."""
    layers = getattr(model, part)
    for i, (weight, bias) in enumerate(layers.parameters):
        name = f"{part}.{i}"
        x = graph.add("Gemm", x, graph.weights(weight, f"{name}.weight"), graph.weights(bias, f"{name}.bias"))
        if i < len(layers.parameters) - 1 or not layers.linear_end:
            x = graph.add("Relu", x)
    return x


def interactions(graph: Graph, model: DLRM, settings: ModelConfig, first: Value, vectors: Value) -> Value:
    """What the top MLP reads of vectors (B, 1 + F, D), `first` (B, D) among them."""
    count, width = 1 + model.embedding.features, model.embedding.width
    if settings.interaction == "dot":
        products = vectors @ graph.add("Transpose", vectors, perm=[0, 2, 1])
        i, j = np.tril_indices(count, -1)
        pairs = graph.add("Gather", graph.add("Reshape", products, [0, count**2]), i * count + j, axis=1)
        return graph.add("Concat", first, pairs, axis=1)
    x_0 = x = graph.add("Reshape", vectors, [0, count * width])
    for i in range(settings.cross_layers if settings.interaction == "cross" else 0):
        names = (f"cross.{i}.{name}" for name in ("v", "w", "bias"))
        v, w, bias = (graph.weights(model.parameters[name], name) for name in names)
        x = x_0 * (x @ v @ w + bias) + x
    return x


def look_up(graph: Graph, embedding: ArrayEmbedding, ids: Value) -> Value:
    """Vectors (B, F, D) of ids (B, F)."""
    return read(graph, embedding, tokens_of(embedding, ids), embedding.features, embedding.width)


def tokens_of(embedding: ArrayEmbedding, ids: Value) -> Value:
    """Tokens (B, F) of ids (B, F); of ids (B, 1), what they are to each feature."""
    rows = ids if embedding.row_of is None else embedding.row_of(ids, slice(None))
    return rows + embedding.base


def read(graph: Graph, embedding: ArrayEmbedding, tokens: Value, *shape: int) -> Value:
    """The rows of tokens (B, C), as (B, *shape)."""
    slots, negative = places(graph, embedding.slot_map, graph.add("Unsqueeze", tokens, [2]))
    vectors = fetch(graph, embedding, slots)
    if negative is not None:
        vectors = np.where(negative, -vectors, vectors)
    return graph.add("Reshape", vectors, [0, *shape])


def pooled(
    graph: Graph,
    embedding: ArrayEmbedding,
    pooling: tuple[str, ...],
    values: Value,
    offsets: Value,
    weights: Value,
) -> Value:
    """Vectors (B, F, D) of bags, as kernels/pool.py has them.

    The bag of an id is how many offsets, but for the first and the last, are at most the place of the id.
    ScatterElements adds up in that order on a CPU, where ScatterND has threads that spoil each other's sums.
    """
    add, features, width, ways = graph.add, embedding.features, embedding.width, modes(pooling)[:, None]
    count, inner = add("Shape", values), add("Slice", offsets, [1], [-1])
    ones, begun = add("Expand", [1], add("Shape", inner)), add("Expand", [0], count + 1)
    begun = add("ScatterElements", begun, inner, ones, axis=0, reduction="add")
    begun = add("CumSum", begun, add("Squeeze", [0]))  # the axis has no dimension
    bag = add("Unsqueeze", add("Slice", begun, [0], [-1]), [1])
    tokens = tokens_of(embedding, add("Unsqueeze", values, [1]))
    rows = read(graph, embedding, add("GatherElements", tokens, bag % features, axis=1), width)
    lengths = add("Slice", offsets, [1], [2**63 - 1]) - add("Slice", offsets, [0], [-1])
    shape = add("Concat", add("Shape", lengths), [width], axis=0)
    bag, lengths = add("Expand", bag, add("Shape", rows)), add("Reshape", lengths, [-1, features, 1])

    def reduced(rows: Value, by: str, start: float) -> Any:
        begun = add("Expand", np.float32(start), shape)
        found = add("ScatterElements", begun, bag, rows, axis=0, reduction=by)
        return add("Reshape", found, [-1, features, width])

    def largest() -> Any:
        return np.where(lengths >= 1, reduced(rows, "max", -np.inf), np.float32(0))

    def summed() -> Any:
        rest = add("Expand", np.float32(1), count - add("Shape", weights))
        scales = add("Unsqueeze", add("Concat", weights, rest, axis=0), [1])
        number: Any = add("Max", graph.cast(lengths, "FLOAT"), np.float32(1))
        return reduced(rows * scales, "add", 0) / np.where(ways == MEAN, number, np.float32(1))

    if (ways == MAX).all():
        return largest()
    return np.where(ways == MAX, largest(), summed()) if (ways == MAX).any() else summed()


def places(graph: Graph, where: SlotMap, tokens: Any) -> tuple[Any, Any]:
    """(slots, whether the sign is -1, or None without signs) of all elements of tokens (B, F, 1), each
    (B, F, C, D / C).

    A row is cut into C pieces that lie in one block each, and have their signs in one word.
    """
    width, block = where.width, where.block
    piece = int(width) if where.family == TABLE else math.gcd(int(width), int(block), int(WORD_BITS))
    first, within = np.arange(0, width, piece, dtype=U64), np.arange(piece, dtype=U64)
    element = tokens * width + first
    if where.family == TABLE:
        return graph.add("Unsqueeze", element, [3]) + within, None
    if where.family == AFFINE:
        number, position = first // block, first % block
        start = (tokens % P * where.a + (number * where.b + where.c)) % P % where.starts
        number = tokens * width + number
    else:
        number, position = element // block, element % block
        start = where.front + multiply_high(word_of(where.key, number), where.memory - where.front)
    slots = start + position
    if where.family == HOT:
        exact = (row := tokens & LOW32) < where.exact
        slots = np.where(exact, row * width + first, slots)
    slots = graph.add("Unsqueeze", slots, [3]) + within
    if where.family != AFFINE:  # the array is circular
        slots = np.where(slots >= where.memory, slots - (where.memory - where.front), slots)
    if not where.signed:
        return slots, None
    bits = sign_bits(word_of(where.key, number), position) >> (position % WORD_BITS)
    if where.family == HOT:
        bits = np.where(exact, U64(0), bits)
    return slots, graph.cast(graph.add("Unsqueeze", bits, [3]) >> within & ONE, "BOOL")


def fetch(graph: Graph, embedding: ArrayEmbedding, slots: Value) -> Any:
    """The weights of slots, as floats."""
    memory, where = embedding.memory, embedding.slot_map
    if not quantised(memory):
        found = graph.add("Gather", graph.weights(memory, "memory"), slots)
        return graph.cast(found, "FLOAT") if memory.dtype == np.float16 else found
    form, length = form_of(memory, where), group_length(where)
    size, bits = code_bytes(form), form.bits
    ends = np.ascontiguousarray(memory[:, size:]).view(np.float16).T
    group, at = slots // length, slots % length * bits
    scale, bias = (
        graph.cast(graph.add("Gather", graph.weights(end, name), group), "FLOAT")
        for name, end in zip(("scale", "bias"), ends, strict=True)
    )
    codes = graph.weights(np.append(memory[:, :size], np.uint8(0)), "codes")
    byte = group * size + at // 8
    code = graph.add("Gather", codes, byte)
    if bits < 8:
        kind = "UINT32" if 8 % bits else "UINT8"
        if 8 % bits:  # a code may go on in the next byte
            high = graph.cast(graph.add("Gather", codes, byte + 1), kind)
            high = graph.add("BitShift", high, graph.cast(8, kind), direction="LEFT")
            code = graph.add("BitwiseOr", graph.cast(code, kind), high)
        code = graph.add("BitShift", code, graph.cast(at % 8, kind), direction="RIGHT")
        code = code & graph.cast(2**bits - 1, kind)
    return bias + scale * graph.cast(code, "FLOAT")
