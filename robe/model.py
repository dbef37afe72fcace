"""The deep learning recommendation model (DLRM, Naumov et al., 2019), forward and backward by hand.

    dense (B, 13) -> bottom MLP -> (B, D) --+
                                            +-> vectors (B, 1 + F, D) -> interaction -> top MLP -> logits (B,)
    ids (B, F) ----> embedding -> (B, F, D) +

Where the data have pooling, ids are bags (bags.py), and the vectors of a bag are pooled to one.

The weights of both MLPs lie in one flat array, so that the optimizer is one kernel call; the matrices
are views of it. Buffers are made once; a smaller batch uses their front.

Where the products want it (`Backend.multiple`), the inputs of both MLPs have columns of zeros behind, and
their first matrices as many rows of zeros. These lie in the flat array too, but no optimizer steps them, and
neither `parameters` nor `state()` shows them: checkpoints of all backends have the same shapes.

In bf16 (matmul.py) the dense columns, the interaction's output and all that lies between products are
rounded, and so is a copy of the flat array, which is what is multiplied. Vectors of embeddings, their
products and the gradients by them are float32: they are read from float32 weights, and added to them.
"""

import math
import threading
from itertools import pairwise
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.bags import NO_WEIGHTS, Bags, bags_of
from robe.config import DataSpec, TrainConfig, used_data
from robe.cross import Cross
from robe.embeddings import ArrayEmbedding, Embedding, create, declared, declared_state
from robe.errors import ArrayError
from robe.graph import Graphs
from robe.interaction import Interaction
from robe.kernels.parts.half import rounding_key
from robe.layers import MLP
from robe.optim import RULES, DenseOptimizer, corrections
from robe.timeline import Phase, no_phase

INTERACTIONS: dict[str, type[Interaction]] = {
    "dot": Interaction,
    "cross": Cross,
    "none": Cross,
}  # by the names of robe.config
EVALUATION_BATCH = 2048
AVERAGED = 2**22  # numbers that are averaged at a time
DROPPED = 2**63  # number of the step from which keys of dropout are counted on; keys of rounding, from 0


def layer_shapes(config: TrainConfig, data: DataSpec) -> dict[str, list[tuple[int, int]]]:
    """`bottom` and `top` -> the (in, out) of each layer, for a resolved configuration."""
    model = config.model
    features = len(used_data(config, data).cardinalities)
    sizes = {
        "bottom": [data.dense, *model.bottom, model.width],
        "top": [INTERACTIONS[model.interaction].width(features, model.width), *model.top, 1],
    }
    return {part: list(pairwise(widths)) for part, widths in sizes.items()}


def parameter_shapes(config: TrainConfig, data: DataSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each dense parameter, for a resolved configuration."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, layers in layer_shapes(config, data).items():
        for i, (n_in, n_out) in enumerate(layers):
            shapes[f"{part}.{i}.weight"] = (n_in, n_out)
            shapes[f"{part}.{i}.bias"] = (n_out,)
    features = len(used_data(config, data).cardinalities)
    return shapes | INTERACTIONS[config.model.interaction].shapes(features, config.model)


def state_shapes(config: TrainConfig, data: DataSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of each array of `DLRM.state()`, without making the model."""
    parameters = parameter_shapes(config, data)
    dense = (sum(math.prod(shape) for shape in parameters.values()),)
    return {
        **{f"average.{name}": (shape, "float32") for name, shape in averaged_shapes(config, data).items()},
        **{name: (shape, "float32") for name, shape in parameters.items()},
        **{name: (array.shape, array.dtype) for name, array in declared_state(config, data).items()},
        **{f"dense.{name}": (dense, "float32") for name in RULES[config.optimizer.optimizer].state},
    }


def averaged_shapes(config: TrainConfig, data: DataSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each mean of weights that a training keeps, for a resolved configuration."""
    if config.average is None:
        return {}
    embedding = {_of_part(part): (weights.count,) for part, weights in declared(config, data).items()}
    return parameter_shapes(config, data) | embedding


def _of_part(part: str) -> str:
    return ".".join(("embedding", *filter(None, (part,))))


def buffer_rows(config: TrainConfig) -> int:
    """Rows that the buffers of a model hold: a training batch, or an efficient one for evaluation."""
    return max(config.batch, EVALUATION_BATCH)


def build(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> "DLRM":
    """The model of a resolved configuration, with its initial weights."""
    return DLRM(config, data, create(config, data, backend, dtype), backend, dtype)


class DLRM:
    """A DLRM whose dense weights start as the configuration's seed says, around a given embedding.

    All calls share the buffers, so threads that share a model hold `lock` from a call until they have read
    its result.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: DataSpec,
        embedding: Embedding,
        backend: Backend,
        dtype="float32",
    ):
        self.embedding, self.backend, self.lock = embedding, backend, threading.Lock()
        self.squares = config.loss == "mse"
        shares = {"bottom": config.model.bottom_dropout, "top": config.model.dropout}
        self.dropout_seed = config.seed if any(shares.values()) else None
        # What the embedding's rate is of the other; None where they are one.
        own_rate, self.rate_share = config.optimizer.embedding_lr, None
        if own_rate is not None:
            self.rate_share = own_rate / config.optimizer.lr
        # What training rows without the others that were dropped put on logits (He et al., 2014, 6.3).
        self.shift = (
            None if data.kept_negatives is None else np.dtype(dtype).type(math.log(data.kept_negatives))
        )
        xp, batch = backend.xp, buffer_rows(config)
        self.rows, self.columns = batch, data.dense
        shapes = parameter_shapes(config, data)
        stored = {name: _stored(name, shape, backend) for name, shape in shapes.items()}
        self.largest_product = 2 * max(math.prod(shape) for shape in shapes.values())
        initial = _views(_initial_dense(shapes, np.random.default_rng([config.seed, 0])), shapes)
        host = np.zeros(sum(map(math.prod, stored.values())), dtype)
        for name, view in _views(host, stored).items():
            view[: len(initial[name])] = initial[name]
        self.dense_parameters = backend.to_device(host)
        self.dense_gradient = xp.zeros_like(self.dense_parameters)
        pieces = _pieces(shapes, stored)
        self.optimizer = DenseOptimizer(config.optimizer, self.dense_parameters, pieces, backend)
        self.d_parts = _parts(self.dense_gradient, stored)
        matrices, d_matrices = (_views(flat, stored) for flat in (self.dense_parameters, self.dense_gradient))
        self.parameters, self.gradients = (
            {name: array[: shapes[name][0]] for name, array in arrays.items()}
            for arrays in (matrices, d_matrices)
        )
        short, self.factors = backend.short, self.dense_parameters
        if short:
            self.factors = backend.empty(self.dense_parameters.shape, short.dtype)
        factors = _views(self.factors, stored)
        self.bottom, self.top = (
            MLP(
                *(_layers(matrices, part), _layers(d_matrices, part), _layers(factors, part)),
                batch,
                backend,
                linear_end=part == "top",
                dropout=shares[part],
            )
            for part in ("bottom", "top")
        )
        columns = backend.padded(data.dense)
        self.dense = None
        if short or columns != data.dense:
            self.dense = backend.empty((batch, columns), short.dtype if short else dtype)
            self.dense[...] = 0
        own = _beside_mlps(matrices), _beside_mlps(d_matrices), _beside_mlps(factors)
        kind = INTERACTIONS[config.model.interaction]
        self.pooling = used_data(config, data).pooling
        further = config.batch, self.pooling
        self.interaction = kind(
            embedding, batch, backend, dtype, *further, own=own, staleness=config.staleness
        )
        self.losses = backend.empty(batch, dtype)
        self.d_logits = backend.empty(batch, dtype)
        self.graphs = Graphs(backend)
        self.shared, self.moved = 0, 0.0  # steps, and the bytes that ranks received in them
        shapes = averaged_shapes(config, data)
        self.averages = {name: xp.zeros(shape, "float32") for name, shape in shapes.items()}

    def predict(self, dense, ids):
        """dense (B, n) float, ids (B, F) uint32 or bags -> logits (B,), valid until the next call.

        They are those of all rows, also where some rows without a click were left out of training. Raises
        ArrayError for other shapes and types. That each id has a row, `checked` makes sure.
        """
        self._require_fit(dense, ids)
        if self.pooling:  # no two batches of bags have the same shapes
            return self._predict(dense, ids)
        return self.graphs("inference", self._predict, dense, ids)

    def _predict(self, dense, ids):
        self.backend.limit_threads(len(dense) * self.largest_product)
        self._shorten()
        interacted = self.interaction.predict(self.bottom.forward(self._multiplied(dense), learns=False), ids)
        logits = self.top.forward(interacted, learns=False)[:, 0]
        if self.shift is not None:
            logits += self.shift
        return logits

    def forward(self, dense, ids, key=None, before: int = 0):
        """As `predict`, and keeps what the gradient needs. key, before: of what is dropped, as of MLP."""
        dropped = {"key": key, "before": before}
        self._shorten()
        self.bottom.forward(self._multiplied(dense), self.interaction.first(len(dense)), **dropped)
        return self.top.forward(self.interaction.forward(ids), **dropped)[:, 0]

    def backward(
        self,
        logits,
        label,
        ids,
        rate: float,
        phase: Phase = no_phase,
        target=None,
        weight=None,
        whole: int | None = None,
    ):
        """Gradients of the mean loss by all dense parameters; returns the losses (B,).

        The embedding is stepped on the way: nothing reads its weights afterwards. target (B,): what is
        learned instead of the label, a probability from 0 to 1; it is overwritten. The losses are those of
        the label all the same. weight (B,): what the loss of each row, and so its gradient, is multiplied
        by; the mean is still over the number of rows. whole: how many rows the batch has of which these are a
        part, if they are one; the mean is over these, and the gradients are those of all once ranks `finish`.
        """
        rows, begin = len(logits), self.backend.ranks.begin
        losses, d_logits = self.losses[:rows], self.d_logits[:rows]
        with phase("backward, top"):
            pulls = label if target is None else target
            self.backend.kernels.binary_cross_entropy(logits, pulls, losses, d_logits)
            if self.squares:
                _square(losses, d_logits, label)
            if target is not None:  # the loss is linear in it
                target -= label
                target *= logits
                losses += target
            if weight is not None:
                losses *= weight
                d_logits *= weight
            if whole not in (None, rows):
                d_logits *= rows / whole
            d_interacted = self.top.backward(d_logits[:, None], want_input=True)
            begin(self.d_parts["top"])
        with phase("backward, embedding"):
            own_rate = rate if self.rate_share is None else rate * self.rate_share
            d_first = self.interaction.backward(d_interacted, ids, own_rate)
            begin(self.d_parts["interaction"])
        with phase("backward, bottom"):
            self.bottom.backward(d_first, want_input=False)
            begin(self.d_parts["bottom"])
        return losses

    def step(
        self,
        label,
        dense,
        ids,
        rate: float,
        phase: Phase = no_phase,
        target=None,
        weight=None,
        whole: int | None = None,
    ):
        """One training step on a batch; returns the losses (B,) before it, valid until the next.

        target, weight: as of `backward`. Of several ranks each gives its part (`Alone.part`) of a batch of
        `whole` rows, all at the same time. Raises ArrayError as `predict` does.
        """
        pairs = ("target", target), ("weight", weight)
        more = {name: array for name, array in pairs if array is not None}
        self._require_fit(dense, ids, label=label, **more)
        embedding, steps, dtype = self.embedding, self.embedding.steps, self.dense_parameters.dtype
        rate = dtype.type(rate)  # so that products with it are those of a graph
        corrected = corrections(self.optimizer.config, steps + 1, dtype)
        key = () if self.dropout_seed is None else (rounding_key(self.dropout_seed, DROPPED + steps),)
        # A graph has no phases, and bags of each batch have other shapes.
        if self.backend.graph is None or phase is not no_phase or self.pooling:
            numbers = rate, corrected, *key
            return self._step(label, dense, ids, **more, numbers=numbers, phase=phase, whole=whole)
        own = rate, *corrected, *key
        held = self.graphs.held((*own, *embedding.changing()))
        behind = 1 + len(corrected)
        numbers = held[0], held[1:behind], *held[behind : len(own)]
        embedding.held = held[len(own) :]

        def captured(label, dense, ids, *arrays):
            return self._step(label, dense, ids, **dict(zip(more, arrays, strict=True)), numbers=numbers)

        try:
            name = " with ".join(("training", *more))
            return self.graphs(name, captured, label, dense, ids, *more.values())
        finally:
            embedding.held, embedding.steps = (), steps + 1  # whether Python ran the step or a graph

    def _step(
        self, label, dense, ids, target=None, weight=None, *, numbers, phase: Phase = no_phase, whole=None
    ):
        """numbers: the rate, `corrections` of the optimizer, and the key of dropout if there is any."""
        rate, corrected, *keys = numbers
        ranks, moved = self.backend.ranks, self.backend.ranks.moved
        if self.interaction.exchange is not None:
            self.interaction.exchange.phase = phase
        self.interaction.ready(ids)
        before = ranks.part(whole or len(label)).start
        self.backend.limit_threads(len(label) * self.largest_product)
        with phase("forward"):
            logits = self.forward(dense, ids, keys[0] if keys else None, before)
        losses = self.backward(logits, label, ids, rate, phase, target, weight, whole)
        with phase("update"):
            ranks.finish(phase)
            self.optimizer.update(self.dense_gradient, rate, corrected)
        self.shared, self.moved = self.shared + 1, self.moved + ranks.moved - moved
        return losses

    def settle(self) -> None:
        """Have all ranks hold the same `state`, of which each may have stepped a part by itself."""
        if self.interaction.exchange is not None:
            ranks, moved = self.backend.ranks, self.backend.ranks.moved
            self.interaction.exchange.settle()
            self.moved += ranks.moved - moved

    def exchanged(self) -> dict[str, Any]:
        """What the processes of a training, if there are several, exchanged in all steps so far: in how many
        the gradients of vectors travelled which way, and the bytes of a step that each received."""
        if self.interaction.exchange is None:
            return {}
        ways, size = dict(self.interaction.exchange.ways), self.backend.ranks.size
        return {"processes": {"count": size, "ways": ways, "bytes": round(self.moved / max(1, self.shared))}}

    def _require_fit(self, dense, ids, **others) -> None:
        """Raise ArrayError for arrays whose end the kernels would read past, or that they would misread."""
        bags, features = self._bags_of(ids), self.embedding.features
        rows = len(ids if bags is None else dense)
        arrays: list[tuple[str, Any, tuple[int, ...]]] = [("dense", dense, (rows, self.columns))]
        arrays += [(name, array, (rows,)) for name, array in others.items()]
        if bags is None:
            arrays.insert(1, ("ids", ids, (rows, features)))
        else:
            bags.require_fit(rows, features)
        for name, array, shape in arrays:
            if array.shape != shape:
                raise ArrayError(f"{name}: has shape {array.shape}, but must have {shape}")
        if rows > self.rows:
            raise ArrayError(f"a batch has {rows} rows, but the buffers of the model are for {self.rows}")
        if bags is None and ids.dtype != "uint32":
            raise ArrayError(f"ids: holds {ids.dtype}, but must hold uint32")

    def _bags_of(self, ids) -> Bags | None:
        """The bags that are given for ids; ArrayError unless bags are given where the data have pooling."""
        bags = bags_of(ids)
        if bags is None and self.pooling:
            raise ArrayError("ids: must be bags, (values, offsets, weights), since the data have pooling")
        if bags is not None and not self.pooling:
            raise ArrayError("ids: are bags, but the data of this model have one id a feature")
        return bags

    def checked(self, ids, rows: int):
        """The ids, still on the host, of B rows as this model takes them, of the features that it uses.

        Raises ConfigError where one has no row, or ArrayError for what are no bags: kernels would read
        elsewhere.
        """
        if not self.embedding.features:
            return np.empty((rows, 0), np.uint32)
        if (bags := self._bags_of(ids)) is None:
            ids = np.ascontiguousarray(ids[:, : self.embedding.features])
            self.embedding.check(ids)
            return ids
        bags.check(rows, self.pooling)
        self.embedding.check(bags.values[:, None], bags.features(len(self.pooling)))
        return bags if bags.weights is not None else bags._replace(weights=NO_WEIGHTS)

    def average(self, number: int) -> None:
        """Take the weights as they are now into their means, the `number`-th of all, from 1 on."""
        if self.interaction.stale is not None:
            self.settle()
        now = self.parameters | {part: array.stepped for part, array in self._arrays().items()}
        for name, mean in self.averages.items():
            flat, weights = mean.reshape(-1), now[name].reshape(-1)
            for start in range(0, flat.size, AVERAGED):
                piece = slice(start, start + AVERAGED)
                difference = weights[piece] - flat[piece]
                difference /= number
                flat[piece] += difference

    def use_averages(self) -> None:
        """Have the means for weights. A training does not go on from here."""
        for name, mean in self.averages.items():
            if name in self.parameters:
                self.parameters[name][...] = mean
        for part, array in self._arrays().items():
            array.restart([(0, self.averages[part])])

    def _arrays(self) -> dict[str, ArrayEmbedding]:
        """Name of its mean -> each array of the embedding whose weights can be averaged."""
        parts = self.embedding.parts.items()
        return {_of_part(part): array for part, array in parts if isinstance(array, ArrayEmbedding)}

    def _shorten(self) -> None:
        """Round the dense parameters, as they are now, for the products that follow."""
        if self.backend.short:
            self.backend.short.store(self.dense_parameters, self.factors)

    def _multiplied(self, dense):
        """dense (B, n) as it is multiplied: rounded, with columns of zeros behind, as the backend wants."""
        if self.dense is None:
            return dense
        whole = self.dense[: len(dense)]
        columns = whole[:, : dense.shape[1]]
        if self.backend.short:
            self.backend.short.store(dense, columns)
        else:
            columns[...] = dense
        return whole

    def state(self) -> dict[str, Any]:
        """Name -> array, everything that training changes; views, so writing to them sets the model."""
        optimizer = {f"dense.{name}": array for name, array in self.optimizer.state.items()}
        averages = {f"average.{name}": mean for name, mean in self.averages.items()}
        return self.parameters | self.embedding.state() | optimizer | averages


def _square(losses, d_logits, label) -> None:
    """Make of the gradients (p - y) / B of the cross entropy, p the probability and y the label, the losses
    (p - y)^2 and the gradients of their mean; in place."""
    losses[...] = d_logits
    losses *= len(label)
    probability = losses + label
    d_logits *= 2 * probability * (1 - probability)
    losses *= losses


def _initial_dense(shapes: dict[str, tuple[int, ...]], rng) -> np.ndarray:
    """The DLRM's initial law: weights N(0, 2 / (in + out)), biases N(0, 1 / out), but 0 beside the MLPs; one
    flat array."""
    parts, others = [], _beside_mlps(shapes)
    for name, shape in shapes.items():
        if len(shape) == 1 and name in others:
            parts.append(np.zeros(shape))
            continue
        deviation = np.sqrt(2 / sum(shape) if len(shape) == 2 else 1 / shape[0])
        parts.append((deviation * rng.standard_normal(shape)).ravel())
    return np.concatenate(parts)


def _stored(name: str, shape: tuple[int, ...], backend: Backend) -> tuple[int, ...]:
    """The shape of a dense parameter with the rows of zeros that belong to padded columns of its input."""
    return (backend.padded(shape[0]), *shape[1:]) if name.endswith(".0.weight") else shape


def _pieces(shapes: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> list[slice]:
    """Where the parameters lie in a flat array of these stored shapes: all but the rows of zeros."""
    pieces, start, stop = [], 0, 0
    for name, shape in shapes.items():
        stop += math.prod(shape)
        if zeros := math.prod(stored[name]) - math.prod(shape):
            pieces.append(slice(start, stop))
            start = stop = stop + zeros
    return [*pieces, slice(start, stop)]


def _views(flat, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Consecutive pieces of a flat array, in the shapes given."""
    views, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        views[name] = flat[start : start + size].reshape(shape)
        start += size
    return views


def _parts(flat, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The consecutive pieces of a flat array that belong to each MLP, and behind them the interaction's."""
    stops = [
        sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(parts))
        for parts in ("bottom.", ("bottom.", "top."))
    ]
    pieces = flat[: stops[0]], flat[stops[0] : stops[1]], flat[stops[1] :]
    return dict(zip(("bottom", "top", "interaction"), pieces, strict=True))


def _beside_mlps(arrays: dict[str, Any]) -> dict[str, Any]:
    """Those of no MLP, which are the interaction's."""
    return {name: array for name, array in arrays.items() if not name.startswith(("bottom.", "top."))}


def _layers(arrays: dict[str, Any], part: str) -> list[tuple[Any, Any]]:
    """The (weight, bias) pairs of one MLP, in order."""
    count = sum(name.startswith(f"{part}.") for name in arrays) // 2
    return [(arrays[f"{part}.{i}.weight"], arrays[f"{part}.{i}.bias"]) for i in range(count)]
