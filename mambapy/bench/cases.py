"""What is measured: tables of cases, in the order in which they are run.

Smaller cases come before larger ones: a contestant that was too slow is spared the larger ones.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mambapy.errors import ConfigError

KINDS = ("scan", "block", "heads", "experts", "vision", "train", "decode")
GIB = 1 << 30
_LETTERS = {
    "batch": "b",
    "length": "l",
    "d_model": "d",
    "d_inner": "e",
    "d_state": "n",
    "d_head": "p",
    "d_mlp": "f",
    "n_experts": "E",
    "top_k": "k",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the results for each of its passes.

    Args:
        kind: one of `KINDS`.
        sizes: batch, length, d_model or d_inner, d_state, n_layers, vocab_size, tokens; of experts
            d_mlp, n_experts, top_k.
        contestants: names, keys of `rivals.WHO`.
        passes: "forward" and "training", or what the kind has instead.
        sweeps: the curves of the plots that this case is a point of.
        fresh: whether each contestant has a new process for it.
        on_gpu: whether it is for a GPU.
        budget_s: seconds for the rounds of each contestant.
        least_s: seconds that a run takes at least; less work is repeated to fill them.
        limit_s: a first run longer than this is the only one.
        patience_s: a run longer than this is broken off, and not begun where a smaller case took as
            long.
        memory_limit: bytes; a contestant that is expected to need more is left out.
        dtype: "float32", or "bfloat16" for activations, and for weights where none are trained.
    """

    kind: str
    sizes: Mapping[str, int]
    contestants: tuple[str, ...]
    passes: tuple[str, ...] = ("forward", "training")
    sweeps: tuple[str, ...] = ()
    fresh: bool = True
    on_gpu: bool = False
    budget_s: float = 1.0
    least_s: float = 0.05
    limit_s: float = 3.0
    patience_s: float = 30.0
    memory_limit: int = 10 * GIB
    dtype: str = "float32"

    @property
    def metered(self) -> bool:
        """Whether memory is measured: of a process on a CPU, if it is new; of a GPU, always."""
        return self.fresh or self.on_gpu

    @property
    def name(self) -> str:
        """Kind and sizes, for instance block-b1-l1024-d768-n16; `--cases` is matched with it."""
        shown = (f"{_LETTERS[key]}{size}" for key, size in self.sizes.items() if key in _LETTERS)
        short = [] if self.dtype == "float32" else ["bf16"]
        return "-".join([self.kind, *shown, *short])


def select(
    kind: str,
    pattern: str | None = None,
    contestants: str | None = None,
    *,
    quick: bool = False,
    device: str = "cpu",
) -> list[Case]:
    """The cases of a kind.

    Args:
        kind: one of `KINDS`.
        pattern: only those whose name has it in it; * and ? stand for any characters.
        contestants: only those, names with commas between them.
        quick: the tiny cases instead.
        device: "cpu", or "cuda", which has larger ones.

    Raises:
        ConfigError: no case's name has the pattern in it, or there is no such contestant.
    """
    cases = (_QUICK if quick else _full(device))[kind]
    if contestants is not None:
        known = [*dict.fromkeys(name for case in cases for name in case.contestants)]
        wanted = [name.strip() for name in contestants.split(",")]
        if unknown := [name for name in wanted if name not in known]:
            raise ConfigError(
                f"--contestants {unknown[0]!r} is not in `bench {kind}`: {', '.join(known)}"
            )
        cases = [
            replace(case, contestants=tuple(n for n in case.contestants if n in wanted))
            for case in cases
        ]
    if pattern is None:
        return cases
    found = [case for case in cases if fnmatch.fnmatchcase(case.name, f"*{pattern}*")]
    if not found:
        names = ", ".join(case.name for case in cases[:3])
        raise ConfigError(f"--cases {pattern!r} fits no case of `bench {kind}`: {names}, ...")
    return found


def _full(device: str) -> dict[str, list[Case]]:
    """The cases of every kind."""
    if device != "cuda":
        return _FULL
    from mambapy.bench.cases_cuda import CUDA

    return _FULL | CUDA


def _scan(b: int, l: int, e: int, n: int, **options: Any) -> Case:
    """One scan."""
    sizes = {"batch": b, "length": l, "d_inner": e, "d_state": n}
    backends = ("auto", "cpu", "chunked", "pscan", "reference")
    rivals = ("mamba.py",) if options.get("sweeps") else ()
    return Case(
        kind="scan",
        sizes=sizes,
        contestants=(*backends, *rivals),
        **{"limit_s": 1.5} | options,
    )


def _block(l: int, d: int, n: int, **options: Any) -> Case:
    """One block, batch 1."""
    sizes = {"batch": 1, "length": l, "d_model": d, "d_state": n}
    contestants = ("floor", "mambapy", "chunked", "mamba.py", "transformers")
    return Case(kind="block", sizes=sizes, contestants=contestants, **options)


def _heads(case: Case) -> Case:
    """The same shape for Mamba-2 and Mamba-3, with 128 states and heads of 64 channels."""
    return replace(
        case,
        kind="heads",
        sizes={**case.sizes, "d_state": 128, "d_head": 64},
        contestants=("floor", "mamba2", "mamba3", "transformers mamba2"),
        sweeps=(),
    )


def _experts(l: int, d: int, f: int, **options: Any) -> Case:
    """16 gated MLPs of inner width f, of which each token goes through 2; batch 1."""
    sizes = {"batch": 1, "length": l, "d_model": d, "d_mlp": f, "n_experts": 16, "top_k": 2}
    return Case(
        kind="experts",
        sizes=sizes,
        contestants=("floor", "mambapy", "dense", "transformers loop", "transformers grouped"),
        **options,
    )


def _vision(b: int, image: int, d: int, layers: int, **options: Any) -> Case:
    """A Vision Mamba on images of patches of 16 x 16."""
    sizes = {"batch": b, "length": (image // 16) ** 2 + 1, "d_model": d, "d_state": 16}
    return Case(
        kind="vision",
        sizes=sizes | {"n_layers": layers, "image": image, "patch": 16},
        contestants=("floor", "mambapy", "chunked", "vit"),
        **{"budget_s": 12.0, "limit_s": 20.0, "patience_s": 60.0} | options,
    )


def _train(b: int, l: int, d: int, layers: int, vocab_size: int, **options: Any) -> Case:
    """A training step of a language model."""
    sizes = {"batch": b, "length": l, "d_model": d, "d_state": 16}
    return Case(
        kind="train",
        sizes=sizes | {"n_layers": layers, "vocab_size": vocab_size},
        contestants=("floor", "mambapy", "mamba.py", "transformers"),
        passes=("step",),
        **{"budget_s": 10.0, "limit_s": 20.0, "patience_s": 60.0} | options,
    )


def _decode(
    l: int, d: int, layers: int, vocab_size: int, tokens: int, read: int = GIB, **options: Any
) -> Case:
    """A prompt of l tokens, and `tokens` tokens after it; `read` bytes to measure the bandwidth."""
    sizes = {"batch": 1, "length": l, "d_model": d, "d_state": 16, "n_layers": layers}
    ours = ("mambapy float32", "mambapy bfloat16", "mambapy int8")
    return Case(
        kind="decode",
        sizes=sizes | {"vocab_size": vocab_size, "tokens": tokens, "bandwidth_bytes": read},
        contestants=("floor", *ours, "mamba.py", "transformers"),
        passes=("prefill", "decode"),
        **{"budget_s": 6.0, "limit_s": 10.0, "patience_s": 60.0} | options,
    )


def _scan_cases() -> list[Case]:
    """Sweeps over length and d_state, and a grid of ordinary shapes where auto must not lose."""
    sweeps = [_scan(1, l, 1536, 16, sweeps=("length",)) for l in (64, 256)]
    sweeps.append(_scan(1, 1024, 1536, 4, sweeps=("d_state",)))
    sweeps.append(_scan(1, 1024, 1536, 16, sweeps=("length", "d_state")))
    sweeps += [_scan(1, l, 1536, 16, sweeps=("length",)) for l in (4096, 8192)]
    sweeps += [_scan(1, 1024, 1536, n, sweeps=("d_state",)) for n in (64, 256)]
    grid = [
        _scan(b, l, 64, n, fresh=False, budget_s=0.3, patience_s=20.0, memory_limit=4 * GIB)
        for l in (1, 8, 64, 512, 4096)
        for b in (1, 16, 128)
        for n in (16, 64)
    ]
    return sweeps + grid


def _block_cases() -> list[Case]:
    """Sweeps over length, d_model and d_state through d_model 768, length 1024, d_state 16."""
    widths = [_block(1024, d, 16, sweeps=("d_model",)) for d in (128, 256, 512)]
    lengths = [_block(l, 768, 16, sweeps=("length",)) for l in (64, 256)]
    middle = _block(1024, 768, 16, sweeps=("length", "d_model", "d_state"), patience_s=150.0)
    states = [_block(1024, 768, n, sweeps=("d_state",)) for n in (32, 64, 128, 256)]
    larger = [_block(1024, d, 16, sweeps=("d_model",)) for d in (1024, 1536)]
    longer = [_block(4096, 768, 16, sweeps=("length",))]
    return [*lengths, *widths, middle, *states, *larger, *longer]


_FULL = {
    "scan": _scan_cases(),
    "block": _block_cases(),
    "train": [_train(16, 256, 256, 6, 257)],
    "heads": [
        *(_heads(_block(l, 768, 128, patience_s=90.0)) for l in (1024, 4096)),
        _heads(_decode(512, 768, 24, 50277, 64)),
    ],
    "decode": [_decode(512, 768, 24, 50277, 64)],
    "vision": [_vision(8, 224, 192, 24)],
    # One token goes in alone, as decoding does.
    "experts": [
        _experts(1, 512, 1024, passes=("forward",), budget_s=2.0),
        _experts(2048, 512, 1024, budget_s=8.0),
    ],
}

_TINY: dict[str, Any] = {"fresh": False, "budget_s": 0.0, "least_s": 0.005}
_QUICK = {
    "scan": [_scan(1, l, 64, 16, sweeps=("length",), **_TINY) for l in (16, 64)],
    "block": [_block(l, 64, 16, sweeps=("length",), **_TINY) for l in (16, 64)],
    "heads": [
        _heads(_block(64, 64, 128, **_TINY)),
        _heads(_decode(16, 64, 2, 257, 4, 1 << 24, **_TINY)),
    ],
    "train": [_train(2, 16, 64, 2, 257, **_TINY)],
    "decode": [_decode(16, 64, 2, 257, 4, 1 << 24, **_TINY)],
    "experts": [_experts(1, 64, 128, passes=("forward",), **_TINY), _experts(64, 64, 128, **_TINY)],
    "vision": [_vision(1, 32, 64, 2, **_TINY)],
}
