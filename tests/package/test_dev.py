"""The developers' tools: reading ptxas, judging spills, finding the sanitizers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from subquad import _build
from subquad._dev import fingerprint, mutate, nvcc_check, sanitize
from subquad._dev.mutate import results
from subquad._dev.mutate.catalogue import CATALOGUE
from subquad._dev.mutate.fault import Fault, Where, problems
from subquad.contract import OPERATORS

LOG = """[1/2] nvcc -c toy.cu -o toy.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3toyEf' for 'sm_80'
ptxas info    : Function properties for _ZN3toyEf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN3toyEd' for 'sm_90a'
ptxas info    : Function properties for _ZN3toyEd
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size
[2/2] nvcc -shared toy.o -o toy.so
"""


def check(monkeypatch: pytest.MonkeyPatch, log: str = LOG, missing: list[str] | None = None) -> int:
    """The exit code of nvcc_check for a compilation that says `log`."""
    monkeypatch.setattr(sys, "argv", ["nvcc_check"])
    monkeypatch.setattr(_build, "find_nvcc", lambda home: "nvcc")
    monkeypatch.setattr(nvcc_check, "compile_cuda", lambda nvcc, arches: (Path("toy.so"), nvcc_check.parse(log)))
    monkeypatch.setattr(nvcc_check, "unregistered", lambda path: missing or [])
    return nvcc_check.main()


def test_ptxas_log_is_read() -> None:
    assert nvcc_check.parse(LOG) == [
        nvcc_check.Kernel("_ZN3toyEf", "sm_80", 40, 0, 0),
        nvcc_check.Kernel("_ZN3toyEd", "sm_90a", 255, 24, 36),
    ]


def test_a_spill_fails_unless_it_is_declared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(monkeypatch) == 1
    assert "SPILL sm_90a" in capsys.readouterr().out
    names = {nvcc_check.template(name) for name in nvcc_check.demangle(["_ZN3toyEf", "_ZN3toyEd"]).values()}
    monkeypatch.setattr(nvcc_check, "allowed_spills", lambda: dict.fromkeys(names, "a good reason"))
    assert check(monkeypatch) == 0


def test_a_missing_registration_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clean = LOG.replace("16 bytes spill stores, 20 bytes", "0 bytes spill stores, 0 bytes")
    assert check(monkeypatch, clean) == 0
    assert check(monkeypatch, clean, missing=["cats_mlp_fwd"]) == 1
    assert "without a CUDA kernel: cats_mlp_fwd" in capsys.readouterr().out


def test_no_kernels_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, "nothing was compiled") == 1


def test_without_nvcc_nothing_is_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["nvcc_check"])
    monkeypatch.setattr(_build, "find_nvcc", lambda home: None)
    assert nvcc_check.main() == 0
    assert "nvcc not found" in capsys.readouterr().out


def test_registrations_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: op != "subquad::cats_glu_fwd"
    )
    assert nvcc_check.unregistered(Path("toy.so")) == ["cats_glu_fwd"] and "cats_glu_fwd" in OPERATORS


def test_templates_are_named() -> None:
    assert nvcc_check.template("cats_up_kernel<bf16, 4, true>") == "cats_up_kernel"


def test_sanitizer_runtime_is_found_or_named() -> None:
    with pytest.raises(FileNotFoundError):
        sanitize.runtime("no-such-compiler")
    try:
        paths = sanitize.runtime("g++")
    except FileNotFoundError:
        pytest.skip("g++ is not installed")
    assert all(Path(path).exists() for path in paths) and "asan" in paths[0]


def test_sanitize_rejects_unknown_backends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sanitize.main(["fpga"])
    assert stopped.value.code == 2 and "fpga" in capsys.readouterr().err


def test_fingerprints_see_one_bit() -> None:
    x = torch.arange(4.0)
    other = x.clone()
    other.view(torch.int32)[2] ^= 1
    assert fingerprint.digest((x,)) == fingerprint.digest((x.clone(),)) != fingerprint.digest((other,))
    assert fingerprint.digest((x,)) != fingerprint.digest((x.view(2, 2),))
    assert fingerprint.digest((torch.zeros(3),)) != fingerprint.digest((-torch.zeros(3),))


def test_fingerprints_are_compared_where_both_have_the_op() -> None:
    before = {"a/native/fp32/s": "1", "a/native/fp32/s/dx": "2", "b/native/fp32/s": "3"}
    after = {"a/native/fp32/s": "9", "a/native/fp32/t": "4"}
    assert fingerprint.compare(before, after) == [
        "a/native/fp32/s: other bits", "a/native/fp32/s/dx: gone", "a/native/fp32/t: new",
    ]  # fmt: skip


def test_fingerprint_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bits.json"
    options = ["--backends", "reference", "--ops", "cats_activation"]
    assert fingerprint.main(["--write", str(file), *options]) == 0
    assert fingerprint.main(["--compare", str(file), *options]) == 0
    file.write_text(file.read_text().replace('": "', '": "x', 1))
    assert fingerprint.main(["--compare", str(file), *options]) == 1
    assert "1 different" in capsys.readouterr().out


# --- planted faults ----------------------------------------

ROOT = Path(__file__).resolve().parents[2]


def test_every_planted_fault_has_its_place() -> None:
    assert problems(CATALOGUE, ROOT) == []


def test_the_catalogue_covers_every_area_and_kind() -> None:
    faults = [fault for group in CATALOGUE.values() for fault in group]
    assert set(CATALOGUE) == set(mutate.AREAS) and len(faults) >= 120
    assert {fault.kind for fault in faults} == set(mutate.KINDS)


def plant(root: Path, old: str, new: str, **changes: str) -> list[str]:
    """What is wrong with a catalogue of one fault in a file of two lines."""
    (root / "f.py").write_text("x = 1\ny = 1\n")
    fault = Fault("f", changes.get("kind", "bounds"), Where("f.py", (changes.get("tests", "f.py"),)), old, new)
    return problems({changes.get("area", "ops"): (fault,)}, root)


def test_dead_and_ambiguous_patterns_are_named(tmp_path: Path) -> None:
    assert plant(tmp_path, "x = 1", "x = 2") == []
    assert "matches 0 places" in plant(tmp_path, "x = 3", "x = 2")[0]
    assert "matches 2 places" in plant(tmp_path, "= 1", "= 2")[0]
    assert "changes nothing" in plant(tmp_path, "x = 1", "x = 1")[0]
    assert "unknown kind" in plant(tmp_path, "x = 1", "x = 2", kind="typo")[0]
    assert "unknown area" in plant(tmp_path, "x = 1", "x = 2", area="gpu")[0]
    assert "there is no tests" in plant(tmp_path, "x = 1", "x = 2", tests="tests")[0]


def test_everything_stays_in_the_denominator(tmp_path: Path) -> None:
    where = Where("f.py", ())
    faults = tuple(Fault(name, "bounds", where, name, "") for name in ("a", "b", "c", "d"))
    file = tmp_path / "results.json"
    killed = results.Verdict("judged", "failed: t", "failed: t", 1)
    results.add(file, {"a": killed, "gone": killed}, {"date": "today"}, ("a", "gone"))
    results.add(
        file,
        {"b": results.Verdict("judged", "", "crash: t", 9), "c": results.Verdict("dead")},
        {"date": "today"},
        "abcd",
    )
    assert results.about(file) == {"date": "today"} and set(results.load(file)) == set("abc")
    lines = results.table({"ops": faults}, results.load(file)).splitlines()
    assert lines[2] == "| ops | 4 | 1 | 25% | 2 | 50% | 1 | 1 |" and lines[3].startswith("| **all** | 4 |")
    survivors = results.survivors({"ops": faults}, results.load(file)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in survivors] == ["| c"]


def test_a_lane_sees_the_fault_in_a_copy(tmp_path: Path) -> None:
    """Planting changes the copy alone, and what it was comes back."""
    from subquad._dev.mutate.tree import Tree

    tree = Tree(tmp_path, tmp_path / "cache", "baseline")
    file = tree.root / "f.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n")
    before = file.stat().st_mtime_ns
    with tree.planted(Fault("f", "bounds", Where("f.py", ()), "1", "2")):
        assert file.read_text() == "x = 2\n"
    assert file.read_text() == "x = 1\n" and file.stat().st_mtime_ns == before
