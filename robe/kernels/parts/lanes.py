"""Spans of weights, several at a time in one vector register, and prefetching.

Numba's compiler turns a loop into vector code where the loop is long; the spans of a ROBE array are 8 to 64
elements, and fall into the scalar rest of such a loop. So the loads and stores of 16 or 8 elements are
written out here as LLVM instructions, for any machine: where registers are shorter, it takes several. With
the JIT off (NUMBA_DISABLE_JIT=1) or bounds checked (NUMBA_BOUNDSCHECK=1), the plain functions below run in
their stead; they compute the same.

A span goes between `memory` (M,) and the contiguous `vectors` (F, D) of one row of a batch, whose elements
are counted 0 .. F * D - 1; element k of it is negated where bit k of `bits` is set. `memory` may be the bits
of halves (half.py), which are widened as they are read; groups of codes (groups.py) have a copy of their own.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from robe.kernels.adagrad import step_weight
from robe.kernels.parts.half import widen
from robe.kernels.parts.hashing import ONE, ZERO, flip

EIGHT, SIXTEEN, SIXTYFOUR = np.uint64(8), np.uint64(16), np.uint64(64)  # 16 float32 are a cache line
THREE, SEVEN, U32 = np.uint64(3), np.uint64(7), np.uint32


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _vector_pointer(context, builder, array_type, array, index, lanes):
    pointer = _pointer(context, builder, array_type, array, index)
    vector = ir.VectorType(context.get_data_type(array_type.dtype), lanes)
    return builder.bitcast(pointer, vector.as_pointer())


def _widened(builder, bits, lanes):
    """`from_half` of half.py. On old machines LLVM's own conversion calls a function that is not there."""
    integers, floats = (ir.VectorType(kind, lanes) for kind in (ir.IntType(32), ir.FloatType()))

    def each(number):
        return ir.Constant(integers, [number] * lanes)

    bits = builder.zext(bits, integers)
    size = builder.and_(bits, each(0x7FFF))
    number = builder.bitcast(builder.shl(size, each(13)), floats)
    number = builder.bitcast(builder.fmul(number, ir.Constant(floats, [2.0**112] * lanes)), integers)
    endless = builder.select(builder.icmp_unsigned(">=", size, each(0x7C00)), each(0x7F800000), each(0))
    sign = builder.shl(builder.and_(bits, each(0x8000)), each(16))
    return builder.bitcast(builder.or_(builder.or_(number, endless), sign), floats)


def _signed(context, builder, array_type, array, index, bits, lanes):
    """`lanes` elements from `index` on, negated where `bits` say so: the sign bit of a float is flipped."""
    size = array_type.dtype.bitwidth
    value = builder.load(_vector_pointer(context, builder, array_type, array, index, lanes), align=size // 8)
    if array_type.dtype == types.uint16:
        size, value = 32, _widened(builder, value, lanes)
    return _negated(builder, value, bits, lanes, size)


def _negated(builder, value, bits, lanes, size):
    integers = ir.VectorType(ir.IntType(size), lanes)
    negative = builder.bitcast(builder.trunc(bits, ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes))
    minus, plus = (ir.Constant(integers, [bit] * lanes) for bit in (1 << (size - 1), 0))
    flipped = builder.xor(builder.bitcast(value, integers), builder.select(negative, minus, plus))
    return builder.bitcast(flipped, value.type)


def _splat(builder, value, lanes):
    """The same number in every lane."""
    nothing, number = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), ir.IntType(32)
    first = builder.insert_element(nothing, value, number(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(number, lanes), [0] * lanes))


@intrinsic(prefer_literal=True)
def _copy_lanes(typing, source, s, bits, out, o, lanes):
    def code(context, builder, signature, arguments):
        source_type, _, _, out_type, _, lanes_type = signature.args
        source, s, bits, out, o, _ = arguments
        lanes = lanes_type.literal_value
        value = _signed(context, builder, source_type, source, s, bits, lanes)
        target = _vector_pointer(context, builder, out_type, out, o, lanes)
        builder.store(value, target, align=out_type.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, s, bits, out, o, lanes), code


def _codes(builder, byte, element, bits, lanes):
    """`lanes` codes from an element on as one vector of bytes; byte(i): pointer to byte i of the codes.

    Of 4 bits, the first, third, ... lie in the same half of neighbouring bytes, the others in the other half
    of those, or, from an odd element on, of the bytes that follow. Of fewer bits, eight lie within 4 bytes.
    """
    vector = ir.VectorType(ir.IntType(8), lanes)
    codes = cgutils.alloca_once(builder, vector)
    with builder.if_else(builder.icmp_unsigned("==", bits, bits.type(8))) as (eight, fewer):
        with eight:
            builder.store(builder.load(builder.bitcast(byte(element), vector.as_pointer()), align=1), codes)
        with fewer, builder.if_else(builder.icmp_unsigned("==", bits, bits.type(4))) as (four, few):
            with four:
                builder.store(_halves(builder, byte, element, lanes), codes)
            with few:
                builder.store(_few(builder, byte, element, bits, lanes), codes)
    return builder.load(codes)


def _halves(builder, byte, element, lanes):
    """`_codes` of 4 bits."""
    kind = ir.IntType(max(8, 4 * lanes))
    odd, at = builder.and_(element, element.type(1)), builder.lshr(element, element.type(1))
    shift = builder.mul(kind(4), odd if kind == odd.type else builder.trunc(odd, kind))
    mask = kind(int("0f" * (kind.width // 8), 16))

    def halves(i, shift):
        word = builder.load(builder.bitcast(byte(i), kind.as_pointer()), align=1)
        half = ir.VectorType(ir.IntType(8), kind.width // 8)
        return builder.bitcast(builder.and_(builder.lshr(word, shift), mask), half)

    found = halves(at, shift)
    if lanes > 1:
        others = halves(builder.add(at, odd), builder.sub(kind(4), shift))
        order = [i // 2 + i % 2 * lanes // 2 for i in range(lanes)]
        order = ir.Constant(ir.VectorType(ir.IntType(32), lanes), order)
        found = builder.shuffle_vector(found, others, order)
    return found


def _few(builder, byte, element, bits, lanes):
    """`_codes` of 3, 2 or 1 bits. 4 bytes can be read from each code on, as scale and bias stand behind."""
    kind, number = ir.IntType(32), element.type
    words = ir.VectorType(kind, lanes)
    first = builder.mul(element, bits)
    shift = builder.trunc(builder.and_(first, number(7)), kind)
    first = builder.lshr(first, number(3))

    def each(i):
        word = builder.load(builder.bitcast(byte(i), kind.as_pointer()), align=1)
        return _splat(builder, builder.lshr(word, shift), lanes)

    found = each(first)
    if lanes > 8:  # eight codes further on, the bits begin at the same bit of a byte
        order = ir.Constant(words, [i // 8 * lanes for i in range(lanes)])
        found = builder.shuffle_vector(found, each(builder.add(first, bits)), order)
    bits = builder.trunc(bits, kind)
    shifts = builder.mul(ir.Constant(words, [i % 8 for i in range(lanes)]), _splat(builder, bits, lanes))
    mask = builder.sub(builder.shl(kind(1), bits), kind(1))
    found = builder.and_(builder.lshr(found, shifts), _splat(builder, mask, lanes))
    return builder.trunc(found, ir.VectorType(ir.IntType(8), lanes))


@intrinsic(prefer_literal=True)
def expand_lanes(typing, table, group, element, size, bits, ends, signs, out, o, lanes):
    def code(context, builder, signature, arguments):
        table_type, out_type, lanes = signature.args[0], signature.args[7], signature.args[9].literal_value
        table, group, element, size, bits, ends, signs, out, o, _ = arguments
        shape = context.make_array(table_type)(context, builder, table).shape
        start = builder.mul(group, builder.extract_value(shape, 1))
        number, byte = ir.IntType(64), ir.IntType(8)

        def codes(offset):
            def at(i):
                i = builder.add(builder.add(start, i), offset)
                return _pointer(context, builder, table_type, table, i)

            return _codes(builder, at, element, bits, lanes)

        ends = [_splat(builder, end, lanes) for end in cgutils.unpack_tuple(builder, ends)]
        scale, bias, found = *ends[:2], codes(number(0))
        if len(ends) > 2:
            # Lanes from `left` on are in the next group, 4 bytes further on.
            left = builder.sub(size, element)
            left = builder.select(builder.icmp_signed("<", left, number(0)), number(0), left)
            left = builder.select(builder.icmp_signed(">", left, number(lanes)), number(lanes), left)
            # Where there is no next group, nothing behind this one may be read.
            ahead = builder.icmp_signed("<", left, number(lanes))
            ahead = builder.select(ahead, number(4), number(0))
            lane = ir.Constant(ir.VectorType(byte, lanes), list(range(lanes)))
            beyond = builder.icmp_unsigned(">=", lane, _splat(builder, builder.trunc(left, byte), lanes))
            here, there = (scale, bias, found), (*ends[2:], codes(ahead))
            scale, bias, found = (builder.select(beyond, b, a) for a, b in zip(here, there, strict=True))
        integers, floats = (ir.VectorType(kind, lanes) for kind in (ir.IntType(32), ir.FloatType()))
        found = builder.zext(found, integers)
        value = builder.fadd(bias, builder.fmul(scale, builder.sitofp(found, floats)))
        target = _vector_pointer(context, builder, out_type, out, o, lanes)
        builder.store(_negated(builder, value, signs, lanes, 32), target, align=4)
        return context.get_dummy_value()

    return types.void(table, group, element, size, bits, ends, signs, out, o, lanes), code


@intrinsic(prefer_literal=True)
def _add_lanes(typing, source, s, bits, scale, out, o, lanes):
    def code(context, builder, signature, arguments):
        source_type, _, _, _, out_type, _, lanes_type = signature.args
        source, s, bits, scale, out, o, _ = arguments
        lanes, align = lanes_type.literal_value, out_type.dtype.bitwidth // 8
        value = _signed(context, builder, source_type, source, s, bits, lanes)
        target = _vector_pointer(context, builder, out_type, out, o, lanes)
        # Two roundings, as in the plain function: the bytes must not depend on where a span is cut.
        total = builder.fadd(
            builder.load(target, align=align), builder.fmul(_splat(builder, scale, lanes), value)
        )
        builder.store(total, target, align=align)
        return context.get_dummy_value()

    return types.void(source, s, bits, scale, out, o, lanes), code


@intrinsic(prefer_literal=True)
def _adagrad_lanes(typing, gradient, rate, eps, accumulator, out, o, lanes):
    def code(context, builder, signature, arguments):
        lanes, align = signature.args[6].literal_value, signature.args[4].dtype.bitwidth // 8
        arrays = [
            _vector_pointer(context, builder, signature.args[i], arguments[i], arguments[5], lanes)
            for i in (0, 3, 4)
        ]
        g, total, weight = (builder.load(pointer, align=align) for pointer in arrays)
        rate, eps = (_splat(builder, arguments[i], lanes) for i in (1, 2))
        total = builder.fadd(total, builder.fmul(g, g))
        name = f"llvm.sqrt.v{lanes}f{8 * align}"
        sqrt = cgutils.get_or_insert_function(builder.module, ir.FunctionType(g.type, [g.type]), name)
        root = builder.call(sqrt, [total])
        step = builder.fdiv(builder.fmul(rate, g), builder.fadd(root, eps))
        new = (ir.Constant(g.type, [0.0] * lanes), total, builder.fsub(weight, step))
        for value, pointer in zip(new, arrays, strict=True):
            builder.store(value, pointer, align=align)
        return context.get_dummy_value()

    return types.void(gradient, rate, eps, accumulator, out, o, lanes), code


@intrinsic(prefer_literal=True)
def _combine_lanes(typing, factors, vectors, out, i, d, width, lanes):
    def code(context, builder, signature, arguments):
        factors_type, vectors_type, out_type, _, _, _, lanes_type = signature.args
        factors, vectors, out, i, d, width, _ = arguments
        lanes, align = lanes_type.literal_value, out_type.dtype.bitwidth // 8
        zero = ir.Constant(ir.VectorType(context.get_data_type(out_type.dtype), lanes), [0.0] * lanes)
        total = cgutils.alloca_once_value(builder, zero)
        count = context.make_array(factors_type)(context, builder, factors).nitems
        with cgutils.for_range(builder, count) as loop:
            factor = builder.load(_pointer(context, builder, factors_type, factors, loop.index))
            element = builder.add(d, builder.mul(loop.index, width))
            pointer = _vector_pointer(context, builder, vectors_type, vectors, element, lanes)
            vector = builder.load(pointer, align=align)
            product = builder.fmul(_splat(builder, factor, lanes), vector, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        element = builder.add(d, builder.mul(i, width))
        target = _vector_pointer(context, builder, out_type, out, element, lanes)
        builder.store(builder.load(total), target, align=align)
        return context.get_dummy_value()

    return types.void(factors, vectors, out, i, d, width, lanes), code


@intrinsic
def _prefetch(typing, array, index):
    def code(context, builder, signature, arguments):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(_pointer(context, builder, signature.args[0], *arguments), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, number(0), number(3), number(1)])  # to read, keep it near, data
        return context.get_dummy_value()

    return types.void(array, index), code


if config.DISABLE_JIT or config.BOUNDSCHECK:

    @register_jitable
    def _copy_lanes(memory, s, bits, vectors, o, lanes):
        for k in range(lanes):
            f, i = divmod(o + np.uint64(k), np.uint64(vectors.shape[1]))
            vectors[f, i] = flip(widen(memory[s + np.uint64(k)]), bits, k)

    @register_jitable
    def expand_lanes(table, group, element, size, bits, ends, signs, out, o, lanes):
        for k in range(lanes):
            beyond, i = element + np.uint64(k) >= size, element + np.uint64(k)
            row, i = (group + ONE, i - size) if beyond else (group, i)
            scale, bias = (ends[-2], ends[-1]) if beyond else (ends[0], ends[1])
            at = i * np.uint64(bits)
            code = U32(table[row, at >> THREE]) >> U32(at & SEVEN)
            if bits == 3:  # which alone may go on in the next byte
                code |= U32(table[row, (at >> THREE) + ONE]) << U32(EIGHT - (at & SEVEN))
            code &= U32((1 << bits) - 1)
            out.flat[o + np.uint64(k)] = flip(bias + scale * np.float32(code), signs, k)

    @register_jitable
    def _add_lanes(vectors, s, bits, scale, memory, o, lanes):
        for k in range(lanes):
            f, i = divmod(s + np.uint64(k), np.uint64(vectors.shape[1]))
            memory[o + np.uint64(k)] += scale * flip(vectors[f, i], bits, k)

    @register_jitable
    def _adagrad_lanes(gradient, rate, eps, accumulator, out, o, lanes):
        for k in range(lanes):
            slot = o + np.uint64(k)
            step_weight(slot, gradient[slot], rate, eps, accumulator, out)
            gradient[slot] = 0

    @register_jitable
    def _combine_lanes(factors, vectors, out, i, d, width, lanes):
        for k in range(lanes):
            total = 0 * factors[0]
            for j in range(factors.size):
                total += factors[j] * vectors[j, d + np.uint64(k)]
            out[i, d + np.uint64(k)] = total

    @register_jitable
    def _prefetch(array, index):
        pass


# Called more than once, the loops over a span are not inlined by LLVM's own choice, and a call for each
# span costs as much as copying it: with blocks of 8, a look-up took 1.4 times as long.
@register_jitable(forceinline=True)
def copy_span(memory, s, bits, vectors, o, length):
    """Write memory[s + k], with its sign, to element o + k of the vectors, for k < length."""
    while length >= SIXTEEN:
        _copy_lanes(memory, s, bits, vectors, o, 16)
        s, o, length, bits = s + SIXTEEN, o + SIXTEEN, length - SIXTEEN, bits >> SIXTEEN
    if length >= EIGHT:
        _copy_lanes(memory, s, bits, vectors, o, 8)
        s, o, length, bits = s + EIGHT, o + EIGHT, length - EIGHT, bits >> EIGHT
    while length > ZERO:
        _copy_lanes(memory, s, bits, vectors, o, 1)
        s, o, length, bits = s + ONE, o + ONE, length - ONE, bits >> ONE


@register_jitable(forceinline=True)
def add_span(vectors, s, bits, scale, memory, o, length):
    """Add scale times element s + k of the vectors, with its sign, to memory[o + k], for k < length."""
    while length >= SIXTEEN:
        _add_lanes(vectors, s, bits, scale, memory, o, 16)
        s, o, length, bits = s + SIXTEEN, o + SIXTEEN, length - SIXTEEN, bits >> SIXTEEN
    if length >= EIGHT:
        _add_lanes(vectors, s, bits, scale, memory, o, 8)
        s, o, length, bits = s + EIGHT, o + EIGHT, length - EIGHT, bits >> EIGHT
    while length > ZERO:
        _add_lanes(vectors, s, bits, scale, memory, o, 1)
        s, o, length, bits = s + ONE, o + ONE, length - ONE, bits >> ONE


@register_jitable(forceinline=True)
def adagrad_span(gradient, rate, eps, accumulator, out, o, length):
    """Adagrad's step on a span of weights, whose gradients become 0."""
    while length >= SIXTEEN:
        _adagrad_lanes(gradient, rate, eps, accumulator, out, o, 16)
        o, length = o + SIXTEEN, length - SIXTEEN
    if length >= EIGHT:
        _adagrad_lanes(gradient, rate, eps, accumulator, out, o, 8)
        o, length = o + EIGHT, length - EIGHT
    while length > ZERO:
        _adagrad_lanes(gradient, rate, eps, accumulator, out, o, 1)
        o, length = o + ONE, length - ONE


@register_jitable
def combine(factors, vectors, out, i):
    """Write the sum of factors[j] * vectors[j] to out[i]; factors (N,), vectors and out (N, D)."""
    i, d, width = np.uint64(i), ZERO, np.uint64(vectors.shape[1])
    while width - d >= SIXTYFOUR:
        _combine_lanes(factors, vectors, out, i, d, width, 64)
        d += SIXTYFOUR
    while width - d >= SIXTEEN:
        _combine_lanes(factors, vectors, out, i, d, width, 16)
        d += SIXTEEN
    while d < width:
        _combine_lanes(factors, vectors, out, i, d, width, 1)
        d += ONE


@register_jitable
def prefetch_span(array, start, length):
    """Ask for the cache lines of a span that will be needed soon."""
    k, line = ZERO, np.uint64(64 // array.itemsize)
    while k < length:
        _prefetch(array, start + k)
        k += line


def require_rows_together(array: np.ndarray) -> None:
    """Raise ValueError unless array[b] is contiguous, which is what indices into it count on."""
    if not array[:1].flags.c_contiguous:
        raise ValueError(f"each row of a batch must be contiguous, but the strides are {array.strides}")
