"""The shape of the repository: every op has its files, every layer imports downwards only, and nothing lies about."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from subquad import _env
from subquad._backends import BACKENDS
from subquad.cache.state import ADAPTERS
from subquad.contract import CONTRACTS, OPERATORS, STEM_OF, STEMS
from subquad.testing.checks import CHECKS
from subquad.testing.specs import SPECS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, TRITON, CSRC = ROOT / "python" / "subquad", ROOT / "kernels" / "triton_ops", ROOT / "csrc"
TOP_LEVEL = {
    ".ci", ".clang-format", ".clang-tidy", ".editorconfig", ".gitattributes", ".gitignore", ".pre-commit-config.yaml",
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "benchmarks", "csrc", "docs",
    "examples", "findings", "kernels", "mkdocs.yml", "pyproject.toml", "python", "setup.py", "tests",
}  # fmt: skip
PLACES = {
    "contract": ("python/subquad/contract/{}.py",),
    "reference": ("python/subquad/reference/{}.py",),
    "ops": ("python/subquad/ops/{}.py",),
    "nn": ("python/subquad/nn/{}.py",),
    "triton": ("kernels/triton_ops/{}.py",),
    "native": ("csrc/ops/{}/params.h", "csrc/ops/{}/arguments.h"),
    "cpu": ("csrc/ops/{}/cpu.h", "csrc/ops/{}/cpu.cpp", "csrc/ops/{}/cpu.isa.cpp"),
    "cuda": ("csrc/ops/{}/cuda.cuh", "csrc/ops/{}/cuda.cu"),
    "spec": ("tests/specs/{}.py",),
    "test": ("tests/ops/{0}/test_{0}.py",),
}
# Native code of an op that stands on that of others; no other op includes another's files.
FAMILIES = {
    "cats_mlp": ("cats_activation",),
    "conv_feature_map": ("causal_conv1d", "feature_map"),
    "lawcat_decode_step": ("gated_linear_attention",),
    "quantised_cats_mlp": ("cats_activation", "cats_mlp", "quantised_linear"),
}
GENERATED = ("build", "dist", "site", "demo")
CXX = {".h", ".cuh", ".cpp", ".cu"}
TEXT = {".py", ".h", ".cuh", ".cpp", ".cu", ".md", ".toml", ".yml", ".yaml", ".cfg", ".in", ".json", ".sh", ""}


def files() -> list[Path]:
    """What belongs to the repository; in a copy without history, what a checkout would have."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if (ROOT / ".git").exists() and listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).exists()]
    walked = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file() or p.is_symlink())
    hidden = re.compile(r"__pycache__|\.egg-info|^\.(?!ci|clang|git(ignore|attributes)|editor|pre-)|\.so$")
    return [
        ROOT / p for p in walked if p.parts[0] not in GENERATED and not any(hidden.search(part) for part in p.parts)
    ]


FILES = [path for path in files() if path.is_file()]
SOURCES = [path for path in FILES if path.suffix == ".py"]
name_of = lambda path: path.relative_to(ROOT).as_posix()  # noqa: E731


def below(folder: Path) -> list[Path]:
    return [path for path in SOURCES if folder in path.parents]


def imports(path: Path, module_level: bool = False) -> Iterator[str]:
    """Names of imported modules: absolute as written, relative with their dots."""
    tree = ast.parse(path.read_text())
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" if node.module else f"{base}{alias.name}" for alias in node.names)


def importing(folder: Path, pattern: str, module_level: bool = False) -> list[str]:
    """ "file: module" for every import in the folder that matches."""
    found = ((path, name) for path in below(folder) for name in imports(path, module_level))
    return [f"{name_of(path)}: {name}" for path, name in found if re.search(pattern, name)]


def _included(path: Path) -> set[str]:
    """Headers of csrc that a file includes, as paths below csrc."""
    names = re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE)
    beside = [path.parent / name if (path.parent / name).exists() else CSRC / name for name in names]
    return {header.resolve().relative_to(CSRC).as_posix() for header in beside}


def native_includes() -> dict[str, set[str]]:
    """Every file of csrc and the headers that it reaches."""
    direct = {p.relative_to(CSRC).as_posix(): _included(p) for p in FILES if CSRC in p.parents and p.suffix in CXX}
    reached = {name: set(found) for name, found in direct.items()}
    grown = True
    while grown:
        before = sum(map(len, reached.values()))
        reached = {name: found.union(*(direct[header] for header in found)) for name, found in reached.items()}
        grown = sum(map(len, reached.values())) > before
    return reached


def _knows_torch(name: str) -> bool:
    return re.search(r"#\s*include\s*<torch/", (CSRC / name).read_text()) is not None


NATIVE = native_includes()


def is_here(path: Path) -> bool:
    """Whether the file exists, or, for Triton kernels, the package of its name."""
    return path.exists() or (path.parent == TRITON and (path.with_suffix("") / "__init__.py").exists())


def missing(stem: str) -> dict[str, str]:
    """What the specs of a stem declare missing."""
    return {place: reason for spec in SPECS if spec.stem == stem for place, reason in spec.missing.items()}


# --- one op, one stem, one set of places ----------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stem", STEMS)
def test_every_op_has_its_files(stem: str, place: str) -> None:
    existing = [is_here(ROOT / name.format(stem)) for name in PLACES[place]]
    if place in missing(stem):
        assert not any(existing), f"{place} of {stem} exists, although its spec declares it missing"
    else:
        assert all(existing), (
            f"expected {[name.format(stem) for name in PLACES[place]]}; or declare {place!r} missing in the spec"
        )


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        (PACKAGE / "contract", "{}.py"),
        (PACKAGE / "reference", "{}.py"),
        (PACKAGE / "ops", "{}.py"),
        (TRITON, "{}.py"),
        (ROOT / "tests" / "specs", "{}.py"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Path) else "",
)
def test_every_file_belongs_to_an_op(folder: Path, pattern: str) -> None:
    prefix, suffix = pattern.split("{}")
    own = [p.name for p in FILES if p.parent == folder and p.name.startswith(prefix) and p.name.endswith(suffix)]
    public = [name for name in own if not name.startswith(("_", "conftest"))]
    assert set(public) <= {pattern.format(stem) for stem in STEMS}


def test_native_code_belongs_to_an_op() -> None:
    assert {path.relative_to(CSRC / "ops").parts[0] for path in FILES if CSRC / "ops" in path.parents} == set(STEMS)


def test_packages_of_triton_kernels_belong_to_an_op() -> None:
    packages = {path.relative_to(TRITON).parts[0] for path in below(TRITON) if path.parent != TRITON}
    assert packages <= {"_common", *STEMS}
    assert [stem for stem in packages if (TRITON / f"{stem}.py").exists()] == []


def test_helpers_that_triton_kernels_share_have_two_users() -> None:
    for helper in (path for path in below(TRITON / "_common") if path.stem != "__init__"):
        users = {
            path.relative_to(TRITON).parts[0].removesuffix(".py")
            for path in below(TRITON)
            if any(helper.stem in name.split(".") and name.startswith(".") for name in imports(path))
        }
        assert len(users) > 1, f"{name_of(helper)} is used by {users} alone"


def test_tests_belong_to_an_op_or_a_room() -> None:
    tests = ROOT / "tests"
    parts = {path.relative_to(tests).parts for path in FILES if tests in path.parents}
    assert {p[0] for p in parts} == {"conftest.py", "distributed", "emulator", "models", "ops", "package", "specs"}
    assert {p[1] for p in parts if p[0] == "ops"} == set(STEMS)


def test_specs_cover_the_schemas() -> None:
    assert {spec.stem for spec in SPECS} == set(STEMS)
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    for contract in CONTRACTS.values():
        assert set(contract.missing) <= set(BACKENDS) - {"reference"}
        for order in (contract.cpu, contract.cuda, contract.cuda_few):
            assert set(order) <= set(BACKENDS) - {"simt"} and order[-1] == "reference"


def test_declared_gaps_are_about_something() -> None:
    known = {*PLACES, *BACKENDS, *(f"check:{name}" for name in CHECKS)}
    known |= {f"check:{name}:{backend}" for name in CHECKS for backend in BACKENDS}
    for spec in SPECS:
        assert set(spec.missing) <= known, spec.name
        assert all(len(reason.split()) > 2 for reason in spec.missing.values()), f"{spec.name}: a gap needs a reason"


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_named_after_their_stem_or_family(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9_]+_(fwd|bwd)|[a-z0-9_]+_", name)
    assert name.split("_")[0] == STEM_OF[name].split("_")[0]


# --- layers ----------------------------------------


def test_reference_stands_alone() -> None:
    allowed = r"^(__future__|math|typing|collections|dataclasses|functools|torch)(\.|$)|^\.[a-z0-9_]*(\.\w+)?$"
    assert importing(PACKAGE / "reference", rf"^(?!{allowed})") == []


def test_triton_kernels_can_be_shipped_alone() -> None:
    for path in below(TRITON):
        depth = len(path.relative_to(TRITON).parts)
        for name in imports(path):
            assert not name.startswith(("subquad", "kernels")), f"{name_of(path)}: {name}"
            assert len(name) - len(name.lstrip(".")) <= depth, f"{name_of(path)} leaves its package: {name}"


def test_ops_do_not_import_kernels() -> None:
    assert importing(PACKAGE / "ops", r"(^|\.)(triton|kernels|_native)(\.|$)") == []
    assert importing(PACKAGE / "ops", r"^\.\.(nn|cache|convert|integrations|testing|calibration)(\.|$)") == []


def test_operators_are_called_in_one_place() -> None:
    users = {line.split(": ")[0] for line in importing(PACKAGE / "ops", r"contract\.(HANDLES|OPERATORS)$")}
    assert users == {"python/subquad/ops/_call.py", "python/subquad/ops/_schema.py"}
    assert importing(PACKAGE / "ops", r"_backends\.resolve$") == ["python/subquad/ops/_call.py: .._backends.resolve"]


def test_modules_do_not_reach_below_the_ops() -> None:
    assert importing(PACKAGE / "nn", r"(^|\.)(triton|kernels|_native|contract)(\.|$)") == []


def test_modules_do_not_know_who_uses_them() -> None:
    """Only the files of earlier places look up, to where things are now."""
    earlier = ("nn/conversion.py", "nn/lawcat_conversion.py")
    above = importing(PACKAGE / "nn", r"^\.\.(convert|integrations|testing|calibration|distillation|demo)(\.|$)")
    assert [found for found in above if not any(f"/{name}:" in found for name in earlier)] == []
    assert importing(PACKAGE / "convert", r"^\.\.(integrations|testing|calibration|distillation|demo)(\.|$)") == []


def test_states_stand_between_ops_and_modules() -> None:
    assert importing(PACKAGE / "cache", r"^\.\.(nn|integrations|testing|calibration)(\.|$)") == []
    assert importing(PACKAGE / "ops", r"^\.\.cache(\.|$)") == []
    assert importing(PACKAGE / "nn", r"(^|\.)integrations(\.|$)") == []


def test_triton_is_imported_lazily() -> None:
    assert (
        importing(PACKAGE, r"^(triton|transformers|peft|safetensors|gguf|matplotlib|pytest)(\.|$)", module_level=True)
        == []
    )


def test_adapters_of_states_exist_and_are_imported_late() -> None:
    """They subclass a library's classes, and are therefore imported when one of its caches is met."""
    for name in ADAPTERS.values():
        path = ROOT / "python" / (name.replace(".", "/") + ".py")
        assert path.exists(), name
        users = importing(PACKAGE, r"integrations\.transformers\.cache(\.|$)|^\.cache(\.|$)")
        late = "sink_cache.py"  # a cache of the library itself, which is imported late, too
        assert [user for user in users if ("/integrations/" in user or "/nn/" in user) and late not in user] == []


def crossings(folder: Path) -> list[str]:
    """ "file: module" where a file or folder of this folder imports its neighbour, or the whole package."""
    entries = {path.stem for path in folder.iterdir() if path.suffix in ("", ".py")} - {"__init__", "__pycache__"}
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        neighbours = [f"{'.' * len(parts)}{name}" for name in entries - {parts[0]}]
        for name in imports(path):
            if any(f"{name}.".startswith(f"{neighbour}.") for neighbour in (*neighbours, "subquad")):
                found.append(f"{'/'.join(parts)}: {name}")
    return found


def test_integrations_do_not_need_each_other(tmp_path: Path) -> None:
    assert crossings(PACKAGE / "integrations") == []
    (tmp_path / "one").mkdir()
    (tmp_path / "two.py").write_text("from .one.parts import a\nfrom ..nn import b\n")
    (tmp_path / "one" / "parts.py").write_text("from . import two\nfrom .. import two\nimport subquad.nn\n")
    assert crossings(tmp_path) == ["one/parts: ..two", "one/parts: subquad.nn", "two: .one.parts.a"]


def test_nothing_needs_several_processes() -> None:
    users = importing(PACKAGE, r"^\.+distributed(\.|$)|^subquad\.distributed(\.|$)")
    assert [user for user in users if "/subquad/distributed/" not in user] == []


def test_specs_do_not_need_pytest() -> None:
    assert importing(ROOT / "tests" / "specs", r"^(pytest|_pytest|hypothesis|tests)(\.|$)") == []


def test_csrc_uses_the_stable_interface_only() -> None:
    pattern = re.compile(r'#\s*include\s*[<"](ATen|c10|pybind11|torch/extension|torch/all|torch/torch)', re.MULTILINE)
    assert [
        name_of(p) for p in FILES if CSRC in p.parents and p.suffix != ".md" and pattern.search(p.read_text())
    ] == []


def test_csrc_kernels_do_not_know_torch() -> None:
    """Kernels take raw pointers: none reaches torch, not by way of another header either. What binds them does."""
    binding = re.compile(r"torch/\w+\.h|cuda/launch\.h|cpu/threads\.cpp|ops/\w+/(arguments\.h|cpu\.cpp|cuda\.cu)")
    reaching = {name for name, found in NATIVE.items() if any(_knows_torch(header) for header in {name, *found})}
    assert {name for name in reaching if not binding.fullmatch(name)} == set()


def test_native_rooms_do_not_know_the_ops() -> None:
    """common, torch, cpu, cuda and simt lie below the ops; an op is included by the declared members of its family."""
    offenders = []
    for name, found in NATIVE.items():
        own = name.split("/")[1] if name.startswith("ops/") else None
        allowed = {own, *FAMILIES.get(own or "", ())}
        offenders += [
            f"{name}: {other}" for other in found if other.startswith("ops/") and other.split("/")[1] not in allowed
        ]
    assert offenders == []


def test_families_are_about_something() -> None:
    stems = {
        name: {other.split("/")[1] for other in found if other.startswith("ops/")} for name, found in NATIVE.items()
    }
    for stem, others in FAMILIES.items():
        assert set(others) <= set().union(*(of for name, of in stems.items() if name.startswith(f"ops/{stem}/"))), stem


def test_kernels_stay_on_their_device() -> None:
    """What both devices share is in common, torch, params.h and arguments.h."""
    for name, found in NATIVE.items():
        side = re.fullmatch(r"(?:ops/\w+/)?(cpu|cuda)[_./].*", name)
        other = {"cpu": r"(ops/\w+/)?cuda[_./]", "cuda": r"(ops/\w+/)?cpu[_./]", None: r"(ops/\w+/)?(cpu|cuda)[_./]"}
        wrong = re.compile(other[side.group(1) if side else None])
        if not name.startswith("simt/"):
            assert [header for header in found if wrong.match(header)] == [], name


def test_cxx_never_defines_schemas() -> None:
    pattern = re.compile(r"STABLE_TORCH_LIBRARY(_FRAGMENT)?\(|\bm\.def\(")
    assert [
        name_of(p) for p in FILES if CSRC in p.parents and p.suffix != ".md" and pattern.search(p.read_text())
    ] == []


# --- housekeeping ----------------------------------------


def test_environment_is_read_in_one_file() -> None:
    shipped = [*below(PACKAGE), *below(TRITON), *below(ROOT / "benchmarks"), ROOT / "setup.py"]
    pattern = re.compile(r"\bos\.(environ|getenv)\b|\bfrom os import\b")
    offenders = [name_of(p) for p in shipped if p != PACKAGE / "_env.py" and pattern.search(p.read_text())]
    assert offenders == []


def test_environment_variables_are_few_and_described() -> None:
    used = set(re.findall(r"\bSUBQUAD_[A-Z_]+\b", (PACKAGE / "_env.py").read_text()))
    assert used == set(_env.VARIABLES) and len(used) <= 10
    assert all(_env.VARIABLES.values())


def test_no_native_march() -> None:
    pattern = re.compile("-march=" + "native|-mtune=" + "native|ffast" + "-math")
    built = [p for p in FILES if p.suffix in TEXT - {".md"} and ROOT / "tests" not in p.parents]
    assert [name_of(p) for p in built if pattern.search(_text(p))] == []


def test_kernels_is_no_package() -> None:
    """With an __init__.py it would shadow the package of that name on the Hugging Face Hub."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "triton").exists()
    assert {p.name for p in (ROOT / "kernels").iterdir() if p.name != "__pycache__"} == {"triton_ops"}


@pytest.mark.parametrize(
    ("link", "target"),
    [("kernels", "../../kernels/triton_ops"), ("csrc", "../../csrc"), ("testing/specs", "../../../tests/specs")],
)
def test_symlinks(link: str, target: str) -> None:
    path = PACKAGE / link
    assert path.is_symlink() and path.readlink().as_posix() == target and path.is_dir()


def test_top_level() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} - TOP_LEVEL == set()


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def test_files_are_short() -> None:
    limit = 600
    long = {
        name_of(p): n for p in FILES if p.suffix in TEXT - {".json", ""} and (n := len(_text(p).splitlines())) > limit
    }
    assert long == {}


def test_no_paths_of_a_machine() -> None:
    pattern = re.compile(r"(?<![\w.}~>-])/(?:work|root|tmp|home/\w+)/\w")
    assert [name_of(p) for p in FILES if p.suffix in TEXT and pattern.search(_text(p))] == []


def test_no_leftovers() -> None:
    pattern = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|^(<{7}|>{7}) ", re.MULTILINE)
    assert [name_of(p) for p in FILES if p.suffix in TEXT - {".md"} and pattern.search(_text(p))] == []


def test_modules_start_alike() -> None:
    """A docstring that says what the module is for, and postponed annotations."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if tree.body:
            assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
        if any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AnnAssign)) for node in tree.body):
            first = next((n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))), None)
            assert isinstance(first, ast.ImportFrom) and first.module == "__future__", (
                f"{name_of(path)} lacks annotations"
            )
