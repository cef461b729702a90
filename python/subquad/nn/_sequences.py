"""The tokens of a batch as sequences one after the other: without padding, and with packed ones apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._packing import Packed
from ..cache.lawcat import LawcatState
from ._tokens import Tokens


class Sequences:
    """S sequences in a row of N tokens, gathered from a batch [B, T].

    Compiled code cannot ask how many tokens are real. There N is B T, and the padding is a last sequence that nobody looks at.
    How many sequences a mask packs it cannot ask either: `resets` then say where the sums begin anew.

    Attributes:
        packed: the bounds of all sequences.
        sums: those that the recurrence is given, less than `packed` where there are `resets`; None: a batch of one sequence.
        resets: bool [N], tokens before which the sums are forgotten; or None.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        packed: Packed,
        rows: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
        sums: Packed | None = None,
        resets: torch.Tensor | None = None,
    ) -> None:
        self.shape, self.packed, self.resets = shape, packed, resets
        self.sums = packed if resets is None else sums
        self._rows, self._real, self._source, self._last = rows, real, source, last

    @classmethod
    def of(cls, tokens: Tokens, batch: int, length: int) -> Sequences | None:
        """None: the batch as it is, every row one sequence that goes on."""
        return tokens.once((cls, batch, length), lambda: cls._of(tokens, batch, length))

    @classmethod
    def _of(cls, tokens: Tokens, batch: int, length: int) -> Sequences | None:
        compiling, count = torch.compiler.is_compiling(), batch * length
        real, begins, shape = tokens.real, tokens.begins, (batch, length)
        if tokens.packed is not None:
            device, number = tokens.packed.int64.device, tokens.packed.sequences
            source = torch.full((number,), batch, device=device)
            return cls(shape, tokens.packed, source=source, last=torch.full((1,), number - 1, device=device))
        if real is None and begins is None:
            return None
        rows = None
        if real is not None:
            rows = real.flatten().logical_not().argsort(stable=True) if compiling else real.flatten().nonzero()[:, 0]
            if not compiling and rows.shape[0] == count:
                real = rows = None
        if begins is None:
            if real is None:
                return None
            counts = real.sum(1)
            if not compiling:
                return cls(shape, _packed(counts, rows), rows)
            device = counts.device
            counts = torch.cat([counts, count - counts.sum()[None]])
            places = torch.arange(batch + 1, device=device)
            return cls(shape, _packed(counts, rows), rows, real, source=places, last=places[:batch])
        # A row goes on with a sequence, which may be empty here, and each beginning adds one.
        row = torch.arange(count, device=begins.device) // length
        opened = begins.flatten().cumsum(0)
        sequence, ends = row + opened, opened.view(batch, length)[:, -1]
        number = batch + (count if compiling else int(ends[-1]))
        of_row = torch.arange(batch, device=begins.device)
        last = of_row + ends
        if not compiling:
            sequence = sequence if rows is None else sequence[rows]
            counts = torch.zeros(number, dtype=torch.int64, device=row.device).index_add(
                0, sequence, torch.ones_like(sequence)
            )
            source = torch.full((number,), batch, device=row.device)
            source = source.index_copy(0, F.pad(last[:-1] + 1, (1, 0)), of_row)
            return cls(shape, _packed(counts, count if rows is None else rows), rows, source=source, last=last)
        if real is not None:
            assert rows is not None
            sequence = torch.where(real.flatten(), sequence, number)
            row, sequence, resets = (
                torch.where(real.flatten(), row, batch)[rows],
                sequence[rows],
                begins.flatten()[rows],
            )
        else:
            resets = begins.flatten()
        counts, of_rows = (
            torch.zeros(size, dtype=torch.int64, device=row.device).index_add(0, x, torch.ones_like(x))
            for size, x in ((number + 1, sequence), (batch + 1, row))
        )
        return cls(shape, _packed(counts, count), rows, real, sums=_packed(of_rows, count), resets=resets)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens [1, N, ...] of x [B, T, ...]. What is in padding, gone or not, is gone."""
        flat = x.flatten(0, 1)
        if self._rows is not None:
            flat = flat[self._rows]
        if self._real is not None:
            flat = torch.where(self._shown(flat), flat, 0)
        return flat[None]

    def spread(self, y: torch.Tensor) -> torch.Tensor:
        """Back to [B, T, ...], 0 at padding."""
        flat = y[0]
        if self._real is not None:
            flat = torch.where(self._shown(flat), flat, 0)
        if self._rows is not None:
            flat = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:]).index_copy(0, self._rows, flat)
        return flat.unflatten(0, self.shape)

    def _shown(self, flat: torch.Tensor) -> torch.Tensor:
        assert self._real is not None and self._rows is not None
        return self._real.flatten()[self._rows].view(-1, *(1,) * (flat.dim() - 1))

    def enter(self, state: LawcatState | None) -> LawcatState | None:
        """The state of every sequence, from that of the rows: those that begin here have none."""
        if state is None or self._source is None:
            return state
        inner = LawcatState()
        for name, value in state.current().items():
            inner.put(name, torch.cat([value, torch.zeros_like(value[:1])]).index_select(0, self._source))
        return inner

    def leave(self, inner: LawcatState | None, state: LawcatState | None) -> None:
        """The state of the rows, from that of the sequences: the last one's."""
        if state is None or inner is None or inner is state:
            return
        assert self._last is not None
        for name, value in inner.current().items():
            state.put(name, value.index_select(0, self._last))

    def forget(self, g: torch.Tensor | None) -> torch.Tensor:
        """Gates with `resets`: nothing passes one of -inf."""
        assert self.resets is not None
        resets = self.resets[None, :, None]
        g = torch.zeros(resets.shape, device=resets.device) if g is None else g
        return torch.where(resets if g.dim() == 3 else resets[..., None], -torch.inf, g)


def _packed(counts: torch.Tensor, tokens: torch.Tensor | int | None) -> Packed:
    assert tokens is not None
    return Packed(F.pad(counts.cumsum(0), (1, 0)), tokens.shape[0] if isinstance(tokens, torch.Tensor) else tokens)


# --- rows before the tokens ----------------------------------------


class Streams:
    """Rows of tokens behind `lead` rows of each sequence's past: [B, lead + T, ...], or [1, S lead + N, ...] of packed ones."""

    def __init__(self, lead: int, length: int, packed: Packed | None) -> None:
        self.lead, self.length, self.packed = lead, length, packed
        if packed is not None:
            self.sequence = packed.sequence.long()
            self.place = torch.arange(packed.tokens, device=self.sequence.device) + (self.sequence + 1) * lead

    def join(self, x: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
        """x [B, T, ...] behind past [B, lead, ...], or x [1, N, ...] behind past [S, lead, ...]; None: zeros."""
        if not self.lead:
            return x
        if self.packed is None:
            past = x.new_zeros(x.shape[0], self.lead, *x.shape[2:]) if past is None else past.to(x.dtype)
            return torch.cat([past, x], 1)
        rows = self.packed.sequences * self.lead
        stream = x.new_zeros(rows + x.shape[1], *x.shape[2:]).index_copy(0, self.place, x[0])
        if past is not None:
            first = self.packed.int64[:-1, None] + self._nth(self.packed.sequences) * self.lead
            stream = stream.index_copy(
                0, (first + self._nth(self.lead)[:, 0]).flatten(), past.to(x.dtype).flatten(0, 1)
            )
        return stream[None]

    def _nth(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self.place.device)[:, None]

    def tail(self, stream: torch.Tensor) -> torch.Tensor:
        """The last `lead` rows of every sequence, copied: a view would keep the whole prompt."""
        if self.packed is None:
            return stream[:, self.length :].clone()
        first = self.packed.int64[1:, None] + self._nth(self.packed.sequences) * self.lead
        return stream[0, first + self._nth(self.lead)[:, 0]]

    def tokens(self, stream: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens themselves."""
        return stream[:, self.lead :] if self.packed is None else stream[:, self.place]

    def delayed(self, stream: torch.Tensor) -> torch.Tensor:
        """The rows `lead` before the tokens, of which the stream may lack the last `lead`."""
        return stream[:, : self.length] if self.packed is None else stream[:, self.place - self.lead]

    def sequences(self) -> torch.Tensor | None:
        """Of which sequence every row is, int64 [1, S lead + N]; None: of that of its row."""
        if self.packed is None:
            return None
        whole = self._nth(self.packed.sequences).expand(-1, self.lead)
        return self.join(self.sequence[None], whole)
