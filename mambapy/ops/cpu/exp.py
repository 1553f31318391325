"""exp, softplus, sigmoid, SiLU, cosine and sine on vectors, for use inside kernels.

2^r is split as 2^k * 2^f with k the nearest integer and |f| <= 1/2. Adding 1.5 * 2^23 rounds r and
leaves k in the low bits of the sum, so that 2^k is multiplied in by one shift and one integer
addition to the exponent; 2^f is a minimax polynomial 1 + f * q(f), so that 2^0 = 1 exactly. The
coefficients come from Remez' exchange in 50 digits; for exp2 in float32 the error is weighted in
ulp and the last bits are chosen with the rounding of Horner's rule (1.84 ulp in all). Relative
errors of the polynomials: exp2 3.4e-18 (float64); log1p 4.7e-9 (float32), 9.1e-18 (float64).
"""

import math

from mambapy.ops.cpu.simd import (
    add_to_exponent,
    constant,
    fma,
    inline,
    largest,
    like,
    polynomial,
    smallest,
    where_greater,
)

LOG2E = 1 / math.log(2)
LN2 = math.log(2)
# ln 2 in two parts; k * LN2_HIGH is exact for |k| <= 2048 in either type.
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.4286068203094173e-06

# fmt: off
_EXP2 = {
    32: (0.693146824836731, 0.24022231996059418, 0.05550886318087578, 0.009671762585639954,
         0.0013225707225501537),
    64: (0.6931471805599453258, 0.2402265069591013126, 0.055504108664820083268,
         0.0096181291075941202503, 0.0013333558146774611079, 0.00015403530457111887113,
         0.000015252733493136247267, 1.3215435282409788228e-6, 1.0178199568333082488e-7,
         7.0737832313174615438e-9, 4.434771806479267299e-10),
}
_EXP2_6 = (
    0.693147202854938784, 0.240226479136157121, 0.0555033247132574051, 0.00961843736067234895,
    0.00133988743543192303, 0.000153533609173466203,
)
# log1p(u) / u for u in [0, 1].
_LOG1P = {
    32: (0.9999999953, -0.4999990242, 0.3332996241, -0.2495413362, 0.1967593909, -0.1530559212,
         0.1060365417, -0.05695952761, 0.01985145902, -0.003244024473),
    64: (0.99999999999999999091, -0.49999999999999183907, 0.33333333333211222772,
         -0.24999999992720820844, 0.19999999769426350392, -0.16666662177728837301,
         0.14285655673270437886, -0.12499456314111502939, 0.11107380930175292205,
         -0.099805047902179838055, 0.090115477347222105824, -0.080772711058299971,
         0.070279694689778977052, -0.057388021668590139838, 0.042166393021985564712,
         -0.026623122495402182298, 0.013756162401601278722, -0.0055020875628665070803,
         0.0015816933173046502617, -0.00028880301904205983757, 0.000025041273203863695709),
}
# fmt: on
# 1.5 * 2^mantissa bits; the largest exponent; exp's last normal result and first infinite one.
_MAGIC = {32: 1.5 * 2**23, 64: 1.5 * 2**52}
_TOP = {32: 128.0, 64: 1024.0}
_EXP_LOW = {32: -87.33654, 64: -708.3964185322641}
_EXP_HIGH = {32: 88.72283, 64: 709.782712893384}


_magic, _top, _bottom = constant(_MAGIC), constant(_TOP), constant({32: -127.0, 64: -1023.0})
_exp_low, _exp_high = constant(_EXP_LOW), constant(_EXP_HIGH)
# For exp in g = f ln 2, which it has at hand: one degree more in float32, as its argument is
# rounded once more.
_EXP2_FINE = {**_EXP2, 32: _EXP2_6}
_EXP = {b: tuple(c * LOG2E ** (i + 1) for i, c in enumerate(_EXP2_FINE[b])) for b in _EXP2}
_exp_tail = polynomial(_EXP)
_exp2_tail, _log1p_ratio = polynomial(_EXP2), polynomial(_LOG1P)


@inline
def exp2(r):
    """2^r; 0 for r <= -127 (float64: -1023), inf from 128 (1024), NaN for NaN; below the normals,
    not exact."""
    # At both clamps f = 0, so that the exponent field becomes exactly that of 0 or of inf.
    return exp2_within(smallest(_top(r), largest(_bottom(r), r)))


@inline
def exp2_within(r):
    """`exp2` for what lies between its clamps."""
    k = r + _magic(r)
    f = r - (k - _magic(r))
    return add_to_exponent(fma(_exp2_tail(f), f, like(r, 1.0)), k)


@inline
def exp(x):
    """e^x within 2 ulp; results below the smallest normal number are 0."""
    k = x * like(x, LOG2E) + _magic(x)
    whole = k - _magic(x)
    g = fma(whole, like(x, -LN2_LOW), fma(whole, like(x, -LN2_HIGH), x))
    value = add_to_exponent(fma(_exp_tail(g), g, like(x, 1.0)), k)
    value = where_greater(_exp_low(x), x, like(x, 0.0), value)
    return where_greater(x, _exp_high(x), like(x, math.inf), value)


@inline
def softplus_and_slope(v):
    """(softplus(v), its derivative sigmoid(v)); as in torch, softplus(v) = v and slope 1 for v >
    20."""
    # u = exp(-|v|) never overflows, and log1p(u) keeps the small values of very negative v.
    u = exp(smallest(v, like(v, 0.0) - v))
    one = like(v, 1.0)
    soft = fma(_log1p_ratio(u), u, largest(v, like(v, 0.0)))
    slope = where_greater(v, like(v, 0.0), one, u) / (one + u)
    linear = like(v, 20.0)
    return where_greater(v, linear, v, soft), where_greater(v, linear, one, slope)


@inline
def softplus(v):
    """log(1 + e^v); v for v > 20."""
    return softplus_and_slope(v)[0]


@inline
def sigmoid(v):
    """1 / (1 + e^-v)."""
    u = exp(smallest(v, like(v, 0.0) - v))
    return where_greater(v, like(v, 0.0), like(v, 1.0), u) / (like(v, 1.0) + u)


@inline
def silu(v):
    """v * sigmoid(v)."""
    return v * sigmoid(v)


@inline
def silu_and_slope(v):
    """(silu(v), its derivative s (1 + v (1 - s)) with s = sigmoid(v))."""
    s = sigmoid(v)
    out = v * s
    return out, fma(out, like(v, 1.0) - s, s)


# Taylor's series to the term that no longer counts for |r| <= pi / 4, in r^2.
_SIN = {
    bits: tuple((-1) ** i / math.factorial(2 * i + 1) for i in range(terms))
    for bits, terms in ((32, 5), (64, 9))
}
_COS = {
    bits: tuple((-1) ** i / math.factorial(2 * i) for i in range(terms))
    for bits, terms in ((32, 6), (64, 10))
}
_sin_ratio, _cos_series = polynomial(_SIN), polynomial(_COS)
# pi / 2 and 2 pi in two parts.
_QUARTER, _QUARTER_LOW = (
    {32: 1.5707963705062866, 64: math.pi / 2},
    {
        32: -4.371139000186241e-08,
        64: 6.123233995736766e-17,
    },
)
_quarter, _quarter_low = constant(_QUARTER), constant(_QUARTER_LOW)
_turn = constant({bits: 4 * part for bits, part in _QUARTER.items()})
_turn_low = constant({bits: 4 * part for bits, part in _QUARTER_LOW.items()})


@inline
def whole(x):
    """x rounded to the nearest whole number, for |x| < 2^22 (float64: 2^51)."""
    return (x + _magic(x)) - _magic(x)


@inline
def within_a_turn(angle, rest):
    """(angle, rest) with angle + rest the same but for whole turns, and |angle| <= pi or so."""
    turns = whole(angle * like(angle, 1 / (2 * math.pi)))
    zero = like(angle, 0.0)
    return fma(zero - turns, _turn(angle), angle), fma(zero - turns, _turn_low(angle), rest)


@inline
def cos_and_sin(angle):
    """(cos, sin) of an angle of at most a turn either way, within 2 ulp of 1."""
    k = whole(angle * like(angle, 2 / math.pi))
    zero = like(angle, 0.0)
    r = fma(zero - k, _quarter_low(angle), fma(zero - k, _quarter(angle), angle))
    square = r * r
    s, c = _sin_ratio(square) * r, _cos_series(square)
    # Quarters of a turn: 0; 1 and 3; 2.
    k = k - like(angle, 4.0) * whole(k * like(angle, 0.25))
    odd, half = k * k, like(angle, 1.5)
    some = like(angle, 0.5)
    cos = where_greater(odd, some, where_greater(odd, half, zero - c, zero - k * s), c)
    sin = where_greater(odd, some, where_greater(odd, half, zero - s, k * c), s)
    return cos, sin
