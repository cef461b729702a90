"""The first hour on a GPU, as far as it can be proved without one."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from subquad._dev import gpu_check, gpu_steps
from subquad._dev.gpu_check import Step
from subquad.bench import outside
from subquad.testing.checks import CHECKS
from subquad.testing.specs import SPECS
from subquad.testing.specs.causal_conv1d import CONV, UPDATE
from subquad.testing.specs.gated_linear_attention import SPEC as GLA
from subquad.testing.specs.gated_linear_attention import STEP
from subquad.testing.specs.interval_attention import SPEC as ATTENTION

NAMES = ["build", "report", "first calls", "quick lane", "memcheck", "racecheck", "bench"]


def python(code: str, limit: float = 60.0, name: str = "step") -> Step:
    return Step(name, (sys.executable, "-c", code), limit)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_dry_run_lists_every_step(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_check.main(["--device", kind, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    planned = gpu_check.steps(kind, tmp_path / "out")
    assert [step.name for step in planned] == NAMES
    for step in planned:
        assert f"{step.name}, {step.limit:.0f} s at most:\n  {step.command}\n" in shown
        assert step.program is not None or step.words[0].endswith("compute-sanitizer")
    assert not (tmp_path / "out").exists()


def test_a_card_needs_less_than_ten_minutes(tmp_path: Path) -> None:
    assert sum(step.limit for step in gpu_check.steps("cuda", tmp_path)) < 600


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_commands_have_the_arguments_they_are_given(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of this package is parsed; nothing runs."""
    monkeypatch.setattr(gpu_steps, "touch", lambda *_: 0)
    monkeypatch.setattr(gpu_steps, "bench", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parsed = 0
    for step in gpu_check.steps(kind, tmp_path):
        words = list(step.words)
        if "subquad._dev.gpu_steps" in words:
            assert gpu_steps.main(words[words.index("subquad._dev.gpu_steps") + 1 :]) == 0
            parsed += 1
    assert parsed == 4


@pytest.mark.heavy
def test_a_failing_and_a_hanging_step_do_not_stop_the_next(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(9); print(9)'])"
    steps = [
        python("print('fine')", name="good"),
        python("raise SystemExit('broken')", name="bad"),
        python(f"print('begun', flush=True); {child}", 2.0, name="hanging"),
        Step("absent", ("no-such-program-anywhere",), 9.0),
        python("import os; os.abort()", name="crashing"),
        Step("set", (sys.executable, "-c", "import os; print(os.environ['A'])"), 60.0, ("A=b c",)),
    ]
    start = time.monotonic()
    outcomes = gpu_check.check(steps, tmp_path, "toy")
    assert time.monotonic() - start < 30
    assert [o.status for o in outcomes] == ["passed", "failed", "timed out", "missing", "failed", "passed"]
    assert [o.tail.strip() for o in outcomes[:4]] == [
        "fine",
        "broken",
        "begun",
        "no-such-program-anywhere was not found",
    ]
    assert outcomes[-1].tail == "b c\n" and outcomes[-1].command.startswith("'A=b c' ")
    written = json.loads((tmp_path / "toy.json").read_text())
    assert [step["name"] for step in written["steps"]] == [step.name for step in steps]
    page = (tmp_path / "toy.md").read_text()
    assert "| hanging | timed out | 2 |" in page and "## bad: failed" in page and "## good" not in page


@pytest.mark.heavy
def test_exit_status_says_whether_all_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, status in (("", 0), ("raise SystemExit(3)", 1)):
        monkeypatch.setattr(
            gpu_check, "steps", lambda *_, code=code: [python("", name="one"), python(code, name="two")]
        )
        assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path)]) == status
    assert "1 of 2 steps passed" in capsys.readouterr().out
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", "one"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--device", "cpu", "--only", "none"], "expected any of build, report"), ([], "no CUDA device is available")],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(SystemExit):
        gpu_check.main(words)
    assert message in capsys.readouterr().err


def test_results_become_a_table(tmp_path: Path) -> None:
    record = {"created": "now", "git": {"sha": "abc"}, "versions": {"torch": "2.13", "c++": "13"}}
    right = {"op": "x", "case": "y", "backend": "triton", "error": 1e-6, "failure": None}
    right["seconds"] = {"subquad": {"median": 1e-3}, "fla": {"median": 2e-3}}
    wrong = {"op": "x", "case": "z", "failure": "off | by one\nmore"}
    page = gpu_check.table([gpu_check.Outcome("a", "b", "passed")], "card", {**record, "results": [right, wrong]})
    assert "| x | y | triton | 1.000 | fla 2.000 | 1.0e-06 |" in page and "now, commit abc, torch 2.13" in page
    assert "| x | z |  | wrong | | off / by one |" in page


def test_every_op_is_touched(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_steps.BACKENDS, "cpu", ("native",))
    assert gpu_steps.touch(SPECS, "cpu", None) == 0
    shown = capsys.readouterr().out
    assert all(f"{spec.name} native torch.bfloat16: ran" in shown for spec in SPECS)


def test_what_fails_is_counted_and_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: object) -> None:
        raise AssertionError("planted")

    monkeypatch.setitem(gpu_steps.BACKENDS, "cpu", ("reference",))
    monkeypatch.setitem(CHECKS, "guards", SimpleNamespace(run=wrong))
    assert gpu_steps.touch((GLA,), "cpu", "guards") == len(gpu_steps.DTYPES)
    assert "planted" in capsys.readouterr().out


def test_every_op_is_timed_before_any_twice() -> None:
    timed = [spec for spec in SPECS if spec.bench]
    chosen = gpu_steps.cases(tuple(timed), "cuda")
    assert [spec.name for spec, _ in chosen[: len(timed)]] == [spec.name for spec in timed]
    assert {case.params["dtype"] for _, case in chosen} == {torch.bfloat16}
    assert all(case.quick for _, case in gpu_steps.cases(tuple(timed), "cpu"))


def test_benchmarks_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert gpu_steps.bench((UPDATE,), "cpu", 0.0, file) == 0 and not file.exists()
    assert "0 cases, 0 wrong, 1 not reached" in capsys.readouterr().out
    broken = dataclasses.replace(CONV, bench_sample=lambda *_: 1 / 0)
    assert gpu_steps.bench((UPDATE, broken), "cpu", 30.0, file) == 1
    record = json.loads(file.read_text())
    right, wrong = record["results"]
    assert right["failure"] is None and set(right["seconds"]) == {"subquad", "shift"}
    assert wrong["failure"].startswith("ZeroDivisionError") and record["not_reached"] == []
    assert "| causal_conv1d_update | update-b1-d4096-fp32 | native |" in gpu_check.table([], "card", record)


def test_other_libraries_are_called_when_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(outside.OUTSIDE) <= {spec.name for spec in SPECS}
    assert outside._of("no_such_library", "call") is None
    called: list[str] = []

    def fake(module: str, name: str):  # type: ignore[no-untyped-def]
        def call(first: torch.Tensor, *rest: object, **options: object) -> tuple[torch.Tensor, None] | torch.Tensor:
            called.append(f"{module}.{name} {list(first.shape)}")
            return (first, None) if "gla" in name else first

        return call

    for found in (lambda *_: None, fake):
        monkeypatch.setattr(outside, "_of", found)
        for spec in (ATTENTION, GLA, STEP, CONV, UPDATE):
            case = next(c for c in spec.bench if c.quick and c.params["dtype"] is torch.bfloat16)
            assert spec.bench_sample is not None
            sample = spec.bench_sample(case, "cpu")
            for build in outside.OUTSIDE[spec.name].values():
                peer = build(sample)
                assert (peer is None) == (found is not fake or spec is STEP), spec.name  # its heads are shared there
                if peer is not None:
                    peer()
    assert called == [
        "flash_attn.flash_attn_func [1, 512, 2, 64]",
        "fla.ops.gla.chunk_gla [1, 512, 2, 64]",
        "causal_conv1d.causal_conv1d_fn [2, 256, 128]",
        "causal_conv1d.causal_conv1d_update [1, 4096]",
    ]
