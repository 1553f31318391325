"""The references of mambapy.ops, with the arguments in the order in which these tests have them."""

from mambapy.ops import reference


def selective_scan(x, dt, A, B, C, D=None, z=None, *, softplus=True, **options):
    return reference.selective_scan(x, dt, A, B, C, D, z, dt_softplus=softplus, **options)


def causal_conv1d(x, weight, bias=None, state=None, seq_idx=None, silu=True):
    activation = "silu" if silu else None
    return reference.causal_conv1d(
        x, weight, bias, activation=activation, state=state, seq_idx=seq_idx
    )


def rms_norm(x, weight, residual=None, eps=1e-5):
    total = x if residual is None else x + residual
    return reference.rms_norm(total, weight, eps), None if residual is None else total
