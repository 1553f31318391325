"""What is measured on an NVIDIA GPU: larger cases, in bfloat16 as such cards are used."""

from typing import Any

from mambapy.bench.cases import GIB, Case

# More than any contestant needs but those that hold (b, l, e, n) many times over.
_LIMIT = 60 * GIB
# A GPU's clock varies little, and to start a process takes longer than to measure a case.
_SHORT: dict[str, Any] = {"fresh": False, "budget_s": 0.5, "patience_s": 60.0}


def _case(kind: str, sizes: dict[str, int], contestants: tuple[str, ...], **options: Any) -> Case:
    """A case with what all of them have."""
    common: dict[str, Any] = {"dtype": "bfloat16", "memory_limit": _LIMIT, "on_gpu": True}
    return Case(kind=kind, sizes=sizes, contestants=contestants, **common | options)


def _scan(b: int, l: int, e: int, n: int, *sweeps: str) -> Case:
    """A scan with all that belongs to it: skip, gate, bias and softplus."""
    sizes = {"batch": b, "length": l, "d_inner": e, "d_state": n, "fused": 1}
    contestants = ("auto", "deterministic", "chunked", "pscan", "official", "mamba.py")
    return _case("scan", sizes, contestants, **_SHORT, sweeps=sweeps)


def _block(b: int, l: int, d: int, *sweeps: str, n: int = 16) -> Case:
    """One block of Mamba-1."""
    sizes = {"batch": b, "length": l, "d_model": d, "d_state": n}
    contestants = ("floor", "mambapy", "chunked", "official", "mamba.py")
    return _case("block", sizes, contestants, **_SHORT, sweeps=sweeps)


def _train(b: int, l: int, d: int, layers: int, vocab_size: int) -> Case:
    """A training step under autocast."""
    sizes = {"batch": b, "length": l, "d_model": d, "d_state": 16, "n_layers": layers}
    ours = ("mambapy", "mambapy conv", "mambapy scan", "mambapy block", "mambapy eager")
    return _case(
        "train",
        sizes | {"vocab_size": vocab_size},
        ("floor", *ours, "official", "mamba.py"),
        passes=("step",),
        budget_s=5.0,
        limit_s=20.0,
        patience_s=120.0,
    )


def _decode(b: int, l: int, d: int, layers: int, tokens: int) -> Case:
    """A prompt of l tokens, and `tokens` tokens after it."""
    sizes = {"batch": b, "length": l, "d_model": d, "d_state": 16, "n_layers": layers}
    return _case(
        "decode",
        sizes | {"vocab_size": 50280, "tokens": tokens, "bandwidth_bytes": 4 * GIB},
        ("floor", "mambapy", "official", "mamba.py", "transformers"),
        passes=("prefill", "decode"),
        budget_s=4.0,
        limit_s=10.0,
        patience_s=60.0,
    )


CUDA = {
    "scan": [
        *(_scan(8, l, 1536, 16, "length") for l in (256, 1024)),
        *(_scan(b, 2048, 1536, 16, "batch") for b in (1, 2)),
        _scan(8, 2048, 768, 16, "d_inner"),
        _scan(8, 2048, 1536, 4, "d_state"),
        _scan(8, 2048, 1536, 16, "length", "batch", "d_inner", "d_state"),
        _scan(64, 512, 1536, 16),
        _scan(1, 32768, 1536, 16),
        _scan(8, 2048, 1536, 64, "d_state"),
        _scan(8, 2048, 5120, 16, "d_inner"),
        _scan(8, 8192, 1536, 16, "length"),
        _scan(32, 2048, 1536, 16, "batch"),
        _scan(8, 2048, 1536, 256, "d_state"),
    ],
    "block": [
        *(_block(8, l, 768, "length") for l in (256, 1024)),
        *(_block(b, 2048, 768, "batch") for b in (1, 2)),
        _block(8, 2048, 256, "d_model"),
        _block(8, 2048, 768, "length", "batch", "d_model", "d_state"),
        _block(8, 4096, 768),
        *(_block(8, 2048, 768, "d_state", n=n) for n in (64, 256)),
        _block(8, 2048, 2560, "d_model"),
        _block(8, 8192, 768, "length"),
        _block(32, 2048, 768, "batch"),
    ],
    "train": [_train(16, 1024, 768, 24, 50280)],
    "decode": [
        _decode(1, 512, 768, 24, 64),
        _decode(64, 512, 768, 24, 64),
        _decode(1, 512, 2560, 64, 64),
    ],
}
