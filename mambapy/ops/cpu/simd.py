"""Vectors of 32 numbers as a Numba type, so that kernels say what the vector unit does.

LLVM's auto-vectoriser gives up on these loops for small reasons (too many arrays that might
overlap, a width it does not know) and on Intel it stops at 256 bits. A value of type <32 x float>
leaves it no choice: LLVM splits it into whatever registers the machine has (2 of AVX-512, 4 of
AVX2, 8 of NEON), and the order of every sum is the one that is written here, so that results are
the same bits on each run.
"""

import operator

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.extending import intrinsic, models, register_model, type_callable

LANES = 32
# Narrower vectors, for loops with so many of them that registers run out.
HALF = LANES // 2
# Options of functions that only kernels call: no entry point from Python, which would take a sixth
# of the time to compile.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
INLINE = {**INNER, "forceinline": True}


def inner(function, **options):
    """`njit` for what only kernels call, compiled once whatever constants it is called with.

    Numba would compile it anew for each constant among its arguments: 15 times for `rows.stage`.
    """
    dispatcher = njit(**INNER, **options)(function)
    template = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: template(
        [types.unliteral(arg) for arg in args], {k: types.unliteral(arg) for k, arg in kws.items()}
    )
    return dispatcher


def inline(function):
    """`inner` that becomes part of its caller, where constants among its arguments are seen."""
    return inner(function, forceinline=True)


# Sums over channels are kept as this many partial sums.
FOLDED = 16


class Vec(types.Type):
    """`lanes` numbers of one Numba float type, in registers."""

    def __init__(self, dtype: types.Float, lanes: int = LANES) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"vec{lanes}x{dtype}")


V32 = Vec(types.float32)
V64 = Vec(types.float64)
VECTORS = {types.float32: V32, types.float64: V64}
HALVES = {kind: Vec(kind, HALF) for kind in VECTORS}
ELEMENT = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
BITS = {vec: vec.dtype.bitwidth for table in (VECTORS, HALVES) for vec in table.values()}


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, llvm_of(fe_type))


def llvm_of(vec: Vec) -> ir.VectorType:
    return ir.VectorType(ELEMENT[vec.dtype], vec.lanes)


def ints_of(vec: Vec) -> ir.VectorType:
    return ir.VectorType(ir.IntType(BITS[vec]), vec.lanes)


def repeat(kind: ir.VectorType, number) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count)


def call(builder, name: str, result, values):
    function = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), values)


def splat_value(builder, scalar, lanes=LANES):
    kind = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.IntType(32)(0))
    mask = repeat(ir.VectorType(ir.IntType(32), lanes), 0)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)


# Arithmetic-


def _register_operator(function, emit) -> None:
    @type_callable(function)
    def _type(context):
        def typer(a, b):
            if isinstance(a, Vec) and a == b:
                return a
            return None

        return typer

    for vec in BITS:
        lower_builtin(function, vec, vec)(
            lambda context, builder, sig, args: emit(builder, args[0], args[1])
        )


_register_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_register_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_register_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_register_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once where the machine can."""
    if not (isinstance(a, Vec) and a == b == c):
        return None

    def codegen(context, builder, sig, args):
        name = f"llvm.fmuladd.v{a.lanes}f{BITS[a]}"
        return call(builder, name, llvm_of(a), list(args))

    return a(a, b, c), codegen


def _selector(predicate: str):
    """An intrinsic `a if a <predicate> b else b`; a NaN in `b` is kept, as the comparison is then
    false."""

    @intrinsic
    def choose(typingctx, a, b):
        if not (isinstance(a, Vec) and a == b):
            return None

        def codegen(context, builder, sig, args):
            return builder.select(builder.fcmp_ordered(predicate, *args), *args)

        return a(a, b), codegen

    return choose


largest = _selector(">")
smallest = _selector("<")


@intrinsic
def where_greater(typingctx, a, b, yes, no):
    """Lane by lane: `yes` where a > b, else `no` (also where either is NaN)."""
    if not (isinstance(a, Vec) and a == b == yes == no):
        return None

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])

    return a(a, b, yes, no), codegen


@intrinsic
def add_to_exponent(typingctx, value, magic):
    """value * 2^k, with k in the low bits of `magic` (= k + 1.5 * 2^mantissa bits), as one integer
    addition."""
    if not (isinstance(value, Vec) and value == magic):
        return None

    def codegen(context, builder, sig, args):
        ints = ints_of(value)
        shift = repeat(ints, 23 if BITS[value] == 32 else 52)
        k = builder.shl(builder.bitcast(args[1], ints), shift)
        bits = builder.add(builder.bitcast(args[0], ints), k)
        return builder.bitcast(bits, llvm_of(value))

    return value(value, magic), codegen


@intrinsic
def exponent_and_mantissa(typingctx, value, split):
    """(k, m) with value = m * 2^k and split <= m < 2 * split, for positive normal values; `split`
    near 0.7."""
    if not (isinstance(value, Vec) and value == split):
        return None
    result = types.UniTuple(value, 2)

    def codegen(context, builder, sig, args):
        ints, size = ints_of(value), 23 if BITS[value] == 32 else 52
        # Subtracting the bits of `split` first makes the exponent field count from it.
        offset = builder.sub(builder.bitcast(args[0], ints), builder.bitcast(args[1], ints))
        k = builder.ashr(offset, repeat(ints, size))
        bits = builder.sub(builder.bitcast(args[0], ints), builder.shl(k, repeat(ints, size)))
        pair = [builder.sitofp(k, llvm_of(value)), builder.bitcast(bits, llvm_of(value))]
        return context.make_tuple(builder, result, pair)

    return result(value, split), codegen


def _shuffle(start: int):
    """An intrinsic `f(a, b)`: every second lane of a, then of b, from lane `start` on."""

    @intrinsic
    def every_second(typingctx, a, b):
        if not (isinstance(a, Vec) and a == b):
            return None

        def codegen(context, builder, sig, args):
            lanes = ir.Constant(
                ir.VectorType(ir.IntType(32), LANES), list(range(start, 2 * LANES, 2))
            )
            return builder.shuffle_vector(*args, lanes)

        return a(a, b), codegen

    return every_second


def _zip(start: int):
    """An intrinsic `f(a, b)`: lanes of a and b in turn, from lane `start` of either on."""

    @intrinsic
    def in_turn(typingctx, a, b):
        if not (isinstance(a, Vec) and a == b):
            return None

        def codegen(context, builder, sig, args):
            lanes = [lane for i in range(start, start + LANES // 2) for lane in (i, i + LANES)]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)
            return builder.shuffle_vector(*args, mask)

        return a(a, b), codegen

    return in_turn


evens, odds = _shuffle(0), _shuffle(1)
zip_low, zip_high = _zip(0), _zip(LANES // 2)


# Constants and broadcasts


@intrinsic
def splat(typingctx, scalar):
    """A vector whose lanes all hold `scalar`."""
    if scalar not in VECTORS:
        return None

    def codegen(context, builder, sig, args):
        return splat_value(builder, args[0])

    return VECTORS[scalar](scalar), codegen


@intrinsic
def like(typingctx, vector, number):
    """A vector of the type of `vector` whose lanes all hold the scalar `number`."""
    if not isinstance(vector, Vec):
        return None

    def codegen(context, builder, sig, args):
        scalar = context.cast(builder, args[1], number, vector.dtype)
        return splat_value(builder, scalar, vector.lanes)

    return vector(vector, number), codegen


@intrinsic
def zeros(typingctx, dtype):
    """A vector of zeros of a NumPy dtype class (np.float32, np.float64)."""
    vector = VECTORS[dtype.dtype]

    def codegen(context, builder, sig, args):
        return repeat(llvm_of(vector), 0.0)

    return vector(dtype), codegen


def constant(table: dict[int, float]):
    """An intrinsic `f(v)`: a vector of the type of `v`, filled with the entry of `table` for its
    bits (32, 64)."""

    @intrinsic
    def filled(typingctx, vector):
        def codegen(context, builder, sig, args):
            return repeat(llvm_of(vector), table[BITS[vector]])

        return vector(vector), codegen

    return filled


def polynomial(table: dict[int, tuple[float, ...]]):
    """An intrinsic `f(v)`: sum_i table[bits][i] v^i by Horner's rule."""

    @intrinsic
    def horner(typingctx, vector):
        def codegen(context, builder, sig, args):
            name = f"llvm.fmuladd.v{vector.lanes}f{BITS[vector]}"
            *rest, value = [repeat(llvm_of(vector), c) for c in table[BITS[vector]]]
            for coefficient in reversed(rest):
                value = call(builder, name, llvm_of(vector), [value, args[0], coefficient])
            return value

        return vector(vector), codegen

    return horner
