"""The contract of every op: its schema in three namespaces, its fakes, limits and preferred backends. One file per stem.

`subquad::<op>` is implemented in C++ (CPU and CUDA), `subquad_triton::<op>` by Triton launchers, `subquad_simt::<op>` by the
CUDA sources running in the host emulator. All are defined here, at import, from the same string, so that schemas and fakes
exist whether or not a native library is present; a library only adds implementations when it is loaded.

A file of this folder that is named after a stem is found and defined; nothing lists the stems.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from ._contract import Contract, Operator

NAMESPACES = {"native": "subquad", "triton": "subquad_triton", "simt": "subquad_simt"}
CONTRACTS: dict[str, Contract] = {
    module.name: import_module(f"{__name__}.{module.name}").CONTRACT
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
}
STEMS = tuple(CONTRACTS)
OPERATORS: dict[str, Operator] = {
    name: op for contract in CONTRACTS.values() for name, op in contract.operators.items()
}
STEM_OF: dict[str, str] = {name: stem for stem, contract in CONTRACTS.items() for name in contract.operators}


def in_family(stem: str, family: str | None) -> bool:
    """Whether an op stem belongs to a family: by its contract, equal to its name, or beginning with that and an underscore."""
    if family is None or stem == family or stem.startswith(family + "_"):
        return True
    return stem in CONTRACTS and CONTRACTS[stem].family == family


def families() -> tuple[str, ...]:
    """The families that contracts name."""
    return tuple(dict.fromkeys(c.family for c in CONTRACTS.values() if c.family is not None))


def _triton_impl(name: str) -> Callable[..., Any]:
    """The launcher of the same name, imported at its first call: importing subquad must not import triton.

    Triton launches on the current device: here that of the first argument.
    """
    launcher: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(import_module(f"subquad.kernels.{STEM_OF[name]}"), name)
        for i, x in enumerate(args):
            if isinstance(x, torch.Tensor) and x.numel() and not x.untyped_storage().nbytes():
                argument = HANDLES["triton"][name]._schema.arguments[i].name
                raise ValueError(f"{argument}: expected a tensor with memory, got one whose storage was freed")
        with torch.cuda.device_of(args[0]):
            return launcher(*args)

    return call


def _define() -> tuple[dict[str, dict[str, Any]], list[torch.library.Library]]:
    handles: dict[str, dict[str, Any]] = {backend: {} for backend in NAMESPACES}
    libraries = []
    for backend, namespace in NAMESPACES.items():
        library = torch.library.Library(namespace, "DEF")
        libraries.append(library)
        for name, op in OPERATORS.items():
            library.define(name + op.args, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{namespace}::{name}", op.fake, lib=library)
            if backend == "triton" and op.triton:
                for key in ("CPU", "CUDA"):
                    library.impl(name, _triton_impl(name), key)
            handles[backend][name] = getattr(getattr(torch.ops, namespace), name).default
    return handles, libraries


# HANDLES[backend][op] is the overload to call; the libraries are kept because definitions die with them.
HANDLES, _LIBRARIES = _define()

__all__ = [
    "CONTRACTS",
    "HANDLES",
    "NAMESPACES",
    "OPERATORS",
    "STEMS",
    "STEM_OF",
    "Contract",
    "Operator",
    "families",
    "in_family",
]
