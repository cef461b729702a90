"""How native code is compiled: one plan per library, executed by ninja. Standard library only (setup.py loads this file).

The same plan serves `pip install`, the build at first use, the emulator's library for tests and the sanitised variants. torch is
located without importing it, and only its stable headers are used, so one binary serves every torch from 2.10 on.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TORCH_TARGET = "0x020a000000000000"  # 2.10
PYTHON_TARGET = "0x030a0000"  # 3.10
X86_LEVELS = {
    "baseline": ("-march=x86-64",),
    "v3": ("-march=x86-64-v3",),
    "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "v4_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"),
}
CUDA_ARCHES = {80: "80", 86: "86", 89: "89", 90: "90a", 100: "100", 103: "103", 120: "120"}
SHIPPED = (80, 90, 100)  # run on sm_86, sm_89 and sm_103 as they are; sm_120 gets the newest one's PTX
# GCC 12 warns about the undefined values inside its own intrinsics headers (its bug 105593), hiding every other message.
INTRINSICS_NOISE = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")


class BuildError(RuntimeError):
    """The native code could not be built; the message says why and what to do."""


@dataclass(frozen=True)
class Unit:
    """One compiler call: source -> object."""

    source: Path
    obj: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """A shared library: its units, the linker call and what its content depends on."""

    name: str
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    root: Path

    def key(self) -> str:
        """Digest of every source, header and command: equal keys mean interchangeable binaries."""
        digest = hashlib.sha256(repr((self.link, [(u.obj, u.command) for u in self.units])).encode())
        for path in sorted(self.root.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp", ".cu") and path.is_file():
                digest.update(path.relative_to(self.root).as_posix().encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def torch_dir() -> Path:
    """Folder of the installed torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not importable here: install it first and build without isolation")
    return Path(next(iter(spec.submodule_search_locations)))


def torch_cuda_version(torch: Path) -> str | None:
    """The CUDA version this torch was built for, or None for a CPU build."""
    match = re.search(r"^cuda.*=\s*'([0-9.]+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return match.group(1) if match else None


def _includes(root: Path, torch: Path) -> tuple[str, ...]:
    python = sysconfig.get_paths()["include"]
    return (f"-I{root}", "-isystem", str(torch / "include"), "-isystem", python)


def _defines() -> tuple[str, ...]:
    return (f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}")


def _object(root: Path, source: Path, suffix: str = "") -> str:
    """Name of an object file: the path below `root` in one word, such as ops_cats_mlp_cpu.isa.v3.o."""
    return source.relative_to(root).with_suffix("").as_posix().replace("/", "_") + f"{suffix}.o"


def _isa_flags() -> dict[str, tuple[str, ...]]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86_LEVELS
    return {"baseline": ()}


def _link(cxx: str, torch: Path, *extra: str) -> tuple[str, ...]:
    return (cxx, "-shared", *extra, f"-L{torch / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-lc10")


def native_library(root: Path, torch: Path, cxx: str, sanitize: bool = False) -> Library:
    """`_C`: the CPU kernels (files named *.isa.cpp once per instruction set) and their bindings."""
    extra = SANITIZE if sanitize else ()
    base: tuple[str, ...] = (
        cxx,
        "-std=c++20",
        "-O1" if sanitize else "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        *extra,
    )
    base += ("-fno-math-errno", "-fno-trapping-math")
    base += (f"-ffile-prefix-map={root}=csrc", *_defines(), *_includes(root, torch))
    units = []
    for source in (root / "module.cpp", *sorted(root.glob("cpu/*.cpp")), *sorted(root.glob("ops/*/cpu*.cpp"))):
        if source.name.endswith(".isa.cpp"):
            for level, flags in _isa_flags().items():
                command = (*base, *flags, *INTRINSICS_NOISE, f"-DSUBQUAD_ISA={level}")
                units.append(Unit(source, _object(root, source, f".{level}"), command))
        else:
            units.append(Unit(source, _object(root, source), base))
    return Library("_C", tuple(units), _link(cxx, torch, *extra), root)


def cuda_library(root: Path, torch: Path, cxx: str, nvcc: str, arches: tuple[int, ...] = SHIPPED) -> Library:
    """`_C_cuda`: the CUDA kernels for these architectures, plus PTX of the newest."""
    gencode = []
    for arch in arches:
        name = CUDA_ARCHES[arch]
        gencode += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    gencode += ["-gencode", f"arch=compute_{max(arches)},code=compute_{max(arches)}"]
    base: tuple[str, ...] = (
        nvcc,
        "-std=c++20",
        "-O3",
        "-ccbin",
        cxx,
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-Xptxas",
        "-v",
    )
    base += ("-lineinfo", *gencode, *_defines(), *_includes(root, torch))
    units = tuple(Unit(source, _object(root, source), base) for source in sorted(root.glob("ops/*/cuda*.cu")))
    # nvcc links, so that it finds its own static runtime.
    link: tuple[str, ...] = (nvcc, "-shared", "-cudart", "static", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10")
    # libtorch.so needs libtorch_cuda.so where there is one: through it the weak stream getter of cuda/launch.h is found.
    link += ("-Xlinker", "--no-as-needed", "-ltorch")
    return Library("_C_cuda", units, link, root)


def simt_library(root: Path, torch: Path, cxx: str, sanitize: bool = False) -> Library:
    """`_C_simt`: the CUDA sources compiled for the host against the emulator; tests only."""
    extra = SANITIZE if sanitize else ()
    base: tuple[str, ...] = (
        cxx,
        "-std=c++20",
        "-O1" if sanitize else "-O2",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        *extra,
    )
    base += (f"-ffile-prefix-map={root}=csrc", "-DSUBQUAD_SIMT", *_defines(), *_includes(root, torch))
    cuda = [Unit(s, _object(root, s), (*base, "-x", "c++")) for s in sorted(root.glob("ops/*/cuda*.cu"))]
    runtime = [Unit(s, _object(root, s), base) for s in sorted(root.glob("simt/*.cpp"))]
    return Library("_C_simt", (*cuda, *runtime), _link(cxx, torch, *extra), root)


def find_nvcc(cuda_home: Path | None = None) -> str | None:
    """The CUDA compiler: from the toolkit the environment names, else from PATH."""
    candidate = cuda_home / "bin" / "nvcc" if cuda_home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def find_ninja() -> str:
    """The ninja executable: on PATH or from the Python package."""
    path = shutil.which("ninja")
    if path is None and importlib.util.find_spec("ninja") is not None:
        import ninja

        path = str(Path(ninja.BIN_DIR) / "ninja")
    if path is None or not Path(path).exists():
        raise BuildError("ninja was not found: pip install ninja")
    return path


def compile_library(library: Library, folder: Path, output: Path, verbose: bool = False) -> str:
    """Compile and link into `output` with ninja, in `folder`. Returns the build log; raises BuildError with it."""
    compiler = library.units[0].command[0] if library.units else "c++"
    if shutil.which(compiler) is None:
        raise BuildError(
            f"no C++ compiler: {compiler!r} was not found; install one (Debian: apt install g++) or set CXX"
        )
    ninja = find_ninja()
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_ninja(library, folder, output)
    result = subprocess.run([ninja, "-C", str(folder), *(["-v"] if verbose else [])], capture_output=True, text=True)
    if result.returncode != 0:
        errors = "\n".join(line for line in result.stdout.splitlines() if re.search(r"\berror\b|^FAILED", line))
        log = f"{result.stdout[-4000:]}{result.stderr[-2000:]}"
        raise BuildError(f"building {library.name} failed:\n{log}\n{errors[-4000:]}")
    return result.stdout


def _write_ninja(library: Library, folder: Path, output: Path) -> None:
    quote = lambda text: str(text).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")  # noqa: E731
    join = lambda parts: shlex.join(map(str, parts)).replace("$", "$$")  # noqa: E731
    lines = [
        "ninja_required_version = 1.5",
        "rule cc",
        "  command = $cmd -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
    ]
    lines += [
        "  deps = gcc",
        "rule link",
        f"  command = {join(library.link[:1])} $in {join(library.link[1:])} -o $out",
        "",
    ]
    for unit in library.units:
        lines += [f"build {quote(unit.obj)}: cc {quote(unit.source.resolve())}", f"  cmd = {join(unit.command)}"]
    objects = " ".join(quote(unit.obj) for unit in library.units)
    lines += [f"build {quote(output.resolve())}: link {objects}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))


def private_folder(path: Path) -> Path:
    """`path`, created for this user alone. Refuses a folder that others own or may write to: code is loaded from it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = path.stat()
    if status.st_uid != os.getuid():
        raise BuildError(f"cache folder {path} belongs to another user; set SUBQUAD_CACHE_DIR to a folder of your own")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


def cached_path(library: Library, cache: Path) -> Path:
    """Where `cached_library` keeps this library, built or not."""
    return cache / f"{library.name}-{library.key()}" / f"{library.name}.so"


def cached_library(library: Library, cache: Path, announce: bool = True) -> Path:
    """The library from the per-user cache, compiled there first if need be. Safe against concurrent processes."""
    private_folder(cache)
    output = cached_path(library, cache)
    if output.exists():
        return output
    folder = private_folder(output.parent)
    with _locked(folder / "lock"):
        if not output.exists():
            if announce:
                print(
                    f"subquad: compiling {library.name} ({len(library.units)} files, once) ...",
                    file=sys.stderr,
                    flush=True,
                )
            partial = folder / f"{library.name}.partial.so"
            compile_library(library, folder, partial)
            partial.replace(output)
    return output
