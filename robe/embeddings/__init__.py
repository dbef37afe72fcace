"""Ways to store embeddings, one file each, all with the same few verbs:

- `lookup(ids, out)`: ids (B, F) uint32 -> out (B, F, D)
- `interact(ids, first, out)`: first (B, D) and those vectors interact -> out (B, D + pairs), for inference
- `backward(d_out, vectors, ids, rate, d_vectors)`: one optimizer step from the gradient d_out (B, D + pairs)
  by the interaction of vectors (B, 1 + F, D); the gradient by vector 0 to d_vectors[:, 0]
- `update(ids, d_vectors, rate)`: one optimizer step from the gradient (B, F, D) of the vectors
- `check(ids)`: refuse ids that have no row, while they are still on the host
- `state()`: name -> array, everything a checkpoint must hold
- `bytes()`: item -> bytes
- `describe()`: what a summary says of it
- `counts()`: what it has counted in training so far, for the log
"""

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.full import full_table
from robe.embeddings.mixed_precision import MixedPrecisionEmbedding, mixed_precision
from robe.embeddings.robe import robe_array

Embedding = ArrayEmbedding | MixedPrecisionEmbedding


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> Embedding:
    """The embedding that a resolved configuration names; raises ConfigError if the data do not fit it."""
    method = config.embedding.method
    if method == "full":
        return full_table(config, data, backend, dtype)
    if method == "mixed_precision":
        return mixed_precision(config, data, backend)
    if method == "none":
        no_features = DataSpec(data.dense, (), "dictionary", data.fingerprint, "no categorical features")
        return full_table(config, no_features, backend, dtype)
    return robe_array(config, data, backend, dtype)


__all__ = ["ArrayEmbedding", "Embedding", "MixedPrecisionEmbedding", "create"]
