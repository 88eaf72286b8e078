"""The two triangles at the edges of a long window, as squares of scores: see `model.attention.tiles`.

Query i of a block sees keys 0…i of its own block and keys i+1…C−1 of the block W tokens earlier: key j of exactly one
of the two. So one square of scores holds both triangles (as in `model.attention.blocks`). Its log-sum-exp is kept, so
that other tiles can be merged into it, and so are the parts of the gradients.

Legend: X rows and kv heads, T tokens, N blocks, C tokens of a block, D head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS_AT_ONCE = 32  # blocks whose scores exist at the same time: few enough for the processor's cache


@dataclass(frozen=True)
class Squares:
    """`blocks` adjacent blocks of `side` queries from `query` on. back: W, or 0 without a block W tokens earlier."""

    query: int
    side: int
    blocks: int
    back: int = 0

    def write(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Overwrite the squares' part of `out` (X, T, D) and `lse` (X, T, 1), which are at least float32."""
        for (q_, k_, v_, out_, lse_), (k_back, v_back) in self._cuts((q, k, v, out, lse), (k, v)):
            scores = self._scores(q_, k_, k_back, -torch.inf, out.dtype).mul_(q.shape[-1] ** -0.5)
            peak = scores.amax(-1, keepdim=True)
            weights = scores.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            lse_.copy_(total.log().add_(peak))
            own, before = self._split(weights.div_(total), v.dtype)
            multiply(out_, own, v_, 0)
            if self.back:
                multiply(out_, before, v_back, 1)

    def write_gradients(self, saved: Sequence[Tensor], out: Tensor, grads: Sequence[Tensor], beta: int) -> None:
        """Overwrite the squares' part of the gradients of q, k and v. Those of k and v keep `beta` times their value.

        saved: gradient of the output, q, k, v (X, T, D), sum of that gradient times `out`, log-sum-exp (X, T, 1).
        """
        scale = saved[1].shape[-1] ** -0.5
        for own, (k_back, v_back, grad_k_back, grad_v_back) in self._cuts(
            (*saved, *grads), (saved[2], saved[3], grads[1], grads[2])
        ):
            grad, q, k, v, delta, lse, grad_q, grad_k, grad_v = own
            scores = self._scores(q, k, k_back, -torch.inf, lse.dtype)
            weights, grad_scores = weigh(scores, self._scores(grad, v, v_back, 0.0, lse.dtype), lse, delta, scale)
            (w_own, w_before), (g_own, g_before) = (self._split(x, q.dtype) for x in (weights, grad_scores))
            multiply(grad_q, g_own, k, 0)
            multiply(grad_k, g_own.mT, q, beta)
            multiply(grad_v, w_own.mT, grad, beta)
            if self.back:
                multiply(grad_q, g_before, k_back, 1)
                multiply(grad_k_back, g_before.mT, q, 1)
                multiply(grad_v_back, w_before.mT, grad, 1)

    def _cuts(self, own: Sequence[Tensor], back: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """A few blocks at a time: views (N, C, D) of `own` (X, T, D), and of `back` W tokens earlier."""
        for row in range(len(own[0])):
            for first in range(0, self.blocks, BLOCKS_AT_ONCE):
                blocks, at = min(BLOCKS_AT_ONCE, self.blocks - first), self.query + first * self.side

                def cut(xs: Sequence[Tensor], start: int, row: int = row, blocks: int = blocks) -> list[Tensor]:
                    end = start + blocks * self.side
                    return [x[row, start:end].unflatten(0, (blocks, self.side)) for x in xs]

                yield cut(own, at), cut(back, at - self.back)

    def _scores(self, x: Tensor, k: Tensor, k_back: Tensor, unseen: float, dtype: torch.dtype) -> Tensor:
        """Products (N, C, C) of x with the keys in its square."""
        return torch.where(self._own_block(x), x @ k.mT, x @ k_back.mT if self.back else unseen).to(dtype)

    def _split(self, square: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The part of the own block, and that of the block W tokens earlier. Overwrites `square`."""
        square = square.to(dtype)
        own = square * self._own_block(square) if self.back else square
        return own, square.sub_(own) if self.back else own

    def _own_block(self, x: Tensor) -> Tensor:
        return torch.ones(self.side, self.side, dtype=torch.bool, device=x.device).tril()


def weigh(scores: Tensor, grad_weights: Tensor, lse: Tensor, delta: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The weights of a softmax with log-sum-exp `lse`, and the gradient of its scores. Overwrites both arguments."""
    weights = scores.mul_(scale).sub_(lse).exp_()
    return weights, grad_weights.sub_(delta).mul_(weights).mul_(scale)


def multiply(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta * out + a @ b with beta 0 or 1, computed in place where the dtypes are the same."""
    if out.dtype == a.dtype:
        out.baddbmm_(a, b, beta=beta)
    else:
        out.add_(a @ b) if beta else out.copy_(a @ b)
