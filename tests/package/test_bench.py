"""The benchmark harness: what it counts, what it refuses to time, what it writes down."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from subquad import _backends, cli
from subquad.bench import command, measure, record, table, timing
from subquad.bench.measure import OURS, Result
from subquad.bench.timing import Plan, Timing
from subquad.contract import HANDLES
from subquad.testing.spec import BenchCase, Sampler
from subquad.testing.specs import SPECS

FAST = Plan(rounds=3, warmup=1, budget=2.0)
MLP = next(spec for spec in SPECS if spec.name == "cats_mlp")


def small(spec, **params):
    """The spec with one tiny benchmark case per sparsity."""
    base = {"tokens": 1, "hidden": 64, "neurons": 512, "dtype": torch.float32, **params}
    cases = tuple(BenchCase(f"s{s}", {**base, "sparsity": s}, quick=True) for s in (0.0, 0.5))
    return dataclasses.replace(spec, bench=cases)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch):
    """`subquad bench` sees one tiny spec and its reference backend."""
    spec = small(MLP)
    monkeypatch.setattr(command, "specs_of", lambda family: [spec])
    monkeypatch.setattr(command, "QUICK", FAST)
    return spec


def run(*words: str) -> int:
    return cli.main(["bench", "--quick", "--backend", "reference", *words])


# --- timing -----------------------------------------------------------------------------------------------------------


def test_median_and_spread() -> None:
    result = timing.summarise([(float(i), False) for i in range(1, 12)], skip_preempted=True)
    assert (result.median, result.p20, result.p80) == (6.0, 3.0, 9.0)
    assert (result.rounds, result.preempted, result.used) == (11, 0, 11)


def test_preempted_samples_are_left_out_and_counted() -> None:
    samples = [(1.0, False), (1.0, False), (9.0, True)]
    assert timing.summarise(samples, skip_preempted=True) == Timing(1.0, 1.0, 1.0, 3, 1, 2)
    assert timing.summarise(samples, skip_preempted=False).used == 3


def test_too_many_preempted_samples_are_kept() -> None:
    result = timing.summarise([(1.0, False), (9.0, True), (9.0, True)], skip_preempted=True)
    assert (result.median, result.preempted, result.used) == (9.0, 2, 3)


def test_candidates_take_turns_and_rotate() -> None:
    calls: list[str] = []

    def candidate(name: str):
        def call() -> None:
            calls.append(name)
            time.sleep(0.0003)

        return call

    times = timing.interleaved({n: candidate(n) for n in "abc"}, Plan(rounds=3, warmup=1, budget=60))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert [t.rounds for t in times.values()] == [3, 3, 3]
    assert all(t.median >= 0.0003 for t in times.values())


def test_short_calls_are_timed_in_batches() -> None:
    calls = [0]

    def call() -> None:
        calls[0] += 1

    times = timing.interleaved({"a": call}, Plan(rounds=2, warmup=1, budget=60))
    assert calls[0] > 100 and times["a"].rounds == 2


def test_budget_stops_rounds_but_not_the_first() -> None:
    times = timing.interleaved({"a": lambda: time.sleep(0.02)}, Plan(rounds=50, warmup=1, budget=0.01))
    assert times["a"].rounds == 1


# --- one case ---------------------------------------------------------------------------------------------------------


def test_a_right_kernel_is_timed_against_every_peer() -> None:
    spec = small(MLP)
    result = measure.run_case(spec, spec.bench[1], "cpu", "reference", FAST)
    assert result.failure is None and result.error <= result.tolerance == spec.tol.forward[torch.float32]
    assert set(result.times) == {OURS, *spec.peers}
    assert result.ratio("torch dense") == result.times[OURS].median / result.times["torch dense"].median
    assert result.baseline == "s0.0"
    assert result.bytes_ratio == pytest.approx(2 / 3, rel=0.01)


def test_a_wrong_kernel_gets_no_time() -> None:
    spec = small(MLP)
    wrong = dataclasses.replace(spec, fn=lambda *args, **kwargs: spec.fn(*args, **kwargs) * 1.001)
    result = measure.run_case(wrong, wrong.bench[0], "cpu", "reference", FAST)
    assert result.times == {} and result.failure is not None and "exceeds" in result.failure
    assert result.gigabytes_per_second is None and result.ratio("torch dense") is None


def test_peers_compute_what_their_names_say() -> None:
    spec = small(MLP)
    sample = spec.bench_sample(spec.bench[1], "cpu")
    torch.testing.assert_close(spec.peers["torch masked"](sample)(), spec.reference(**sample.args, **sample.kwargs))
    dense = {**sample.kwargs, "threshold": -1.0}
    torch.testing.assert_close(spec.peers["torch dense"](sample)(), spec.reference(**sample.args, **dense))


@pytest.mark.parametrize("case", [c for c in MLP.bench if c.params["sparsity"] and c.quick], ids=lambda c: c.id)
def test_threshold_is_the_quantile_that_the_case_names(case: BenchCase) -> None:
    sample = MLP.bench_sample(case, "cpu")
    z = sample.args["x"].double() @ sample.args["w_gate"].double().t()
    dead = (torch.nn.functional.silu(z).abs() <= sample.kwargs["threshold"]).double().mean().item()
    assert abs(dead - case.params["sparsity"]) < 0.005


def test_dense_twin() -> None:
    twins = {case.id: measure.dense_twin(case, MLP.bench) for case in MLP.bench if not case.quick}
    assert twins["4096x11008-fp32-N1-s0.7"].id == "4096x11008-fp32-N1-s0"
    assert twins["4096x11008-fp32-N1-s0"] is None and twins["4096x11008-bf16-N8-s0.5"] is None


def test_roofline_bound_follows_the_bytes_saved() -> None:
    def timed(case: str, seconds: float, **more) -> Result:
        return Result("op", case, {}, "native", 0.0, 1.0, times={OURS: Timing(seconds, 0, 0, 1, 0, 1)}, **more)

    results = [timed("s0", 2.0), timed("s0.5", 1.5, baseline="s0", bytes_ratio=2 / 3)]
    assert table.against_baseline(results[0], results) == (None, None)
    assert table.against_baseline(results[1], results) == (0.75, pytest.approx(1.10 * 2 / 3))


def test_overhead_finds_the_raw_operator() -> None:
    reason = _backends.unavailable("cats_mlp", "native", "cpu", build=True)
    if reason is not None:
        pytest.skip(reason)
    before = dict(HANDLES["native"])
    sample = next(iter(MLP.samples(Sampler(size="small"))))
    found = measure.overhead(MLP, sample, "native", Plan(rounds=20, warmup=3, budget=5))
    assert found["public"] > found["raw"] > 0 and found["difference"] == found["public"] - found["raw"]
    assert HANDLES["native"] == before


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_writes_a_record_and_a_plot(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "deep" / "r.json", tmp_path / "r.png"
    assert run("--json", str(out), "--plot", str(picture)) == 0
    data = json.loads(out.read_text())
    assert (data["kind"], data["schema"]) == (record.KIND, record.SCHEMA)
    assert {"created", "git", "versions", "machine", "threads", "cpu_isa", "settings"} <= set(data)
    assert data["versions"]["torch"] == torch.__version__ and data["threads"] == torch.get_num_threads()
    assert [entry["case"] for entry in data["results"]] == ["s0.0", "s0.5"]
    entry = data["results"][0]
    assert set(entry["seconds"]) == {OURS, "torch dense", "torch masked"}
    assert set(entry["seconds"][OURS]) == {"median", "p20", "p80", "rounds", "preempted", "used"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "torch dense" in shown and "s0.5" in shown


def test_command_compares_with_an_earlier_record(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    assert run("--json", str(out)) == 0
    data = json.loads(out.read_text())
    for entry in data["results"]:
        entry["ratios"]["torch dense"] *= 1e6
    out.write_text(json.dumps(data))
    capsys.readouterr()
    assert run("--compare", str(out)) == 0
    assert capsys.readouterr().out.count("0.00x") == 2


@pytest.mark.parametrize("text", ["{}", "not json", '{"kind": "subquad-bench", "schema": 99}'])
def test_command_refuses_a_foreign_record(tiny, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    assert run("--compare", str(path)) == 2
    assert "compare:" in capsys.readouterr().err


def test_command_fails_on_a_wrong_kernel(tiny, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    wrong = dataclasses.replace(tiny, fn=lambda *args, **kwargs: tiny.fn(*args, **kwargs) + 1)
    monkeypatch.setattr(command, "specs_of", lambda family: [wrong])
    assert run("--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")) == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown and "2 of 2 cases failed" in shown
    assert all(e["failure"] and not e["seconds"] for e in json.loads((tmp_path / "r.json").read_text())["results"])


def test_command_rejects_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "no_such_family"]) == 2
    assert "family:" in capsys.readouterr().err
    assert cli.main(["bench", "--threads", "0"]) == 2
    assert "threads:" in capsys.readouterr().err


def test_family_selects_ops() -> None:
    names = {spec.name for spec in command.specs_of("cats")}
    assert {"cats_mlp", "cats_activation"} <= names
    assert {spec.stem for spec in command.specs_of("cats_mlp")} == {"cats_mlp"}


def test_targets_of_the_large_cases_are_set() -> None:
    large = [case for case in MLP.bench if not case.quick and case.params["dtype"] is not torch.float16]
    single = [case for case in large if case.params["tokens"] == 1]
    assert {case.params["sparsity"] for case in single} == {0.0, 0.5, 0.7, 0.9}
    assert all(0 < case.params["target"] <= (0.80 if case in single else 1.0) for case in large)
    assert {case.params["tokens"] for case in large} == {1, 8, 17, 64, 128}
