"""`python -m subquad._dev.fingerprint`: hashes of what every op computes, to show that a change moved no bit.

Outputs, tensors changed in place and gradients of every sample of every spec: all samples on native and reference, the first
few small ones in Triton's interpreter and in the emulator. Hashes hold for one machine and one torch; write them before a
change, compare after it:

    python -m subquad._dev.fingerprint --write before.json
    python -m subquad._dev.fingerprint --compare before.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .. import _env
from .._backends import BACKENDS, unavailable
from ..testing.case import Case
from ..testing.spec import OpSpec

INTERPRETED = ("triton", "simt")
FEW = 2  # samples of an interpreted backend


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of shapes, dtypes and bits."""
    state = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        state.update(f"{plain.dtype}{list(plain.shape)}".encode())
        state.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return state.hexdigest()[:16]


def of_spec(spec: OpSpec, backend: str) -> Iterator[tuple[str, str]]:
    """(what, hash) of every sample's results and gradients."""
    interpreted = backend in INTERPRETED
    for dtype in spec.dtypes[:1] if interpreted else spec.dtypes:
        case = Case(spec, backend, dtype)
        for sample in case.samples("small" if interpreted else "full")[: FEW if interpreted else None]:
            what = f"{spec.name}/{backend}/{str(dtype).removeprefix('torch.')}/{sample.id}"
            yield what, digest(case.call(sample))
            for name, grad in case.gradients(sample).items():
                yield f"{what}/d{name}", digest((grad,))


def collect(backends: Iterable[str], stems: Iterable[str] = ()) -> dict[str, str]:
    """Hashes by spec, backend, dtype, sample and gradient; of the ops named, or of all."""
    from ..testing.specs import SPECS

    found: dict[str, str] = {}
    wanted = set(stems)
    for spec in SPECS:
        for backend in backends:
            if (not wanted or spec.stem in wanted) and unavailable(spec.stem, backend, "cpu", build=True) is None:
                found.update(of_spec(spec, backend))
    return found


def compare(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What differs, one line each; entries that only one side has count where the other has their backend and op."""
    scope = {tuple(key.split("/")[:2]) for key in before} & {tuple(key.split("/")[:2]) for key in after}
    keys = {key for key in before | after if tuple(key.split("/")[:2]) in scope}
    words = {(True, False): "gone", (False, True): "new", (True, True): "other bits"}
    return [f"{key}: {words[key in before, key in after]}" for key in sorted(keys) if before.get(key) != after.get(key)]


def main(argv: list[str] | None = None) -> int:
    """Write or compare; 1 when something differs."""
    parser = argparse.ArgumentParser(
        prog="python -m subquad._dev.fingerprint", description="Hash what every op computes."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="hashes of now")
    action.add_argument("--compare", type=Path, metavar="FILE", help="list what has other bits than then")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--ops", nargs="+", default=(), metavar="STEM", help="these ops alone")
    args = parser.parse_args(argv)
    _env.interpret_triton()
    torch.set_num_threads(1)
    now = collect(args.backends, args.ops)
    if args.write:
        args.write.write_text(json.dumps(now, indent=1) + "\n")
        print(f"{len(now)} hashes")
        return 0
    different = compare(json.loads(args.compare.read_text()), now)
    print("\n".join([*different, f"{len(now)} hashes, {len(different)} different"]))
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
