"""What importing does and does not do, each in a fresh process."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import subquad

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def run(code: str, blocked: tuple[str, ...] = ()) -> str:
    """Standard output of a fresh interpreter that cannot import `blocked`."""
    environment = {"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    prefix = BLOCK.format(blocked=blocked) if blocked else ""
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", prefix + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.heavy
def test_import_is_light() -> None:
    """Nothing beyond torch is loaded, CUDA is not initialised, no library is built or loaded, nothing is printed."""
    heavy = ("triton", "torch._dynamo", "torch._inductor", "transformers", "sympy", "rich", "matplotlib", "pytest")
    code = f"""
import torch
before = set(sys.modules)
import subquad
print([name for name in {heavy!r} if name in sys.modules], torch.cuda.is_initialized(), subquad._native.loaded())
print(sorted(n for n in set(sys.modules) - before if not n.startswith(("subquad", "torch"))))
"""
    lines = run("import sys" + code).splitlines()
    assert lines[0] == "[] False {}"
    assert len(lines) == 2, lines
    allowed = {"fcntl", "hashlib", "subprocess", "platform", "shutil", "sysconfig"}
    new = {name.strip("'[] ").split(".")[0].lstrip("_") for name in lines[1].split(",")}
    assert new - allowed - {name.lstrip("_") for name in sys.stdlib_module_names} <= {""}


@pytest.mark.heavy
def test_kernel_package_does_not_import_triton() -> None:
    assert run("import sys, subquad.kernels; print('triton' in sys.modules)").strip() == "False"


@pytest.mark.heavy
@pytest.mark.parametrize(
    "module",
    [
        "nn",
        "ops",
        "reference",
        "testing",
        "testing.specs",
        "integrations.transformers",
        "convert",
        "calibration",
        "nn.conversion",
        "nn.lawcat_conversion",
    ],
)
def test_optional_packages_are_optional(module: str) -> None:
    """Every part can be imported without what only some users have."""
    blocked = ("triton", "transformers", "pytest", "hypothesis", "rich", "matplotlib", "safetensors", "gguf")
    assert run(f"import subquad.{module}", blocked) == ""


@pytest.mark.heavy
def test_works_without_triton_and_without_native_code() -> None:
    """The reference serves alone, after one warning."""
    code = """
import torch, subquad
from subquad import _native
_native.load = lambda name, build: "blocked"
weights = (torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 3))
for _ in range(2):
    print(subquad.cats_mlp(torch.ones(1, 2), *weights, 0.1).shape)
print(subquad.backends()["cats_mlp"]["cpu"]["triton"])
"""
    output = run(code, blocked=("triton",))
    assert output.count("torch.Size([1, 2])") == 2
    assert output.count("SubquadWarning") == 1
    assert "triton cannot be imported" in output


@pytest.mark.parametrize("name", subquad.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(subquad, name) is not None


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'subquad' has no attribute 'cats_mpl'"):
        subquad.cats_mpl  # noqa: B018


@pytest.mark.heavy
def test_every_module_can_be_imported() -> None:
    """Each by itself in one process; modules of kernels need triton, those of _dev are tools."""
    skipped = ("subquad.kernels.", "subquad._dev", "subquad.csrc", "subquad.demo", "subquad._C", "subquad.__main__")
    names = [m.name for m in pkgutil.walk_packages(subquad.__path__, "subquad.", onerror=lambda name: None)]
    names = [n for n in names if not n.startswith(skipped) and not n.endswith("__main__")]
    assert "subquad.testing.specs.cats_mlp" in names
    run("\n".join(f"import {name}" for name in names))
