"""The layer between embeddings and top MLP: vector 0, and the products of all pairs of vectors.

Where one kernel does a look-up, or an update, and the interaction at once, it is taken here. Another
interaction is another such layer.
"""

from typing import Any, ClassVar

from robe.backend import Backend
from robe.embeddings import Embedding
from robe.kernels.interaction import out_width


class Interaction:
    """Vector 0, of the bottom MLP, and those of an embedding -> (B, D + pairs), in `backend.padded` columns.

    rows: of the largest batch. Buffers are made once; a smaller batch uses their front. The kernels see
    D + pairs columns; those behind are always zeros, and their gradients are not looked at. In bf16 the
    output and its gradient are rounded, to be multiplied; vectors are not.
    """

    # The operation that a look-up is -> the one that looks up and interacts.
    fuses: ClassVar[dict[str, str]] = {"gather": "gather_interaction", "cached_gather": "cached_interaction"}

    @staticmethod
    def width(features: int, width: int) -> int:
        """Numbers that the layer writes per row, for F categorical features and width D."""
        return out_width(1 + features, width)

    @classmethod
    def activations(cls, features: int, width: int) -> int:
        """Numbers per row in the buffers of the layer: vectors, their gradients, and what it writes."""
        return 2 * (1 + features) * width + cls.width(features, width)

    def __init__(self, embedding: Embedding, rows: int, backend: Backend, dtype="float32"):
        self.embedding, self.kernels, self.short = embedding, backend.kernels, backend.short
        shape = rows, 1 + embedding.features, embedding.width
        self.vectors, self.d_vectors = (backend.empty(shape, dtype) for _ in range(2))
        columns = self.width(embedding.features, embedding.width)
        self.columns = slice(columns)
        kept = self.short.dtype if self.short else dtype
        self.out = backend.empty((rows, backend.padded(columns)), kept)
        self.out[:, columns:] = 0
        fused = self.fuses.get(embedding.looks_up_by)
        self.fused = getattr(self.kernels, fused) if fused else None
        self.scatters = backend.fuses_scatter

    def first(self, rows: int) -> Any:
        """(B, D): where vector 0 has to be written before `forward`."""
        return self.vectors[:rows, 0]

    def predict(self, first, ids) -> Any:
        """first (B, D), ids (B, F) -> (B, D + pairs), for inference; valid until the next call."""
        rows = len(ids)
        if self.fused is None:
            self.first(rows)[...] = first
            return self.forward(ids)
        out = self.out[:rows]
        self.fused(*self.embedding.operands(ids), first, out[:, self.columns])
        return self._settled(out)

    def forward(self, ids) -> Any:
        """ids (B, F) -> (B, D + pairs), from `first`; keeps the vectors, which the gradient needs."""
        vectors, out = self.vectors[: len(ids)], self.out[: len(ids)]
        self.embedding.lookup(ids, vectors[:, 1:])
        self.kernels.interaction(vectors, out[:, self.columns])
        return self._settled(out)

    def backward(self, d_out, ids, rate: float) -> Any:
        """d_out (B, D + pairs) -> the gradient (B, D) of vector 0; the embedding takes its optimizer step.

        Where the step is an addition, it can be made without ever writing the gradients of the vectors.
        """
        embedding, rows, d_out = self.embedding, len(ids), d_out[:, self.columns]
        vectors, d_vectors = self.vectors[:rows], self.d_vectors[:rows]
        d_first = d_vectors[:, 0]
        if self.scatters and embedding.adds:
            slots = embedding.slots(ids)
            self.kernels.interaction_scatter(d_out, vectors, *slots, -rate, d_first, embedding.memory)
            embedding.steps += 1
        else:
            self.kernels.interaction_backward(d_out, vectors, d_vectors)
            embedding.update(ids, d_vectors[:, 1:], rate)
        return d_first

    def _settled(self, out) -> Any:
        """What a kernel wrote, rounded where products want that."""
        if self.short:
            self.short.settle(out)
        return out
