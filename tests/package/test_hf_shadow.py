"""Our folder `kernels/` must hide neither the Hugging Face package `kernels` nor Triton, wherever Python is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *path: Path) -> str:
    """Standard output of Python started in the checkout, with these folders first on its path."""
    environment = {"PYTHONPATH": ":".join(map(str, path)), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a package as the Hub's `kernels` is."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(name): return 'the real one'\n")
    return tmp_path / "site"


def test_real_package_wins_even_behind_the_checkout(site: Path) -> None:
    """`python -c` puts the current folder, the checkout, first."""
    assert run("from kernels import get_kernel; print(get_kernel(''))", site) == "the real one"
    assert run("from kernels import get_kernel; print(get_kernel(''))", ROOT, site) == "the real one"


def test_alone_it_is_an_empty_namespace() -> None:
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)"
    assert run(code) == "True"


def test_our_kernels_are_found_by_their_own_name(site: Path) -> None:
    assert run("import subquad.kernels as k; print(k.__name__)", ROOT / "python", site) == "subquad.kernels"


def test_triton_is_not_hidden() -> None:
    """With `kernels/` itself first on the path, as pytest --doctest-modules puts it."""
    pytest.importorskip("triton")
    assert run("import triton; print(hasattr(triton, 'jit'))", ROOT / "kernels") == "True"
