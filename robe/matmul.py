"""Matrix products of the dense layers, and what they are computed in.

    fp32    float32 throughout
    tf32    inputs rounded to 10 explicit bits of mantissa, products summed in float32
    bf16    inputs rounded to 7 explicit bits, products summed in float32

Inputs and outputs are float32 arrays whatever the precision: weights, activations and gradients keep all
their bits between products. On a GPU these are modes of its tensor cores; elsewhere `emulated` rounds and
multiplies in float32, which is slower than fp32 and shows what the precision does to the result.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

CUDA_R_32F, CUDA_R_16BF = 0, 14  # the numbers by which CUDA names float32 and bfloat16
WORKSPACE = 64 * 2**20  # bytes
MANTISSA = {"tf32": 10, "bf16": 7}  # explicit bits; float32 has 23


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """float32 values with `bits` explicit bits of mantissa, to nearest, ties to even; NaN stays NaN."""
    dropped = np.uint32(23 - bits)
    word = x.view(np.uint32)
    # Adding half a unit, less one bit where the kept part is even, carries exactly where rounding goes up.
    half = np.uint32((1 << int(dropped - 1)) - 1) + (word >> dropped & np.uint32(1))
    return np.where(np.isnan(x), x, (word + half >> dropped << dropped).view(np.float32))


def product(a, b, out) -> None:
    """a b by NumPy, the same bytes however many threads its BLAS has, if its kernels are those for AVX-512.

    OpenBLAS adds up a long sum in parts, and two threads cut it elsewhere than one unless its length is a
    multiple of 32. (All lengths up to 3,000 were tried on one machine: sums of up to 448 are never cut, nor
    those of 479 in the MLPerf model's first product.) The rest is a small product of its own.
    """
    length = a.shape[1]
    whole = length // 32 * 32
    if length == whole or length <= (256 if a.strides[0] < a.strides[1] else 480):
        np.matmul(a, b, out=out)
    else:
        np.matmul(a[:, :whole], b[:whole], out=out)
        out += a[:, whole:] @ b[whole:]


def emulated(precision: str) -> Callable[[Any, Any, Any], None]:
    """NumPy's matmul(a, b, out) as a GPU would compute it in that precision."""
    if precision == "fp32":
        return product
    bits = MANTISSA[precision]
    return lambda a, b, out: product(rounded(a, bits), rounded(b, bits), out)


def as_columns(matrix) -> tuple[bool, int]:
    """How BLAS, for which a matrix lies column by column, finds the transpose of `matrix` in its memory.

    Returns whether it must transpose what it finds, and the elements from one column to the next. Raises
    ValueError for an array with neither neighbouring rows nor neighbouring columns.
    """
    (rows, columns), item = matrix.shape, matrix.itemsize
    down, along = matrix.strides
    # The stride of an axis of length 1 says nothing.
    if along == item or columns == 1:
        return False, max(down // item, columns)
    if down == item or rows == 1:
        return True, along // item
    raise ValueError(f"a matrix of strides {matrix.strides} has neither rows nor columns in one piece")


class Gemm:
    """matmul(a, b, out) by cuBLAS, without a copy of strided views, with a handle and a workspace of its own.

    cublas: the module of nvmath's bindings; CuPy's own refuses to be captured in a graph. to_bf16: writes
    float32 values as bfloat16 words. empty: allocates on the device.
    """

    def __init__(
        self, precision: str, cublas: ModuleType, to_bf16: Callable[[Any, Any], Any], empty: Callable
    ):
        self.cublas, self.to_bf16, self.empty = cublas, to_bf16, empty
        self.handle, self.workspace = cublas.create(), empty(WORKSPACE, np.uint8)
        self.type = CUDA_R_16BF if precision == "bf16" else CUDA_R_32F
        types = cublas.ComputeType
        self.compute = types.COMPUTE_32F_FAST_TF32 if precision == "tf32" else types.COMPUTE_32F
        self.one, self.zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        self.words: list[Any] = [None, None]  # (N,) uint16: room for both inputs in bfloat16
        self.use(0)

    def use(self, stream: int) -> None:
        """Run later products on the CUDA stream of that address; 0 is the legacy default stream."""
        self.cublas.set_stream(self.handle, stream)
        # After the stream, as setting that takes the workspace away. Allocated here, it has the size that
        # cuBLAS wants on any card, and its address stays that of a captured graph.
        self.cublas.set_workspace(self.handle, self.workspace.data.ptr, WORKSPACE)

    def __call__(self, a, b, out) -> None:
        if self.type != CUDA_R_32F:
            a, b = self.shortened(a, 0), self.shortened(b, 1)
        # out = a b by rows is out^T = b^T a^T by columns.
        (b_turned, b_step), (a_turned, a_step), (turned, out_step) = map(as_columns, (b, a, out))
        if turned:
            raise ValueError("the rows of `out` must be in one piece")
        operation = self.cublas.Operation.N, self.cublas.Operation.T
        left = b.data.ptr, self.type, b_step
        right = a.data.ptr, self.type, a_step
        result = out.data.ptr, CUDA_R_32F, out_step
        sizes = out.shape[1], out.shape[0], a.shape[1]
        one, zero = self.one.ctypes.data, self.zero.ctypes.data
        turns = operation[b_turned], operation[a_turned]
        how = self.compute, self.cublas.GemmAlgo.DFALT
        self.cublas.gemm_ex(self.handle, *turns, *sizes, one, *left, *right, zero, *result, *how)

    def shortened(self, matrix, side: int):
        """The matrix in bfloat16, in a buffer that fits the largest matrix seen on that side of a product."""
        turned, _ = as_columns(matrix)
        matrix = matrix.T if turned else matrix
        if self.words[side] is None or self.words[side].size < matrix.size:
            self.words[side] = self.empty(matrix.size, np.uint16)
        words = self.words[side][: matrix.size].reshape(matrix.shape)
        self.to_bf16(matrix, words)
        return words.T if turned else words
