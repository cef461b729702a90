"""Which implementation runs, and what is said when the wanted one cannot."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import subquad
from subquad import _backends, _native
from subquad.contract import CONTRACTS, NAMESPACES, STEMS
from subquad.testing import backend_params
from subquad.testing.instruments import record_ops

ROOT = Path(__file__).parents[2]
Z = torch.linspace(-3.0, 3.0, 7)


def ran(**options: object) -> str:
    """The backend that a call of cats_activation runs on."""
    with record_ops() as calls:
        subquad.cats_activation(Z, 0.1, **options)  # type: ignore[arg-type]
    if not calls:
        return "reference"
    return next(name for name, namespace in NAMESPACES.items() if namespace == calls[0].op.namespace)


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from a fresh table and leaves none behind."""
    for name in ("_choices", "_ready", "_warned"):
        monkeypatch.setattr(_backends, name, type(getattr(_backends, name))())
    monkeypatch.setattr(_backends, "_override", None)
    monkeypatch.setattr(_backends, "_from_env", None)


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda name, build: f"{name} was not built, says the test")


def test_table_covers_every_op_device_and_backend() -> None:
    table = subquad.backends()
    assert set(table) == set(STEMS)
    for devices in table.values():
        assert set(devices) == {"cpu", "cuda"}
        for reasons in devices.values():
            assert set(reasons) == {"native", "triton", "simt", "reference"}
            assert all(isinstance(reason, str) and reason for reason in reasons.values())
            assert reasons["reference"] == "available"


def test_table_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda name, build: pytest.fail("built") if build else "not built")
    assert subquad.backends()["cats_mlp"]["cpu"]["native"] == "not built"


@backend_params("cats_activation", "native", "triton", "simt")
def test_precedence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call argument over use_backend over the environment over the table."""
    monkeypatch.setattr(_backends, "_from_env", "reference")
    assert ran() == "reference"
    with subquad.use_backend(backend):
        assert ran() == backend
        assert ran(backend="reference") == "reference"
        with subquad.use_backend("reference"):
            assert ran() == "reference"
            assert ran(backend=backend) == backend
        assert ran() == backend
    assert ran() == "reference"


@backend_params("cats_activation", "native")
def test_table_prefers_native_on_the_cpu(backend: str) -> None:
    assert ran() == backend
    with subquad.use_backend("reference"), subquad.use_backend(None):
        assert ran() == backend


def test_use_backend_is_undone_by_an_exception() -> None:
    with pytest.raises(RuntimeError, match="inside"), subquad.use_backend("reference"):
        raise RuntimeError("inside")
    assert _backends._override is None


@pytest.mark.parametrize("name", ["cuda", "Native", "", 3])
def test_unknown_name(name: object) -> None:
    with pytest.raises(ValueError, match="use_backend: name: expected one of native"), subquad.use_backend(name):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="backend: expected one of native"):
        subquad.cats_activation(Z, 0.1, backend=name)  # type: ignore[arg-type]


def test_forced_backend_never_falls_back(no_native: None) -> None:
    message = "^backend: got 'native' for cats_activation on cpu, .*: _C was not built, says the test"
    with pytest.raises(ValueError, match=message):
        ran(backend="native")
    with pytest.raises(ValueError, match=message), subquad.use_backend("native"):
        ran()


def test_forced_triton_needs_its_interpreter_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"^backend: got 'triton' for cats_mlp on cpu, .*TRITON_INTERPRET=1"):
        weights = (torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 3))
        subquad.cats_mlp(torch.ones(1, 2), *weights, 0.1, backend="triton")


def test_automatic_choice_falls_back_with_one_warning(no_native: None) -> None:
    with pytest.warns(subquad.SubquadWarning, match="native kernels are not in use.*says the test") as caught:
        assert ran() == "reference"
        assert ran() == "reference"
    assert len(caught) == 1


@backend_params("cats_activation", "native")
def test_what_an_explicit_call_compiled_is_chosen_from_then_on(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = _native.load
    monkeypatch.setattr(_native, "load", lambda name, build: load(name, build) if build else "not built yet")
    with pytest.warns(subquad.SubquadWarning, match="not built yet"):
        assert ran() == "reference"
    assert ran(backend=backend) == backend
    monkeypatch.setattr(_native, "load", load)
    assert ran() == backend


def test_explicit_choice_does_not_warn(no_native: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran(backend="reference") == "reference"


def test_declared_gaps_have_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = dataclasses.replace(CONTRACTS["cats_mlp"], missing={"triton": "decode only"})
    monkeypatch.setitem(CONTRACTS, "cats_mlp", declared)
    assert subquad.backends()["cats_mlp"]["cpu"]["triton"] == "decode only"


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin", "HOME": str(Path.home()), **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)


CALL = "import torch, subquad; print(subquad.cats_activation(torch.ones(2), 0.1))"


@pytest.mark.heavy
def test_environment_variable() -> None:
    assert _run(CALL, SUBQUAD_BACKEND="reference").stdout.startswith("tensor([0.7311")
    wrong = _run(CALL, SUBQUAD_BACKEND="fastest")
    assert "backend: expected one of native" in wrong.stderr and "'fastest'" in wrong.stderr


@pytest.mark.heavy
def test_forbidden_build_is_said(tmp_path: Path) -> None:
    """Without a built library and with SUBQUAD_JIT=0 a forced native call names the variable."""
    code = "from subquad import _native; _native._prebuilt = lambda name: None\n" + CALL.replace(
        "0.1", "0.1, backend='native'"
    )
    result = _run(code, SUBQUAD_JIT="0", SUBQUAD_CACHE_DIR=str(tmp_path / "cache"))
    assert "SUBQUAD_JIT=0" in result.stderr, result.stderr


@pytest.mark.heavy
def test_first_call_ever_may_be_compiled() -> None:
    """In a fresh process, with nothing resolved yet: fullgraph, forward and backward."""
    code = """
import torch, subquad
f = torch.compile(lambda z: subquad.cats_activation(z, 0.1, backend="reference"), fullgraph=True, backend="aot_eager")
z = torch.ones(2, 3, requires_grad=True)
f(z).sum().backward()
print(z.grad.shape)
"""
    result = _run(code)
    assert result.stdout.strip() == "torch.Size([2, 3])", result.stderr
