"""Loads, stores and sums of vectors in memory; the counters that workers share. Pointers have no
bounds."""

import platform

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mambapy.ops.cpu.simd import (
    BITS,
    ELEMENT,
    FOLDED,
    HALVES,
    LANES,
    V32,
    VECTORS,
    Vec,
    call,
    ints_of,
    llvm_of,
    repeat,
    splat_value,
)


@intrinsic
def pointer(typingctx, address, dtype):
    """The integer `address` as a pointer to a NumPy dtype class, or to int64 (`int`)."""
    result = types.CPointer(dtype.dtype if isinstance(dtype, types.NumberClass) else types.int64)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, dtype), codegen


def _loader(table):
    """An intrinsic `f(base, offset)`: the numbers at base[offset], base[offset + 1], ... as a
    vector of `table`."""

    @intrinsic
    def load_vector(typingctx, base, offset):
        if not isinstance(base, types.CPointer) or base.dtype not in table:
            return None
        vector = table[base.dtype]

        def codegen(context, builder, sig, args):
            place = builder.gep(args[0], [args[1]])
            place = builder.bitcast(place, llvm_of(vector).as_pointer())
            return builder.load(place, align=base.dtype.bitwidth // 8)

        return vector(base, types.int64), codegen

    return load_vector


load, load_narrow = _loader(VECTORS), _loader(HALVES)


@intrinsic
def store(typingctx, base, offset, value):
    """Write a vector to base[offset], base[offset + 1], ..."""
    if not isinstance(value, Vec) or base != types.CPointer(value.dtype):
        return None

    def codegen(context, builder, sig, args):
        place = builder.gep(args[0], [args[1]])
        place = builder.bitcast(place, llvm_of(value).as_pointer())
        builder.store(args[2], place, align=base.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(base, types.int64, value), codegen


def _lanes(builder, vector, start: int, count: int):
    """Lanes start ... start + count - 1 of a vector."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


@intrinsic
def accumulate(typingctx, base, offset, a, b):
    """base[offset + i] += sum of a * b over the lanes i and i + half of all, for i < half of
    all."""
    if not isinstance(a, Vec) or a != b or base != types.CPointer(a.dtype):
        return None
    folded = a.lanes // 2

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(ELEMENT[a.dtype], folded)
        place = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
        value = builder.load(place, align=a.dtype.bitwidth // 8)
        for start in (0, folded):
            parts = [_lanes(builder, args[i], start, folded) for i in (2, 3)]
            value = call(builder, f"llvm.fmuladd.v{folded}f{BITS[a]}", kind, [*parts, value])
        builder.store(value, place, align=a.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(base, types.int64, a, a), codegen


def _sum_in_halves(builder, value, count: int):
    """The sum of `count` lanes: (0 + count/2, 1 + count/2 + 1, ...), then again."""
    while count > 1:
        count //= 2
        value = builder.fadd(*[_lanes(builder, value, start, count) for start in (0, count)])
    return builder.extract_element(value, ir.IntType(32)(0))


@intrinsic
def total(typingctx, base, offset):
    """The sum of base[offset : offset + FOLDED], in halves."""
    if not isinstance(base, types.CPointer) or base.dtype not in VECTORS:
        return None

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(ELEMENT[base.dtype], FOLDED)
        place = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
        value = builder.load(place, align=base.dtype.bitwidth // 8)
        return _sum_in_halves(builder, value, FOLDED)

    return base.dtype(base, types.int64), codegen


@intrinsic
def lanes_total(typingctx, vector):
    """The sum of a vector's numbers, in halves."""
    if not isinstance(vector, Vec):
        return None

    def codegen(context, builder, sig, args):
        return _sum_in_halves(builder, args[0], LANES)

    return vector.dtype(vector), codegen


@intrinsic
def load_int8(typingctx, base, offset):
    """LANES float32 from signed bytes."""

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(ir.IntType(8), LANES)
        place = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
        return builder.sitofp(builder.load(place, align=1), llvm_of(V32))

    return V32(types.CPointer(types.int8), types.int64), codegen


def _half_loader(brain: bool):
    """An intrinsic `f(base, offset)`: LANES float32 from the bits of bfloat16 (`brain`) or float16
    numbers."""

    @intrinsic
    def load_half(typingctx, base, offset):
        def codegen(context, builder, sig, args):
            half = ir.IntType(16) if brain else ir.HalfType()
            place = builder.gep(args[0], [args[1]])
            place = builder.bitcast(place, ir.VectorType(half, LANES).as_pointer())
            value = builder.load(place, align=2)
            if not brain:
                return builder.fpext(value, llvm_of(V32))
            wide = builder.shl(builder.zext(value, ints_of(V32)), repeat(ints_of(V32), 16))
            return builder.bitcast(wide, llvm_of(V32))

        return V32(types.CPointer(types.uint16), types.int64), codegen

    return load_half


def _half_storer(brain: bool):
    """An intrinsic `f(base, offset, value)`: round float32 to nearest even and write them; NaN
    stays NaN."""

    @intrinsic
    def store_half(typingctx, base, offset, value):
        def codegen(context, builder, sig, args):
            ints, number = ints_of(V32), args[2]
            if brain:
                bits = builder.bitcast(number, ints)
                odd = builder.and_(builder.lshr(bits, repeat(ints, 16)), repeat(ints, 1))
                bits = builder.add(bits, builder.add(odd, repeat(ints, 0x7FFF)))
                nan = builder.fcmp_unordered("uno", number, number)
                bits = builder.select(nan, repeat(ints, 0x7FC00000), bits)
                bits = builder.lshr(bits, repeat(ints, 16))
                number = builder.trunc(bits, ir.VectorType(ir.IntType(16), LANES))
            else:
                number = builder.fptrunc(number, ir.VectorType(ir.HalfType(), LANES))
            place = builder.gep(args[0], [args[1]])
            builder.store(number, builder.bitcast(place, number.type.as_pointer()), align=2)
            return context.get_dummy_value()

        return types.void(types.CPointer(types.uint16), types.int64, V32), codegen

    return store_half


load_bfloat16, load_float16 = _half_loader(True), _half_loader(False)
store_bfloat16, store_float16 = _half_storer(True), _half_storer(False)


def _first(builder, count):
    """A mask of the first `count` lanes."""
    index = ir.Constant(ir.VectorType(ir.IntType(64), LANES), list(range(LANES)))
    return builder.icmp_signed("<", index, splat_value(builder, count))


@intrinsic
def load_first(typingctx, base, offset, count):
    """`load` of the first `count` lanes; the others are 0 and are not read."""
    vector = VECTORS[base.dtype]

    def codegen(context, builder, sig, args):
        kind = llvm_of(vector)
        place = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
        values = [
            place,
            ir.IntType(32)(base.dtype.bitwidth // 8),
            _first(builder, args[2]),
            repeat(kind, 0.0),
        ]
        return call(builder, f"llvm.masked.load.v{LANES}f{BITS[vector]}.p0", kind, values)

    return vector(base, types.int64, types.int64), codegen


@intrinsic
def store_first(typingctx, base, offset, value, count):
    """`store` of the first `count` lanes; no more is written."""
    if not isinstance(value, Vec) or base != types.CPointer(value.dtype):
        return None

    def codegen(context, builder, sig, args):
        place = builder.bitcast(builder.gep(args[0], [args[1]]), llvm_of(value).as_pointer())
        align = ir.IntType(32)(base.dtype.bitwidth // 8)
        values = [args[2], place, align, _first(builder, args[3])]
        call(builder, f"llvm.masked.store.v{LANES}f{BITS[value]}.p0", ir.VoidType(), values)
        return context.get_dummy_value()

    return types.void(base, types.int64, value, types.int64), codegen


@intrinsic
def fetch_add(typingctx, base, offset):
    """base[offset]++ as one atomic step; the value before it."""
    if base != types.CPointer(types.int64):
        return None

    def codegen(context, builder, sig, args):
        place = builder.gep(args[0], [args[1]])
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(base, types.int64), codegen


@intrinsic
def finish(typingctx, base, offset):
    """base[offset]++ as one atomic step, after everything this thread has written."""
    if base != types.CPointer(types.int64):
        return None

    def codegen(context, builder, sig, args):
        builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), ir.IntType(64)(1), "release")
        return context.get_dummy_value()

    return types.void(base, types.int64), codegen


@intrinsic
def load_acquire(typingctx, base, offset):
    """base[offset], before anything this thread reads from now on."""
    if base != types.CPointer(types.int64):
        return None

    def codegen(context, builder, sig, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "acquire", 8)

    return types.int64(base, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this thread waits for another, which may share it."""

    def codegen(context, builder, sig, args):
        machine = platform.machine()
        if machine in ("x86_64", "AMD64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif machine in ("arm64", "aarch64"):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(), codegen
