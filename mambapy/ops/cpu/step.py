"""One decoding step of a whole model as one launch of one kernel, and of single ops."""

import numpy as np
import torch
from torch import Tensor

from mambapy.ops.cpu import step_kernel as kernel
from mambapy.ops.cpu.rows import CODES, FIRST_SLOT, SIZES
from mambapy.ops.cpu.simd import LANES
from mambapy.ops.cpu.threads import arithmetic, compiled, run
from mambapy.ops.step_plan import Rows, StepPlan, Weights

# Tasks are counted by stage: as many workers may come as there are threads.
MANY = 1 << 30
# Measured: with 100 kB a task, memory gave two thirds of what it gives with 500 kB.
BYTES_OF_A_TASK = 500_000


class CpuPlan(StepPlan):
    """The stages of one step; it calculates in float32 or float64."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        super().__init__(batch, dtype, torch.device("cpu"))
        self._numbers: list[int] = []
        self._work, self._taps = 0, 1
        # Where states are in the list of numbers.
        self._states: list[int] = []
        # What the plan has made itself, and the tensors that are copied anew at each run because
        # the kernel cannot read them where they are. All others belong to the caller.
        self._made: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._args = np.empty(0, np.int64)

    def norm(self, x: Rows, weight: Tensor | None, eps: float, name: str = "norm") -> Rows:
        """RMSNorm of each row, into the room `name`; without a weight, of scale one."""
        y = self.rows(name, x.width)
        self._work += self.batch * x.width
        if weight is None:
            weight = torch.ones(x.width, dtype=self.dtype)
            self._made.append(weight)
        self._made.append(torch.tensor([eps], dtype=self.dtype))
        bits = self._made[-1].data_ptr()
        self._add(kernel.NORM, self.batch, x, y, self._address(weight), 0, x.width, bits)
        return y

    def linear(
        self, x: Rows, weights: Weights, name: str = "", *, add_to: Rows | None = None
    ) -> Rows:
        """A product, into the room `name` or added to the rows `add_to`."""
        weight, bias, scale = weights
        out, inner = weight.shape
        y = self.rows(name, out) if add_to is None else add_to
        self._work += self.batch * out * inner
        readable = (weight.dtype == torch.float64) == (self.dtype == torch.float64)
        at = self._address(weight, convert=not readable)
        code = CODES[weight.dtype if readable else self.dtype]
        block = _rows_of_a_task(out, inner * weight.element_size())
        self._add(
            kernel.LINEAR, -(-out // block), x, y, at, self._address(bias), out,
            code, self._address(scale), inner, block, int(add_to is not None),
        )  # fmt: skip
        return y

    def conv(self, x: Rows, weight: Tensor, bias: Tensor | None, silu: bool) -> Rows:
        """`ops.causal_conv1d_step` with a weight of e rows of k numbers; has a state."""
        e, k = x.width, weight.shape[-1]
        y = self.rows("conv", e)
        self._work += self.batch * e * k
        self._taps = max(self._taps, k)
        self._add(
            kernel.CONV, self._channel_tasks(e), x, y, self._address(weight), self._address(bias),
            e, *self._state(), k, int(silu),
        )  # fmt: skip
        return y

    def scan(
        self,
        x: Rows,
        dt: Rows,
        A: Tensor,
        B: Rows,
        C: Rows,
        D: Tensor | None,
        z: Rows | None,
        *,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        A_is_log: bool = False,
    ) -> Rows:
        """`ops.selective_scan_step`; A may be given as log(-A); has a state."""
        e, n = x.width, B.width
        y = self.rows("scan", e)
        self._work += self.batch * e * n * 4
        gate = (-1, 0) if z is None else (z.start, z.pitch)
        self._add(
            kernel.SCAN, self._channel_tasks(e), x, y, self._address(A), self._address(dt_bias), e,
            *self._state(), dt.start, dt.pitch, B.start, C.start, B.pitch, *gate,
            self._address(D), n, int(dt_softplus), int(A_is_log),
        )  # fmt: skip
        return y

    def ssd(
        self,
        x: Rows,
        dt: Rows,
        A_log: Tensor,
        B: Rows,
        C: Rows,
        D: Tensor,
        *,
        dt_bias: Tensor,
        dt_limit: tuple[float, float],
        d_head: int,
        n_groups: int,
    ) -> Rows:
        """`ops.ssd_step` with A = -exp(A_log) and softplus; has a state."""
        e, n, h = x.width, B.width // n_groups, x.width // d_head
        y = self.rows("scan", e)
        self._work += self.batch * e * n * 4
        self._made.append(torch.tensor(dt_limit, dtype=self.dtype))
        limits = self._made[-1].data_ptr()
        self._add(
            kernel.SSD, self.batch * h, x, y, self._address(A_log), self._address(dt_bias), e,
            *self._state(), dt.start, dt.pitch, B.start, C.start, B.pitch, d_head, n_groups,
            limits, self._address(D), n, int(D.dim() == 2),
        )  # fmt: skip
        return y

    def gated_norm(self, x: Rows, z: Rows, weight: Tensor, n_groups: int, eps: float) -> Rows:
        """`ops.gated_rms_norm` of each row."""
        y = self.rows("gated", x.width)
        self._work += self.batch * x.width * 20
        self._made.append(torch.tensor([eps], dtype=self.dtype))
        bits = self._made[-1].data_ptr()
        self._add(
            kernel.GATED_NORM, self.batch * n_groups, x, y, self._address(weight), 0, x.width,
            z.start, z.pitch, n_groups, bits,
        )  # fmt: skip
        return y

    def run(self, inputs: list[Tensor], states: list[Tensor]) -> list[Tensor]:
        """Run every stage in one launch."""
        if self._args.size == 0:
            self._finish()
        for place, x in zip(self._inputs, inputs, strict=True):
            self._view(place).copy_(x)
        for copy, T in self._copies:
            copy.copy_(T)
        ready = [T.dtype == self.dtype and T.is_contiguous() for T in states]
        states = [
            T if is_ready else T.detach().to(self.dtype).contiguous()
            for T, is_ready in zip(states, ready, strict=True)
        ]
        new = [torch.empty_like(T) for T in states]
        args = self._args.copy()
        for at, *pair in zip(self._states, states, new, strict=True):
            args[at], args[at + 1] = [T.data_ptr() for T in pair]
        scratch = max((1 + self.batch) * LANES, self._taps * kernel.WIDTH) * self.dtype.itemsize
        run(compiled(kernel.build, self.dtype), args, MANY, scratch, self._work)
        return new

    def _finish(self) -> None:
        """Make the workspace, and what the kernel takes, from all stages."""
        # Vectors may be read beyond the end of the last row.
        with torch.inference_mode(False):
            self._workspace = torch.empty(self._size + 2 * LANES, dtype=self.dtype)
        stages = len(self._numbers) // kernel.FIELDS
        head = [*[0] * SIZES, stages, self._workspace.data_ptr(), self.batch]
        head += [0] * (FIRST_SLOT - len(head))
        self._args = np.array([*head, *self._numbers], dtype=np.int64)

    def _add(self, kind: int, tasks: int, x: Rows, y: Rows, *operands: int) -> None:
        """Append a stage."""
        numbers = [kind, tasks, 0, 0, x.start, x.pitch, y.start, y.pitch, *operands]
        self._numbers += numbers
        self._numbers += [0] * (kernel.FIELDS - len(numbers))

    def _state(self) -> tuple[int, int]:
        """The place of a state in the stage that is about to be added: filled in at each run."""
        self._states.append(FIRST_SLOT + len(self._numbers) + kernel.OLD)
        return 0, 0

    def _channel_tasks(self, channels: int) -> int:
        """Blocks of channels in all rows."""
        return self.batch * -(-channels // kernel.WIDTH)

    def _address(self, T: Tensor | None, *, convert: bool | None = None) -> int:
        """Where the numbers of T are, contiguous and in the plan's dtype; 0 for None."""
        if T is None:
            return 0
        T = T.detach()
        if convert is None:
            convert = T.dtype != self.dtype
        if convert or not T.is_contiguous():
            copy = torch.empty(T.shape, dtype=self.dtype if convert else T.dtype)
            self._copies.append((copy, T))
            T = copy
        return T.data_ptr()


def _rows_of_a_task(rows: int, row_bytes: int) -> int:
    """How many rows of a matrix a task takes: long streams for the prefetcher, equal shares."""
    threads = torch.get_num_threads()
    tasks = max(1, rows * row_bytes // BYTES_OF_A_TASK)
    tasks = -(-tasks // threads) * threads
    return -(-rows // tasks)


def conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: bool = False
) -> tuple[Tensor, Tensor]:
    """`conv1d.forward` for one token: x (b, e), state (b, k-1, e) -> y (b, e), new state (b, k-1,
    e)."""
    plan = CpuPlan(x.shape[0], arithmetic(x.dtype))
    y = plan.conv(plan.input("x", x.shape[1]), weight, bias, activation)
    (new,) = plan.run([x.detach()], [state])
    return plan.result(y).to(x.dtype), new.to(state.dtype)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`selective_scan.forward` for one token.

    Args:
        x, dt, z: (b, e).    B, C: (b, n).    The rest as there.

    Returns:
        y (b, e) and a new state (b, e, n); `state` is not changed.
    """
    plan = CpuPlan(x.shape[0], arithmetic(x.dtype))
    given = {"x": x, "dt": dt, "B": B, "C": C, **({} if z is None else {"z": z})}
    rows = {name: plan.input(name, T.shape[1]) for name, T in given.items()}
    y = plan.scan(
        rows["x"], rows["dt"], A, rows["B"], rows["C"], D, rows.get("z"),
        dt_bias=dt_bias, dt_softplus=dt_softplus,
    )  # fmt: skip
    (new,) = plan.run([T.detach() for T in given.values()], [state])
    return plan.result(y).to(x.dtype), new
