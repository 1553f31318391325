"""The choice of the next token as one launch, right where the next step reads it.

A choice is a dozen small operators, and each takes as long to launch as a part of the step. So they
are recorded, as they are: the graph calls the same kernels, and finds the same token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mambapy.ops.gpu.record import recorded
from mambapy.ops.step_plan import Choice

# Recording takes as long as some dozen launches, which a short text does not win back. What is run
# before compiles what needs compiling.
FIRST = 8


class Chooser:
    """Chooses tokens one after the other, always in one way.

    Args:
        place: (b,) int64, where a step reads its token; the chosen one is written there.
        step: the graph that makes the logits, where there is one.
    """

    def __init__(self, place: Tensor, step: torch.cuda.CUDAGraph | None) -> None:
        self._place, self._step, self._times, self._room = place, step, 0, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self, n: int, noise: Tensor | None) -> None:
        """Prepare for the next n tokens, and noise (n, b) for them."""
        if n > self._room:
            self._make_room(n, noise is not None)
        self._at.zero_()
        if noise is not None and self._noise is not None:
            self._noise[:n].copy_(noise)

    def go(self, choice: Choice, logits: Callable[[], Tensor]) -> None:
        """Choose one; it goes to `tokens` too, after those since `begin`."""
        self._times += 1
        if self._times > FIRST and self._graph is None and self._step is not None:
            graph = torch.cuda.CUDAGraph()
            with recorded(graph, torch.cuda.Stream(), self._step.pool()):
                self._choose(choice, logits())
            self._graph = graph
        if self._graph is None:
            self._choose(choice, logits())
        else:
            self._graph.replay()

    def _make_room(self, n: int, noisy: bool) -> None:
        """Room for n tokens; a graph knows the old one."""
        b, device = len(self._place), self._place.device
        self._graph, self._room = None, n
        # Used again outside of inference mode.
        with torch.inference_mode(False):
            self._at = torch.zeros(1, dtype=torch.int64, device=device)
            self.tokens = torch.zeros(n, b, dtype=torch.int64, device=device)
            self._noise = torch.zeros(n, b, device=device) if noisy else None

    def _choose(self, choice: Choice, logits: Tensor) -> None:
        """What is recorded."""
        noise = None if self._noise is None else self._noise.index_select(0, self._at)[0]
        token = choice(logits, noise, self._place)
        self._place.copy_(token)
        self.tokens.index_copy_(0, self._at, token[None])
        self._at.add_(1)
