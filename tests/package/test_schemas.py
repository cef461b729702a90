"""One schema per operator, the same in every namespace, implemented under every key, and reached by the specs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from subquad.contract import CONTRACTS, HANDLES, NAMESPACES, OPERATORS, STEM_OF, STEMS, Operator
from subquad.testing import backend_cases, backend_params
from subquad.testing.case import Case
from subquad.testing.checks.operators import recorded
from subquad.testing.specs import SPECS

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BINDINGS = {"cpu": "cpu.cpp", "cuda": "cuda.cu"}


def arguments(name: str) -> list[str]:
    """Argument names of an operator, in order."""
    return [argument.name for argument in HANDLES["native"][name]._schema.arguments]


@pytest.mark.parametrize("name", OPERATORS)
def test_same_schema_in_every_namespace(name: str) -> None:
    schemas = {str(HANDLES[backend][name]._schema).split("::", 1)[1] for backend in NAMESPACES}
    assert len(schemas) == 1
    assert schemas.pop() == name + OPERATORS[name].args


@pytest.mark.parametrize("name", OPERATORS)
def test_schemas_are_functional(name: str) -> None:
    """Only a name that ends with an underscore, as torch's own do, stands for an operator that writes to an argument."""
    schema = HANDLES["native"][name]._schema
    assert schema.is_mutable == any(a.alias_info is not None for a in schema.arguments) == name.endswith("_")
    assert all(a.alias_info is None for a in schema.returns)
    assert torch.Tag.pt2_compliant_tag in HANDLES["native"][name].tags


@backend_params("cats_mlp", *NAMESPACES)
@pytest.mark.parametrize("name", OPERATORS)
def test_implemented_for_the_cpu(name: str, backend: str) -> None:
    op = OPERATORS[name]
    expected = {"native": True, "simt": op.cuda, "triton": op.triton}[backend]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACES[backend]}::{name}", "CPU") is expected


@pytest.mark.parametrize("name", OPERATORS)
def test_triton_registers_both_devices(name: str) -> None:
    for key in ("CPU", "CUDA"):
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"subquad_triton::{name}", key)
        assert found is OPERATORS[name].triton


@pytest.mark.parametrize("folder", BINDINGS)
def test_cxx_implements_exactly_the_schemas(folder: str) -> None:
    """Each operator in the binding of its stem, once."""
    for stem in STEMS:
        expected = [n for n, op in CONTRACTS[stem].operators.items() if (op.cuda or folder == "cpu")]
        path = CSRC / "ops" / stem / BINDINGS[folder]
        found = re.findall(r'm\.impl\("(\w+)"', path.read_text()) if expected else []
        assert sorted(found) == sorted(expected) and path.exists() == bool(expected)


@backend_params("cats_mlp", "triton")
@pytest.mark.parametrize(
    "name", [n for n, op in OPERATORS.items() if op.triton and "triton" not in CONTRACTS[STEM_OF[n]].missing]
)
def test_launchers_have_the_schema_as_signature(name: str, backend: str) -> None:
    launcher = getattr(__import__(f"subquad.kernels.{STEM_OF[name]}", fromlist=[name]), name)
    assert list(inspect.signature(launcher).parameters) == arguments(name)


@pytest.mark.parametrize("stem", STEMS)
def test_cxx_parameters_are_named_as_in_the_schema(stem: str) -> None:
    """Error messages quote C++ parameter names."""
    text = (CSRC / "ops" / stem / "arguments.h").read_text()
    for name in CONTRACTS[stem].operators:
        declared = re.search(rf"\b{name}\(([^)]*)\)\s*{{", text)
        assert declared, f"{stem}/arguments.h has no function {name}"
        assert [p.split()[-1].lstrip("&*") for p in declared.group(1).split(",")] == arguments(name)


def public(op: Operator, backend: str) -> bool:
    """Whether calls of the op's function reach it; not what shards of sequences need on a CPU alone, in no other backend."""
    return op.cuda or (op.triton and backend != "simt")


@backend_cases("cats_mlp", "stem", {b: [(s,) for s in STEMS if b not in CONTRACTS[s].missing] for b in NAMESPACES})
def test_specs_reach_every_operator(stem: str, backend: str) -> None:
    """The generic checks judge what the samples call; an operator that none calls would go untested."""
    reached = {call.name for spec in SPECS if spec.stem == stem for call in recorded(Case(spec, backend))}
    assert reached >= {name for name, op in CONTRACTS[stem].operators.items() if public(op, backend)}
