"""The learning rate as a pure function of the step, so that a resumed run needs no memory of it."""

import math


def lr_factor(
    step: int,
    total: int | None,
    *,
    schedule: str = "cosine",
    warmup: int = 0,
    min_ratio: float = 0.0,
    decay_fraction: float = 0.2,
) -> float:
    """The factor on the peak learning rate at `step`, in (0, 1].

    Both schedules rise linearly, f(s) = (s + 1) / warmup, reach 1 at step warmup - 1 and end on
    min_ratio at step total - 1. "cosine" falls along half a cosine from there on; "wsd" (warm-up,
    stable, decay) stays at 1 and falls linearly over the last `decay_fraction` of all steps.

    Args:
        step: 0-based step, 0 <= step < total.
        total: number of steps of the run; None while it is not known yet, then nothing decays.
        schedule: "cosine" or "wsd".
        warmup: steps of warm-up, >= 0.
        min_ratio: factor at the last step, 0 to 1.
        decay_fraction: share of the steps in which "wsd" decays, 0 to 1.

    Source: Loshchilov & Hutter 2017 (arXiv 1608.03983); Hu et al. 2024 (arXiv 2404.06395).
    """
    if step < warmup:
        return (step + 1) / warmup
    if total is None:
        return 1.0
    start = warmup if schedule == "cosine" else max(warmup, total - round(decay_fraction * total))
    # From 0 at the last step before the decay to 1 at the last step of all.
    progress = min(1.0, (step + 1 - start) / max(1, total - start))
    if progress <= 0.0:
        return 1.0
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return min_ratio + (1.0 - min_ratio) * shape
