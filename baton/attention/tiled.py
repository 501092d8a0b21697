"""Attention in plain torch for any device: on CPU always, on a GPU where the fast kernels do not apply.

On CPU the results are bit for bit independent of batching, chunking and threads. Keys are visited in
tiles that start at multiples of `_TILE` in the sequence's own positions, and merged with an online
softmax. A tile none of whose keys a query may see leaves that query's sums unchanged exactly, so it
does not matter whether a batch mate made us visit it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, KvCache
from baton.attention.slots import new_token_slots
from baton.errors import BatonError
from baton.kv.hashing import KvLayout

PREFERRED_BLOCK_SIZE = 16

_TILE = 256
_PIECE_ROWS = 256
_GROUPED_ROWS = 16
# Batched float32 products of fewer than 4 rows, or of 5 to 7, round differently from those of more.
_ROW_MULTIPLE = 4
# Below every score, yet finite: -inf minus -inf would be NaN.
_NEVER = -1e30


class TiledKvCache(KvCache):
    """[blocks, layers, 2 (keys, values), kv_heads, block_size, head_dim]."""

    def __init__(
        self, layout: KvLayout, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.total_blocks = layout, shape[0]
        self._storage = (
            _zeros(shape, dtype) if device.type == "cpu" else torch.zeros(*shape, dtype=dtype, device=device)
        )

    @property
    def storage(self) -> torch.Tensor:
        return self._storage


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU that take memory and time only where they are first used: writing gigabytes of
    them would be most of a worker's start.

    Raises:
        BatonError: the machine does not have that much memory.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise BatonError(
            f"a KV pool of {size / 1024**3:.1f} GiB does not fit into memory; lower --kv-bytes or --kv-blocks"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


@dataclass(frozen=True)
class _Piece:
    """Up to `_PIECE_ROWS` consecutive queries of one sequence; `row` is the first one's in the batch."""

    row: int
    rows: int
    position: int
    blocks: Sequence[int]


@dataclass(frozen=True)
class _Tile:
    """One tile of the leading `pieces` of a group: which block rows to gather, and which keys a query
    must not see.

    `block_rows` is int64 [pieces * kv_heads * blocks]; `hidden` is bool [pieces, 1, rows, 1, tokens], or
    None when every query sees every key. `tokens` is the part of the tile that any query sees.
    """

    pieces: int
    tokens: int
    block_rows: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True)
class _Group:
    """Pieces of equally many queries, computed as one batch. `batch_rows` is int64 [pieces * padded],
    the last query of a piece repeated up to `padded`; tiles are per window of the model's layers."""

    pieces: int
    rows: int
    padded: int
    batch_rows: torch.Tensor
    result_rows: torch.Tensor
    tiles: dict[int | None, list[_Tile]]


class TiledAttention(AttentionBackend):
    """See the module. Every layer must have the same kv_heads and head_dim."""

    name = "tiled"

    def __init__(self, specs: Sequence[AttentionSpec], cache: TiledKvCache) -> None:
        self.cache = cache
        self._device = cache.storage.device
        self._specs = tuple(specs)
        _, self._layers, _, self._kv_heads, self._block_size, self._head_dim = cache.storage.shape
        self._tile = max(_TILE, self._block_size)
        self._tile_blocks = self._tile // self._block_size
        self._widths = _exact_widths(self._tile, self._block_size, self._head_dim, cache.storage)
        # The pool as rows of one head's part of one block, and as rows of one head's one token.
        self._block_rows = cache.storage.view(-1, self._block_size * self._head_dim)
        self._token_rows = cache.storage.view(-1, self._head_dim)
        self._group_size = self._specs[0].heads // self._kv_heads
        self._row_multiple = _ROW_MULTIPLE * (2 if self._kv_heads == 1 else 1)  # see _bmm
        self._windows = sorted({spec.window for spec in specs}, key=lambda window: window or 0)
        self._new_rows = torch.empty(0, dtype=torch.int64)
        self._groups: list[_Group] = []

    def begin(self, batch: AttentionBatch) -> None:
        pieces, row = [], 0
        for new, context, blocks in zip(
            batch.query_lens, batch.context_lens, batch.block_tables, strict=True
        ):
            for start in range(0, new, _PIECE_ROWS):
                rows = min(_PIECE_ROWS, new - start)
                pieces.append(_Piece(row + start, rows, context - new + start, blocks))
            row += new
        self._new_rows = self._new_token_rows(batch).to(self._device)
        self._groups = [self._group(group) for group in _alike(pieces)]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec = self._specs[layer]
        first = layer * 2 * self._kv_heads
        keys, values = self._block_rows[first:], self._block_rows[first + self._kv_heads :]
        token = first * self._block_size
        self._token_rows[token:].index_copy_(0, self._new_rows, k.reshape(-1, self._head_dim))
        # An overflow in one request must stay its own: hidden keys weigh 0, and 0 * inf is NaN.
        finite = v.nan_to_num().reshape(-1, self._head_dim)
        self._token_rows[token + self._kv_heads * self._block_size :].index_copy_(0, self._new_rows, finite)
        out = q.new_empty(q.shape[0], spec.heads * spec.head_dim)
        for group in self._groups:
            result = self._attend_group(spec, group, q, keys, values)
            out.index_copy_(0, group.result_rows, result)
        return out

    def _attend_group(
        self, spec: AttentionSpec, group: _Group, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """[pieces * rows, heads * head_dim] of one group."""
        heads, share, dim = self._kv_heads, self._group_size, self._head_dim
        batch, rows = group.pieces * heads, group.padded * share
        queries = q.index_select(0, group.batch_rows).view(group.pieces, group.padded, heads, share, dim)
        queries = queries.transpose(1, 2).reshape(batch, rows, dim)
        top = torch.full((batch, rows, 1), _NEVER, device=self._device)
        weight = torch.zeros(batch, rows, 1, device=self._device)
        total = torch.zeros(batch, rows, dim, device=self._device)
        for tile in group.tiles[spec.window]:
            some = slice(tile.pieces * heads)
            tile_keys = keys.index_select(0, tile.block_rows).view(-1, tile.tokens, dim)
            tile_values = values.index_select(0, tile.block_rows).view(-1, tile.tokens, dim)
            scores = _bmm(queries[some], tile_keys.transpose(1, 2)).float().mul_(spec.scale)
            if spec.softcap is not None:
                scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
            if tile.hidden is not None:
                shaped = scores.view(tile.pieces, heads, group.padded, share, tile.tokens)
                shaped.masked_fill_(tile.hidden, -torch.inf)
            new_top = torch.maximum(top[some], scores.amax(-1, keepdim=True))
            likely = scores.sub_(new_top).exp_()
            keep = (top[some] - new_top).exp_()
            weight[some].mul_(keep).add_(likely.sum(-1, keepdim=True))
            total[some].mul_(keep).add_(_bmm(likely.to(q.dtype), tile_values))
            top[some] = new_top
        mean = total.div_(weight).view(group.pieces, heads, group.padded, share, dim)
        mean = mean[:, :, : group.rows].transpose(1, 2)
        return mean.reshape(group.pieces * group.rows, heads * share * dim).to(q.dtype)

    def _new_token_rows(self, batch: AttentionBatch) -> torch.Tensor:
        """int64 [tokens * kv_heads]: rows of the new tokens' keys in layer 0, in `_token_rows`."""
        stride = self._layers * 2 * self._kv_heads * self._block_size
        heads = torch.arange(self._kv_heads) * self._block_size
        blocks, offsets = new_token_slots(batch, self._block_size)
        return ((blocks * stride + offsets)[:, None] + heads).flatten()

    def _group(self, pieces: Sequence[_Piece]) -> _Group:
        rows = pieces[0].rows
        padded = rows
        while padded * self._group_size % self._row_multiple:
            padded += 1
        offsets = torch.arange(padded).clamp(max=rows - 1)
        first_rows = torch.tensor([piece.row for piece in pieces])
        return _Group(
            pieces=len(pieces),
            rows=rows,
            padded=padded,
            batch_rows=(first_rows[:, None] + offsets).flatten().to(self._device),
            result_rows=(first_rows[:, None] + torch.arange(rows)).flatten().to(self._device),
            tiles={window: self._tiles(pieces, offsets, window) for window in self._windows},
        )

    def _tiles(self, pieces: Sequence[_Piece], offsets: torch.Tensor, window: int | None) -> list[_Tile]:
        """The tiles the pieces must visit, the first of each piece together, then the second, ..."""
        firsts, lasts = [], []
        for piece in pieces:
            oldest = 0 if window is None else max(0, piece.position - window + 1)
            firsts.append(oldest // self._tile)
            lasts.append((piece.position + piece.rows - 1) // self._tile)
        counts = [last - first + 1 for first, last in zip(firsts, lasts, strict=True)]
        count = max(counts)
        tables = torch.tensor(
            [
                self._table(piece.blocks, first, last, count)
                for piece, first, last in zip(pieces, firsts, lasts, strict=True)
            ]
        ).view(len(pieces), count, 1, self._tile_blocks)
        heads = torch.arange(self._kv_heads)[:, None]
        block_rows = tables * (self._layers * 2 * self._kv_heads) + heads
        start = torch.tensor(firsts) * self._tile
        positions = torch.tensor([piece.position for piece in pieces])[:, None] + offsets
        queries = positions[:, None, :, None, None]
        tiles = []
        for number in range(count):
            some = max(at for at, visited in enumerate(counts) if visited > number) + 1
            seen = max(
                piece.position + piece.rows - (first + number) * self._tile
                for piece, first in zip(pieces[:some], firsts, strict=False)
            )
            tokens = next(width for width in self._widths if width >= min(seen, self._tile))
            keys = (start[:some] + number * self._tile)[:, None] + torch.arange(tokens)
            keys = keys[:, None, None, None, :]
            hidden = keys > queries[:some]
            if window is not None:
                hidden |= keys <= queries[:some] - window
            mask = hidden.to(self._device) if bool(hidden.any()) else None
            rows = block_rows[:some, number, :, : tokens // self._block_size]
            tiles.append(_Tile(some, tokens, rows.flatten().to(self._device), mask))
        return tiles

    def _table(self, blocks: Sequence[int], first: int, last: int, count: int) -> list[int]:
        """Ids of the blocks of tiles `first` .. `last`, padded to `count` tiles with the sequence's own."""
        wanted = list(blocks[first * self._tile_blocks : (last + 1) * self._tile_blocks])
        return wanted + [blocks[0]] * (count * self._tile_blocks - len(wanted))


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """torch.bmm, a batch of one as two halves: threads cut a single product where they like."""
    if left.shape[0] > 1:
        return torch.bmm(left, right)
    halves = left.view(2, left.shape[1] // 2, left.shape[2])
    return torch.bmm(halves, right.expand(2, -1, -1)).view(1, left.shape[1], right.shape[2])


def _exact_widths(tile: int, block_size: int, head_dim: int, like: torch.Tensor) -> list[int]:
    """Token counts, ascending, to which a tile of which no more is seen may be cut.

    Cutting must not change a bit: the sums over the part must equal those over the whole tile whose
    rest weighs 0. Whether they do depends on how this machine's matrix products add up, so it is tried.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=random).to(like)

    widths = [tile]
    for width in (tile // 2, tile // 4):
        if width % block_size:
            break
        for rows in (_ROW_MULTIPLE, 8 * _ROW_MULTIPLE):
            q, k, v, p = (
                draw(2, rows, head_dim),
                draw(2, tile, head_dim),
                draw(2, tile, head_dim),
                draw(2, rows, tile),
            )
            p[..., width:] = 0
            part = p[..., :width].contiguous()
            exact = (
                torch.equal(
                    torch.bmm(q, k.transpose(1, 2))[..., :width], torch.bmm(q, k[:, :width].transpose(1, 2))
                )
                and torch.equal(torch.bmm(p, v), torch.bmm(part, v[:, :width]))
                and torch.equal(p.float().sum(-1), part.float().sum(-1))
            )
            if not exact:
                return widths
        widths.insert(0, width)
    return widths


def _alike(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces of few queries grouped by how many, the longest context first; each longer piece alone."""
    by_rows: dict[int, list[_Piece]] = {}
    groups = []
    for piece in sorted(pieces, key=lambda piece: -piece.position):
        if piece.rows > _GROUPED_ROWS:
            groups.append([piece])
        elif piece.rows in by_rows:
            by_rows[piece.rows].append(piece)
        else:
            groups.append(by_rows.setdefault(piece.rows, [piece]))
    return groups
