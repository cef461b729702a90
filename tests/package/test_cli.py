"""The command line and the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import subquad
from subquad import _backends, _env, _native, cli, report
from subquad.contract import CONTRACTS, STEMS

ROOT = Path(__file__).resolve().parents[2]


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.heavy
def test_help_imports_no_command() -> None:
    code = (
        "import sys\nfrom subquad import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "modules = {module for module, _ in cli.COMMANDS.values()}\n"
        "assert not modules & set(sys.modules), modules & set(sys.modules)\n"
        "assert 'triton' not in sys.modules and 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(cli.COMMANDS[name][0])
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run_from_args)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0 and f"subquad {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"subquad {subquad.__version__}"


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["report", "--no-such-option"]])
def test_wrong_arguments_end_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.parametrize("module", ["subquad", "subquad.report"])
def test_modules_run(module: str) -> None:
    words = ["report", "--json"] if module == "subquad" else ["--json"]
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["versions"]["subquad"] == subquad.__version__


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run_from_args", interrupted)
    assert cli.main(["report"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- report -----------------------------------------------------------------------------------------------------------


def test_json_report(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(output(capsys, "report", "--json"))
    assert set(data) == {"schema", "versions", "machine", "native", "environment", "ops"}
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["torch_threads"] == torch.get_num_threads()
    assert set(data["ops"]) == set(STEMS)
    for devices in data["ops"].values():
        assert set(devices) == set(_backends.DEVICES)
        for entry in devices.values():
            assert set(entry["backends"]) == set(_backends.BACKENDS)
            assert all(entry["backends"].values())  # "available" or a reason, never empty
            assert entry["backends"]["reference"] == "available"


def test_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "report")
    assert all(word in shown for word in ("Versions", "Machine", "Native libraries", "Environment", "Backends", *STEMS))


@pytest.mark.filterwarnings("ignore::subquad.SubquadWarning")
@pytest.mark.parametrize("stem", STEMS)
def test_report_says_what_a_call_would_run(stem: str) -> None:
    assert report.collect()["ops"][stem]["cpu"]["chosen"] == _backends.resolve(stem, "cpu", None)


def test_report_passes_over_what_cannot_run() -> None:
    states = dict.fromkeys(_backends.BACKENDS, "not here") | {"reference": "available"}
    assert report._choice("cats_mlp", "cpu", states) == "reference"
    assert report._choice("cats_mlp", "cpu", states | {"native": "available"}) == "native"


def test_report_shows_a_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with subquad.use_backend("reference"):
        assert report.collect()["ops"]["cats_mlp"]["cpu"]["chosen"] == "reference"
    monkeypatch.setattr(_backends, "_from_env", "triton")
    monkeypatch.setattr(_backends, "_triton_unavailable", lambda device: "no")
    assert report.collect()["ops"]["cats_mlp"]["cpu"]["chosen"] == "triton (would raise)"


def test_report_lists_variables_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SUBQUAD_JIT", "0")
    assert report.collect()["environment"] == {"SUBQUAD_JIT": "0"}


def test_report_survives_broken_probes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(_native, "load", broken)
    monkeypatch.setattr(_native, "cpu_isas", broken)
    monkeypatch.setattr(_env, "as_dict", broken)
    monkeypatch.setattr(_env, "cxx", broken)
    monkeypatch.setattr(_backends, "backends", broken)
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(subprocess, "run", broken)
    assert "out of order" in output(capsys, "report", "--json")
    assert "out of order" in output(capsys, "report")


def test_support_table_is_the_one_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    begin, end = "<!-- ops:begin -->\n", "\n<!-- ops:end -->"
    assert text.count(begin) == text.count(end) == 1
    table = text.split(begin)[1].split(end)[0]
    assert table.strip() == report.support_table(), "paste the output of `subquad report --ops` between the markers"


def test_support_table_states_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = dataclasses.replace(CONTRACTS["cats_mlp"], missing={"triton": "needs tensor cores"})
    monkeypatch.setitem(CONTRACTS, "cats_mlp", declared)
    assert "- `cats_mlp` has no `triton` backend: needs tensor cores" in report.support_table()


# --- build ------------------------------------------------------------------------------------------------------------


def test_build_rejects_an_unknown_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "fpga"]) == 2
    assert "'fpga'" in capsys.readouterr().err


@pytest.mark.parametrize("age", [-600, 600])
def test_build_tells_that_a_library_in_the_package_was_not_built(
    age: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    library, source = tmp_path / "_C.so", tmp_path / "csrc" / "ops" / "one.cpp"
    source.parent.mkdir(parents=True)
    for file, seconds in ((source, 1e9), (library, 1e9 + age)):
        file.touch()
        os.utime(file, (seconds, seconds))
    monkeypatch.setattr(_native, "load", lambda name, build: None)
    monkeypatch.setattr(_native, "loaded", lambda: {"_C": library})
    for name, path in (("PACKAGE", tmp_path), ("SOURCES", source.parents[1])):
        monkeypatch.setattr(_native, name, path)
    assert cli.main(["build"]) == 0
    out = capsys.readouterr().out
    assert "in the package, not built now" in out and (f"older than {source}" in out) == (age < 0)


def test_build_reports_each_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_native, "load", lambda name, build: None if name == "_C" and build else "no compiler")
    monkeypatch.setattr(_native, "loaded", lambda: {"_C": Path("somewhere.so")})
    assert cli.main(["build"]) == 0
    assert "native: somewhere.so" in capsys.readouterr().out
    assert cli.main(["build", "native", "cuda"]) == 1
    assert "cuda: no compiler" in capsys.readouterr().err
