"""One decoding step of a whole model as one launch: a CUDA graph of a handful of kernels a layer.

Decoding reads every weight once for one token. What costs time besides is the distance of two
kernels, so there must be few, and launching them, so a graph does that. The plan puts together what
a model says in single stages:

    norm -> linear                   one kernel: every program normalises the row again
    conv -> linear -> linear, scan   two: the first product's sums over blocks of channels go to the
                                     scan, which adds them up and makes dt from them
    ssd -> gated_norm -> linear      two: the gate belongs to the ssd, the norm to the product

Of many rows, or in large models, what would be done again too often is a kernel of its own: norms,
and the first product behind the convolution.

To that end a norm or a product waits in `_later` until something reads it, and becomes part of
that, or is launched by itself. How the launches run is said in launched_plan.py.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mambapy.ops.gpu import step_kernel as kernel
from mambapy.ops.gpu import step_tiles as tiles
from mambapy.ops.gpu.launched_plan import Launch, LaunchedPlan
from mambapy.ops.step_plan import Rows, Weights

# Whether a kernel starts while the one before it still runs, where the card can do that.
OVERLAP = True


class _Norm(NamedTuple):
    """A norm that waits for its reader."""

    x: Rows
    weight: Tensor | None
    eps: float
    groups: int = 1
    z: Rows | None = None

    def reads(self) -> list[Rows]:
        """Whose numbers it needs."""
        return [self.x] if self.z is None else [self.x, self.z]


class _Linear(NamedTuple):
    """A product that waits for its reader, of x or of its norm."""

    x: Rows
    weights: Weights
    norm: _Norm | None

    def reads(self) -> list[Rows]:
        """Whose numbers it needs."""
        return [self.x] if self.norm is None else self.norm.reads()


class GpuPlan(LaunchedPlan):
    """The stages of one step; it calculates in float32, and keeps the states."""

    def __init__(self, batch: int, device: torch.device) -> None:
        super().__init__(batch, device)
        self.kernels = 0
        self._later: dict[Rows, _Norm | _Linear] = {}
        # What became part of its reader, and is nowhere to be read again.
        self._swallowed: set[Rows] = set()
        # What the model's layers hand to each other: the dtype of norms.
        self._between = torch.float32
        self._overlap = (
            OVERLAP and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        )

    def embed(self, table: Weights, name: str) -> Rows:
        """Rows of a table by tokens (b,), which `run` is given, into the room `name`."""
        count, d = table.weight.shape
        self._tokens.append(torch.zeros(self.batch, dtype=torch.int64, device=self.device))
        y = self.rows(name, d)
        self._launch(
            kernel._embed, (self.batch,),
            tokens=self._tokens[-1], table=self._readable(table.weight),
            scale=self._readable(table.scale), y=y, pitch=y.pitch, count=count, D=d,
            BLOCK=tiles.power(d), num_warps=8,
        )  # fmt: skip
        return y

    def norm(self, x: Rows, weight: Tensor | None, eps: float, name: str = "norm") -> Rows:
        """RMSNorm of each row, into the room `name`; without a weight, of scale one."""
        y = self.rows(name, x.width)
        if weight is not None:
            self._between = weight.dtype
        return self._postpone(y, _Norm(x, weight, eps))

    def linear(
        self, x: Rows, weights: Weights, name: str = "", *, add_to: Rows | None = None
    ) -> Rows:
        """A product, into the room `name` or added to the rows `add_to`."""
        norm = self._later.get(x)
        # Of many rows every program would normalise all.
        few = self.batch <= tiles.MATVEC_ROWS
        if few and isinstance(norm, _Norm) and norm.groups == 1 and norm.z is None:
            self._swallow(x)
        else:
            norm = None
        stage = _Linear(x, weights, norm)
        if add_to is None:
            return self._postpone(self.rows(name, weights.weight.shape[0]), stage)
        self._ready(*stage.reads())
        self._overwrite(add_to)
        self._launch_linear(stage, add_to, add=True)
        return add_to

    def conv(self, x: Rows, weight: Tensor, bias: Tensor | None, silu: bool) -> Rows:
        """`ops.causal_conv1d_step` with a weight of e rows of k numbers; has a state."""
        e, k = x.width, weight.shape[-1]
        y = self.rows("conv", e)
        self._ready(x)
        self._overwrite(y)
        E, R, warps = tiles.conv(e, self.batch)
        self._launch(
            kernel._conv, (-(-e // E), -(-self.batch // R)),
            x=x, x_pitch=x.pitch, state=self._state(k - 1, e), weight=self._readable(weight),
            bias=self._readable(bias), y=y, y_pitch=y.pitch, proj=None, scale=None, parts=None,
            rows=self.batch, e=e, TAPS=k, SILU=silu, OUT=1, P=1, E=E, R=R,
            num_warps=warps,
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
        args = self._selective(x, dt, B, C) if dt_bias is None else None
        if args is None:
            self._ready(dt, B, C)
            args = {
                "dt": dt, "dt_pitch": dt.pitch, "dt_weight": None, "dt_bias": dt_bias, "B": B,
                "C": C, "bc_pitch": B.pitch, "distance": 0, "RANK": 1, "PARTS": 1, "NORM": False,
            }  # fmt: skip
            for name in ("dt", "b", "c"):
                args |= {f"{name}_norm": None, f"{name}_eps": 0.0}
        args["dt_bias"] = self._readable(args["dt_bias"])
        self._ready(x, z)
        self._overwrite(y)
        E, R, warps = tiles.scan(e, self.batch)
        self._launch(
            kernel._scan, (-(-e // E), -(-self.batch // R)),
            x=x, x_pitch=x.pitch, A=self._readable(A), D=self._readable(D), z=z,
            z_pitch=0 if z is None else z.pitch, state=self._state(e, n), y=y, y_pitch=y.pitch,
            rows=self.batch, e=e, STATES=n, S=tiles.power(n),
            W=tiles.power(args["RANK"]) if R == 1 else tiles.summed(args["RANK"]),
            SOFTPLUS=dt_softplus, IS_LOG=A_is_log, E=E, R=R, G=8 if R == 1 else 1,
            IN=self._factors(), num_warps=warps, **args,
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
        n, h = B.width // n_groups, x.width // d_head
        y = self.rows("scan", x.width)
        self._ready(x, dt, B, C)
        self._overwrite(y)
        E, warps = tiles.ssd(d_head, self.batch)
        self._launch(
            kernel._ssd, (-(-d_head // E), h, self.batch),
            x=x, x_pitch=x.pitch, dt=dt, dt_pitch=dt.pitch, dt_bias=self._readable(dt_bias),
            A_log=self._readable(A_log), B=B, C=C, bc_pitch=B.pitch, D=self._readable(D), z=None,
            z_pitch=0, state=self._state(h, d_head, n), y=y, y_pitch=y.pitch,
            low=float(dt_limit[0]), high=float(dt_limit[1]), heads=h, heads_of_group=h // n_groups,
            STATES=n, S=tiles.power(n), HEAD=d_head, BY_CHANNEL=D.dim() == 2, E=E, num_warps=warps,
        )  # fmt: skip
        return y

    def gated_norm(self, x: Rows, z: Rows, weight: Tensor, n_groups: int, eps: float) -> Rows:
        """`ops.gated_rms_norm` of each row."""
        y = self.rows("gated", x.width)
        self._between = weight.dtype
        last = self._launches[-1] if self._launches else None
        if last is None or last.kernel is not kernel._ssd or last.args["y"] != x:
            return self._postpone(y, _Norm(x, weight, eps, n_groups, z))
        self._ready(z)
        last.args.update(z=z, z_pitch=z.pitch)
        return self._postpone(y, _Norm(x, weight, eps, n_groups))

    def _selective(self, x: Rows, dt: Rows, B: Rows, C: Rows) -> dict[str, Any] | None:
        """What a scan takes if it makes dt itself and adds up what the convolution found.

        None unless dt is a product of a piece, and B and C are pieces, perhaps normalised, of one
        product of x, which the convolution has just made.
        """
        up = self._later.get(dt)
        if not isinstance(up, _Linear) or up.weights.scale is not None:
            return None
        waiting = [up.norm or self._later.get(up.x), self._later.get(B), self._later.get(C)]
        norms = [N for N in waiting if isinstance(N, _Norm) and N.groups == 1 and N.z is None]
        if len(norms) not in (0, 3):
            return None
        sources = [N.x for N in norms] or [up.x, B, C]
        whole, product = next(
            ((y, P) for y, P in self._later.items() if all(_within(rows, y) for rows in sources)),
            (x, None),
        )
        if not isinstance(product, _Linear) or product.norm or product.weights.bias is not None:
            return None
        last = self._launches[-1]
        if product.x != x or last.kernel is not kernel._conv or last.args["y"] != x:
            return None
        self._swallow(whole)
        out, inner = product.weights.weight.shape
        if tiles.apart(out, inner, self.batch):
            blocks = tiles.parts(inner, self.batch)
            parts = self.rows("parts", blocks * out)
            self._launch_linear(product, Rows(parts.start, out, out), parts=blocks)
        else:
            blocks = last.grid[0]
            parts = self.rows("parts", blocks * out)
            last.args.update(
                proj=self._readable(product.weights.weight), parts=parts, OUT=out,
                P=tiles.power(out), scale=self._readable(product.weights.scale),
            )  # fmt: skip
        places = [Rows(parts.start + rows.start - whole.start, out, 1) for rows in sources]
        args: dict[str, Any] = dict(zip(("dt", "B", "C"), places, strict=True))
        for name, N in zip(("dt", "b", "c"), norms or (None, None, None), strict=True):
            args[f"{name}_norm"] = self._readable(N.weight) if N else None
            args[f"{name}_eps"] = N.eps if N else 0.0
        for rows in (dt, *((B, C) if norms else ()), *((up.x,) if norms and not up.norm else ())):
            self._swallow(rows)
        return args | {
            "dt_pitch": out, "bc_pitch": out, "distance": self.batch * out, "PARTS": blocks,
            "dt_weight": self._readable(up.weights.weight), "dt_bias": up.weights.bias,
            "RANK": up.x.width, "NORM": bool(norms),
        }  # fmt: skip

    def _launch_linear(self, stage: _Linear, y: Rows, *, add: bool = False, parts: int = 1) -> None:
        """Launch a product; of many rows perhaps in parts, each over a share of the inputs."""
        (weight, bias, scale), norm = stage.weights, stage.norm
        (x,) = stage.reads()
        out, inner = weight.shape
        args: dict[str, Any] = {
            "x": x, "x_pitch": x.pitch, "w": self._readable(weight), "bias": self._readable(bias),
            "scale": self._readable(scale), "y": y, "y_pitch": y.pitch, "out": out,
            "rows": self.batch, "INNER": inner, "ADD": add,
        }  # fmt: skip
        if self.batch <= tiles.MATVEC_ROWS:
            J, K, ahead, warps = tiles.matvec(out, inner, self.batch)
            args |= {
                "B": tiles.power(self.batch), "N": warps, "J": J, "K": K, "AHEAD": ahead,
                "norm": self._readable(norm.weight) if norm else None,
                "eps": norm.eps if norm else 0.0, "NORM": norm is not None, "num_warps": warps,
            }  # fmt: skip
            self._launch(kernel._matvec, (-(-out // (warps * J)),), **args)
            return
        N, B, K, warps, deep = tiles.matmul(out, inner, self.batch, self._between)
        if self._between.itemsize == 2 and x in self._places.values():
            # It is rounded to that in any case: half the bytes.
            self._narrow[x.start] = self._between
        args |= {"B": B, "N": N, "K": K, "PART": -(-inner // parts), "IN": self._factors()}
        args |= {"num_warps": warps, "num_stages": deep}
        self._launch(kernel._matmul, (-(-out // N), -(-self.batch // B), parts), **args)

    def _launch_norm(self, stage: _Norm, y: Rows) -> None:
        """Launch a norm by itself."""
        x, weight, eps, groups, z = stage
        width = x.width // groups
        self._launch(
            kernel._norm, (self.batch, groups),
            x=x, x_pitch=x.pitch, z=z, z_pitch=0 if z is None else z.pitch,
            weight=self._readable(weight), eps=eps, y=y, y_pitch=y.pitch, WIDTH=width,
            BLOCK=tiles.power(width),
        )  # fmt: skip

    def _launch(self, what: Any, grid: tuple[int, ...], **args: Any) -> None:
        """Append a launch; it writes what is called y."""
        self._swallowed.discard(args["y"])
        # The first kernel has none before it.
        overlap = self._overlap and bool(self._launches)
        args |= {"PDL": self._overlap, **({"launch_pdl": True} if overlap else {})}
        self._launches.append(Launch(what, grid, args))
        self.kernels += 1

    def _overwrite(self, y: Rows) -> None:
        """Launch what waits to read what is in y now."""
        for rows, stage in list(self._later.items()):
            if any(_within(read, y) for read in stage.reads()):
                self._now(rows)

    def _postpone(self, y: Rows, stage: _Norm | _Linear) -> Rows:
        """Leave a stage to its reader."""
        self._overwrite(y)
        self._swallowed.discard(y)
        # At the end of the order.
        self._later.pop(y, None)
        self._later[y] = stage
        return y

    def _swallow(self, rows: Rows) -> None:
        """A waiting stage has become part of another."""
        del self._later[rows]
        self._swallowed.add(rows)

    def _ready(self, *read: Rows | None) -> None:
        """Launch what waits to write these rows."""
        for rows in read:
            if rows is None:
                continue
            if any(_within(rows, gone) for gone in self._swallowed):
                raise RuntimeError("a stage is read twice, of which no result is kept")
            for y in [y for y in self._later if _within(rows, y)]:
                self._now(y)

    def _now(self, y: Rows) -> None:
        """Launch what waits, up to the stage that writes y."""
        while y in self._later:
            first = next(iter(self._later))
            stage = self._later.pop(first)
            if isinstance(stage, _Norm):
                self._launch_norm(stage, first)
            else:
                self._launch_linear(stage, first)

    def _complete(self) -> None:
        """Append what still waits."""
        for y in list(self._later):
            self._now(y)

    def _factors(self) -> Any:
        """What tensor cores multiply: what the model's layers hand to each other."""
        # Triton's interpreter has no products of bfloat16.
        numbers = self._between if self.device.type == "cuda" else torch.float32
        return getattr(tl, str(numbers).removeprefix("torch."))


def _within(rows: Rows, y: Rows) -> bool:
    """Whether `rows` are columns of the room that y fills."""
    return y.start <= rows.start < y.start + y.pitch
