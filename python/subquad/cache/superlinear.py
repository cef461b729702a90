"""The keys and values of a Superlinear layer: all of them, in one piece or in pages that rows and forks share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from .. import _checks
from ..contract.span_attention import MAX_HEAD_DIM
from ..ops import _call
from ._memory import zeros
from ._pages import Pages, counts, write
from .state import TensorState, preallocated


class SuperlinearKVCache(TensorState):
    """Keys and values of all tokens of every sequence, for `superlinear_attention_step`; nothing else is remembered.

    Sequences of a batch have lengths of their own; padding is never stored. Memory is allocated once, and addresses stay: steps
    can be captured and compiled, and no value is read from a GPU. Where values cannot be read (there, unless SUBQUAD_DEBUG=1, and
    in compiled code) tokens that do not fit are no error but are not stored, and `seq_lens` says so. There are no gradients:
    `superlinear_attention` trains.

    With `page_size`, sequences take pages of a pool as they grow, and give them back in `truncate` and `reset`: many sequences of
    unlike lengths need less than batch * max_len places. `select`, `reorder` and `fork` copy no full page; rows that go on from
    one prompt share its pages, and a page that is not full is copied before it is written to. Without, `fork` copies.

    Args:
        batch: B, number of sequences.
        num_kv_heads, head_dim: Hkv and D, of the keys.
        max_len: tokens that a sequence may have.
        v_head_dim: Dv, of the values; None for D.
        dtype: None for torch's default.
        device: of the tensors.
        page_size: tokens of a page, a power of two from 16 on; None for one piece.
        num_pages: pages of the pool, which forks share; None for as many as all sequences need at full length.
        separate_search_keys: whether the search has keys of its own beside k.

    Attributes:
        k, v: [B, N, Hkv, D] and [B, N, Hkv, Dv] with N = max_len, or [P, page, Hkv, D] and [P, page, Hkv, Dv].
        search_keys: as k, or None.
        block_table: int32 [B, pages], the pages of each row in order, -1 behind the last; None for one piece.
        seq_lens: int64 [B], tokens of each sequence.
        max_len: tokens that a sequence may have.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: numbers out of range, a page size that is no power of two, `num_pages` without it.

    Example:
        >>> import torch, subquad
        >>> cache = subquad.SuperlinearKVCache(1, 2, 64, 8)
        >>> q_search, q = torch.randn(1, 30, 4, 8), torch.randn(1, 30, 4, 8)
        >>> with torch.no_grad():
        ...     cache.append(torch.randn(1, 30, 2, 8), torch.randn(1, 30, 2, 8))
        ...     out = subquad.superlinear_attention_step(q_search, q, cache, cache.seq_lens - 30)
        >>> out.shape, cache.seq_lens.tolist()
        (torch.Size([1, 30, 4, 8]), [30])
    """

    counters = ("max_len", "page_size")
    advice = "every token can be taken back"
    k: torch.Tensor
    v: torch.Tensor
    search_keys: torch.Tensor | None
    block_table: torch.Tensor | None
    seq_lens: torch.Tensor

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        v_head_dim: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        separate_search_keys: bool = False,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        for name, size, least, most in (
            ("batch", batch, 0, None), ("num_kv_heads", num_kv_heads, 1, None), ("max_len", max_len, 1, 2**31 - 1),
            ("head_dim", head_dim, 1, MAX_HEAD_DIM), ("v_head_dim", v_head_dim, 1, MAX_HEAD_DIM),
        ):  # fmt: skip
            _checks.size(name, size, least)
            if most is not None and size > most:
                raise ValueError(f"{name}: expected at most {most}, got {size}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        _checks.flag("separate_search_keys", separate_search_keys)
        device, rows, places = _checks.device("device", device), batch, max_len
        self.max_len, self.page_size = max_len, page_size
        self.block_table, self._pages = None, None
        if page_size is not None:
            _checks.size("page_size", page_size, 16)
            if page_size & (page_size - 1):
                raise ValueError(f"page_size: expected a power of two, got {page_size}")
            columns = -(-max_len // page_size)
            rows, places = max(1, batch * columns) if num_pages is None else num_pages, page_size
            _checks.size("num_pages", rows, 1)
        elif num_pages is not None:
            raise ValueError(f"num_pages: expected None without page_size, got {num_pages}")
        first, second = "batch" if num_pages is None else "num_pages", "max_len" if page_size is None else "page_size"
        sizes = {first: rows, second: places, "num_kv_heads": num_kv_heads, "head_dim": max(head_dim, v_head_dim)}
        _checks.elements(**sizes)
        if page_size is not None:
            self.put("block_table", torch.full((batch, columns), -1, dtype=torch.int32, device=device))
            self._pages = Pages(rows, device)
        widths = {"k": head_dim, "v": v_head_dim} | ({"search_keys": head_dim} if separate_search_keys else {})
        self.search_keys = None
        for name, width in widths.items():
            self.put(name, zeros(rows, places, num_kv_heads, width, dtype=dtype, device=device))
        self.put("seq_lens", torch.zeros(batch, dtype=torch.int64, device=device))

    def __repr__(self) -> str:
        shape = f"batch={self.seq_lens.shape[0]}, num_kv_heads={self.k.shape[2]}, max_len={self.max_len}"
        pages = "" if self.page_size is None else f", page_size={self.page_size}, num_pages={self.k.shape[0]}"
        search = ", separate_search_keys=True" if self.search_keys is not None else ""
        return (
            f"{type(self).__name__}({shape}, head_dim={self.k.shape[3]}, v_head_dim={self.v.shape[3]}, dtype={self.k.dtype}, "
            f"device={self.k.device}{pages}{search})"
        )

    # --- new tokens ----------------------------------------

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        search_keys: torch.Tensor | None = None,
    ) -> None:
        """New tokens enter behind the last ones, any number of them.

        Args:
            k, v: [B, T, Hkv, D] and [B, T, Hkv, Dv], of the cache's dtype.
            positions: int32 or int64 [B], the number in its sequence of each row's first token, at most `seq_lens`; or [B, T],
                that of every token, -1 for columns that are none. In a row they follow each other. What the sequence had from
                there on is forgotten. None: behind the last, which is faster with pages.
            search_keys: [B, T, Hkv, D], where the cache has them.

        Raises:
            TypeError: wrong types or dtypes.
            ValueError: wrong shapes, more tokens than fit, positions that leave a gap or do not follow each other, search keys
                that are missing or not wanted, a tensor that requires a gradient. Nothing has changed then.
        """
        k, v, search_keys = _call.autocast(k, v, search_keys, to=self.k)
        new = self._checked(k, v, search_keys)
        columns = k.shape[1]
        if positions is None:
            place = self.seq_lens[:, None] + torch.arange(columns, device=self.k.device)
            start = self.seq_lens
        else:
            place, start = self._placed(positions, columns)
        if not place.numel():
            return
        ends = torch.where(place < self.max_len, place, -1).amax(1) + 1
        ends = torch.maximum(ends, start)
        real: torch.Tensor | None = (place >= 0) & (place < self.max_len)
        if _checks.readable(place):
            most = int(place.max())
            if most >= self.max_len:
                raise ValueError(f"k: expected at most the {self.max_len} tokens of max_len, got {most + 1}")
            real = None if positions is None else real
        row = torch.arange(place.shape[0], device=self.k.device)[:, None].expand_as(place)
        if self.block_table is not None and self.page_size is not None:
            if positions is None:
                self._extend(ends, columns)
            else:
                self._adopt(self.block_table, start, ends)
            row = self.block_table.gather(1, (place // self.page_size).clamp(0, self.block_table.shape[1] - 1)).long()
            real = None if real is None else real & (row >= 0)
            room = (self.block_table >= 0).sum(1) * self.page_size
            ends, place = torch.minimum(ends, room), place % self.page_size
        chosen = None if real is None else real.flatten()
        for name, value in new.items():
            write(getattr(self, name), (row.flatten(), place.flatten()), value.flatten(0, 1), chosen)
        self.seq_lens.copy_(ends)

    def _checked(self, k: Any, v: Any, search_keys: Any) -> dict[str, torch.Tensor]:
        """The new rows by name."""
        if (search_keys is None) != (self.search_keys is None):
            wanted = "None, for the cache has none" if self.search_keys is None else "keys, which the cache has"
            raise ValueError(f"search_keys: expected {wanted}, got {type(search_keys).__name__}")
        new = {"k": k, "v": v} | ({} if search_keys is None else {"search_keys": search_keys})
        batch, heads = self.seq_lens.shape[0], self.k.shape[2]
        for name, x in new.items():
            _checks.like(name, x, None, self.k, "the cache")
            width = getattr(self, name).shape[3]
            if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (batch, heads, width) or x.shape[1] != k.shape[1]:
                columns = "T" if x is k else k.shape[1]
                raise ValueError(f"{name}: expected shape [{batch}, {columns}, {heads}, {width}], got {list(x.shape)}")
            if torch.is_grad_enabled():
                _checks.no_gradient(name, x, "superlinear_attention trains")
        return new

    def _placed(self, positions: Any, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The place of every token [B, T], -1 for none, and of the first in each row [B], `seq_lens` where there is none."""
        given = _checks.integers("positions", positions)
        _checks.same_device("positions", given, self.k.device, "the cache")
        batch = self.seq_lens.shape[0]
        if given.shape not in ((batch,), (batch, columns)):
            raise ValueError(f"positions: expected shape [{batch}] or [{batch}, {columns}], got {list(given.shape)}")
        place = given.long()
        if place.dim() == 1:
            place = place[:, None] + torch.arange(columns, device=self.k.device)
        if not place.numel():
            return place, self.seq_lens
        real = place >= 0
        beginning = (place - (real.cumsum(1) - 1)).masked_fill(~real, torch.iinfo(torch.int64).max)
        least = beginning.amin(1)
        start = torch.minimum(least, self.seq_lens)
        if _checks.readable(place):
            if bool((place < (0 if given.dim() == 1 else -1)).any()) or bool((start < 0).any()):
                raise ValueError(f"positions: expected numbers from 0 on, or -1 for no token, got {_shown(given)}")
            if bool((real & (beginning != least[:, None])).any()):
                raise ValueError(f"positions: expected numbers that follow each other in a row, got {_shown(given)}")
            if bool((real.any(1) & (least > self.seq_lens)).any()):
                raise ValueError(
                    f"positions: expected at most seq_lens, {_shown(self.seq_lens)}, of the first token, got {_shown(given)}"
                )
        return place, start

    # --- pages ----------------------------------------

    def _extend(self, ends: torch.Tensor, columns: int) -> None:
        """Pages for the tokens up to `ends`, at most `columns` a row."""
        assert self.block_table is not None and self.page_size is not None and self._pages is not None
        fresh = (columns - 1) // self.page_size + 1
        column = -(-self.seq_lens // self.page_size)[:, None] + torch.arange(fresh, device=self.k.device)
        wanted = column * self.page_size < ends[:, None]
        self._pages.check(wanted, self._pages.left)
        page = self._pages.take(wanted)
        row = torch.arange(column.shape[0], device=self.k.device)[:, None].expand_as(column)
        write(self.block_table, (row.flatten(), column.flatten()), page.flatten(), wanted.flatten())

    def _adopt(self, table: torch.Tensor, lens: torch.Tensor, ends: torch.Tensor | None = None) -> None:
        """Go on with rows of a table of the same pool, of which the first `lens` tokens stay, and with room up to `ends`.

        A last page that is not full becomes the row's own, a copy unless nobody else has it. Nothing changes on an error.
        """
        assert self.block_table is not None and self.page_size is not None and self._pages is not None
        pool, size = self._pages, self.page_size
        column = torch.arange(table.shape[1], device=table.device)
        filled = -(-lens // size)
        table = torch.where(column < filled[:, None], table, -1)
        at = (filled - 1).clamp(min=0)[:, None]
        last = table.gather(1, at)[:, 0]
        unfilled = lens % size > 0
        users = pool.users - counts(self.block_table, pool.users.shape[0]) + counts(table, pool.users.shape[0])
        same = (last[:, None] == last) & unfilled[:, None] & unfilled
        alone = users[last.clamp(min=0)] == same.sum(1)
        copied = unfilled & ~(alone & ~same.tril(-1).any(1))
        wanted = copied[:, None] & (column == at)
        table = table.masked_fill(wanted, -1)
        users = users - counts(torch.where(copied, last, -1), pool.users.shape[0])
        if ends is not None:
            wanted = wanted | ((column >= filled[:, None]) & (column * size < ends[:, None]))
        pool.check(wanted, (users == 0).sum())
        pool.restart(users)
        table = torch.where(wanted, pool.take(wanted), table)
        page = table.gather(1, at)[:, 0]
        copied = copied & (page >= 0)
        for name in STORED:
            x: torch.Tensor | None = getattr(self, name)
            if x is not None and table.shape[0]:
                write(x, (page,), x[last.clamp(min=0)], copied)
        self._become(block_table=table, seq_lens=torch.minimum(lens, (table >= 0).sum(1) * size))

    def _become(self, **changed: torch.Tensor) -> None:
        """Have these values, at the same addresses where there are as many rows."""
        for name, value in changed.items():
            own: torch.Tensor = getattr(self, name)
            if own.shape == value.shape:
                own.copy_(value)
            else:
                self.put(name, value)

    # --- going back ----------------------------------------

    @property
    def seen(self) -> torch.Tensor:
        """`seq_lens`."""
        return self.seq_lens

    @property
    def kept(self) -> int:
        """Tokens that `rollback` can take back from every sequence now. Waits for a GPU."""
        return int(self.seq_lens.min()) if self.seq_lens.shape[0] else 0

    def keep(self, tokens: int) -> None:
        """Nothing has to be kept for a rollback."""
        _checks.size("tokens", tokens)

    def truncate(self, lens: int | torch.Tensor) -> None:
        """Forget all but the first `lens` tokens of every sequence.

        Args:
            lens: an int, or int32 or int64 [B], at most `seq_lens`.

        Raises:
            TypeError: what is no integer.
            ValueError: more than there are, or less than 0; a page that two rows shared has to be copied and none is free.
                Nothing has changed then. Where they cannot be read such numbers count as the nearest legal ones.
        """
        wanted = self._per_row("lens", lens)
        if _checks.readable(wanted) and bool(((wanted < 0) | (wanted > self.seq_lens)).any()):
            raise ValueError(f"lens: expected 0 to seq_lens, {_shown(self.seq_lens)}, got {_shown(wanted)}")
        self._shorten(torch.minimum(wanted.clamp(min=0), self.seq_lens))

    def rollback(self, tokens: int | torch.Tensor) -> None:
        """Be as before the last tokens: `truncate`, told how many go.

        Args:
            tokens: how many of every sequence; an int, or int32 or int64 [B].

        Raises:
            TypeError, ValueError: as `truncate`.
        """
        back = self._per_row("tokens", tokens)
        if _checks.readable(back) and bool(((back < 0) | (back > self.seq_lens)).any()):
            raise ValueError(f"tokens: expected 0 to seq_lens, {_shown(self.seq_lens)}, got {_shown(back)}")
        self._shorten((self.seq_lens - back.clamp(min=0)).clamp(min=0))

    def reset(self, mask: torch.Tensor | None = None) -> None:
        """Forget everything, or the sequences where the bool mask [B] is True. Pages are free again; stale keys stay, unseen."""
        if mask is None:
            self._shorten(torch.zeros_like(self.seq_lens))
            return
        _checks.booleans("mask", mask)
        if mask.shape != self.seq_lens.shape:
            raise ValueError(f"mask: expected shape {list(self.seq_lens.shape)}, got {list(mask.shape)}")
        self._shorten(self.seq_lens.masked_fill(mask.to(self.seq_lens.device), 0))

    def _shorten(self, lens: torch.Tensor) -> None:
        if self.block_table is None:
            self.seq_lens.copy_(lens)
        else:
            self._adopt(self.block_table, lens)

    def _per_row(self, name: str, value: int | torch.Tensor) -> torch.Tensor:
        """int64 [B] of a number for every sequence, or one for all."""
        if isinstance(value, torch.Tensor):
            _checks.integers(name, value, 1)
            _checks.same_device(name, value, self.seq_lens.device, "the cache")
            if value.shape != self.seq_lens.shape:
                raise ValueError(f"{name}: expected shape {list(self.seq_lens.shape)}, got {list(value.shape)}")
            return value.long()
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int or a tensor of them, got {type(value).__name__}")
        return torch.full_like(self.seq_lens, value)

    # --- rows ----------------------------------------

    def fork(self) -> SuperlinearKVCache:
        """A cache of the same sequences that goes on by itself: a copy, or with pages one that shares the full ones.

        Pages of a fork are taken from the pool of this cache until the fork's `reset`.

        Raises:
            ValueError: no pages for those that are not full. Nothing has changed then.
        """
        other = copy.copy(self)
        if self.block_table is None:
            for name, x in self.tensors().items():
                other.put(name, x.clone())
            return other
        other.put("block_table", torch.full_like(self.block_table, -1))
        other.put("seq_lens", torch.zeros_like(self.seq_lens))
        other._adopt(self.block_table, self.seq_lens)
        return other

    def select(self, rows: torch.Tensor) -> None:
        self._check_rows(rows)
        if self.block_table is None:
            super().select(rows)
            return
        rows = rows.to(self.seq_lens.device)
        self._adopt(self.block_table.index_select(0, rows), self.seq_lens.index_select(0, rows))

    def reorder(self, rows: torch.Tensor) -> None:
        if self.block_table is None:
            super().reorder(rows)
            return
        self._check_rows(rows)
        if rows.shape != self.seq_lens.shape:
            raise ValueError(f"rows: expected the {self.seq_lens.shape[0]} sequences of the cache, got {rows.shape[0]}")
        self.select(rows)

    def _check_rows(self, rows: torch.Tensor) -> None:
        _checks.integers("rows", rows, 1)
        count = self.seq_lens.shape[0]
        if _checks.readable(rows) and any(not 0 <= row < count for row in rows.tolist()):
            raise ValueError(f"rows: expected numbers in 0..{count - 1}, got {_shown(rows)}")

    # --- as a state ----------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name in NAMES if (x := getattr(self, name)) is not None}

    def put(self, name: str, value: torch.Tensor) -> None:
        if name not in NAMES:
            raise ValueError(f"state: expected names of a SuperlinearKVCache, got {name!r}")
        setattr(self, name, preallocated(value))

    @property
    def nbytes(self) -> int:
        """Memory of all tensors; with pages of the whole pool, which forks share."""
        return super().nbytes + (0 if self._pages is None else self._pages.nbytes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> None:
        """Move all tensors. A cache with pages leaves its pool to the forks, if it moves at all."""
        if self.k.device == torch.empty(0, device=device).device:
            return
        old, table = self._pages, self.block_table
        super().to(device, non_blocking)
        if old is not None and table is not None:
            old.restart(old.users - counts(table, old.users.shape[0]))
            self._own_pool()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies of the tensors that `state_dict` gave, of any number of sequences and pages.

        Raises:
            ValueError: names that are missing or not known, a cache of other shapes, dtypes or lengths. Nothing has changed then.
        """
        own = self.state_dict()
        for name in sorted(own.keys() ^ state.keys()):
            wanted = f"expected {name!r}" if name in own else "expected names of this SuperlinearKVCache"
            raise ValueError(f"state: {wanted}, got {sorted(state)}")
        batch, rows = state["seq_lens"].shape[0], state["k"].shape[0]
        for name, value in own.items():
            other = state[name]
            if not isinstance(value, torch.Tensor):
                if other != value:
                    raise ValueError(f"{name}: expected {value!r} as this cache has, got {other!r}")
                continue
            first = rows if self.block_table is not None and name in STORED else batch
            shape = [first, *value.shape[1:]]
            if other.dtype is not value.dtype or list(other.shape) != shape:
                got = f"{other.dtype} {list(other.shape)}"
                raise ValueError(f"{name}: expected {value.dtype} {shape}, got {got}")
        lens = state["seq_lens"]
        if batch and not 0 <= int(lens.min()) <= int(lens.max()) <= self.max_len:
            raise ValueError(f"seq_lens: expected numbers in 0..{self.max_len}, got {_shown(lens)}")
        if self.block_table is not None:
            table = state["block_table"]
            held = (table >= 0).sum(1).to(lens.device) * self.k.shape[1]
            if batch and (int(table.max()) >= rows or bool((held < lens).any())):
                raise ValueError(f"block_table: expected pages below {rows} for all of seq_lens, got {table.tolist()}")
            self.reset()  # pages of a pool that forks go on with
        for name, value in self.tensors().items():
            self.put(name, state[name].to(value.device, copy=True))
        self._own_pool()

    def _own_pool(self) -> None:
        """Count the pages of this cache alone."""
        if self.block_table is not None:
            self._pages = Pages(self.k.shape[0], self.k.device)
            self._pages.restart(counts(self.block_table, self.k.shape[0]))


STORED = ("k", "v", "search_keys")
NAMES = (*STORED, "block_table", "seq_lens")


def _shown(numbers: torch.Tensor) -> str:
    return _checks.shown(numbers.flatten().tolist())
