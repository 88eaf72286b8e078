"""The two triangles at the edges of a long window, as squares of scores: see `model.attention.tiles`.

A query sees of its own block the keys no later than itself, and of the block W tokens back those that stand later
there than it does here: of the j-th keys of both, exactly one. So one square of scores holds both (as in
`model.attention.blocks`), with the log-sum-exp and the gradients that let other tiles be added.

Legend: X rows and kv heads, T tokens, N blocks, C tokens of a block, D head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 32  # blocks whose scores are alive together: few enough to stay in a cache


@dataclass(frozen=True)
class Squares:
    """`blocks` blocks of `side` queries from `query` on, one behind another. back: W, or 0 for no block before."""

    query: int
    side: int
    blocks: int
    back: int = 0

    def begin(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Write what the squares give to `out` and `lse`, float32 at least. All (X, T, D), but lse (X, T, 1)."""
        for (q_, k_, v_, out_, lse_), (k_back, v_back) in self._cuts((q, k, v, out, lse), (k, v)):
            scores = self._scores(q_, k_, k_back, -torch.inf, out.dtype).mul_(q.shape[-1] ** -0.5)
            peak = scores.amax(-1, keepdim=True)
            weights = scores.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            lse_.copy_(total.log().add_(peak))
            own, before = self._apart(weights.div_(total), v.dtype)
            _product(out_, own, v_, 0)
            if self.back:
                _product(out_, before, v_back, 1)

    def begin_gradients(self, saved: Sequence[Tensor], out: Tensor, grads: Sequence[Tensor], beta: int) -> None:
        """Write the squares' share to the gradients of q, k and v; those of k and v are `beta` times theirs and it.

        saved: gradient of the output, q, k, v (X, T, D), sum of that gradient times `out`, lse (X, T, 1).
        """
        scale = saved[1].shape[-1] ** -0.5
        for own, (k_back, v_back, grad_k_back, grad_v_back) in self._cuts(
            (*saved, *grads), (saved[2], saved[3], grads[1], grads[2])
        ):
            grad, q, k, v, delta, lse, grad_q, grad_k, grad_v = own
            weights = self._scores(q, k, k_back, -torch.inf, lse.dtype).mul_(scale).sub_(lse).exp_()
            moved = self._scores(grad, v, v_back, 0.0, lse.dtype).sub_(delta).mul_(weights).mul_(scale)
            (mine, before), (moved_mine, moved_before) = (self._apart(x, q.dtype) for x in (weights, moved))
            _product(grad_q, moved_mine, k, 0)
            _product(grad_k, moved_mine.mT, q, beta)
            _product(grad_v, mine.mT, grad, beta)
            if self.back:
                _product(grad_q, moved_before, k_back, 1)
                _product(grad_k_back, moved_before.mT, q, 1)
                _product(grad_v_back, before.mT, grad, 1)

    def _cuts(self, own: Sequence[Tensor], back: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """A few blocks at a time: (N, C, D) of `own` (X, T, D), and of `back` as many tokens earlier as W."""
        for row in range(len(own[0])):
            for first in range(0, self.blocks, AT_ONCE):
                blocks, at = min(AT_ONCE, self.blocks - first), self.query + first * self.side

                def cut(xs: Sequence[Tensor], begin: int, row: int = row, blocks: int = blocks) -> list[Tensor]:
                    end = begin + blocks * self.side
                    return [x[row, begin:end].unflatten(0, (blocks, self.side)) for x in xs]

                yield cut(own, at), cut(back, at - self.back)

    def _scores(self, x: Tensor, k: Tensor, k_back: Tensor, unseen: float, dtype: torch.dtype) -> Tensor:
        """Products (N, C, C) of x with the keys that each sees, of either block."""
        return torch.where(self._own(x), x @ k.mT, x @ k_back.mT if self.back else unseen).to(dtype)

    def _apart(self, square: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What belongs to the own block, and to the one before; `square` is used up."""
        square = square.to(dtype)
        own = square * self._own(square) if self.back else square
        return own, square.sub_(own) if self.back else own

    def _own(self, x: Tensor) -> Tensor:
        return torch.ones(self.side, self.side, dtype=torch.bool, device=x.device).tril()


def _product(to: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """to = beta * to + a @ b, beta 0 or 1, in the precision of `to` when that is the inputs'."""
    if to.dtype == a.dtype:
        to.baddbmm_(a, b, beta=beta)
    else:
        to.add_(a @ b) if beta else to.copy_(a @ b)
