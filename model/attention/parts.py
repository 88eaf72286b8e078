"""Rows cut into parts, one for each process: which keys and values a part needs from the parts before it.

A sliding layer at position i needs the W - 1 tokens before i and nothing else. So a part needs the last W - 1 keys and
values to its left, its halo, however long the row is. With global tokens it also needs those of its first document, and
a full layer needs everything before the part. Three parts of four tokens, W = 3 and one global token:

    row         0 1 2 3 | 4 5 6 7 | 8 9 10 11
    last part   0             6 7   8 9 10 11

Halo and part together are a row of their own: its tokens see in it what they see in the whole row. So every attention
form computes it as it is. Chunked layers start their halo at the border of a chunk, which keeps the borders in place.

Keys and values travel while attention computes the queries that see none of the halo. In the backward pass the
gradient of the halo travels the other way, and the part that owns the keys adds it to its own.

Legend: B batch, T positions of a part, S halo, G kv heads, H heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention.reference import Attend
from model.packing import Packing, Part
from model.windows import LayerSpec


def halo(spec: LayerSpec, row: Packing, first: int) -> Tensor:
    """Positions in the row (B or 1, S) of the earlier tokens that the tokens from `first` on need. -1: no token.

    >>> row = Packing.of_whole_rows(12, torch.device("cpu"))
    >>> halo(LayerSpec("sliding", 3, global_tokens=1), row, 8).tolist()
    [[0, 6, 7]]
    >>> halo(LayerSpec("chunked", 5), row, 8).tolist()
    [[5, 6, 7]]
    """
    if first == 0:
        return row.positions.new_empty(len(row.positions), 0)
    position = row.positions[:, first : first + 1]
    count = halo_size(spec, position)
    size = int(count.max())
    column = torch.arange(size) - (size - count)
    index = torch.where(column < spec.global_tokens, first - position + column, first - count + column)
    return index.masked_fill(column < 0, -1)


def halo_size(spec: LayerSpec, position: Tensor) -> Tensor:
    """Earlier tokens of the document that the tokens from `position` in it on need.

    >>> halo_size(LayerSpec("sliding", 64), torch.tensor([10, 1000, 100_000])).tolist()
    [10, 63, 63]
    """
    if spec.window is None:
        return position
    near = torch.full_like(position, (spec.window - 1) * spec.dilation)
    if spec.kind == "chunked":  # behind the global tokens, borders stay at multiples of the window
        near = position % spec.window + -spec.global_tokens % spec.window
    return torch.minimum(position, near + spec.global_tokens)


class Message(NamedTuple):
    """Tokens that travel to or from part `peer`: their rows and columns, in the part or in the halo."""

    peer: int
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Exchange:
    """What a part sends and receives for one layer. size: tokens of the halo."""

    group: Any
    size: int
    sends: Sequence[Message]
    receives: Sequence[Message]


def plan_exchange(spec: LayerSpec, part: Part, rows: int, device: torch.device) -> Exchange:
    """Every part works out all halos, so nobody has to ask."""

    def messages(peer: int, reader: int, owner: int) -> list[Message]:
        index = halo(spec, part.row, part.bounds[reader]).expand(rows, -1)
        first, end = part.bounds[owner], part.bounds[owner + 1]
        row, column = ((index >= first) & (index < end)).nonzero(as_tuple=True)
        where = column if reader == part.index else index[row, column] - first
        return [Message(peer, row.to(device), where.to(device))] if len(row) else []

    parts, mine = range(len(part.bounds) - 1), part.index
    sends = [message for peer in parts[mine + 1 :] for message in messages(peer, reader=peer, owner=mine)]
    receives = [message for peer in parts[:mine] for message in messages(peer, reader=mine, owner=peer)]
    return Exchange(part.group, halo(spec, part.row, part.first).shape[1], sends, receives)


class _Mail:
    """Messages under way, and the buffers that they fill."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def post(self, sends: Sequence[Message], receives: Sequence[Message], k: Tensor, v: Tensor) -> None:
        """Send keys and values, or their gradients, and receive others of the same shape and type."""
        out = [torch.cat((k[m.rows, :, m.columns], v[m.rows, :, m.columns]), 1) for m in sends]
        self.buffers = [k.new_empty(len(m.rows), 2 * k.shape[1], k.shape[3]) for m in receives]
        self.receives, self.like, group = receives, k.new_empty(*k.shape[:2], 0, k.shape[3]), self.exchange.group
        operations = [dist.P2POp(dist.isend, x, group=group, group_peer=m.peer) for m, x in zip(sends, out)]
        operations += [
            dist.P2POp(dist.irecv, x, group=group, group_peer=m.peer) for m, x in zip(receives, self.buffers)
        ]
        self.sent, self.works = out, dist.batch_isend_irecv(operations) if operations else []

    def collect(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Wait. Sums (B, G, tokens, D) of what has arrived for each token, for keys and for values."""
        for work in self.works:
            work.wait()
        (b, g, _, d), new = self.like.shape, self.like.new_zeros
        k, v = new(b, g, tokens, d), new(b, g, tokens, d)
        for message, buffer in zip(self.receives, self.buffers):
            of_k, of_v = buffer.chunk(2, 1)
            k[message.rows, :, message.columns] += of_k
            v[message.rows, :, message.columns] += of_v
        self.sent, self.buffers, self.works = [], [], []
        return k, v


class _Depart(torch.autograd.Function):
    """Starts to send keys and values. The result is a number that only ties `_Arrive` to them."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, mail: _Mail) -> Tensor:
        ctx.mail, ctx.tokens = mail, k.shape[2]
        mail.post(mail.exchange.sends, mail.exchange.receives, k, v)
        return k.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.mail.collect(ctx.tokens), None


class _Arrive(torch.autograd.Function):
    """The keys and values (B, G, S, D) of the halo."""

    @staticmethod
    def forward(ctx: Any, departed: Tensor, mail: _Mail) -> tuple[Tensor, Tensor]:
        ctx.mail = mail
        return mail.collect(mail.exchange.size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        ctx.mail.post(ctx.mail.exchange.receives, ctx.mail.exchange.sends, grad_k, grad_v)
        return grad_k.new_zeros(()), None


@dataclass(frozen=True)
class AcrossParts:
    """Attention of a part. The first `edge` queries may see the halo. `behind` computes them over [halo | part].

    inside: computes the part as if there were no halo, which is right for the other queries. None if there are none.
    """

    exchange: Exchange
    edge: int
    behind: Attend
    inside: Attend | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        mail = _Mail(self.exchange)
        departed = _depart(k, v, mail)
        others = [] if self.inside is None else [self.inside(q, k, v, sinks)[:, :, self.edge :]]
        near_q, near_k, near_v = (x[:, :, : self.edge] for x in (q, k, v))
        far_k, far_v = _arrive(departed, mail)
        of_edge = self.behind(near_q, torch.cat((far_k, near_k), 2), torch.cat((far_v, near_v), 2), sinks)
        return torch.cat((of_edge, *others), 2)


@torch.compiler.disable
def _depart(k: Tensor, v: Tensor, mail: _Mail) -> Tensor:
    return _Depart.apply(k, v, mail)


@torch.compiler.disable
def _arrive(departed: Tensor, mail: _Mail) -> tuple[Tensor, Tensor]:
    return _Arrive.apply(departed, mail)


def row_behind(row: Packing, behind: Tensor, first: int, end: int) -> Packing:
    """The tokens `behind` (B or 1, S) and those from `first` up to `end`, as rows of their own."""
    if row.documents is None:
        return Packing.of_whole_rows(behind.shape[1] + end - first, row.positions.device)
    ids = row.documents.gather(1, behind.clamp_min(0)).masked_fill(behind < 0, -1)
    return Packing.of_documents(torch.cat((ids, row.documents[:, first:end]), 1))
