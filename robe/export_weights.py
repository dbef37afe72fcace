"""The weights of a trained model by the names that the DLRM gives them, for programs that have its formula.

    bot_l.I.weight (out, in), bot_l.I.bias (out,)    the MLPs; I counts layers and rectifiers
    top_l.I.weight, top_l.I.bias
    emb_l.K.weight (rows, D)                         the table of feature K, or
    hashed_weight (M,), robe_settings (n,) uint8     a ROBE array, and what robe.torch makes a module of: JSON

All else is float32, whatever the run stores. import_weights.py reads these files, and says more of the names.
For FBGEMM tables are its fused rows, (rows, S) uint8: those of parts/codes.py, which are copied.
The logits of a run whose training left out rows without a click are corrected in the last bias.
"""

from typing import BinaryIO, Literal, Self

import msgspec
import numpy as np
from safetensors.numpy import save

from robe.config import ConfigError, DataSpec, Pooling, TrainConfig
from robe.embeddings import MixedPrecisionEmbedding
from robe.kernels.parts.groups import form_of, quantised
from robe.model import DLRM
from robe.packages import extra

PARTS = {"bottom": "bot_l", "top": "top_l"}
TABLES = "full", "mixed_precision"  # methods that have a row for each id
SETTINGS = "robe_settings"
FUSED = 8, 4, 2  # bits that FBGEMM has fused rows of


class ModuleSettings(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What RobeEmbedding of robe.torch takes, by its names, to read an array; RobeEmbeddingBag, if there is a
    `mode`."""

    cardinalities: tuple[int, ...]
    width: int
    weights: int
    block: int
    hash: Literal["mix", "affine"]
    hash_seed: int
    sign: bool
    hashed: bool
    mode: tuple[Pooling, ...] | None = None

    @classmethod
    def of(cls, config: TrainConfig, data: DataSpec, weights: int) -> Self:
        """That of an array of so many weights."""
        chosen = config.embedding
        how = {name: getattr(chosen, name) for name in ("block", "hash", "hash_seed", "sign")}
        hashed = data.dialect == "hash"
        return cls(data.cardinalities, config.model.width, weights, hashed=hashed, mode=data.pooling, **how)


def dense_tensors(model: DLRM, config: TrainConfig) -> dict[str, np.ndarray]:
    """Those of both MLPs, of a model on the CPU; ConfigError where there are dense weights besides."""
    if config.model.interaction == "cross":
        raise ConfigError(
            "the DLRM has no names for the weights of `robe train --interaction cross`; --to onnx writes them"
        )
    tensors = {}
    for name, array in model.parameters.items():
        part, layer, kind = name.split(".")
        tensors[f"{PARTS[part]}.{2 * int(layer)}.{kind}"] = np.ascontiguousarray(array.T)
    if model.shift is not None:
        *_, last = tensors
        tensors[last] = tensors[last] + model.shift
    return tensors


def by_feature(rows: np.ndarray, data: DataSpec) -> dict[str, np.ndarray]:
    """The rows of all tables, one behind the other, as a table for each feature."""
    parts = np.split(rows, np.cumsum(data.cardinalities)[:-1])
    return {f"emb_l.{f}.weight": part for f, part in enumerate(parts)}


def state_dict(model: DLRM, config: TrainConfig, data: DataSpec) -> dict[str, np.ndarray]:
    """All weights, with an array or tables of float32; ConfigError for a model that has neither."""
    method, embedding = config.embedding.method, model.embedding
    if method not in ("robe", *TABLES):
        raise ConfigError(
            f"--to torch is not for runs of `robe train --method {method}`; it is for robe, full and "
            "mixed_precision"
        )
    tensors, (part,) = dense_tensors(model, config), embedding.parts.values()
    weights = part.read(0, part.weights)
    if method != "robe":
        return tensors | by_feature(weights.reshape(-1, embedding.width), data)
    settings = bytearray(msgspec.json.encode(ModuleSettings.of(config, data, weights.size)))
    return tensors | {"hashed_weight": weights, SETTINGS: np.frombuffer(settings, np.uint8)}


def to_torch(model: DLRM, config: TrainConfig, data: DataSpec, file: BinaryIO) -> int:
    """Write `state_dict` as tensors of PyTorch and nothing else; returns how many."""
    try:
        import torch
    except ImportError:
        raise ConfigError(f"--to torch needs torch: {extra('torch')}") from None
    tensors = state_dict(model, config, data)
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, file)
    return len(tensors)


def fused_rows(model: DLRM, config: TrainConfig) -> tuple[np.ndarray, int]:
    """(rows (R, S) uint8 of all tables, bits of a code), with what a cache holds rounded as in training.

    Raises ConfigError for a model that has no such rows.
    """
    method = config.embedding.method
    if method not in TABLES:
        instead = "; --to onnx and --to torch write its array" if method == "robe" else ""
        raise ConfigError(
            f"--to fbgemm is for tables, of `robe train --method full` and mixed_precision, and {method} has "
            f"no row for each id{instead}"
        )
    (part,) = model.embedding.parts.values()
    if isinstance(part, MixedPrecisionEmbedding):
        stored, bits = part.table, part.form.bits
    else:
        stored = part.memory
        bits = form_of(stored, part.slot_map).bits if quantised(stored) else 8 * stored.itemsize
    if bits not in FUSED or part.width * bits % 8:
        raise ConfigError(
            f"--to fbgemm is for codes of 8, 4 or 2 bits that fill whole bytes, and a row of this run has "
            f"{part.width} weights of {bits}; make them with `robe convert RUN --to int8 --out NEW`"
        )
    rows = np.empty_like(stored)
    part.copy_codes(rows)
    return rows, bits


def to_fbgemm(model: DLRM, config: TrainConfig, data: DataSpec, facts: dict[str, str], file: BinaryIO) -> int:
    """Write fused rows, and the MLPs in float32, as safetensors; returns how many tensors.

    facts: what the metadata tell.
    """
    rows, bits = fused_rows(model, config)
    tensors = dense_tensors(model, config) | by_feature(rows, data)
    file.write(save(tensors, facts | {"memory": f"int{bits}"}))
    return len(tensors)
