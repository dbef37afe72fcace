"""ROBE in PyTorch: modules whose one parameter is the array, over the kernels of this package.

    RobeEmbedding(cardinalities, D, ...)       ids (B, F) -> vectors (B, F, D)
    RobeEmbeddingBag(cardinalities, D, ...)    bags of ids, as of robe/bags.py -> (B, F, D)
    replace_embedding_bags(model)              an array in the place of all tables of a model
    from_run(folder)                           the module of a trained run

Weights and hash are those of the method `robe` with the same settings and seed. This file alone needs the
extra `torch`, and nothing else here imports it.

A look-up is an operation of PyTorch, `torch.ops.robe.look_up`, and so are its gradient and the step that
takes the gradient's place where an optimizer is fused into the backward pass. What is the same in each call
goes to them as one text, `how`, so that a graph that was exported says all. The kernels read and write the
memory of the tensors.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from robe import checkpoint
from robe.backend import Backend, select
from robe.bags import Bags, modes
from robe.config import METHODS, OPTIMIZERS, WEIGHT_BYTES, ConfigError, OptimizerConfig, Pooling
from robe.embeddings import create
from robe.errors import ArrayError
from robe.estimator import described, in_keywords
from robe.export_weights import ModuleSettings
from robe.kernels.parts.hashing import SlotMap, slot_map
from robe.optim import RULES, corrections, touched_step
from robe.packages import extra

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"robe.torch needs PyTorch: {extra('torch')}", name=error.name) from None


@dataclasses.dataclass(frozen=True)
class How:
    """What look-ups of an array have in common.

    hash, width, block, weights, hash_seed, sign: of slot_map
    base: what makes an id of each feature a token
    pooling: of each feature; None where each has one id
    optimizer: of the step that is fused into the backward pass, if there is one
    """

    hash: str
    width: int
    block: int
    weights: int
    hash_seed: int
    sign: bool
    base: tuple[int, ...]
    pooling: tuple[Pooling, ...] | None
    optimizer: OptimizerConfig

    @property
    def has_max(self) -> bool:
        return "max" in (self.pooling or ())

    def text(self) -> str:
        return msgspec.json.encode(self).decode()


@cache
def _how(text: str) -> How:
    return msgspec.json.decode(text, type=How)


class Place(NamedTuple):
    """What the kernels of a device are told besides tensors."""

    how: How
    backend: Backend
    slot_map: SlotMap
    base: Any  # (F,) uint64
    origin: Any  # (1,) uint64: the base of tokens
    modes: Any  # (F,) uint8, of pooling

    def array(self, tensor: Tensor) -> Any:
        """The tensor's memory, as kernels take it."""
        return self.backend.xp.asarray(tensor.detach())

    def unpooled(self, ids: Tensor, offsets: Tensor | None, scales: Tensor | None) -> tuple:
        """(ids, offsets); where each bag holds one id, which need not be pooled, (ids (B, F), None)."""
        features = len(self.base)
        if offsets is None or scales is not None or len(offsets) != len(ids) + 1 or ids.is_cuda:
            return ids, offsets
        starts = offsets.numpy()
        if len(ids) % features or starts[0] != 0 or (starts[1:] - starts[:-1] != 1).any():
            return ids, offsets
        return ids.reshape(-1, features), None

    def slots(self, ids: Tensor, offsets: Tensor | None) -> tuple:
        """(rows, base, slot_map) as kernels take them: of ids (B, F), or of the tokens (N, 1) of bags."""
        rows = self.array(ids).view("uint64")
        if offsets is None:
            return rows, self.base, self.slot_map
        features, xp = len(self.base), self.backend.xp
        owners: Any = 0
        if features > 1:
            owners = (xp.searchsorted(self.array(offsets), xp.arange(len(rows)), side="right") - 1) % features
        return (self.base[owners] + rows)[:, None], self.origin, self.slot_map

    def scales(self, scales: Tensor | None) -> Any:
        return self.backend.xp.empty(0, "float32") if scales is None else self.array(scales)

    def gather(self, weight: Tensor, slots: tuple) -> Tensor:
        """The vectors of all rows, (B, F, D) or (N, 1, D)."""
        vectors = weight.new_empty((*slots[0].shape, self.how.width))
        self.backend.kernels.gather(self.array(weight), *slots, self.array(vectors))
        return vectors

    def row_gradients(self, d_out, weight, ids, offsets, scales, wanted) -> tuple[tuple, Tensor]:
        """(gradients of all rows, their slots), and the gradients of `scales` (N,) if they are wanted, else
        (0,)."""
        ids, offsets = self.unpooled(ids, offsets, scales)
        slots, d_scales = self.slots(ids, offsets), d_out.new_empty(0)
        if offsets is None:
            return (self.array(d_out), slots), d_scales
        d_rows, kernels = d_out.new_empty(len(slots[0]), self.how.width), self.backend.kernels
        rows = d_rows  # which are not read then
        if wanted or self.how.has_max:
            rows = self.gather(weight, slots)[:, 0]
        bags = self.array(offsets), self.scales(None if wanted else scales), self.modes
        kernels.pool_backward(self.array(d_out), self.array(rows), *bags, self.array(d_rows))
        if wanted:
            d_scales = (d_rows * rows).sum(1)
            d_rows *= scales[:, None]
        return (self.array(d_rows)[:, None], slots), d_scales


@cache
def _place(text: str, device: str) -> Place:
    how, backend = _how(text), select(device)
    to = backend.to_device
    base, origin = to(np.array(how.base, np.uint64)), to(np.zeros(1, np.uint64))
    where = slot_map(how.hash, how.width, how.block, how.weights, how.hash_seed, how.sign)
    return Place(how, backend, where, base, origin, to(modes(how.pooling)) if how.pooling else None)


def _in_order(operation: Callable) -> Callable:
    """Kernels run on CUDA's default stream, so where another one is current each waits for the other."""

    @wraps(operation)
    def ordered(tensor: Tensor, *arguments):
        if not tensor.is_cuda:
            return operation(tensor, *arguments)
        current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        default.wait_stream(current)
        result = operation(tensor, *arguments)
        current.wait_stream(default)
        return result

    return ordered


@_in_order
def _vectors(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    state: Sequence[Tensor],
    how: str,
) -> Tensor:
    """Vectors (B, F, D) of ids (B, F), or (N,) in bags, int64; offsets (B * F + 1,), scales (N,).

    state: of `_step`, which the backward pass is then; empty where it gives a gradient.
    """
    here = _place(how, weight.device.type)
    ids, offsets = here.unpooled(ids, offsets, scales)
    _check(here, weight, ids, offsets, scales)
    rows = here.gather(weight, here.slots(ids, offsets))
    if offsets is None:
        return rows
    out = weight.new_empty(_shape(here.how, ids, offsets))
    bags = here.array(offsets), here.scales(scales), here.modes
    here.backend.kernels.pool(here.array(rows[:, 0]), *bags, here.array(out))
    return out


def _check(here: Place, weight: Tensor, ids: Tensor, offsets: Tensor | None, scales: Tensor | None) -> None:
    """Raise ArrayError for what kernels would misread; of what lies on a GPU only shapes and types."""
    if weight.dtype != torch.float32 or weight.shape != (here.how.weights,):
        raise ArrayError(f"weight must be ({here.how.weights},) float32, not {weight.dtype}")
    if ids.is_cuda:
        return
    numbers = ids.numpy()
    if (numbers >> 32).any():
        raise ArrayError("ids must be from 0 to 2^32 - 1")
    if offsets is not None:
        bags = Bags(numbers.astype(np.uint32), offsets.numpy(), None if scales is None else scales.numpy())
        bags.check(bags.rows(len(here.base)), here.how.pooling)


def _shape(how: How, ids: Tensor, offsets: Tensor | None) -> tuple:
    features = len(how.base)
    return (ids.shape[0] if offsets is None else (offsets.shape[0] - 1) // features, features, how.width)


_look_up = torch.library.custom_op("robe::look_up", _vectors, mutates_args=())


@_look_up.register_fake
def _(weight, ids, offsets, scales, state, how):
    return weight.new_empty(_shape(_how(how), ids, offsets))


@_in_order
def _add_gradient(
    d_out: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    how: str,
    wanted: bool,
    total: Tensor,
) -> Tensor:
    """Add the gradients of the weights to `total` (M,); returns those of the scales (N,), if they are wanted.

    weight: None where the gradients do not depend on it.
    """
    here = _place(how, d_out.device.type)
    (d_rows, slots), d_scales = here.row_gradients(d_out, weight, ids, offsets, scales, wanted)
    here.backend.kernels.scatter_add(d_rows, *slots, 1, here.array(total))
    return d_scales


@torch.library.custom_op("robe::gradient", mutates_args=())
def _gradient(
    d_out: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    how: str,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """What `_add_gradient` adds to zeros, and returns."""
    total = d_out.new_zeros(_how(how).weights)
    return total, _add_gradient(d_out, weight, ids, offsets, scales, how, wanted, total)


@_gradient.register_fake
def _(d_out, weight, ids, offsets, scales, how, wanted):
    return d_out.new_empty(_how(how).weights), d_out.new_empty(ids.shape[0] if wanted else 0)


@torch.library.custom_op("robe::step", mutates_args=("weight", "state"))
@_in_order
def _step(
    d_out: Tensor,
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    state: Sequence[Tensor],
    how: str,
    wanted: bool,
) -> Tensor:
    """One step of the optimizer on the weights that `ids` touch, as ArrayEmbedding.update takes it; returns
    what `_add_gradient` does.

    state: the learning rate (), the steps so far (), the sums of gradients (M,), which are 0 before and
        afterwards, and what the optimizer keeps.
    """
    here = _place(how, weight.device.type)
    gradients, d_scales = here.row_gradients(d_out, weight, ids, offsets, scales, wanted)
    _take_step(weight, state, here, [gradients])
    return d_scales


def _take_step(weight: Tensor, state: Sequence[Tensor], here: Place, gradients: list[tuple]) -> None:
    """One step of the optimizer. gradients: those of the rows that each look-up read, and their slots.

    What several look-ups read is stepped with the first of them by all their gradients, which are 0 then, and
    for a gradient of 0 nothing happens.
    """
    rate, steps, *kept = state
    steps += 1
    memory, kernels, optimizer = here.array(weight), here.backend.kernels, here.how.optimizer
    touched, options = touched_step(optimizer)
    if touched is None:
        for d_rows, slots in gradients:
            kernels.scatter_add(d_rows, *slots, -float(rate), memory)
        return
    gradient, *sums = map(here.array, kept)
    for d_rows, slots in gradients:
        kernels.scatter_add(d_rows, *slots, 1, gradient)
    numbers = float(rate), *corrections(optimizer, int(steps), memory.dtype), *options
    for _, slots in gradients:
        getattr(kernels, touched)(*slots, *numbers, gradient, *sums, memory)


@_step.register_fake
def _(d_out, weight, ids, offsets, scales, state, how, wanted):
    return d_out.new_empty(ids.shape[0] if wanted else 0)


def _remember(
    ctx, how: str, wanted: bool, weight: Tensor, *tensors: Tensor, state: Sequence[Tensor] = ()
) -> None:
    """Keep for the backward pass what it reads; the weights only where gradients depend on them."""
    by_max = _how(how).has_max
    if wanted and by_max:
        raise ArrayError("per_sample_weights: have no gradient where a feature is pooled by max")
    ctx.how, ctx.wanted, ctx.count = how, wanted, len(state)
    ctx.save_for_backward(weight if state or wanted or by_max else None, *tensors, *state)


def _keep(ctx, inputs, output) -> None:
    *tensors, state, how = inputs
    _remember(ctx, how, ctx.needs_input_grad[3], *tensors, state=state)


def _backward(ctx, d_out: Tensor):
    weight, ids, offsets, scales, *state = ctx.saved_tensors
    bags, d_weight = (weight, ids, offsets, scales), None
    if state:
        d_scales = _step(d_out.contiguous(), *bags, state, ctx.how, ctx.wanted)
    else:
        d_weight, d_scales = _gradient(d_out.contiguous(), *bags, ctx.how, ctx.wanted)
    return d_weight, None, None, d_scales if ctx.wanted else None, [None] * ctx.count, None


_look_up.register_autograd(_backward, setup_context=_keep)


class _Meet(torch.autograd.Function):
    """Weights (M,) -> a tensor (0,) that look-ups of many features depend on instead.

    So the backward pass comes here when all of them have added to one gradient, `told`. Each for itself,
    they would make as many gradients as large as the array. Where an optimizer is fused, they have listed
    theirs there, and one step takes them all.
    """

    @staticmethod
    def forward(ctx, weight, told, array):
        ctx.told, ctx.array = told, array
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx, nothing):
        told, array = ctx.told, ctx.array
        if array is not None:
            weight = array.weight.detach()
            _in_order(_take_step)(weight, array.kept(), _place(array.how, weight.device.type), told)
            told.clear()
            return None, None, None
        return told.pop() if told else None, None, None


class _Meeting:
    """Where the look-ups of one forward pass in one array meet; `array`: where its optimizer is fused."""

    def __init__(self, array: "RobeEmbedding | None"):
        self.array = array
        self.found: weakref.ref | None = None  # only the look-ups of a pass keep it

    def __getstate__(self):
        return {"array": self.array, "found": None}

    def of(self, weight: Tensor) -> Tensor:
        """The tensor (0,) of `_Meet`, with its `told`, a list, and the array."""
        meeting = self.found and self.found()
        if meeting is None:
            told: list = []
            meeting = _Meet.apply(weight, told, self.array)
            meeting.told, meeting.fused = told, self.array is not None
            self.found = weakref.ref(meeting)
        return meeting


class _MeetingLookUp(torch.autograd.Function):
    """`_look_up` of weights that meet."""

    @staticmethod
    def forward(ctx, meeting, weight, ids, offsets, scales, how):
        ctx.meeting = meeting
        _remember(ctx, how, ctx.needs_input_grad[4], weight, ids, offsets, scales)
        return _vectors(weight, ids, offsets, scales, [], how)

    @staticmethod
    def backward(ctx, d_out):
        told, arguments = ctx.meeting.told, (d_out.contiguous(), *ctx.saved_tensors)
        if ctx.meeting.fused:
            here = _place(ctx.how, d_out.device.type)
            gradients, d_scales = _in_order(here.row_gradients)(*arguments, ctx.wanted)
            told.append(gradients)
        else:
            if not told:
                told.append(d_out.new_zeros(_how(ctx.how).weights))
            d_scales = _add_gradient(*arguments, ctx.how, ctx.wanted, told[0])
        return d_out.new_empty(0), None, None, None, d_scales if ctx.wanted else None, None


# Of the settings of `robe train`, by name, those of an array and of its initial weights; and those of a step.
OF_ARRAY = {*METHODS["robe"].options, "seed"} - {"memory", "master", "rounding"}
OF_STEP = {"eps", "beta1", "beta2", "momentum", "weight_decay", "embedding_l2"}


class RobeEmbedding(nn.Module):
    """One ROBE array for F categorical features: ids (B, F) integers -> vectors (B, F, D) float32.

    cardinalities: how many values each feature has; ids are 0 .. cardinality - 1.
    width: D.
    weights: M; or give `compression` or `megabytes`.
    hashed: ids are any 32 bits instead, and the cardinalities say about how many distinct ones there are.
    fused: an optimizer, sgd, adagrad, rowwise_adagrad, adam or momentum, whose step the backward pass takes,
        on the weights that the batch reads; `weight` then never has a gradient.
    lr: its rate, which is the tensor `lr` from then on.
    settings: of `robe train`, by name: block, hash, hash_seed, sign, init_bound, seed; with `fused` also eps,
        beta1, beta2, momentum, weight_decay and embedding_l2.

    Its parameter is `weight` (M,). What a fused optimizer keeps are buffers, so state_dict holds it.
    Raises ConfigError for settings that cannot be used, ArrayError (a ValueError) for ids that do not fit.
    """

    pooling: Pooling | Iterable[Pooling] | None = None

    def __init__(
        self,
        cardinalities: Iterable[int],
        width: int,
        weights: int | None = None,
        *,
        hashed: bool = False,
        fused: str | None = None,
        lr: float | None = None,
        **settings: Any,
    ):
        super().__init__()
        if (fused is None) != (lr is None):
            raise ConfigError("give fused, the name of an optimizer, and lr, its rate, or none of both")
        if fused is not None and (fused == "none" or fused not in OPTIMIZERS):
            known = ", ".join(name for name in OPTIMIZERS if name != "none")
            raise ConfigError(f"fused must be of {known}, not {fused!r}")
        known = OF_ARRAY | (OF_STEP if fused else set())
        if strange := settings.keys() - known:
            raise ConfigError(
                f"{min(strange)} is no setting of this module; there are {', '.join(sorted(known))}"
            )
        settings |= {"weights": weights, "width": width, "optimizer": fused or "none", "lr": lr}
        with in_keywords():
            config, data = described(cardinalities, 0, hashed, self.pooling, settings)
            array: Any = create(config, data, select("cpu"))
        chosen = config.embedding
        self.features = len(data.cardinalities)
        self.how = How(
            *(chosen.hash, width, chosen.block, array.weights, chosen.hash_seed, chosen.sign),
            *(tuple(array.base.tolist()), data.pooling, config.optimizer),
        ).text()
        self.weight = nn.Parameter(torch.from_numpy(array.memory))
        self.state: tuple[str, ...] = ()  # names of the buffers, as `_step` takes them
        if fused:
            self.register_buffer("lr", torch.tensor(config.optimizer.lr, dtype=torch.float64))
            self.register_buffer("steps", torch.tensor(0))
            # Of SGD the kernel of weight decay takes an accumulator, an empty one, too.
            kept = "gradient", *(RULES[fused].state or ("accumulator",))
            for name in kept:
                persistent = array.arrays[name].kept
                self.register_buffer(name, torch.from_numpy(getattr(array, name)), persistent=persistent)
            self.state = "lr", "steps", *kept

    def extra_repr(self) -> str:
        how = _how(self.how)
        return f"{self.features} features, {how.width}, {how.weights} weights, block={how.block}"

    def forward(self, ids: Tensor) -> Tensor:
        if ids.ndim != 2 or ids.shape[1] != self.features:
            raise ArrayError(f"ids: has shape {tuple(ids.shape)}, but must have (any, {self.features})")
        return self._look_up(ids)

    def _look_up(self, ids: Tensor, offsets: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        training = torch.is_grad_enabled() and self.weight.requires_grad
        state = self.kept() if training else []
        return _look_up(self.weight, _integers("ids", ids), offsets, scales, state, self.how)

    def kept(self) -> list[Tensor]:
        """The state of `_step`; empty where no optimizer is fused."""
        return [getattr(self, name) for name in self.state]


class RobeEmbeddingBag(RobeEmbedding):
    """The same for features that hold any number of ids, whose vectors are pooled: sum, mean or max.

    mode: of all features, or a tuple of one for each.
    include_last_offset: whether offsets end with N.

    Called with the ids of all bags (N,), offsets and per_sample_weights (N,) or None, it gives vectors
    (B, F, D). Bag (b, f) begins at offsets[b * F + f]. The mean is over the number of ids, whatever the
    weights, as in FBGEMM.
    """

    def __init__(
        self,
        cardinalities: Iterable[int],
        width: int,
        weights: int | None = None,
        *,
        mode: Pooling | Iterable[Pooling] = "sum",
        include_last_offset: bool = False,
        **settings: Any,
    ):
        self.pooling = mode
        super().__init__(cardinalities, width, weights, **settings)
        self.include_last_offset = include_last_offset

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if offsets is None or ids.ndim != 1 or offsets.ndim != 1:
            raise ArrayError("give ids (N,) and offsets, of one dimension each")
        return self._look_up(ids, *_bags(ids, offsets, per_sample_weights, self.include_last_offset))


def _integers(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
        raise ArrayError(f"{name}: holds {tensor.dtype}, but must hold integers")
    return tensor.long().contiguous()


def _bags(ids: Tensor, offsets: Tensor, scales: Tensor | None, closed: bool) -> tuple:
    """(offsets (bags + 1,), scales) for a look-up; closed: whether offsets end with N."""
    offsets = _integers("offsets", offsets)
    if not closed:
        offsets = torch.cat([offsets, offsets.new_full((1,), len(ids))])
    return offsets, None if scales is None else scales.float().contiguous()


class RobeFeature(nn.Module):
    """One feature of an array that features share, called as the nn.EmbeddingBag or nn.Embedding that it
    replaces.

    Of a bag: ids (N,), offsets and per_sample_weights, or ids (B, L), all bags as long -> (B, D). Of an
    embedding: ids of any shape -> (..., D). `weight` is that of all of them, and so is `array`, with the rate
    `lr`, where an optimizer is fused.
    """

    def __init__(self, array: RobeEmbedding, feature: int, table: nn.Module, meeting: _Meeting):
        super().__init__()
        self.weight, self.meeting, self.array = array.weight, meeting, meeting.array
        self.mode: Pooling | None = getattr(table, "mode", None)
        self.include_last_offset = getattr(table, "include_last_offset", False)
        how = _how(array.how)
        pooling = (self.mode,) if self.mode else None
        self.how = dataclasses.replace(how, base=how.base[feature : feature + 1], pooling=pooling).text()

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        ids = _integers("ids", input)
        if self.mode is None:
            return self._look_up(ids.reshape(-1, 1), None, None).reshape(*ids.shape, -1)
        if ids.ndim != (2 if offsets is None else 1):
            raise ArrayError("give ids (N,) and offsets, or ids (B, L) without offsets")
        closed = self.include_last_offset
        if offsets is None:
            bags, length = ids.shape
            offsets, closed = torch.arange(bags + 1, device=ids.device) * length, True
            ids = ids.reshape(-1)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        return self._look_up(ids, *_bags(ids, offsets, per_sample_weights, closed))[:, 0]

    def _look_up(self, ids: Tensor, offsets: Tensor | None, scales: Tensor | None) -> Tensor:
        arguments = ids, offsets, scales
        meets = torch.is_grad_enabled() and self.weight.requires_grad
        if torch.compiler.is_compiling() or not meets:  # no meeting can be traced
            if self.array is not None and meets:
                raise ConfigError("features with a fused optimizer cannot be compiled; RobeEmbedding can be")
            return _look_up(self.weight, *arguments, [], self.how)
        return _MeetingLookUp.apply(self.meeting.of(self.weight), self.weight.detach(), *arguments, self.how)


# Option of a table that an array has not -> what it is without.
REFUSED = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False}


class Saved(NamedTuple):
    """Bytes of the tables that were replaced, and of the array in their place."""

    before: int
    after: int


def replace_embedding_bags(model: nn.Module, **settings: Any) -> Saved:
    """Put one new array in the place of every nn.EmbeddingBag of a model, and of every nn.Embedding that is
    in an nn.ModuleList; each becomes a RobeFeature of it.

    settings: those of RobeEmbedding; `compression` is 100 where no size is given.
    The array is untrained, whatever the tables were, and its gradient is dense unless an optimizer is fused.
    Make others afterwards.
    Raises ConfigError for tables that one array cannot stand for: of several widths, or with options that it
    has not.
    """
    places = [
        (parent, name, table)
        for parent in model.modules()
        for name, table in parent._modules.items()
        if isinstance(table, nn.EmbeddingBag)
        or (isinstance(table, nn.Embedding) and isinstance(parent, nn.ModuleList))
    ]
    tables = list(dict.fromkeys(table for _, _, table in places))
    if not tables:
        raise ConfigError("the model holds no nn.EmbeddingBag, and no nn.ModuleList of nn.Embedding")
    width, weight = tables[0].embedding_dim, tables[0].weight
    for table in tables:
        if table.embedding_dim != width or table.weight.dtype != torch.float32:
            raise ConfigError(f"{table}: one array stands for tables of one width, in float32")
        for option, default in REFUSED.items():
            if getattr(table, option) is not default:
                raise ConfigError(f"{table}: an array has no {option}; make the table without it")
    array = RobeEmbedding([table.num_embeddings for table in tables], width, **settings).to(weight.device)
    meeting = _Meeting(array if array.state else None)
    features = {table: RobeFeature(array, f, table, meeting) for f, table in enumerate(tables)}
    for parent, name, table in places:
        setattr(parent, name, features[table])
    before = sum(table.weight.nbytes for table in tables)
    return Saved(before, array.weight.nbytes)


def from_run(folder: Path | str, **fused: Any) -> RobeEmbedding:
    """The module of a run's trained array: a RobeEmbeddingBag where its data have pooling.

    fused: as RobeEmbedding takes it, with lr and what belongs to it. Raises ConfigError for a run of another
    method or in codes, CheckpointError where there is none.
    """
    folder = Path(folder)
    config, data, _ = checkpoint.newest_state(folder)
    chosen = config.embedding
    if chosen.method != "robe" or chosen.memory not in WEIGHT_BYTES:
        what = f"--method {chosen.method} --memory {chosen.memory}"
        raise ConfigError(f"{folder}: is of {what}, but a module is made of --method robe in fp32 or fp16")
    trained: Any = checkpoint.load_model(folder, "cpu")[0].embedding
    kind = RobeEmbeddingBag if data.pooling else RobeEmbedding
    settings = msgspec.to_builtins(ModuleSettings.of(config, data, trained.weights))
    module = kind(**settings, **fused)
    module.weight.data.copy_(torch.from_numpy(trained.read(0, trained.weights)))
    return module
