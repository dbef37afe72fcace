"""Four floats read or written by one instruction: a quarter of the instructions, each 16 bytes wide.

What is read or written begins at a multiple of 16 bytes, of an array in the memory of the device, or in that
of a thread block (`_shared`).
"""

from numba import config, cuda

if config.ENABLE_CUDASIM or cuda.implementation == "Built-in":
    # Without numba-cuda no kernel is compiled; what is imported here is then the meaning alone.
    def store4(array, i, j, a, b, c, d):
        """array[i, j : j + 4] = a, b, c, d"""
        array[i, j], array[i, j + 1], array[i, j + 2], array[i, j + 3] = a, b, c, d

    def load4(array, i, j, k):
        """array[i, j, k : k + 4] as a tuple"""
        return array[i, j, k], array[i, j, k + 1], array[i, j, k + 2], array[i, j, k + 3]

    def store4_shared(array, i, a, b, c, d):
        """array[i : i + 4] = a, b, c, d"""
        array[i], array[i + 1], array[i + 2], array[i + 3] = a, b, c, d

    def load4_shared(array, i):
        """array[i : i + 4] as a tuple"""
        return array[i], array[i + 1], array[i + 2], array[i + 3]

else:
    from llvmlite import ir
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic
    from numba.cuda.types import UniTuple, uintp, void

    GLOBAL, SHARED = 1, 3  # NVVM's numbers of the memories that arrays lie in

    def _four(context, builder, kind, view, index, memory):
        """Pointer to four elements from an index on."""
        view = context.make_array(kind)(context, builder, view)
        there = cgutils.get_item_pointer(context, builder, kind, view, index)
        four = ir.VectorType(context.get_data_type(kind.dtype), 4)
        return builder.addrspacecast(builder.bitcast(there, four.as_pointer()), four.as_pointer(memory))

    def _storing(memory, axes):
        def generate(context, builder, signature, arguments):
            there = _four(context, builder, signature.args[0], arguments[0], arguments[1 : 1 + axes], memory)
            value = ir.Constant(there.type.pointee, ir.Undefined)
            for k, x in enumerate(arguments[1 + axes :]):
                value = builder.insert_element(value, x, ir.Constant(ir.IntType(32), k))
            builder.store(value, there, align=16)

        return generate

    def _loading(memory):
        def generate(context, builder, signature, arguments):
            there = _four(context, builder, signature.args[0], arguments[0], arguments[1:], memory)
            value = builder.load(there, align=16)
            parts = [builder.extract_element(value, ir.Constant(ir.IntType(32), k)) for k in range(4)]
            return context.make_tuple(builder, signature.return_type, parts)

        return generate

    @intrinsic
    def store4(typing, array, i, j, a, b, c, d):
        """array[i, j : j + 4] = a, b, c, d"""
        return void(array, uintp, uintp, *(array.dtype,) * 4), _storing(GLOBAL, 2)

    @intrinsic
    def load4(typing, array, i, j, k):
        """array[i, j, k : k + 4] as a tuple"""
        return UniTuple(array.dtype, 4)(array, uintp, uintp, uintp), _loading(GLOBAL)

    @intrinsic
    def store4_shared(typing, array, i, a, b, c, d):
        """array[i : i + 4] = a, b, c, d"""
        return void(array, uintp, *(array.dtype,) * 4), _storing(SHARED, 1)

    @intrinsic
    def load4_shared(typing, array, i):
        """array[i : i + 4] as a tuple"""
        return UniTuple(array.dtype, 4)(array, uintp), _loading(SHARED)


def in_fours(array) -> bool:
    """Whether rows of a (B, F, D) array, which may be a view, can be written by `store4` as (B, F * D)."""
    there = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    width = array.shape[2]
    return (
        array.dtype == "float32"
        and array.strides[1:] == (4 * width, 4)
        and width % 4 == 0
        and array.strides[0] % 16 == 0
        and there["data"][0] % 16 == 0
    )
