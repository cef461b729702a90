"""Which pages of a pool are in use, and by how many rows: counted on the device, so that a step never waits for it."""

from __future__ import annotations

import torch

from .. import _checks


class Pages:
    """The pages of one pool, which the rows of one cache and of its forks share.

    Attributes:
        users: int32 [P], rows that hold each page.
        free: int32 [P], of which the first `left` are the pages that nobody holds.
        left: int64 [].
    """

    def __init__(self, count: int, device: torch.device | str | None) -> None:
        self.users = torch.zeros(count, dtype=torch.int32, device=device)
        self.free = torch.arange(count, dtype=torch.int32, device=device)
        self.left = torch.full((), count, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self.users.nbytes + self.free.nbytes + self.left.nbytes

    def check(self, wanted: torch.Tensor, left: torch.Tensor) -> None:
        """ValueError where more pages are `wanted` than are `left`, if that can be read without waiting."""
        if _checks.readable(left) and int(wanted.sum()) > int(left):
            raise ValueError(
                f"num_pages: expected {int(wanted.sum())} more pages of the pool of {self.users.shape[0]}, of which {int(left)} "
                "are free"
            )

    def take(self, wanted: torch.Tensor) -> torch.Tensor:
        """A page for everything `wanted`, a bool tensor: int32 of its shape, -1 where none is wanted or none is left."""
        rank = wanted.flatten().cumsum(0).view_as(wanted)
        given = wanted & (rank <= self.left)
        page = torch.where(given, self.free[(self.left - rank).clamp(0, self.free.shape[0] - 1)], -1)
        self.left -= given.sum()
        self.users += counts(page, self.users.shape[0])
        return page

    def restart(self, users: torch.Tensor) -> None:
        """Go on with these users."""
        self.users.copy_(users)
        used = (users > 0).to(torch.uint8)
        self.free.copy_(used.argsort(stable=True))
        self.left.copy_((used == 0).sum())


def counts(table: torch.Tensor, pages: int) -> torch.Tensor:
    """int32 [P]: how often each page is in a table, where -1 is none."""
    found = torch.zeros(pages, dtype=torch.int32, device=table.device)
    return found.index_add_(0, table.clamp(min=0).flatten(), (table >= 0).flatten().int())


def write(x: torch.Tensor, at: tuple[torch.Tensor, ...], value: torch.Tensor, chosen: torch.Tensor | None) -> None:
    """x[at] = value at the `chosen` ones of [n] places, None for all; no others are touched, whatever `at` says there.

    Those that are not chosen repeat the first that is, or else write x[0] to itself: nothing has to be counted.
    """
    if chosen is not None:
        numbers = torch.arange(chosen.shape[0], device=x.device)
        pick, some = torch.where(chosen, numbers, chosen.to(torch.uint8).argmax()), chosen.any()
        at = tuple(torch.where(some, index[pick], 0).long() for index in at)
        value = torch.where(some, value[pick], x[(0,) * len(at)])
    x.index_put_(at, value)
