"""The low-rank cross network of DCN v2 (Wang et al., 2021), as TorchRec's LowRankCrossNet has it.

    x_0 = the vectors of a row, one behind the other                     (B, n), n = (1 + F) D
    x_{l+1} = x_0 * (x_l V_l W_l + b_l) + x_l                            V (n, rank), W (rank, n), b (n,)

Without a layer it is x_0 that the top MLP reads. V and W are TorchRec's, transposed, and start by its law:
N(0, 2 / (n + rank)), and biases of 0.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from robe.backend import Backend
from robe.config import ModelConfig
from robe.embeddings import Embedding
from robe.interaction import Interaction


class Layer(NamedTuple):
    """Weights of a layer, and its buffers for all rows of a batch."""

    factors: tuple[Any, Any]  # V and W as they are multiplied
    bias: Any
    gradients: tuple[Any, Any, Any]  # by V, W and b
    read: Any  # (rows, n): x_l as it is multiplied
    narrow: Any  # (rows, rank): x_l V
    inner: Any  # (rows, n): x_l V W + b
    out: Any  # (rows, n): x_{l+1}


class Cross(Interaction):
    """Vector 0, of the bottom MLP, and those of an embedding -> (B, (1 + F) D), in `backend.padded` columns.

    In bf16 what products read is rounded; sums, x_0 and the gradients by x_0 and x_l are not.
    """

    fuses: ClassVar[dict[str, str]] = {}

    @staticmethod
    def width(features: int, width: int) -> int:
        return (1 + features) * width

    @classmethod
    def shapes(cls, features: int, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        n, rank = cls.width(features, model.width), model.cross_rank
        own = {"v": (n, rank), "w": (rank, n), "bias": (n,)}
        return {f"cross.{i}.{name}": shape for i in range(_depth(model)) for name, shape in own.items()}

    @classmethod
    def activations(cls, features: int, model: ModelConfig, again: bool = False) -> int:
        depth, n = _depth(model), cls.width(features, model.width)
        # Of each layer x_l V and the sum with b, of all but the last x_{l+1}, and the gradients by both sums.
        own = (depth + 1) * (n + model.cross_rank) + (depth - 1) * n if depth else 0
        return super().activations(features, model, again) + own

    def __init__(
        self,
        embedding: Embedding,
        rows: int,
        backend: Backend,
        dtype="float32",
        *further: Any,
        own: tuple[Mapping, Mapping, Mapping],
        staleness: int = 0,
    ):
        super().__init__(embedding, rows, backend, dtype, *further, own=own, staleness=staleness)
        self.xp, self.matmul = backend.xp, backend.matmul
        self.x_0, self.d_x_0 = (array.reshape(rows, -1) for array in (self.vectors, self.d_vectors))
        (parameters, gradients, factors), shape, short = own, self.x_0.shape, self.short
        kept, depth = short.dtype if short else dtype, len(parameters) // 3
        self.layers: list[Layer] = []
        x = self.x_0
        for i in range(depth):
            v, w, bias = (f"cross.{i}.{name}" for name in ("v", "w", "bias"))
            narrow = backend.empty((rows, len(factors[w])), kept)
            last = i == depth - 1 and not short
            out = self.out[:, self.columns] if last else backend.empty(shape, dtype)
            read, inner = backend.empty(shape, kept) if short else x, backend.empty(shape, dtype)
            by = gradients[v], gradients[w], gradients[bias]
            x = out
            self.layers.append(
                Layer((factors[v], factors[w]), parameters[bias], by, read, narrow, inner, out)
            )
        if self.layers:
            self.d_inner, self.d_narrow = backend.empty(shape, dtype), backend.empty(narrow.shape, kept)
        if short:
            self.d, self.d_short = backend.empty(shape, dtype), backend.empty(shape, kept)

    def forward(self, ids) -> Any:
        xp, short = self.xp, self.short
        rows = len(self.look_up(ids))
        x_0 = x = self.x_0[:rows]
        for layer in self.layers:
            (v, w), (read, narrow, inner, y) = layer.factors, (array[:rows] for array in layer[3:])
            if short:
                short.store(x, read)
            self.matmul(read, v, narrow)
            self._settled(narrow)
            self.matmul(narrow, w, inner)
            xp.add(inner, layer.bias, out=inner)
            xp.multiply(x_0, inner, out=y)
            xp.add(y, x, out=y)
            x = y
        out = self.out[:rows]
        if short:
            short.store(x, out[:, self.columns])
        elif not self.layers:
            out[:, self.columns] = x
        return out

    def backward(self, d_out, ids, rate: float) -> Any:
        """d_out (B, n) -> the gradient (B, D) of vector 0; the embedding takes its optimizer step.

        d_out is overwritten.
        """
        rows, xp, short, d = len(d_out), self.xp, self.short, d_out[:, self.columns]
        x_0, d_x_0 = self.x_0[:rows], self.d_x_0[:rows]
        if short:
            short.load(d, self.d[:rows])
            d = self.d[:rows]
        d_x_0[...] = 0
        for layer in reversed(self.layers):
            (v, w), (d_v, d_w, d_bias) = layer.factors, layer.gradients
            read, narrow, inner, _ = (array[:rows] for array in layer[3:])
            d_inner, d_narrow = self.d_inner[:rows], self.d_narrow[:rows]
            xp.multiply(d, inner, out=inner)
            xp.add(d_x_0, inner, out=d_x_0)
            xp.multiply(d, x_0, out=d_inner)
            xp.sum(d_inner, axis=0, out=d_bias)
            pulls = d_inner
            if short:
                pulls = self.d_short[:rows]
                short.store(d_inner, pulls)
            self.matmul(narrow.T, pulls, d_w)
            self.matmul(pulls, w.T, d_narrow)
            self._settled(d_narrow)
            self.matmul(read.T, d_narrow, d_v)
            self.matmul(d_narrow, v.T, d_inner)
            xp.add(d, d_inner, out=d)
        xp.add(d_x_0, d, out=d_x_0)
        self.update(ids, self.d_vectors[:rows], rate)
        return self.d_vectors[:rows, 0]


def _depth(model: ModelConfig) -> int:
    return model.cross_layers if model.interaction == "cross" else 0
