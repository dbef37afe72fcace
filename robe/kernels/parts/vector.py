"""Four floats written by one instruction: a quarter of the stores, each 16 bytes wide."""

from numba import config, cuda

if config.ENABLE_CUDASIM or cuda.implementation == "Built-in":
    # Without numba-cuda no kernel is compiled; what is imported here is then the meaning alone.
    def store4(array, i, j, a, b, c, d):
        """array[i, j : j + 4] = a, b, c, d"""
        array[i, j], array[i, j + 1], array[i, j + 2], array[i, j + 3] = a, b, c, d

else:
    from llvmlite import ir
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic
    from numba.cuda.types import float32, uintp, void

    GLOBAL = 1  # NVVM's number of the memory that arrays lie in

    @intrinsic
    def store4(typing, array, i, j, a, b, c, d):
        """array[i, j : j + 4] = a, b, c, d"""

        def generate(context, builder, signature, arguments):
            kind, view = signature.args[0], arguments[0]
            view = context.make_array(kind)(context, builder, view)
            there = cgutils.get_item_pointer(context, builder, kind, view, arguments[1:3])
            four = ir.VectorType(ir.FloatType(), 4)
            value = ir.Constant(four, ir.Undefined)
            for k, x in enumerate(arguments[3:]):
                value = builder.insert_element(value, x, ir.Constant(ir.IntType(32), k))
            there = builder.addrspacecast(builder.bitcast(there, four.as_pointer()), four.as_pointer(GLOBAL))
            builder.store(value, there, align=16)

        return void(array, uintp, uintp, float32, float32, float32, float32), generate


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
