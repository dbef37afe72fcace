"""Matrix products of the dense layers, and what they are computed in.

    fp32    float32 throughout
    tf32    factors rounded to 10 explicit bits of mantissa as they are multiplied, and summed in float32
    bf16    factors kept with 7 explicit bits, and summed in float32

In fp32 and tf32 all arrays are float32, and keep all their bits between products. In bf16 what is multiplied
is bfloat16 already (`Short`): activations and their gradients, which products and the passes beside them
round as they write them, and a copy of the weights, made once a step. Weights themselves, their gradients,
the last outputs and the loss are float32. On a GPU these are modes of its tensor cores; elsewhere the same
numbers are rounded and multiplied in float32, which is slower than fp32 and shows what the precision does to
the result.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

CUDA_R_32F, CUDA_R_16BF = 0, 14  # the numbers by which CUDA names float32 and bfloat16
WORKSPACE = 64 * 2**20  # bytes
TF32, BF16 = 10, 7  # explicit bits of mantissa; float32 has 23


class Short(NamedTuple):
    """How a backend keeps bfloat16 numbers.

    dtype: of arrays of them. uint16 are words as in kernels/parts/bfloat.py, on a GPU; NumPy has no such
        type, and keeps them as float32 whose lower bits are 0.
    store: (x, out), writes float32 numbers, rounded to the nearest; out may be x, if it is of that dtype.
    load: (short, out), writes them as float32.
    """

    dtype: str
    store: Callable[[Any, Any], Any]
    load: Callable[[Any, Any], Any]

    def settle(self, written: Any) -> None:
        """Round what a product or a kernel wrote, where that could not write bfloat16 itself."""
        if self.dtype == "float32":
            self.store(written, written)


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
    """NumPy's matmul(a, b, out) as a GPU would compute it in that precision; in bf16 of rounded factors."""
    if precision == "tf32":
        return lambda a, b, out: product(rounded(a, TF32), rounded(b, TF32), out)
    return product


def _store(x: np.ndarray, out: np.ndarray) -> None:
    out[...] = rounded(x, BF16)


def _load(short: np.ndarray, out: np.ndarray) -> None:
    out[...] = short


EMULATED = Short("float32", _store, _load)


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


def type_of(matrix) -> int:
    """CUDA's number for what a matrix holds."""
    return CUDA_R_16BF if matrix.dtype == np.uint16 else CUDA_R_32F


class Gemm:
    """matmul(a, b, out) by cuBLAS, without a copy of strided views, with a handle and a workspace of its own.

    Arrays are float32, or uint16 words of bfloat16; both factors are alike. cublas: the module of nvmath's
    bindings; CuPy's own refuses to be captured in a graph. empty: allocates on the device.
    """

    def __init__(self, precision: str, cublas: ModuleType, empty: Callable):
        self.cublas = cublas
        self.handle, self.workspace = cublas.create(), empty(WORKSPACE, np.uint8)
        types = cublas.ComputeType
        self.compute = types.COMPUTE_32F_FAST_TF32 if precision == "tf32" else types.COMPUTE_32F
        self.scales = np.array([1, 0], np.float32)
        self.one, self.zero = self.scales.ctypes.data, self.scales[1:].ctypes.data  # addresses
        self.use(0)

    def use(self, stream: int) -> None:
        """Run later products on the CUDA stream of that address; 0 is the legacy default stream."""
        self.stream = stream
        self.cublas.set_stream(self.handle, stream)
        # After the stream, as setting that takes the workspace away. Allocated here, it has the size that
        # cuBLAS wants on any card, and its address stays that of a captured graph.
        self.cublas.set_workspace(self.handle, self.workspace.data.ptr, WORKSPACE)

    def __call__(self, a, b, out) -> None:
        if not a.size:  # of a batch of which this process has no row
            out[...] = 0
            return
        # out = a b by rows is out^T = b^T a^T by columns.
        (b_turned, b_step), (a_turned, a_step), (turned, out_step) = map(as_columns, (b, a, out))
        if turned:
            raise ValueError("the rows of `out` must be in one piece")
        operation = self.cublas.Operation.N, self.cublas.Operation.T
        left = b.data.ptr, type_of(b), b_step
        right = a.data.ptr, type_of(a), a_step
        result = out.data.ptr, type_of(out), out_step
        sizes = out.shape[1], out.shape[0], a.shape[1]
        turns = operation[b_turned], operation[a_turned]
        how = self.compute, self.cublas.GemmAlgo.DFALT
        self.cublas.gemm_ex(self.handle, *turns, *sizes, self.one, *left, *right, self.zero, *result, *how)


def mask_bytes(columns: int) -> int:
    """Bytes of a row of a mask: a bit for each column, in whole steps of 128 bits, as cuBLASLt wants."""
    return -(-columns // 128) * 16


def alignment(*arrays) -> int:
    """The largest power of two, up to 256 bytes, of which the addresses of all arrays are multiples."""
    bits = 256
    for array in arrays:
        bits |= array.data.ptr
    return bits & -bits


class Plan(NamedTuple):
    """What cuBLASLt needs to know of a product besides the addresses."""

    operation: int  # handle of its descriptor
    layouts: tuple[int, int, int]  # handles, of both factors and the result
    algorithm: np.ndarray | None  # the one it found best; None if it knows none


class Epilogues:
    """Products that do the passes beside them, by the epilogues of cuBLASLt; so activations and their
    gradients are written once, and not read and written again.

        rectified   out = max(a b + bias, 0); a mask, if given, gets a bit for each positive element
        gradient    out = a b where the mask has a bit, else 0; bias = sum of out over the rows

    gemm: the plain products, whose precision, stream and workspace these share. cublas_lt: the module of
    nvmath's bindings. bias (N,) of out's dtype; mask (B, mask_bytes(N)) uint8, its bits in an order of
    cuBLASLt's. To cuBLASLt our out (B, N) is a matrix of N rows and B columns, and a bias has a number for
    each row.

    This rectifier makes 0 of a NaN, which bias_relu keeps. Training still ends where it diverges: the last
    layer has no rectifier, and before each checkpoint all weights are looked at. But numbers so large that
    activations overflow may be given a probability here that is finite, and means nothing.
    """

    def __init__(self, gemm: Gemm, cublas_lt: ModuleType):
        self.gemm, self.lt, self.handle = gemm, cublas_lt, cublas_lt.create()
        self.plans: dict[tuple, Plan] = {}  # made once for each epilogue, shape and alignment

    def __call__(self, kind: str, a, b, out, bias, mask) -> bool:
        """Compute a product of that kind, `rectified` or `gradient`; returns whether cuBLASLt could."""
        if not len(out):
            return False
        names = self.lt.Epilogue
        if kind == "gradient":
            epilogue = names.DRELU_BGRAD
        else:
            epilogue = names.RELU_BIAS if mask is None else names.RELU_AUX_BIAS
        gemm = self.gemm
        # out = a b by rows is out^T = b^T a^T by columns, as in Gemm.
        stored = tuple(map(as_columns, (b, a, out)))
        sizes = out.shape[1], out.shape[0], a.shape[1]
        # PyTorch, too, has the bias tell how the result is aligned: both are moved in the same steps.
        aligned = alignment(b), alignment(a), alignment(out, bias)
        step = None if mask is None else 8 * mask.strides[0]
        types = type_of(b), type_of(a), type_of(out)
        key = epilogue, sizes, stored, types, aligned, step
        if key not in self.plans:
            self.plans[key] = self.plan(*key, bias, mask)
        plan = self.plans[key]
        if plan.algorithm is None:
            return False
        self.point(plan.operation, bias, mask)
        result = out.data.ptr
        of_b, of_a, of_out = plan.layouts
        self.lt.matmul(
            *(self.handle, plan.operation, gemm.one, b.data.ptr, of_b, a.data.ptr, of_a),
            *(gemm.zero, result, of_out, result, of_out, plan.algorithm.ctypes.data),
            *(gemm.workspace.data.ptr, WORKSPACE, gemm.stream),
        )
        return True

    def plan(self, epilogue, sizes, stored, types, aligned, step, bias, mask) -> Plan:
        """Describe the product, and ask for the best algorithm."""
        lt, gemm, (m, n, k) = self.lt, self.gemm, sizes
        operation = lt.matmul_desc_create(gemm.compute, CUDA_R_32F)
        (b_turned, b_step), (a_turned, a_step), (turned, out_step) = stored
        if turned:
            raise ValueError("the rows of `out` must be in one piece")
        is_of = lt.MatmulDescAttribute
        self.describe(operation, is_of.TRANSA, np.int32(b_turned))  # CUBLAS_OP_N and CUBLAS_OP_T are 0 and 1
        self.describe(operation, is_of.TRANSB, np.int32(a_turned))
        self.describe(operation, is_of.EPILOGUE, np.uint32(epilogue))
        if step is not None:
            self.describe(operation, is_of.EPILOGUE_AUX_LD, np.int64(step))
        self.point(operation, bias, mask)
        layouts = (
            lt.matrix_layout_create(types[0], *((k, m) if b_turned else (m, k)), b_step),
            lt.matrix_layout_create(types[1], *((n, k) if a_turned else (k, n)), a_step),
            lt.matrix_layout_create(types[2], m, n, out_step),
        )
        return Plan(operation, layouts, self.best(operation, layouts, aligned))

    def best(self, operation: int, layouts: tuple[int, int, int], aligned) -> np.ndarray | None:
        """The algorithm that cuBLASLt would take, its first member; None if it has none for this product."""
        lt, (of_b, of_a, of_out) = self.lt, layouts
        preference, wants = lt.matmul_preference_create(), lt.MatmulPreferenceAttribute
        limits: dict[int, np.generic] = {wants.MAX_WORKSPACE_BYTES: np.uint64(WORKSPACE)}
        for letter, bytes_ in zip("ABCD", (*aligned, aligned[-1]), strict=True):
            limits[wants[f"MIN_ALIGNMENT_{letter}_BYTES"]] = np.uint32(bytes_)
        for attribute, value in limits.items():
            value = np.array(value)
            lt.matmul_preference_set_attribute(preference, attribute, value.ctypes.data, value.nbytes)
        found, count = np.zeros(1, lt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
        asked = self.handle, operation, of_b, of_a, of_out, of_out, preference, 1
        try:
            lt.matmul_algo_get_heuristic(*asked, found.ctypes.data, count.ctypes.data)
        except lt.cuBLASLtError:  # not supported
            return None
        finally:
            lt.matmul_preference_destroy(preference)
        return found if count[0] and found["state"][0] == 0 else None

    def point(self, operation: int, bias, mask) -> None:
        """Tell where the bias lies, or goes, and where the mask."""
        is_of = self.lt.MatmulDescAttribute
        self.describe(operation, is_of.BIAS_POINTER, np.int64(bias.data.ptr))
        if mask is not None:
            self.describe(operation, is_of.EPILOGUE_AUX_POINTER, np.int64(mask.data.ptr))

    def describe(self, operation: int, attribute: int, value: np.generic) -> None:
        """Set an attribute of a descriptor, which copies it."""
        held = np.array(value)
        self.lt.matmul_desc_set_attribute(operation, attribute, held.ctypes.data, held.nbytes)
