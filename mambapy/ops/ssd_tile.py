"""A few chunks of state-space duality: what `ssd_chunked.py` does with each of them.

Letters: b batch, c chunks, t chunks of a tile, q tokens of a chunk, i and j its rows (tokens times
r), g groups, e heads of a group, p channels of a head, n state size. States stand as (b, g, n, e,
p) here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decays:
    """What is left of tokens and states in chunks of q tokens: few numbers, made once for all.

    Args:
        cum: (b, c, g, e, q) running sums of the log decays of a chunk, float64 where that exists.
        scale: (b, c, g, e, q).
        own: (b, c, g, e, q) or None.
        into: (b, c, i, g, e, 1) exp(cum): what is left of the state before the chunk.
        left: (b, c, g, e, q) what is left of a token at the chunk's end.
        counts: (b, c, i, g, e, 1) left * scale.
        total: (b, c, g, 1, e, 1) what is left of a state after the chunk.
        earlier: (q, q) 1 where token j comes before token t, else 0.
    """

    cum: Tensor
    scale: Tensor
    own: Tensor | None
    into: Tensor
    left: Tensor
    counts: Tensor
    total: Tensor
    earlier: Tensor

    @classmethod
    def of(
        cls, log_decay: Tensor, scale: Tensor, own: Tensor | None, g: int, r: int, q: int
    ) -> "Decays":
        """From (b, l, h) each, l a multiple of q."""
        cum = _sums_in_chunks(_by_head(log_decay, g, q))
        scale = _by_head(scale, g, q).contiguous()
        left = (cum[..., -1:] - cum).clamp_(max=0.0).exp_().to(scale.dtype)

        def by_row(T: Tensor) -> Tensor:
            T = T.permute(0, 1, 4, 2, 3).contiguous()  # (b, c, q, g, e)
            return (T if r == 1 else T.repeat_interleave(r, dim=2)).unsqueeze(-1)

        return cls(
            cum,
            scale,
            None if own is None else _by_head(own, g, q).contiguous(),
            by_row(cum.exp().to(scale.dtype)),
            left,
            by_row(left * scale),
            cum[..., -1].exp().to(scale.dtype)[:, :, :, None, :, None],
            torch.ones(q, q, dtype=scale.dtype, device=scale.device).triu_(1),
        )

    def part(self, rows: slice, chunks: slice) -> "Decays":
        """Those of some rows of the batch and some chunks."""
        return Decays(
            self.cum[rows, chunks],
            self.scale[rows, chunks],
            None if self.own is None else self.own[rows, chunks],
            self.into[rows, chunks],
            self.left[rows, chunks],
            self.counts[rows, chunks],
            self.total[rows, chunks],
            self.earlier,
        )


@dataclass(frozen=True)
class Sequence:
    """The arguments of `ssd_chunked.dual`, cut into chunks on request.

    Args:
        x: (b, l, r, h, p).
        K: (b, l, r, g, n).
        Q: (b, l, r, g, n).
        D: (g, e, 1) or None.
        chunk: tokens of a chunk.
        whole: those of the whole chunks, or None.
        rest: those of the shorter chunk at the end, or None.
        fused: whether a kernel makes the matrices.
    """

    x: Tensor
    K: Tensor
    Q: Tensor
    D: Tensor | None
    chunk: int
    whole: Decays | None
    rest: Decays | None
    fused: bool

    @classmethod
    def of(
        cls,
        x: Tensor,
        log_decay: Tensor,
        scale: Tensor,
        K: Tensor,
        Q: Tensor,
        own: Tensor | None,
        D: Tensor | None,
        chunk: int,
        fused: bool,
    ) -> "Sequence":
        """From the arguments of `dual`."""
        g, r, l = K.shape[3], x.shape[2], x.shape[1]
        cut = l // chunk * chunk

        def decays(steps: slice, q: int) -> Decays | None:
            parts = (log_decay[:, steps], scale[:, steps])
            return Decays.of(*parts, None if own is None else own[:, steps], g, r, q)

        return cls(
            x,
            K,
            Q,
            None if D is None else D.view(g, -1, 1),
            chunk,
            decays(slice(0, cut), chunk) if cut else None,
            decays(slice(cut, l), l - cut) if cut < l else None,
            fused,
        )

    def tile(self, rows: slice, steps: slice) -> "Tile":
        """Some rows of the batch and some steps: whole chunks, or the shorter one at the end."""
        if self.whole is not None and steps.stop - steps.start >= self.chunk:
            chunks = slice(steps.start // self.chunk, steps.stop // self.chunk)
            decays = self.whole.part(rows, chunks)
        elif self.rest is not None:
            decays = self.rest.part(rows, slice(0, 1))
        g, q = self.K.shape[3], decays.cum.shape[-1]

        def by_row(T: Tensor) -> Tensor:
            return T[rows, steps].unflatten(1, (-1, q)).flatten(2, 3)  # (b, t, i, ...)

        X = by_row(self.x).unflatten(3, (g, -1))
        r = self.x.shape[2]
        return Tile(X, by_row(self.K), by_row(self.Q), self.D, r, decays, self.fused)


@dataclass(frozen=True)
class Tile:
    """A few chunks of a few rows of the batch.

    Args:
        X: (b, t, j, g, e, p).
        K: (b, t, j, g, n).
        Q: (b, t, i, g, n).
        D: (g, e, 1) or None.
        r: rows of a token.
        decays: of these chunks.
        fused: whether a kernel makes the matrices.
    """

    X: Tensor
    K: Tensor
    Q: Tensor
    D: Tensor | None
    r: int
    decays: Decays
    fused: bool

    def forward(self, S: Tensor, y: Tensor) -> Tensor:
        """Write the outputs to y (b, l, r, h, p); the state after the tile."""
        before = self.states(S)  # (b, t+1, g, n, e, p)
        M = self.matrix(self.scores())
        inside = torch.einsum("btgeij,btjgep->btigep", M, self.X)
        across = torch.einsum("btign,btgnep->btigep", self.Q, before[:, :-1])
        y = y.unflatten(1, (before.shape[1] - 1, -1)).flatten(2, 3).unflatten(3, M.shape[2:4])
        torch.addcmul(inside, across, self.decays.into, out=y)
        return before[:, -1]

    def states(self, S: Tensor) -> Tensor:
        """(b, t+1, g, n, e, p): S, and the state after each chunk."""
        new = torch.einsum("btjgn,btjgep->btgnep", self.K, self.X * self.decays.counts)
        total = self.decays.total
        found = new.new_empty(new.shape[0], new.shape[1] + 1, *new.shape[2:])
        found[:, 0] = S
        for c in range(new.shape[1]):
            torch.addcmul(new[:, c], total[:, c], found[:, c], out=found[:, c + 1])
        return found

    def backward(
        self, before: Tensor, grad_S: Tensor, grad_y: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the state before the tile; those of x, log_decay, scale, K, Q, own, D.

        Args:
            before: (b, t, g, n, e, p) the state before each chunk.
            grad_S: (b, g, n, e, p) the gradient of the state after the tile.
            grad_y: (b, l, r, h, p).
        """
        X, K, Q, decays = self.X, self.K, self.Q, self.decays
        scale, left, total, counts = decays.scale, decays.left, decays.total, decays.counts
        gY = grad_y.unflatten(1, (X.shape[1], -1)).flatten(2, 3).unflatten(3, X.shape[3:5])
        # Between chunks: from the last to the first.
        P = gY * decays.into
        after = torch.einsum("btign,btigep->btgnep", Q, P)
        for c in reversed(range(X.shape[1])):
            # Now the gradient of the state after chunk c, and the one after that of chunk c - 1.
            after[:, c], grad_S = grad_S, after[:, c].addcmul(total[:, c], grad_S)
        gW = torch.einsum("btjgn,btgnep->btjgep", K, after)
        across = torch.einsum("btign,btgnep->btigep", Q, before)
        by_into = self.by_token((P * across).sum(-1))  # (b, t, g, e, q)
        by_left = self.by_token((X * gW).sum(-1)) * left  # (b, t, g, e, q)
        by_total = (after * before).sum((3, 5)) * total[:, :, :, 0, :, 0]

        # Inside chunks.
        scores = self.scores()
        gM = torch.einsum("btigep,btjgep->btgeij", gY, X)
        gD = gM.diagonal(dim1=-2, dim2=-1).sum((0, 1, 4)).flatten()  # (h)
        M, g_scores, g_decay, g_scale, g_own = self.inside(scores, gM)
        gX = torch.einsum("btgeij,btigep->btjgep", M, gY).addcmul_(gW, counts)
        gQ = torch.einsum("btgij,btjgn->btign", g_scores, K)
        gQ += torch.einsum("btigep,btgnep->btign", P, before)
        gK = torch.einsum("btgij,btign->btjgn", g_scores, Q)
        gK += torch.einsum("btjgep,btgnep->btjgn", X * counts, after)
        # A decay counts for the pairs of a token before and one after it, for what later tokens
        # have of the state before the chunk, for what earlier ones leave at its end, and between
        # both ends. Each is summed up by itself: differences of sums over all tokens would leave a
        # rounding error where the decay is strong, which a long step then multiplies.
        earlier = decays.earlier
        g_decay = g_decay + by_into @ (1 - earlier) + (by_left * scale) @ earlier
        g_decay += by_total.unsqueeze(-1)
        g_scale = g_scale + by_left
        if decays.own is None:
            g_scale = g_scale + g_own
        found = [self.back(gX.flatten(3, 4)), _flat(g_decay), _flat(g_scale)]
        return grad_S, [*found, self.back(gK), self.back(gQ), _flat(g_own), gD]

    def inside(self, scores: Tensor, gM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """M, and gradients from that of M, which may be overwritten.

        Returns:
            M (b, t, g, e, i, j), the gradients of the scores (b, t, g, i, j), of the log decays, of
            scale, and of what a token counts for itself, (b, t, g, e, q) each.
        """
        if self.fused:
            from mambapy.ops.cpu import ssd

            of = self.decays
            return ssd.inside(of.cum, of.scale, of.own, self.D, of.earlier, scores, gM.contiguous())
        E = self.decay_matrix()
        weights = self.weights(E)
        g_scores = (gM * weights).sum(3)  # (b, t, g, i, j)
        g_weights = self.by_pair(gM * scores[:, :, :, None])  # (b, t, g, e, q, q)
        g_own = g_weights.diagonal(dim1=-2, dim2=-1).clone()
        g_weights.mul_(E)
        g_scale = g_weights.sum(-2)
        # For token t, the sum over i >= t > j.
        earlier = self.decays.earlier
        g_weights.mul_(self.decays.scale.unsqueeze(-2))
        g_decay = ((1 - earlier).mT @ g_weights).mul_(earlier.mT).sum(-1)
        M = self.skipped(weights * scores[:, :, :, None])
        return M, g_scores, g_decay, g_scale, g_own

    def decay_matrix(self) -> Tensor:
        """(b, t, g, e, q, q): exp(cum_i - cum_j) below the diagonal, 0 elsewhere."""
        # Rounding can make a difference positive, and above the diagonal it is: exp of that could
        # be infinite, and would stay so under a mask.
        cum = self.decays.cum
        E = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).to(self.X.dtype).clamp_(max=0.0)
        return E.masked_fill_(self.decays.earlier.mT == 0, -torch.inf).exp_()

    def weights(self, E: Tensor) -> Tensor:
        """(b, t, g, e, i, j): how much token j counts for token i, its score apart."""
        scale, own = self.decays.scale, self.decays.own
        weights = E * scale.unsqueeze(-2)
        own = scale if own is None else own
        weights.diagonal(dim1=-2, dim2=-1).copy_(own)
        if self.r > 1:
            weights = weights.repeat_interleave(self.r, -2).repeat_interleave(self.r, -1)
        return weights

    def scores(self) -> Tensor:
        """(b, t, g, i, j): Q_i K_j."""
        return torch.einsum("btign,btjgn->btgij", self.Q, self.K)

    def matrix(self, scores: Tensor) -> Tensor:
        """(b, t, g, e, i, j): M, with the skip on its diagonal."""
        if self.fused:
            from mambapy.ops.cpu import ssd

            return ssd.matrix(self.decays.cum, self.decays.scale, self.decays.own, self.D, scores)
        return self.skipped(self.weights(self.decay_matrix()) * scores[:, :, :, None])

    def skipped(self, M: Tensor) -> Tensor:
        """M with the skip on its diagonal."""
        if self.D is not None:
            M.diagonal(dim1=-2, dim2=-1).add_(self.D)
        return M

    def by_token(self, T: Tensor) -> Tensor:
        """The sum of T (b, t, i, g, e) over the rows of each token: (b, t, g, e, q)."""
        T = T if self.r == 1 else T.unflatten(2, (-1, self.r)).sum(3)  # (b, t, q, g, e)
        return T.permute(0, 1, 3, 4, 2)

    def by_pair(self, T: Tensor) -> Tensor:
        """The sum of T (..., i, j) over the rows of each pair of tokens: (..., q, q)."""
        if self.r == 1:
            return T
        return T.unflatten(-1, (-1, self.r)).sum(-1).unflatten(-2, (-1, self.r)).sum(-2)

    def back(self, T: Tensor) -> Tensor:
        """T (b, t, i, ...) as (b, l, r, ...)."""
        return T.unflatten(2, (-1, self.r)).flatten(1, 2)


def _by_head(T: Tensor, g: int, q: int) -> Tensor:
    """T (b, l, h) in chunks of q: (b, c, g, e, q)."""
    T = T.unflatten(1, (-1, q)).unflatten(3, (g, -1))  # (b, c, q, g, e)
    return T.permute(0, 1, 3, 4, 2)


def _flat(T: Tensor) -> Tensor:
    """T (b, c, g, e, q) as (b, l, h)."""
    return T.permute(0, 1, 4, 2, 3).flatten(1, 2).flatten(2, 3)


def _sums_in_chunks(a: Tensor) -> Tensor:
    """Sums of a (..., q) up to each step; in float64 where the device has it."""
    a = a.to(torch.float32 if a.device.type == "mps" else torch.float64)
    # Not cumsum: CUDA refuses it where deterministic algorithms are asked for.
    return a @ torch.ones(a.shape[-1], a.shape[-1], dtype=a.dtype, device=a.device).triu_()
