"""NVIDIA's bindings of cuBLAS on a double: what their calls mean by the manual, computed by NumPy."""

import ctypes
from types import SimpleNamespace

import numpy as np


class Shared(np.ndarray):
    """A NumPy array with a pointer to its memory where CuPy's has one."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


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

    def matrix(self, address, kind, rows, columns, step):
        """(rows, columns), column j at `step` elements times j; kind: 0 is float32, 14 bfloat16."""
        assert step >= max(1, rows)
        element = {0: ctypes.c_float, 14: ctypes.c_uint16}[kind]
        flat = np.ctypeslib.as_array((element * (step * (columns - 1) + rows)).from_address(address))
        size = flat.itemsize
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (size, step * size))

    def operand(self, address, kind, turned, rows, columns, step):
        stored = self.matrix(address, kind, *((columns, rows) if turned else (rows, columns)), step)
        if kind == 14:
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.T if turned else stored

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
        a = self.operand(a, kind_a, turn_a, m, k, lda)
        b = self.operand(b, kind_b, turn_b, k, n, ldb)
        scale, keep = (self.matrix(address, 0, 1, 1, 1)[0, 0] for address in (alpha, beta))
        assert keep == 0
        self.matrix(c, kind_c, m, n, ldc)[...] = scale * (a @ b)
