"""`agree`: the same error on all ranks where they differ, before a collective is entered that would hang or lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from .. import _env
from . import _collectives
from ._collectives import Group

_SHOWN = 200  # characters of a fact in a message
_DEBUG = _env.read().debug


def agree(group: Group = None, **facts: Any) -> None:
    """Check that all ranks of a group have the same facts; all of them must call it.

    One gather of 8 bytes a rank, and one more of the facts themselves where they differ.

    Args:
        group: a process group, a one-dimensional DeviceMesh, or None for the default group.
        facts: by name; compared by their `repr`.

    Raises:
        ValueError: on every rank, naming the first fact that differs and each rank's.
    """
    group = _collectives.group_of(group)
    _, size = _collectives.rank_and_size(group)
    if size == 1:
        return
    words = {name: repr(value) for name, value in facts.items()}
    digest = hashlib.blake2b(repr(sorted(words.items())).encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little", signed=True)])
    every = _collectives.all_gather(own.to(_device(group)), group).tolist()
    if len(set(every)) == 1:
        return
    known = _collectives.gather_objects(words, group)
    names = dict.fromkeys(name for one in known for name in one)  # in the order they were given in
    name = next(name for name in names if len({one.get(name) for one in known}) > 1)
    got = ", ".join(f"{one.get(name, 'nothing')[:_SHOWN]} on rank {r}" for r, one in enumerate(known))
    raise ValueError(f"{name}: expected the same on all ranks of the group, got {got}")


def _device(group: Group) -> torch.device:
    """Where the group's collectives work."""
    backend = torch.distributed.get_backend(group)
    return torch.device("cuda" if backend == "nccl" else "cpu")


def checked(layout: Any, signature: Callable[[], dict[str, Any]], check: Callable[[], None]) -> None:
    """The local checks of a call, then, for a signature that the layout has not seen, the agreement of all ranks about it.

    A rank whose check fails tells the others, so that all raise and nobody waits. Once a signature is known nothing is sent, and
    a rank that fails then leaves the others waiting for the group's timeout; under SUBQUAD_DEBUG=1 all agree on every call.
    """
    problem: Exception | None = None
    facts: dict[str, Any] = {}
    try:
        check()
        facts = signature()
    except (TypeError, ValueError) as error:
        problem = error
    key = repr(sorted(facts.items()))
    if problem is None and key in layout.agreed and not _DEBUG:
        return
    if layout.size > 1:
        try:
            agree(layout.group, problem=None if problem is None else f"{type(problem).__name__}: {problem}", **facts)
        except ValueError:
            if problem is None:
                raise
    if problem is not None:
        raise problem
    layout.agreed.add(key)
