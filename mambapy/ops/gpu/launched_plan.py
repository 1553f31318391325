"""Launches one after the other, on a GPU recorded as one CUDA graph.

What a plan has is here: the states, which live in it and are changed in place; the graph; streams,
which take turns. What is launched, step.py says.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambapy.ops.gpu.choose import Chooser
from mambapy.ops.gpu.record import recorded
from mambapy.ops.step_plan import Choice, KeepingPlan, Rows

# How many ways to choose a token a plan keeps recorded.
MOST_CHOOSERS = 4


class Launch(NamedTuple):
    """A kernel, its grid, and its arguments by name; rows stand for where they will be."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]


class LaunchedPlan(KeepingPlan):
    """Kernels in an order, and the memory that they work on."""

    def __init__(self, batch: int, device: torch.device) -> None:
        super().__init__(batch, torch.float32, device)
        self._launches: list[Launch] = []
        self._states: list[Tensor] = []
        self._tokens: list[Tensor] = []
        # Weights that cannot be read where they are are copied at each step.
        self._copies: list[tuple[Tensor, Tensor]] = []
        # Activations that are kept in 16 bits, by where they start.
        self._narrow: dict[int, torch.dtype] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done: torch.cuda.Event | None = None
        self._choosers: dict[Choice, Chooser] = {}

    @abstractmethod
    def _complete(self) -> None:
        """Append what still waits to be launched."""

    def load(self, states: list[Tensor]) -> None:
        """Take over states, in the order of the stages that have one; they are not changed."""
        with self._here():
            self._finish()
            self._wait()
            if states:
                torch._foreach_copy_(self._states, states)
            self.release()

    def advance(self, inputs: list[Tensor]) -> None:
        """Run every stage, from the states that the last one left."""
        places = [*self._tokens, *map(self._view, self._inputs)]
        with self._here():
            self._wait()
            for place, x in zip(places, inputs, strict=True):
                place.copy_(x)
            self._step()
            self.release()

    @property
    def chooses(self) -> bool:
        """Whether tokens are all it takes."""
        return len(self._tokens) == 1 and not self._inputs

    def choose(
        self,
        token: Tensor,
        n: int,
        choice: Choice,
        noise: Tensor | None,
        logits: Callable[[], Tensor],
    ) -> Tensor:
        """Run every stage n times, and choose a token after each; see `Chooser`."""
        (place,) = self._tokens
        with self._here():
            self._wait()
            place.copy_(token)
            # The last used is the last.
            chooser = self._choosers.pop(choice, None) or Chooser(place, self._graph)
            self._choosers[choice] = chooser
            if len(self._choosers) > MOST_CHOOSERS:
                del self._choosers[next(iter(self._choosers))]
            chooser.begin(n, noise)
            for _ in range(n):
                self._step()
                chooser.go(choice, logits)
            found = chooser.tokens[:n].clone()
            self.release()
        return found

    def _step(self) -> None:
        """Run every stage once."""
        if self._graph is None:
            self._launch_all()
        else:
            self._graph.replay()

    def states(self) -> list[Tensor]:
        """Copies of the states."""
        copies = [torch.empty_like(T) for T in self._states]
        if copies:
            with self._here():
                self._wait()
                torch._foreach_copy_(copies, self._states)
                self.release()
        return copies

    def release(self) -> None:
        """Whoever uses the plan next, on whichever stream, waits for what is on this one."""
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self.device))

    def _wait(self) -> None:
        """The last use may have been on another stream."""
        if self._done is not None:
            self._done.wait(torch.cuda.current_stream(self.device))

    def _finish(self) -> None:
        """Make the workspace and, on a GPU, the graph."""
        if self._workspace.numel():
            return
        self._complete()
        with torch.inference_mode(False):
            self._workspace = torch.zeros(self._size, device=self.device)
        if self.device.type == "cuda":
            self._capture()

    @contextmanager
    def _here(self) -> Iterator[None]:
        """On the plan's device, without gradients."""
        cuda = self.device.type == "cuda"
        with torch.no_grad(), torch.cuda.device(self.device) if cuda else nullcontext():
            yield

    def _capture(self) -> None:
        """Launch everything once, which compiles it, and once more into the graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._launch_all()
        torch.cuda.current_stream().wait_stream(side)
        self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        with recorded(self._graph, side):
            self._launch_all()
        # The graph knows addresses; a model that moves away must not be kept here.
        self._launches.clear()
        self._copies = [(copy, copy) for copy, _ in self._copies]

    def _launch_all(self) -> None:
        """Launch every kernel."""
        for copy, T in self._copies:
            copy.copy_(T)
        for what, grid, args in self._launches:
            what[grid](**{k: self._view(v) if isinstance(v, Rows) else v for k, v in args.items()})

    def _view(self, rows: Rows) -> Tensor:
        """An activation in the workspace."""
        if rows.start not in self._narrow:
            return super()._view(rows)
        narrow = self._workspace.view(self._narrow[rows.start])
        return narrow.as_strided((self.batch, rows.width), (rows.pitch, 1), 2 * rows.start)

    def _state(self, *shape: int) -> Tensor:
        """A state (b, ...) of the stage that is about to be launched."""
        self._states.append(torch.zeros(self.batch, *shape, device=self.device))
        return self._states[-1]

    def _readable(self, T: Tensor | None) -> Tensor | None:
        """The numbers of T, contiguous."""
        if T is None or T.is_contiguous():
            return None if T is None else T.detach()
        self._copies.append((torch.empty(T.shape, dtype=T.dtype, device=T.device), T.detach()))
        return self._copies[-1][0]
