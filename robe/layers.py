"""A stack of dense layers, forward and backward by hand.

Where the backend can (`Backend.fused`), products do the passes beside them: bias and rectifier forward, the
gradient of the rectifier and the sum for the bias backward. Else a product is followed by one of the kernels
`bias_relu` and `bias_relu_backward`, which show what is meant.
"""

import numpy as np

from robe.backend import Backend
from robe.matmul import mask_bytes


class MLP:
    """x -> relu(x W + b) -> ... ; with `linear_end` the last layer has no rectifier.

    parameters: a list of (weight (in, out), bias (out,)) and `gradients` of the same shapes; both are
    views that the model owns. Buffers for `batch` rows are made once; smaller batches use their front.
    """

    def __init__(self, parameters, gradients, batch: int, backend: Backend, linear_end: bool = False):
        self.parameters, self.gradients = parameters, gradients
        self.backend, self.linear_end = backend, linear_end
        first = parameters[0][0]
        self.products = [backend.empty((batch, w.shape[1]), w.dtype) for w, _ in parameters]
        self.d_inputs = [backend.empty((batch, w.shape[0]), w.dtype) for w, _ in parameters[1:]]
        self.d_first = backend.empty((batch, first.shape[0]), first.dtype)
        # Which activations of all layers but the last are positive, for products that rectify.
        self.masks = [
            backend.empty((batch, mask_bytes(w.shape[1])), np.uint8) if backend.fused else None
            for w, _ in parameters[:-1]
        ]

    def forward(self, x, out=None, learns: bool = True):
        """x (B, in) -> (B, out), in `out` if given; valid until the next call.

        learns: whether `backward` will follow.
        """
        xp, rows = self.backend.xp, len(x)
        last = len(self.parameters) - 1
        self.activations, self.positive = [x], []
        for i, (weight, bias) in enumerate(self.parameters):
            product = self.products[i][:rows]
            y = out if i == last and out is not None else product
            if i == last and self.linear_end:
                self.backend.matmul(x, weight, product)
                xp.add(product, bias, out=y)
            else:
                mask = self.masks[i][:rows] if learns and self.backend.fused and i < last else None
                self.positive.append(self._rectified(x, weight, bias, product, y, mask))
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
        for i in reversed(range(last + 1)):
            weight, _ = self.parameters[i]
            d_weight, _ = self.gradients[i]
            self.backend.matmul(self.activations[i].T, d_y, d_weight)
            if i:
                d_x = self.d_inputs[i - 1][:rows]
                self._gradient(i - 1, d_y, weight.T, d_x)
            elif want_input:
                d_x = self.d_first[:rows]
                self.backend.matmul(d_y, weight.T, d_x)
            d_y = d_x
        return d_y if want_input else None

    def _rectified(self, x, weight, bias, product, out, mask):
        """out = max(x W + b, 0); returns the mask if it was written. product: room for x W."""
        if self.backend.fused and self.backend.fused("rectified", x, weight, out, bias, mask):
            return mask
        self.backend.matmul(x, weight, product)
        self.backend.kernels.bias_relu(product, bias, out)
        return None

    def _gradient(self, i: int, d_y, weight, d):
        """d = d_y W where the output of layer i is positive, else 0; and the gradient by its bias."""
        mask, (_, d_bias) = self.positive[i], self.gradients[i]
        if mask is None or not self.backend.fused("gradient", d_y, weight, d, d_bias, mask):
            self.backend.matmul(d_y, weight, d)
            self.backend.kernels.bias_relu_backward(self.activations[i + 1], d, d_bias)
