"""Build logic only; the metadata is in pyproject.toml.

The extension is built when it can be (torch importable, ninja and a C++ compiler at hand) and left out when it cannot:
the package then computes through its other backends. SUBQUAD_BUILD_EXT=0 leaves it out, SUBQUAD_BUILD_EXT=1 makes a
failure an error.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Kept at the top of the repository, shipped inside the package; symlinks in python/subquad serve development.
PACKAGE_DIRS = {"subquad.kernels": "kernels/triton_ops", "subquad.testing.specs": "tests/specs", "subquad.csrc": "csrc"}
NOT_SHIPPED = ("subquad._dev", "subquad._dev.*")


def _load(name: str) -> ModuleType:
    """A module of the package by path: importing the package itself would import torch."""
    spec = importlib.util.spec_from_file_location(f"subquad_setup{name}", ROOT / "python" / "subquad" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_build, _env = _load("_build"), _load("_env")


def _library(name: str) -> object | None:
    """The plan of one extension, or None when this torch has no use for it; BuildError when it cannot be built."""
    if _env.read().build_ext == "0":
        raise _build.BuildError("SUBQUAD_BUILD_EXT=0")
    torch = _build.torch_dir()
    if name == "subquad._C":
        return _build.native_library(ROOT / "csrc", torch, _env.cxx())
    if _build.torch_cuda_version(torch) is None:
        return None
    nvcc = _build.find_nvcc(_env.cuda_home())
    if nvcc is None:
        raise _build.BuildError("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    return _build.cuda_library(ROOT / "csrc", torch, _env.cxx(), nvcc)


class BuildExt(build_ext):
    """Compiles through the package's own build plans; an extension that cannot be built is dropped with one line."""

    def run(self) -> None:
        super().run()
        self.distribution.ext_modules = self.extensions

    def build_extensions(self) -> None:
        dropped: dict[str, list[str]] = {}
        for extension in list(self.extensions):
            output = Path(self.get_ext_fullpath(extension.name))
            output.unlink(missing_ok=True)  # of an earlier build: it must not travel with this one
            try:
                library = _library(extension.name)
                if library is not None:
                    # Not build_temp, which differs between editable and other builds: ninja shall find its objects.
                    print(_build.compile_library(library, ROOT / "build" / extension.name, output))
            except _build.BuildError as error:
                if _env.read().build_ext == "1":
                    raise
                dropped.setdefault(str(error), []).append(extension.name)
            if not output.exists():
                self.extensions.remove(extension)
        for reason, names in dropped.items():
            print(f"subquad: installing without {', '.join(names)}: {reason}", file=sys.stderr, flush=True)


class BdistWheel(bdist_wheel):
    """Builds the extensions first: what came out decides between an abi3 and a pure wheel."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def _packages() -> list[str]:
    packages = set(find_packages("python", exclude=NOT_SHIPPED)) | set(PACKAGE_DIRS)
    for name, folder in PACKAGE_DIRS.items():
        packages |= {f"{name}.{package}" for package in find_packages(folder)}
    return sorted(packages)


setup(
    packages=_packages(),
    package_dir={"": "python", **PACKAGE_DIRS},
    include_package_data=False,
    package_data={"subquad": ["py.typed"], "subquad.csrc": ["**/*.h", "**/*.cuh", "**/*.cpp", "**/*.cu"]},
    ext_modules=[Extension(name, [], py_limited_api=True) for name in ("subquad._C", "subquad._C_cuda")],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
