"""Weights that others have published, the state dict of a DLRM in PyTorch, as a model of ours.

    bot_l.I.weight (out, in), bot_l.I.bias (out,)    the bottom MLP; I counts layers and rectifiers
    top_l.I.weight, top_l.I.bias                     the top MLP
    emb_l.K.weight (rows, D)                         the table of feature K (github.com/facebookresearch/dlrm)
    hashed_weight, emb_l.K.hashed_weight, emb_l.K.weight (M,)
                                  instead of tables, one ROBE array under all these names, or some of them
                                  (github.com/apd10/universal_memory_allocation, apd10/robez, apd10/dlrm)
    emb_l.K.random_numbers        beside it, the constants P, C, B, A of its hash, and more
    emb_l.K.helper_Eidx_base      beside it, on a CPU, (D,): the block of each element, i // Z
    robe_settings                 beside it, in files of export_weights.py: the hash, and of which data it is

Widths, M and the interaction follow from the shapes: what the top MLP reads are the products of pairs, or the
vectors themselves (`--interaction none`); the products where both have as many numbers. Features come in the
order of the data's columns, and pairs in that of the DLRM, which is ours: (1, 0), (2, 0), (2, 1), (3, 0), ...
"""

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from robe.backend import select
from robe.config import (
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    resolve,
)
from robe.export_weights import SETTINGS, ModuleSettings
from robe.interaction import Interaction
from robe.kernels.parts.hashing import P, SlotMap
from robe.model import DLRM, build
from robe.packages import extra

BLOCK, SEED = 1, 1024  # the defaults of the published code
ARRAY = re.compile(r"hashed_weight|emb_l\.\d+\.(hashed_)?weight")
BESIDE = re.compile(r"emb_l\.\d+\.(random_numbers|signature|helper_\w+)")
Tensors = dict[str, np.ndarray]


def read_tensors(file: Path) -> Tensors:
    """The tensors of a file of safetensors, or of one of PyTorch, from which nothing else is ever loaded.

    Raises ConfigError for a file that is neither, OSError for one that cannot be read.
    """
    file.open("rb").close()  # safetensors and torch have other words for what keeps a file from being read
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "numpy") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}
        except (SafetensorError, TypeError) as error:  # NumPy has no bfloat16
            raise ConfigError(f"{file}: not a file of safetensors that NumPy reads ({error})") from None
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{file}: to read it takes torch: {extra('torch')}; or save the state dict as .safetensors"
        ) from None
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch's own choice, with advice how to run code after all
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"holds {stranger[1]}, which is no tensor, and is not run" if stranger else "is damaged or none"
        )
        raise ConfigError(
            f"{file}: {what}; of a file of PyTorch only tensors are loaded: save the state dict alone, "
            "`torch.save(model.state_dict(), FILE)`"
        ) from None
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    if not found or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ConfigError(f"{file}: holds no state dict, a name and a tensor each")
    return {name: _numbers(tensor) for name, tensor in found.items()}


def _numbers(tensor: Any) -> np.ndarray:
    """A tensor of PyTorch, floats of any kind as float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def imported(
    tensors: Tensors, data: DataSpec, block: int | None = None, hash_seed: int | None = None
) -> tuple[TrainConfig, DLRM]:
    """The configuration and the model of a state dict.

    block, hash_seed: Z and the seed of the hash of a ROBE array; default: those of the published code.
    Raises ConfigError that names the tensor which does not fit the others, or the data.
    """
    if data.dialect == "hash" and SETTINGS not in tensors:
        raise ConfigError(
            "published weights are for ids that count from 0, and those of these data are raw values; prepare"
            " them with `robe prepare FILE --ids dictionary --out DIR`"
        )
    left, features, written = dict(tensors), len(data.cardinalities), None
    for name, tensor in left.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise ConfigError(f"{name}: holds a value that is not finite")
    bottom, top = _layers(left, "bot_l", data.dense), _layers(left, "top_l")
    width = len(bottom[-1][1])
    shared = [name for name in left if ARRAY.fullmatch(name) and left[name].ndim == 1]
    _require_each(left, features, shared)
    if shared and SETTINGS in left:
        if (block, hash_seed) != (None, None):
            raise ConfigError(f"--block and --hash-seed are for files that lack {SETTINGS}, which tell them")
        written = _settings(left.pop(SETTINGS))
        how = {name: getattr(written, name) for name in ("block", "hash", "hash_seed", "sign")}
        settings = EmbeddingConfig("robe", weights=left[shared[0]].size, **how)
    elif shared:
        settings = EmbeddingConfig(
            "robe",
            weights=left[shared[0]].size,
            block=BLOCK if block is None else block,
            hash="affine",
            sign=False,
            hash_seed=SEED if hash_seed is None else hash_seed,
        )
    elif (block, hash_seed) != (None, None):
        raise ConfigError("--block and --hash-seed are for a ROBE array, and this file holds full tables")
    else:
        settings = EmbeddingConfig("full")
    hidden = [tuple(len(bias) for _, bias in layers[:-1]) for layers in (bottom, top)]
    interaction = _interaction(top[0][0], features, width)
    model = ModelConfig(width=width, bottom=hidden[0], top=hidden[1], interaction=interaction)
    config = resolve(TrainConfig(model, settings, OptimizerConfig("none")))
    if written is not None:
        _require_same(written, ModuleSettings.of(config, data, left[shared[0]].size))
    made = build(config, data, select("cpu"))
    embedding: Any = made.embedding
    for part, layers in (("bottom", bottom), ("top", top)):
        for i, (weight, bias) in enumerate(layers):
            made.parameters[f"{part}.{i}.weight"][...] = weight.T
            made.parameters[f"{part}.{i}.bias"][...] = bias
    if made.shift is not None:  # so that all together gives what the file gives
        made.parameters[f"top.{len(top) - 1}.bias"][...] -= made.shift
    if shared:
        embedding.write(0, _array(left, shared, config, embedding.slot_map))
    else:
        for f, (rows, start) in enumerate(zip(data.cardinalities, embedding.base, strict=True)):
            table = _take(left, f"emb_l.{f}.weight", rows, width)
            embedding.write(int(start) * width, table.reshape(-1))
    if left:
        raise ConfigError(f"{min(left)}: is no tensor of such a model, and may change what it computes")
    return config, made


def _settings(tensor: np.ndarray) -> ModuleSettings:
    try:
        return msgspec.json.decode(tensor.tobytes(), type=ModuleSettings)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{SETTINGS}: not as `robe export` writes them ({error})") from None


def _require_same(written: ModuleSettings, here: ModuleSettings) -> None:
    """Raise ConfigError unless an array was written for data like these. How many raw values there are
    changes nothing."""
    for name in written.__struct_fields__:
        of_file, of_data = getattr(written, name), getattr(here, name)
        if of_file != of_data and not (name == "cardinalities" and written.hashed):
            raise ConfigError(
                f"{SETTINGS}: {name} is {of_file}, but {of_data} for these data; give those it was trained on"
            )


def _take(left: Tensors, name: str, *shape: int | None) -> np.ndarray:
    """A tensor as float32, taken out of `left`; ConfigError unless it is there and has that shape, of which
    None is any length."""
    if name not in left:
        raise ConfigError(f"{name}: is missing; give the state dict of a whole DLRM")
    tensor = left.pop(name)
    if len(tensor.shape) != len(shape) or any(
        n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ConfigError(f"{name}: has shape {tensor.shape}, but must have ({wanted}) to fit")
    if tensor.dtype.kind != "f":
        raise ConfigError(f"{name}: holds {tensor.dtype}, but must hold floats")
    return tensor.astype(np.float32, copy=False)


def _layers(left: Tensors, part: str, reads: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weight (out, in), bias (out,)) of each layer of an MLP whose first one reads so many numbers."""
    numbers = [int(found[1]) for name in left if (found := re.fullmatch(rf"{part}\.(\d+)\.weight", name))]
    layers = []
    for number in sorted(numbers) or [0]:
        weight = _take(left, f"{part}.{number}.weight", None, reads)
        reads = len(weight)
        layers.append((weight, _take(left, f"{part}.{number}.bias", reads)))
    if part == "top_l" and reads != 1:
        raise ConfigError(f"{part}.{max(numbers)}.weight: gives {reads} numbers, and a probability is one")
    return layers


def _require_each(left: Tensors, features: int, shared: list[str]) -> None:
    """Raise ConfigError unless there is a table for each feature, or for none, where an array is shared."""
    numbers = {int(found[1]) for name in left if (found := re.match(r"emb_l\.(\d+)\.", name))}
    if numbers or not shared:
        for number in sorted(numbers ^ set(range(features))):
            what = "is too many" if number in numbers else "is missing"
            raise ConfigError(
                f"emb_l.{number}.weight: {what}; these data have {features} categorical columns"
            )


def _interaction(weight: np.ndarray, features: int, width: int) -> str:
    """The interaction whose numbers the top MLP reads, with a first matrix (out, in)."""
    widths = {"dot": Interaction.width(features, width), "none": (1 + features) * width}
    for kind, numbers in widths.items():
        if weight.shape[1] == numbers:
            return kind
    raise ConfigError(
        f"top_l.0.weight: reads {weight.shape[1]} numbers; {features} categorical columns and vectors of "
        f"{width} give {widths['dot']} with products of pairs, and {widths['none']} without"
    )


def _array(left: Tensors, names: list[str], config: TrainConfig, where: SlotMap) -> np.ndarray:
    """The one array (M,) that has all these names, taken out of `left` with what lies beside it.

    where: the slots that the configuration says, which must be those of the file.
    """
    array, settings = _take(left, names[0], None), config.embedding
    for name in names[1:]:
        if not np.array_equal(_take(left, name, array.size), array):
            raise ConfigError(f"{name}: is another array than {names[0]}, but all features share one")
    blocks = np.arange(config.model.width) // settings.block
    known = {
        "random_numbers": (f"--hash-seed {settings.hash_seed}", np.array([P, where.c, where.b, where.a])),
        "helper_Eidx_base": (f"--block {settings.block}", blocks),
    }
    for name in [name for name in left if BESIDE.fullmatch(name)]:
        found, kind = left.pop(name), name.rpartition(".")[2]
        if kind in known and not np.array_equal(found[: len(known[kind][1])], known[kind][1]):
            raise ConfigError(f"{name}: is not that of {known[kind][0]}; give the one it was trained with")
    return array
