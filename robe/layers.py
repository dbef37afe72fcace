"""A stack of dense layers, forward and backward by hand."""

from robe.backend import Backend


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

    def forward(self, x, out=None):
        """x (B, in) -> (B, out), in `out` if given; valid until the next call."""
        xp, kernels, rows = self.backend.xp, self.backend.kernels, len(x)
        last = len(self.parameters) - 1
        self.activations = [x]
        for i, (weight, bias) in enumerate(self.parameters):
            product = self.products[i][:rows]
            self.backend.matmul(x, weight, product)
            x = out if i == last and out is not None else product
            if i == last and self.linear_end:
                xp.add(product, bias, out=x)
            else:
                kernels.bias_relu(product, bias, x)
            self.activations.append(x)
        return x

    def backward(self, d_y, want_input: bool):
        """Gradients from d_y (B, out), which is overwritten; returns d_x (B, in), if wanted."""
        xp, kernels, rows = self.backend.xp, self.backend.kernels, len(d_y)
        last = len(self.parameters) - 1
        for i in reversed(range(len(self.parameters))):
            weight, _ = self.parameters[i]
            d_weight, d_bias = self.gradients[i]
            if i == last and self.linear_end:
                xp.sum(d_y, axis=0, out=d_bias)
            else:
                kernels.bias_relu_backward(self.activations[i + 1], d_y, d_bias)
            self.backend.matmul(self.activations[i].T, d_y, d_weight)
            if i or want_input:
                d_x = (self.d_inputs[i - 1] if i else self.d_first)[:rows]
                self.backend.matmul(d_y, weight.T, d_x)
                d_y = d_x
        return d_y if want_input else None
