"""A private copy of the sources with warm builds: faults are planted there, never in the working tree."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ... import _build, _env
from .fault import Fault, Where

_BUILT = {"native": "_C.abi3.so", "simt": "_C_simt.so"}  # where the package looks for them first


@dataclass
class Tree:
    """The copy in `folder / "tree"`, pristine builds in `folder / "build"`, a fault's in `folder / "fault"`."""

    source: Path
    folder: Path
    best: str  # CPU instruction set of this machine

    @property
    def root(self) -> Path:
        return self.folder / "tree"

    def sync(self) -> None:
        """Bring the copy up to date; what has not changed keeps its time, and so its objects."""
        listed = subprocess.run(
            ["git", "-C", str(self.source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True, text=True, check=True,
        ).stdout.split("\0")  # fmt: skip
        wanted = {name for name in listed if name and os.path.lexists(self.source / name)}
        for name in wanted:
            _copy(self.source / name, self.root / name)
        for path in list(self.root.rglob("*")):
            kept = path.suffix in (".so", ".pyc") or (path.is_dir() and not path.is_symlink())
            if not kept and path.relative_to(self.root).as_posix() not in wanted:
                path.unlink()

    def build(self) -> None:
        """Both libraries without a fault, all instruction sets."""
        for name, output in _BUILT.items():
            built = self.folder / "build" / output
            _build.compile_library(self._library(name), self.folder / "build" / name, built)
            shutil.copy2(built, self._installed(output))

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The copy with the fault, compiled as far as it reaches; raises BuildError when it does not compile."""
        path = self.root / fault.where.file
        before, times = path.read_text(), path.stat()
        native = fault.where.library
        try:
            path.write_text(fault.text(self.root))
            _forget_bytecode(path)
            if native:
                self._build_fault(fault)
            yield
        finally:
            path.write_text(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            _forget_bytecode(path)
            if native:
                shutil.copy2(self.folder / "build" / _BUILT[native], self._installed(_BUILT[native]))

    def _build_fault(self, fault: Fault) -> None:
        name, work = fault.where.library, self.folder / "fault"
        pristine, output = self.folder / "build" / name, self._installed(_BUILT[name])
        library = self._library(name)
        seen = [u for u in library.units if self._is_seen(u.obj, fault.where)]
        left = [str(pristine / u.obj) for u in library.units if u not in seen]
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        # With ninja's records, what the fault does not touch is up to date.
        for kept in (".ninja_log", ".ninja_deps", *(u.obj for u in seen)):
            shutil.copy2(pristine / kept, work / kept)
        output.unlink()
        link = (*library.link[:1], *left, *library.link[1:])
        _build.compile_library(replace(library, units=tuple(seen), link=link), work, output)

    def _is_seen(self, obj: str, where: Where) -> bool:
        level = obj.split(".")[-2] if ".isa." in obj else None
        ops = [path.rpartition("/")[2] for path in where.tests if path.startswith("tests/ops/")]
        of_tests = not ops or any(obj.startswith(f"ops_{op}_c") for op in ops)
        return (of_tests or not obj.startswith("ops_")) and level in (None, *(where.levels or (self.best,)))

    def _library(self, name: str) -> _build.Library:
        """The plan of a release without optimisation: the problems of tests are tiny, compiling is what takes time."""
        make = _build.native_library if name == "native" else _build.simt_library
        library = make(self.root / "csrc", _build.torch_dir(), _env.cxx())
        units = (
            replace(u, command=tuple("-O0" if w in ("-O2", "-O3") else w for w in u.command)) for u in library.units
        )
        return replace(library, units=tuple(units))

    def _installed(self, output: str) -> Path:
        return self.root / "python" / "subquad" / output


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        if not (target.is_symlink() and target.readlink() == source.readlink()):
            target.unlink(missing_ok=True)
            target.symlink_to(source.readlink())
    elif not target.is_file() or source.read_bytes() != target.read_bytes():
        shutil.copyfile(source, target)


def _forget_bytecode(path: Path) -> None:
    """Two faults of one length within a second would share their bytecode."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
