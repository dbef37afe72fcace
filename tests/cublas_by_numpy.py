"""NVIDIA's bindings of cuBLAS and cuBLASLt on a double: what their calls mean by the manual, by NumPy."""

import ctypes
from enum import IntEnum
from types import SimpleNamespace

import numpy as np

from robe.matmul import rounded


class Shared(np.ndarray):
    """A NumPy array with a pointer to its memory where CuPy's has one."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


def matrix(address, kind, rows, columns, step):
    """(rows, columns), column j at `step` elements times j; kind: 0 is float32, 14 bfloat16."""
    assert step >= max(1, rows)
    element = {0: ctypes.c_float, 14: ctypes.c_uint16}[kind]
    flat = np.ctypeslib.as_array((element * (step * (columns - 1) + rows)).from_address(address))
    size = flat.itemsize
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (size, step * size))


def operand(address, kind, turned, rows, columns, step):
    stored = matrix(address, kind, *((columns, rows) if turned else (rows, columns)), step)
    if kind == 14:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.T if turned else stored


def write(numbers, address, kind, step):
    there = matrix(address, kind, *numbers.shape, step)
    there[...] = rounded(numbers, 7).view(np.uint32) >> 16 if kind == 14 else numbers


class Blas:
    """nvmath.bindings.cublas: column-major matrices, at host addresses here."""

    Operation = SimpleNamespace(N=0, T=1)
    GemmAlgo = SimpleNamespace(DFALT=-1)
    ComputeType = SimpleNamespace(COMPUTE_32F=68, COMPUTE_32F_FAST_TF32=77)

    def create(self):
        return 1

    def set_stream(self, handle, stream):
        """As cuBLAS does, also go back to the workspace of its own."""
        self.stream, self.workspace = stream, None

    def set_workspace(self, handle, address, size):
        self.workspace = address, size

    def gemm_ex(
        self,
        handle,
        turn_a,
        turn_b,
        m,
        n,
        k,
        alpha,
        a,
        kind_a,
        lda,
        b,
        kind_b,
        ldb,
        beta,
        c,
        kind_c,
        ldc,
        *how,
    ):
        self.how = how
        a = operand(a, kind_a, turn_a, m, k, lda)
        b = operand(b, kind_b, turn_b, k, n, ldb)
        scale, keep = (matrix(address, 0, 1, 1, 1)[0, 0] for address in (alpha, beta))
        assert keep == 0
        assert kind_a == kind_b
        write(scale * (a @ b), c, kind_c, ldc)


def number(address, size):
    """A whole number of so many bytes."""
    return int.from_bytes(ctypes.string_at(address, size), "little")


class BlasLt:
    """nvmath.bindings.cublasLt: handles are numbers of records; refused: epilogues that it does not have.

    Column-major, D (M, N) = epilogue(op(A) op(B)), with a bias for each row. The mask of a rectifier is a
    matrix of M rows, too, of bits; their order is this double's own, and the columns of bytes are filled up.
    """

    cuBLASLtError = type("cuBLASLtError", (Exception,), {})
    Epilogue = IntEnum("Epilogue", {"RELU_BIAS": 6, "RELU_AUX_BIAS": 134, "DRELU_BGRAD": 152})
    MatmulDescAttribute = IntEnum(
        "MatmulDescAttribute",
        {
            **{"TRANSA": 3, "TRANSB": 4, "EPILOGUE": 7, "BIAS_POINTER": 8},
            **{"EPILOGUE_AUX_POINTER": 11, "EPILOGUE_AUX_LD": 12},
        },
    )
    MatmulPreferenceAttribute = IntEnum(
        "MatmulPreferenceAttribute",
        {"MAX_WORKSPACE_BYTES": 1, **{f"MIN_ALIGNMENT_{x}_BYTES": 5 + i for i, x in enumerate("ABCD")}},
    )
    matmul_heuristic_result_dtype = np.dtype(
        [
            ("algo", "<u8", (8,)),
            ("workspace_size", "<u8"),
            ("state", "<i4"),
            ("waves", "<f4"),
            ("pad", "<i4", 4),
        ]
    )

    def __init__(self, refused=()):
        self.records, self.refused, self.calls = {}, refused, []

    def create(self):
        return self.record("handle")

    def record(self, *what):
        self.records[len(self.records) + 1] = what
        return len(self.records)

    def matmul_desc_create(self, compute, scale):
        return self.record("operation", compute, scale, {})

    def matmul_desc_set_attribute(self, operation, attribute, address, size):
        assert size == (4 if attribute < 8 else 8)
        self.records[operation][3][attribute] = number(address, size)

    def matrix_layout_create(self, kind, rows, columns, step):
        assert step >= max(1, rows)
        return self.record("layout", kind, rows, columns, step)

    def matmul_preference_create(self):
        return self.record("preference", {})

    def matmul_preference_set_attribute(self, preference, attribute, address, size):
        assert size == (8 if attribute == 1 else 4)
        self.records[preference][1][attribute] = number(address, size)

    def matmul_preference_destroy(self, preference):
        self.records[preference] = ()

    def matmul_algo_get_heuristic(self, handle, operation, a, b, c, d, preference, most, results, count):
        """An algorithm is good for the product that was asked about, at addresses as aligned as was said."""
        assert (handle, c, most) == (1, d, 1)
        attributes = self.records[operation][3]
        ctypes.c_int32.from_address(count).value = 0
        if attributes[7] in self.refused:
            if self.refused[attributes[7]] == "raise":
                raise self.cuBLASLtError
            return
        said = self.records[preference][1]
        found = np.zeros(1, self.matmul_heuristic_result_dtype)
        found["algo"][0, :8] = operation, a, b, d, *(said[5 + i] for i in (0, 1, 2, 3))
        found["workspace_size"] = said[1]
        ctypes.memmove(results, found.ctypes.data, found.nbytes)
        ctypes.c_int32.from_address(count).value = 1

    def matmul(
        self,
        handle,
        operation,
        alpha,
        a,
        of_a,
        b,
        of_b,
        beta,
        c,
        of_c,
        d,
        of_d,
        algorithm,
        space,
        size,
        stream,
    ):
        chosen = np.ctypeslib.as_array((ctypes.c_uint64 * 8).from_address(algorithm)).tolist()
        assert chosen[:4] == [operation, of_a, of_b, of_d]
        assert (c, of_c) == (d, of_d)
        _, self.compute, scale, attributes = self.records[operation]
        assert scale == 0
        for address, aligned in zip((a, b, c, d), chosen[4:], strict=True):
            assert address % aligned == 0
        self.calls.append((attributes[7], space, size, stream))
        a, b = (
            operand_of(self.records[layout], address, attributes[turn])
            for layout, address, turn in ((of_a, a, 3), (of_b, b, 4))
        )
        scale, keep = (matrix(address, 0, 1, 1, 1)[0, 0] for address in (alpha, beta))
        assert keep == 0
        _, kind, m, n, step = self.records[of_d]
        assert (a.shape[0], b.shape[1]) == (m, n)
        out = scale * (a @ b)
        if attributes[7] == self.Epilogue.DRELU_BGRAD:
            out = out * unpacked(mask_of(attributes, m, n), m)
            write(out, d, kind, step)
            write(out.sum(axis=1, keepdims=True), attributes[8], kind, m)
            return
        out = out + operand(attributes[8], kind, False, m, 1, m)
        positive = out > 0  # a NaN is not
        write(np.where(positive, out, 0), d, kind, step)
        if attributes[7] == self.Epilogue.RELU_AUX_BIAS:
            mask = mask_of(attributes, m, n)
            mask[...] = 255
            packed = np.packbits(positive, axis=0)
            mask[: len(packed)] = packed


def operand_of(layout, address, turned):
    _, kind, rows, columns, step = layout
    stored = operand(address, kind, False, rows, columns, step)
    return stored.T if turned else stored


def mask_of(attributes, m, n):
    """The bytes of a mask, (bytes of a column, n)."""
    step = attributes[12]
    assert step % 128 == 0
    assert step >= m
    size = step // 8
    return (
        np.ctypeslib.as_array((ctypes.c_uint8 * (size * n)).from_address(attributes[11])).reshape(n, size).T
    )


def unpacked(mask, m):
    return np.unpackbits(np.ascontiguousarray(mask), axis=0)[:m]
