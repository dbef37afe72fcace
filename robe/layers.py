"""A stack of dense layers, forward and backward by hand.

Where the backend can (`Backend.fused`), products do the passes beside them: bias and rectifier forward, the
gradient of the rectifier and the sum for the bias backward. Else a product is followed by one of the kernels
`bias_relu` and `bias_relu_backward`, which show what is meant.
"""

from typing import Any

import numpy as np

from robe.backend import Backend
from robe.matmul import mask_bytes

LAYER = 2**40  # from the number of an activation to that of the same one in the next layer


class MLP:
    """x -> relu(x W + b) -> ... ; with `linear_end` the last layer has no rectifier.

    dropout: the share of the activations of all layers but the last that are dropped where `forward` is given
    a key; `linear_end` tells which numbers these have.

    parameters: a list of (weight (in, out), bias (out,)); `gradients` of the same shapes; and `factors`, the
    parameters as they are multiplied: rounded copies where the backend keeps activations short, else the
    parameters themselves. All are views that the model owns. Buffers for `batch` rows are made once; smaller
    batches use their front. Where activations are short, so is all that a layer reads or hands on, and each
    gradient by that; but the last output is float32, and so is the gradient by it.
    """

    def __init__(
        self,
        parameters,
        gradients,
        factors,
        batch: int,
        backend: Backend,
        linear_end: bool = False,
        dropout: float = 0.0,
    ):
        self.parameters, self.gradients = parameters, gradients
        self.dropout, self.dropped = dropout, False
        # The last bias is added to float32 products.
        self.factors = [*factors[:-1], (factors[-1][0], parameters[-1][1])]
        self.backend, self.short, self.linear_end = backend, backend.short, linear_end
        weights, kept = [weight for weight, _ in parameters], factors[0][0].dtype
        shapes = [(batch, weight.shape[1]) for weight in weights]
        self.products = [backend.empty(shape, kept) for shape in shapes[:-1]]
        self.products.append(backend.empty(shapes[-1], weights[-1].dtype))
        self.d_inputs = [backend.empty(shape, kept) for shape in shapes[:-1]]
        self.d_first = backend.empty((batch, weights[0].shape[0]), kept)
        if self.short:
            self.d_last = backend.empty(shapes[-1], kept)
            self.d_biases = [backend.empty(weight.shape[1:], kept) for weight in weights[:-1]]
        # Smaller rooms stay: captured graphs go on to use them.
        self.rooms: list[Any] = []
        # Which activations of all layers but the last are positive, for products that rectify.
        self.masks = [
            backend.empty((batch, mask_bytes(columns)), np.uint8) if backend.fused else None
            for _, columns in shapes[:-1]
        ]

    def forward(self, x, out=None, learns: bool = True, key=None, before: int = 0):
        """x (B, in) -> (B, out), in `out` if given; valid until the next call.

        learns: whether `backward` will follow. key: what is dropped follows from it and from the number of a
        row, which is `before` of the first; None: nothing is.
        """
        xp, rows = self.backend.xp, len(x)
        self.dropped = bool(self.dropout) and key is not None
        last = len(self.parameters) - 1
        self.activations, self.positive = [x], []
        for i, (weight, bias) in enumerate(self.factors):
            product = self.products[i][:rows]
            y = out if i == last and out is not None else product
            if i == last and self.linear_end:
                self.backend.matmul(x, weight, product)
                xp.add(product, bias, out=y)
            else:
                # What is positive behind a product says nothing of what is dropped afterwards.
                masked = learns and self.backend.fused and i < last and not self.dropped
                mask = self.masks[i][:rows] if masked else None
                self.positive.append(self._rectified(x, weight, bias, product, y, mask))
            if self.short and i < last:
                self.short.settle(y)
            if self.dropped and i < last:
                first = LAYER * (2 * i + self.linear_end) + before * y.shape[1]
                self.backend.kernels.dropout(self.dropout, key, first, y.reshape(-1))
            x = y
            self.activations.append(x)
        return x

    def backward(self, d_y, want_input: bool):
        """Gradients from d_y (B, out), which is overwritten; returns d_x (B, in), if wanted."""
        xp, kernels, rows = self.backend.xp, self.backend.kernels, len(d_y)
        last = len(self.parameters) - 1
        _, d_bias = self.gradients[last]
        if self.linear_end:
            xp.sum(d_y, axis=0, out=d_bias)
        else:
            kernels.bias_relu_backward(self.activations[last + 1], d_y, d_bias)
        if self.short:
            self.short.store(d_y, self.d_last[:rows])
            d_y = self.d_last[:rows]
        for i in reversed(range(last + 1)):
            weight, _ = self.factors[i]
            d_weight, _ = self.gradients[i]
            self.backend.matmul(self.activations[i].T, d_y, d_weight)
            if i:
                d_x = self.d_inputs[i - 1][:rows]
                self._gradient(i - 1, d_y, weight.T, d_x)
            elif want_input:
                d_x = self.d_first[:rows]
                self.backend.matmul(d_y, weight.T, d_x)
                if self.short:
                    self.short.settle(d_x)
            d_y = d_x
        return d_y if want_input else None

    def _rectified(self, x, weight, bias, product, out, mask):
        """out = max(x W + b, 0); returns the mask if it was written. product: room for x W."""
        if self.backend.fused and self.backend.fused("rectified", x, weight, out, bias, mask):
            return mask
        product = self._sums(product)
        self.backend.matmul(x, weight, product)
        self.backend.kernels.bias_relu(product, bias, out)
        return None

    def _gradient(self, i: int, d_y, weight, d):
        """d = d_y W where the output of layer i is positive, else 0; and the gradient by its bias."""
        mask, (_, d_bias) = self.positive[i], self.gradients[i]
        # A product that sums d for the bias on the way writes both alike.
        written = self.d_biases[i] if self.short else d_bias
        if mask is None or not self.backend.fused("gradient", d_y, weight, d, written, mask):
            sums = self._sums(d)
            self.backend.matmul(d_y, weight, sums)
            if self.dropped:  # what was not
                sums /= 1 - self.dropout
            self.backend.kernels.bias_relu_backward(self.activations[i + 1], sums, d_bias)
            if self.short:
                self.short.store(sums, d)
                self.short.store(d_bias, written)
        if self.short:
            self.short.load(written, d_bias)

    def _sums(self, out):
        """Room for a product before it is rounded to be kept in `out`, which it is if that holds floats."""
        if out.dtype != np.uint16:
            return out
        if not self.rooms or self.rooms[-1].size < out.size:
            self.rooms.append(self.backend.empty(out.size, np.float32))
        return self.rooms[-1][: out.size].reshape(out.shape)
