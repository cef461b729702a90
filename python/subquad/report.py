"""`subquad report`: what is installed here, which backend would run each op, and why not the others."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from . import _backends, _build, _env, _native
from .contract import CONTRACTS, Contract

SCHEMA = 1
_DISTRIBUTIONS = ("torch", "triton", "numpy", "transformers", "rich", "ninja")


def _probe(question: Callable[..., Any], *args: Any) -> Any:
    """The answer, or the error as text: a report that crashes helps nobody."""
    try:
        return question(*args)
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cxx() -> str | None:
    if shutil.which(_env.cxx()) is None:
        return None
    output = subprocess.run([_env.cxx(), "--version"], capture_output=True, text=True, timeout=20).stdout.strip()
    return output.splitlines()[0] if output else None


def _nvcc() -> str | None:
    path = _build.find_nvcc(_env.cuda_home())
    if path is None:
        return None
    output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    return next((line.strip() for line in output.splitlines() if "release" in line), None)


def versions() -> dict[str, str | None]:
    """Versions of subquad, Python, the packages it works with and the compilers."""
    from . import __version__

    found: dict[str, str | None] = {"subquad": __version__, "python": platform.python_version()}
    found |= {name: _probe(_version, name) for name in _DISTRIBUTIONS}
    found["c++"] = _probe(_cxx)
    found["nvcc"] = _probe(_nvcc)
    return found


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def machine() -> dict[str, Any]:
    """The hardware and how torch would use it."""
    return {
        "platform": _probe(platform.platform),
        "cpu": _probe(_cpu_model),
        "logical_cpus": _probe(os.cpu_count),
        "memory_gib": _probe(_memory_gib),
        "torch_threads": _probe(torch.get_num_threads),
        "torch_cpu_capability": _probe(torch.backends.cpu.get_cpu_capability),
        "torch_cuda": _probe(lambda: torch.version.cuda),
        "gpus": _probe(lambda: [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]),
    }


def _native_state() -> dict[str, Any]:
    names = ("_C", "_C_cuda", "_C_simt")
    libraries = {name: _probe(_native.load, name, False) for name in names}
    paths = _native.loaded()
    return {
        "libraries": {name: str(paths[name]) if name in paths else reason for name, reason in libraries.items()},
        "cpu_isa_available": _probe(_native.cpu_isas),
        "cpu_isa_in_use": _probe(_native.cpu_isa),
        "cache": _probe(lambda: str(_env.read().cache_dir)),
    }


def _choice(stem: str, device: str, states: dict[str, str], few: bool = False) -> str:
    """What a call without `backend=` would run, found without warning or building anything."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no device"
    forced = _backends._override or _backends._from_env
    if forced is not None:
        return forced if states.get(forced) == "available" else f"{forced} (would raise)"
    return next(name for name in CONTRACTS[stem].preference(device, few) if states[name] == "available")


def _op(stem: str, device: str, states: dict[str, str]) -> dict[str, Any]:
    contract = CONTRACTS[stem]
    entry = {"chosen": _probe(_choice, stem, device, states), "backends": states}
    if device == "cuda" and contract.few:
        entry["few_tokens"] = contract.few
        entry["chosen_for_few_tokens"] = _probe(_choice, stem, device, states, True)
    return entry


def _ops() -> dict[str, Any]:
    table = _backends.backends()
    return {stem: {device: _op(stem, device, s) for device, s in devices.items()} for stem, devices in table.items()}


def collect() -> dict[str, Any]:
    """Everything the report says, as plain data."""
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "machine": machine(),
        "native": _probe(_native_state),
        "environment": _probe(_env.as_dict),
        "ops": _probe(_ops),
    }


def _kinds(contract: Contract, backend: str, device: str) -> str:
    """What a backend has of an op: "fwd", "fwd bwd", "step" or several of them."""
    if backend in contract.missing:
        return "-"
    kinds = {"_fwd": "fwd", "_bwd": "bwd", "_": "step"}
    there = [name for name in contract.operators if backend == "reference" or _backends.has(name, backend, device)]
    found = {word for ending, word in kinds.items() if any(name.endswith(ending) for name in there)}
    composed = contract.trained_by is not None and backend not in CONTRACTS[contract.trained_by].missing
    if "fwd" in found and (backend == "reference" or composed):
        found.add("bwd")
    return " ".join(word for word in kinds.values() if word in found)


def _gradients(contract: Contract) -> str:
    """Where the gradients of CUDA C++ come from when it has none itself."""
    for operator in contract.operators.values():
        if operator.backward and not _backends.has(operator.backward, "native", "cuda"):
            order = [b for b in contract.preference("cuda") if _backends.has(operator.backward, b, "cuda")]
            return f"; gradients of native: {order[0]}"
    return ""


def support_table() -> str:
    """The support table of README.md, in markdown: what exists, whatever this machine can run."""
    header = ("op", "native, CPU", "native, CUDA", "triton", "simt", "reference", "chosen on CPU", "chosen on GPU")
    lines = [header, ("---",) * len(header)]
    notes = []
    for stem, contract in CONTRACTS.items():
        places = (("native", "cpu"), ("native", "cuda"), ("triton", "cuda"), ("simt", "cpu"), ("reference", "cpu"))
        few = f"; up to {contract.few} tokens: {' > '.join(contract.cuda_few)}" if contract.few else ""
        chosen = (" > ".join(contract.cpu), " > ".join(contract.cuda) + few + _gradients(contract))
        lines.append((f"`{stem}`", *(_kinds(contract, *place) for place in places), *chosen))
        notes += [f"- `{stem}` has no `{backend}` backend: {reason}" for backend, reason in contract.missing.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([table, *([""] if notes else []), *notes])


def _show_pairs(console: Any, title: str, pairs: Any) -> None:
    from rich.table import Table

    if not isinstance(pairs, dict):  # a probe that failed
        pairs = {"": pairs}
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str("-" if value is None else value)
        table.add_row(name, text or "-")
    console.print(table, "")


def _show_ops(console: Any, ops: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="Backends", title_justify="left")
    for column in ("op", "device", "chosen", "backend", "state"):
        table.add_column(column, overflow="fold", no_wrap=column == "op")
    for stem, devices in ops.items():
        for device, entry in devices.items():
            chosen = str(entry["chosen"])
            if "few_tokens" in entry:
                chosen += f"; {entry['chosen_for_few_tokens']} up to {entry['few_tokens']} tokens"
            heads = (stem, device, chosen)
            for row, (backend, state) in enumerate(entry["backends"].items()):
                table.add_row(*(heads if row == 0 else ("", "", "")), backend, state)
            table.add_section()
    console.print(table)


def show(report: dict[str, Any]) -> None:
    """Print a report for a person."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    native = report["native"]
    if isinstance(native, dict):
        native = {**native["libraries"], **{name: value for name, value in native.items() if name != "libraries"}}
    _show_pairs(console, "Versions", report["versions"])
    _show_pairs(console, "Machine", report["machine"])
    _show_pairs(console, "Native libraries", native)
    _show_pairs(console, "Environment", report["environment"] or {"SUBQUAD_*": "none set"})
    if isinstance(report["ops"], dict):
        _show_ops(console, report["ops"])
    else:
        console.print(report["ops"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--ops", action="store_true", help="print only the support table of the README, as markdown")


def run_from_args(args: argparse.Namespace) -> int:
    """Print what was asked for; always 0."""
    if args.ops:
        print(support_table())
    elif args.json:
        json.dump(collect(), sys.stdout, indent=2)
        print()
    else:
        show(collect())
    return 0


if __name__ == "__main__":
    from .cli import module_main

    raise SystemExit(module_main("subquad.report"))
