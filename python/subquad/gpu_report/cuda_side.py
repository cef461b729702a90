"""The CUDA C++ half of the report: compile every source with nvcc, as the extension does, and take the cubins out.

A kernel may declare why it spills, beside its definition: a comment `// allow-spill(kernel_name): reason`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import _build, _env, _native
from ..contract import in_family
from .occupancy import Arch

_ALLOW = re.compile(r"//\s*allow-spill\((\w+)\):\s*(\S.*)")


class CudaError(RuntimeError):
    """nvcc refused a source; the message carries its own."""


def unavailable(archs: Sequence[Arch]) -> str | None:
    """Why the CUDA sources cannot be compiled here for any of these architectures, or None."""
    if _build.find_nvcc(_env.cuda_home()) is None:
        return "nvcc was not found (install the CUDA toolkit or set CUDA_HOME)"
    if not set(archs) & set(_build.CUDA_ARCHES):
        return f"the CUDA sources are compiled for {', '.join(map(str, _build.CUDA_ARCHES))} only"
    return None


def nvcc_version() -> str | None:
    """Release of the CUDA compiler, such as "13.0", or None without one."""
    nvcc = _build.find_nvcc(_env.cuda_home())
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else None


def plan(nvcc: str, archs: tuple[int, ...]) -> tuple[_build.Library, Path]:
    """The extension for these architectures, and where the per-user cache keeps it, compiled or not."""
    library = _build.cuda_library(_native.SOURCES.resolve(), _build.torch_dir(), _env.cxx(), nvcc, archs)
    return library, _build.cached_path(library, _build.private_folder(_env.read().cache_dir))


def compile_all(family: str | None, archs: Sequence[Arch], progress: Callable[[int], None]) -> dict[str, Path]:
    """Objects by op stem, each with the cubins of the requested architectures. Kept in the per-user cache.

    Args:
        family: a prefix of op stems, or None for all.
        archs: architectures; those that are not NVIDIA's are ignored.
        progress: called with the number of sources first (negated), then with 1 for every compiled one.

    Raises:
        CudaError: if nvcc fails.
    """
    nvcc = _build.find_nvcc(_env.cuda_home())
    assert nvcc is not None, "ask unavailable() first"
    known = tuple(arch for arch in archs if isinstance(arch, int) and arch in _build.CUDA_ARCHES)
    library, extension = plan(nvcc, known)
    units = [unit for unit in library.units if in_family(unit.source.parent.name, family)]
    progress(-len(units))
    built = extension.parent  # where the extension itself was compiled, if it was
    folder = _build.private_folder(_env.read().cache_dir / f"gpu-report-{library.key()}")
    objects = {}
    for unit in units:
        candidates = (built / unit.obj, folder / unit.obj)
        path = next((candidate for candidate in candidates if candidate.exists()), None)
        objects[unit.source.parent.name] = path or _compile(unit, folder / unit.obj)
        progress(1)
    return objects


def _compile(unit: _build.Unit, output: Path) -> Path:
    partial = output.with_suffix(".partial.o")
    result = subprocess.run([*unit.command, "-c", str(unit.source), "-o", str(partial)], capture_output=True, text=True)
    if result.returncode != 0:
        raise CudaError(f"nvcc failed on {unit.source.parent.name}/{unit.source.name}:\n{result.stderr[-4000:]}")
    return partial.replace(output)


def allowed_spills() -> dict[str, str]:
    """Kernel name -> declared reason, from the comments in the CUDA sources."""
    reasons: dict[str, str] = {}
    for path in sorted((_native.SOURCES / "ops").glob("*/*.cu*")):
        reasons.update(_ALLOW.findall(path.read_text()))
    return reasons
