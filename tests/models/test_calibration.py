"""The magnitude sketch, CatsCalibrator and the sparsity tracker."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import subquad
from subquad.calibration import CatsCalibrator, MagnitudeSketch, sparsity_report, track_sparsity
from subquad.calibration.sketch import ABOVE, BINS, NAN, OCTAVES, SLOTS, ZERO
from subquad.convert import CatsConfig, convert_mlps, revert_mlps
from subquad.nn import CATSMLP

pytestmark = pytest.mark.filterwarnings("ignore:.*native kernels are not in use")  # any backend will do

H, I = 16, 48  # noqa: E741
SHARES = (0.1, 0.3, 0.4, 0.5, 0.7, 0.9, 0.99)


def sketch_of(values: torch.Tensor) -> MagnitudeSketch:
    sketch = MagnitudeSketch()
    sketch.update(values)
    return sketch


def achieved(values: torch.Tensor, threshold: float) -> float:
    return (values.abs() <= torch.tensor(threshold)).double().mean().item()


# --- sketch ----------------------------------------------------------------------------------------------------------


def test_sketch_is_58_kilobytes() -> None:
    assert BINS == 7296 and MagnitudeSketch().counts.nbytes == 8 * SLOTS < 58 * 1024


@pytest.mark.parametrize("scale", [1e-6, 5e-4, 0.01, 0.3, 3.0, 30.0, 100.0])
def test_achieved_equals_target_at_every_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = F.silu(torch.randn(1_000_000, generator=generator) * scale)
    sketch = MagnitudeSketch()
    for part in values.split(300_000):
        sketch.update(part)
    for share in SHARES:
        target = max(share, achieved(values, 0.0))  # exact zeros are inactive at any threshold
        assert abs(achieved(values, sketch.threshold(share)) - target) < 2e-4


@pytest.mark.parametrize("scale", [1e-6, 0.01, 3.0, 100.0])
@pytest.mark.parametrize("count", [1, 2, 97, 100_000])
def test_exact_for_bfloat16(scale: float, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(count, generator=generator) * scale).bfloat16()
    sketch = sketch_of(values)
    for share in (*SHARES, 1.0):
        rank = math.ceil(round(share * count, 6))
        assert sketch.threshold(share) == values.float().abs().kthvalue(rank).values.item()


def test_special_values_are_counted_apart() -> None:
    values = torch.tensor(
        [0.0, -0.0, 1e-13, -1e-30, 1e-45, 2.0**-40, 1.0, -1.0, 2.0**17, 1e30, math.inf, -math.inf, math.nan]
    )
    sketch = sketch_of(values)
    below = int(sketch.counts[:OCTAVES].sum())
    above, zero, nan = (int(sketch.counts[i]) for i in (ABOVE, ZERO, NAN))
    assert (zero, below, above, nan) == (2, 3, 4, 1)
    assert int(sketch.counts[OCTAVES:ABOVE].sum()) == 3 and sketch.counts[0] == 1
    assert (sketch.total, sketch.nan_count, sketch.maximum.item()) == (12, 1, math.inf)
    assert sketch.threshold(2 / 12) == 0.0
    assert 0 < sketch.threshold(3 / 12) < 2.0**-126 < sketch.threshold(4 / 12) < 1e-29
    assert 1e-13 <= sketch.threshold(5 / 12) < 2.0**-40 <= sketch.threshold(6 / 12) <= 2.0**-40 * (1 + 2.0**-7)
    with pytest.warns(subquad.SubquadWarning, match="clamped"):
        assert sketch.threshold(0.9) == 2.0**17
    assert sketch.threshold(1.0) == math.inf


def test_zeros_do_not_pull_the_threshold_down() -> None:
    values = torch.cat([torch.zeros(100), torch.full((100,), 1e-13), torch.linspace(1, 2, 800)])
    sketch = sketch_of(values)
    for share in (0.3, 0.5):
        assert abs(achieved(values, sketch.threshold(share)) - share) < 2e-3
    assert sketch.threshold(0.05) == 0.0 and 0 < sketch.threshold(0.15) < 2.0**-40


def test_limits() -> None:
    sketch = sketch_of(torch.tensor([0.1, 0.2, 0.3]))
    assert sketch.threshold(0.0) == -1.0
    assert sketch.threshold(1.0) == torch.tensor(0.3).item()
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sparsity: expected a number from 0 to 1"):
            sketch.threshold(bad)
    for empty in (MagnitudeSketch(), sketch_of(torch.empty(0)), sketch_of(torch.full((5,), math.nan))):
        with pytest.raises(ValueError, match="nothing was counted"):
            empty.threshold(0.5)


def test_rank_is_not_lost_to_rounding() -> None:
    values = torch.arange(1, 101).bfloat16()  # 0.57 * 100 > 57 in floating point
    for percent in range(1, 101):
        assert sketch_of(values).threshold(percent / 100) == percent


def test_update_leaves_its_input_alone() -> None:
    values = torch.tensor([-1.0, math.nan])
    sketch_of(values)
    assert values[0] == -1 and values[1].isnan()
    sketch_of(torch.randn(6, 4).t()[:, ::2].requires_grad_())


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(numbers, max_size=20), min_size=1, max_size=5), st.floats(0, 1))
def test_merged_equals_one_shot(parts: list[list[float]], share: float) -> None:
    merged, one = MagnitudeSketch(), MagnitudeSketch()
    for part in parts:
        merged.merge(sketch_of(torch.tensor(part)))
    one.update(torch.tensor([v for part in parts for v in part]))
    assert torch.equal(merged.counts, one.counts) and torch.equal(merged.maximum, one.maximum)
    if one.total:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", subquad.SubquadWarning)
            assert merged.threshold(share) == one.threshold(share)


in_range = st.floats(2.0**-39, 2.0**16, width=32) | st.just(0.0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(in_range, min_size=1, max_size=60), st.floats(0, 1), st.floats(0, 1))
def test_threshold_brackets_the_order_statistic(values: list[float], share: float, other: float) -> None:
    data = torch.tensor(values)
    sketch = sketch_of(data)
    threshold = sketch.threshold(share)
    low, high = sorted((share, other))
    assert sketch.threshold(low) <= sketch.threshold(high)  # monotone
    if share == 0:
        assert threshold == -1
        return
    rank = max(1, math.ceil(share * len(values) * (1 - 1e-12)))
    exact = data.kthvalue(rank).values.item()
    assert abs(threshold - exact) <= 2.0**-7 * exact  # same bin
    assert threshold <= data.max().item()


# --- a small model ---------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, I, False), nn.Linear(H, I, False)
        self.down_proj = nn.Linear(I, H, False)
        self.act_fn = nn.SiLU()
        with torch.no_grad():
            self.gate_proj.weight.mul_(gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.mlp = MLP(gain)


class Model(nn.Module):
    """Embedding and two residual MLPs: every token is independent of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, H)
        self.layers = nn.ModuleList([Block(1.0), Block(4.0)])
        self.fail = False

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer.mlp(x)
        if self.fail:
            raise RuntimeError("on purpose")
        return x


NAMES = ["layers.0.mlp", "layers.1.mlp"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 1000, (8, 50), generator=torch.Generator().manual_seed(0))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def counts(calibrator: CatsCalibrator) -> list[torch.Tensor]:
    return [sketch.counts for sketch in calibrator.sketches.values()]


def same(a: CatsCalibrator, b: CatsCalibrator) -> bool:
    return a.tokens == b.tokens and all(torch.equal(x, y) for x, y in zip(counts(a), counts(b), strict=True))


def run(model: nn.Module, *args: torch.Tensor, options: dict[str, object] | None = None, **kwargs) -> CatsCalibrator:
    with CatsCalibrator(model, **(options or {})) as calibrator:
        model(*args, **kwargs)
    return calibrator


def snapshot(model: nn.Module) -> list[object]:
    state = [(name, id(p), p.stride(), p.clone()) for name, p in model.named_parameters()]
    return [hooks(model), [(name, id(m)) for name, m in model.named_modules()], state]


def unchanged(model: nn.Module, before: list[object]) -> bool:
    now = snapshot(model)
    same_values = all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(now[2], before[2], strict=True))
    return now[:2] == before[:2] and same_values and len(now[2]) == len(before[2])


# --- collecting ------------------------------------------------------------------------------------------------------


def gate_magnitudes(model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """|act(gate)| of every layer, [tokens, I]."""
    x, result = model.embedding(ids.flatten()), []
    for layer in model.layers:
        result.append(F.silu(layer.mlp.gate_proj(x)).abs())
        x = x + layer.mlp(x)
    return result


def test_thresholds_reach_the_target(model: Model, ids: torch.Tensor) -> None:
    magnitudes = gate_magnitudes(model, ids)
    calibrator = run(model, ids)
    assert calibrator.tokens == dict.fromkeys(NAMES, 400)
    for share in SHARES:
        thresholds = calibrator.thresholds(share)
        assert list(thresholds) == NAMES
        for values, threshold in zip(magnitudes, thresholds.values(), strict=True):
            assert abs(achieved(values, threshold) - share) < 2e-3
    assert calibrator.thresholds(0.0) == dict.fromkeys(NAMES, -1.0)
    assert list(calibrator.thresholds(1.0).values()) == [values.max().item() for values in magnitudes]


def test_converted_model_is_calibrated_densely(model: Model, ids: torch.Tensor) -> None:
    want = run(model, ids)
    dense = model(ids)
    convert_mlps(model, CatsConfig(threshold=0.5))
    model.layers[1].mlp.enabled = False
    sparse = model(ids)
    with CatsCalibrator(model) as calibrator:
        torch.testing.assert_close(model(ids), dense)
    assert not torch.allclose(sparse, dense)
    torch.testing.assert_close(model(ids), sparse)
    assert [layer.mlp.enabled for layer in model.layers] == [True, False] and hooks(model) == 0
    assert calibrator.thresholds(0.5) == pytest.approx(want.thresholds(0.5), rel=1e-4)


def test_collecting_twice_adds_up(model: Model, ids: torch.Tensor) -> None:
    calibrator = run(model, ids[:3])
    with calibrator:
        model(ids[3:])
    assert same(calibrator, run(model, ids))
    with calibrator, pytest.raises(RuntimeError, match="already"):
        calibrator.__enter__()


@pytest.mark.parametrize("converted", [False, True])
def test_exception_restores_everything(model: Model, ids: torch.Tensor, converted: bool) -> None:
    if converted:
        convert_mlps(model, CatsConfig(threshold=0.1))
        model.layers[0].mlp.enabled = False
    before = snapshot(model)
    model.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        run(model, ids)
    assert unchanged(model, before)
    if converted:
        assert [layer.mlp.enabled for layer in model.layers] == [False, True]
    calibrator = CatsCalibrator(model)
    model.layers[1].mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"(layers|sparsity): expected numbers"):
        calibrator.__enter__()
    assert hooks(model) == 0
    if converted:
        assert not model.layers[0].mlp.enabled


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("positional", [False, True])
def test_padding_does_not_count(
    model: Model, ids: torch.Tensor, dtype: torch.dtype, positional: bool, converted: bool
) -> None:
    if converted:
        convert_mlps(model)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0  # left padding
    mask[1, 30:] = 0
    padded = run(model, ids, mask.to(dtype)) if positional else run(model, input_ids=ids, attention_mask=mask.to(dtype))
    plain = run(model, ids[mask.bool()][None])
    assert same(padded, plain) and padded.tokens[NAMES[0]] == 360
    assert not same(padded, run(model, ids))


def test_mask_of_a_cached_call_ends_with_the_new_tokens(model: Model, ids: torch.Tensor) -> None:
    mask = torch.ones(8, 60)
    mask[:, 58:] = 0
    assert run(model, ids, mask).tokens[NAMES[0]] == 8 * 48


def test_mask_does_not_outlive_its_forward(model: Model, ids: torch.Tensor) -> None:
    with CatsCalibrator(model) as calibrator:
        model(ids, torch.zeros_like(ids))
        model(ids[:2, :5])
        model.fail = True
        with pytest.raises(RuntimeError):
            model(ids[:2, :5], torch.zeros(2, 5))
        model.layers[0].mlp(torch.randn(3, H))
    assert calibrator.tokens == {NAMES[0]: 13, NAMES[1]: 10}


def test_a_mask_that_tells_no_padding_is_refused(model: Model, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask: expected bool, or float of 0 and numbers below -1000"):
        run(model, ids, torch.ones(ids.shape[0], 1, ids.shape[1], ids.shape[1]))
    with pytest.raises(ValueError, match=r"attention_mask: expected .* or \[B, T\]"):
        run(model, ids, torch.ones(ids.shape[0], ids.shape[1], ids.shape[1]))
    with pytest.raises(ValueError, match="expected one value per token"):
        run(model, ids, options={"token_mask": torch.ones(8, 3)})
    assert hooks(model) == 0


def test_token_mask(model: Model, ids: torch.Tensor) -> None:
    keep = torch.zeros(8, 50)
    keep[:, 10:30] = 1
    want = run(model, ids[:, 10:30])
    assert same(run(model, ids, options={"token_mask": keep}), want)
    assert same(run(model, ids, options={"token_mask": lambda args, kwargs: keep}), want)
    mask = torch.ones(8, 50)
    mask[4:] = 0
    assert same(run(model, ids, mask, options={"token_mask": keep}), run(model, ids[:4, 10:30]))


def test_positions(model: Model, ids: torch.Tensor) -> None:
    assert same(run(model, ids, options={"skip_first_tokens": 7}), run(model, ids[:, 7:]))
    assert same(run(model, ids, options={"only_last_fraction": 0.3}), run(model, ids[:, 35:]))
    mask = torch.ones(8, 50)
    mask[:, :10] = 0  # positions count from the first real token
    assert same(run(model, ids, mask, options={"skip_first_tokens": 7}), run(model, ids[:, 17:]))
    assert same(run(model, ids, mask, options={"only_last_fraction": 0.5}), run(model, ids[:, 30:]))


def test_max_tokens(model: Model, ids: torch.Tensor) -> None:
    with CatsCalibrator(model, max_tokens=130) as calibrator:
        model(ids[:2])
        assert not calibrator.done
        model(ids[2:])
    assert calibrator.done and same(calibrator, run(model, ids.flatten()[None, :130]))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"skip_first_tokens": -1}, "skip_first_tokens"),
        ({"only_last_fraction": 0.0}, "only_last_fraction"),
        ({"only_last_fraction": 1.5}, "only_last_fraction"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"layers": [2]}, "layers: expected numbers below 2"),
        ({"layers": ["layers.0.attention"]}, "(layers|sparsity): expected numbers"),
    ],
)
def test_bad_options(model: Model, options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CatsCalibrator(model, **options)


def test_model_without_mlps() -> None:
    with pytest.raises(ValueError, match="model: expected gated MLPs"):
        CatsCalibrator(nn.Sequential(nn.Linear(3, 3)))


def test_bare_modules(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    x, mlp = torch.randn(200, H), MLP(1.0).requires_grad_(False)
    module = CATSMLP.from_llama_mlp(mlp)
    assert run(mlp, x).thresholds(0.5)[""] == pytest.approx(run(module, x).thresholds(0.5)[""], rel=1e-4)
    with pytest.raises(ValueError, match="from_llama_mlp"):
        run(mlp, x).apply(0.5)
    assert run(module, x).apply(0.5) == [""] and module.threshold > 0


# --- applying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converted", [False, True])
def test_apply_sets_thresholds_and_metadata(model: Model, ids: torch.Tensor, converted: bool) -> None:
    if converted:
        convert_mlps(model, CatsConfig(inclusive=True))
    calibrator = run(model, ids)
    assert calibrator.apply(0.7, config=CatsConfig(inclusive=True)) == NAMES
    for layer, threshold in zip(model.layers, calibrator.thresholds(0.7).values(), strict=True):
        assert isinstance(layer.mlp, CATSMLP) and layer.mlp.threshold == torch.tensor(threshold)
        assert layer.mlp.cats_meta.tolist() == pytest.approx([1.0, 0.7, 400.0, 1.0])
    rows = sparsity_report(model, [ids])
    assert all(abs(1 - row.active_mean - 0.7) < 2e-3 for row in rows)


def test_apply_by_layer(model: Model, ids: torch.Tensor) -> None:
    calibrator = run(model, ids)
    assert calibrator.apply({-1: 0.5}) == [NAMES[1]]
    assert isinstance(model.layers[0].mlp, MLP)
    assert calibrator.apply({0: 0.3, "layers.1.mlp": 0.6}) == NAMES
    assert [round(layer.mlp.cats_meta[1].item(), 3) for layer in model.layers] == [0.3, 0.6]
    assert calibrator.apply(lambda name: 0.9 if "0" in name else None) == [NAMES[0]]
    assert [round(layer.mlp.cats_meta[1].item(), 3) for layer in model.layers] == [0.9, 0.6]


def test_failed_apply_changes_nothing(model: Model, ids: torch.Tensor) -> None:
    calibrator, empty = run(model, ids), CatsCalibrator(model)
    before = snapshot(model)

    def fails(action, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            action()
        assert unchanged(model, before)

    fails(lambda: empty.apply(0.5), ValueError, "layers.0.mlp: nothing was counted")
    fails(lambda: calibrator.apply(1.5), ValueError, "sparsity: expected")
    fails(lambda: calibrator.apply({0: 0.5, 7: 0.5}), ValueError, r"(layers|sparsity): expected numbers")
    fails(lambda: calibrator.apply({0: 0.5, 1: math.nan}), ValueError, "layers.1.mlp: sparsity")
    fails(lambda: calibrator.apply(0.5, config=CatsConfig(prefill="no")), ValueError, "layers.0.mlp: prefill")
    with calibrator, pytest.raises(RuntimeError, match="with block"):
        calibrator.apply(0.5)
    assert unchanged(model, before)
    model.layers[1].mlp.act_fn = nn.Tanh()  # the first layer could be converted, the second cannot
    before = snapshot(model)
    fails(lambda: calibrator.apply(0.5), ValueError, "layers.1.mlp: activation")


def test_layers_option_limits_the_calibration(model: Model, ids: torch.Tensor) -> None:
    assert run(model, ids, options={"layers": [1]}).apply(0.5) == [NAMES[1]]
    assert isinstance(model.layers[0].mlp, MLP)


def test_nan_is_reported(model: Model, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model.embedding.weight[int(ids[0, 0])] = math.nan
    calibrator = run(model, ids)
    with pytest.warns(subquad.SubquadWarning, match=r"NaN gate activations in 2 layers, first 'layers.0.mlp' with \d+"):
        thresholds = calibrator.thresholds(0.5)
    assert all(0 < threshold < 10 for threshold in thresholds.values())


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_merge_equals_one_run(model: Model, ids: torch.Tensor) -> None:
    first, second = run(model, ids[:3]), run(model, ids[3:])
    first.merge(second)
    assert same(first, run(model, ids))
    with pytest.raises(ValueError, match="first difference"):
        first.merge(CatsCalibrator(model, layers=[0]))


def test_save_and_load(model: Model, ids: torch.Tensor, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    calibrator = run(model, ids)
    calibrator.save(tmp_path / "gates.safetensors")
    loaded = CatsCalibrator(model).load(tmp_path / "gates.safetensors")
    assert same(loaded, calibrator) and loaded.thresholds(0.5) == calibrator.thresholds(0.5)
    assert loaded.thresholds(1.0) == calibrator.thresholds(1.0)
    with pytest.raises(ValueError, match="first difference"):
        CatsCalibrator(model, layers=[0]).load(tmp_path / "gates.safetensors")
    safetensors.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a calibration file of version 1, got None"):
        loaded.load(tmp_path / "other.safetensors")
    assert same(loaded, calibrator)
    assert loaded.apply(0.5) == NAMES


def _reduce(rank: int, path: str, calibrator: CatsCalibrator, results: object) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)  # the parent's OpenMP threads do not survive a fork
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    calibrator.all_reduce()
    results.put((calibrator.tokens, [c.tolist() for c in counts(calibrator)], calibrator.thresholds(1.0)))
    dist.destroy_process_group()


def test_all_reduce(model: Model, ids: torch.Tensor, tmp_path) -> None:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    parts, want = (run(model, ids[:3]), run(model, ids[3:])), run(model, ids)
    arguments = [(rank, str(tmp_path / "store"), part, results) for rank, part in enumerate(parts)]
    workers = [context.Process(target=_reduce, args=args, daemon=True) for args in arguments]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    for tokens, reduced, maxima in got:
        assert tokens == want.tokens and reduced == [c.tolist() for c in counts(want)]
        assert maxima == want.thresholds(1.0)


# --- tracking --------------------------------------------------------------------------------------------------------


def test_tracker_counts_what_the_masks_say(model: Model, ids: torch.Tensor) -> None:
    magnitudes = gate_magnitudes(model, ids[:1, :12])[0]
    run(model, ids).apply(0.8)
    threshold = model.layers[0].mlp.threshold
    mask = magnitudes > threshold
    with track_sparsity(model) as tracker:
        for i in range(4):
            model(ids[:1, i : i + 1])
        model(ids[:1, 4:12])
    row = tracker.report()[0]
    active = mask.float().mean(1)
    unions = [*active[:4].tolist(), mask[4:].any(0).float().mean().item()]
    assert (row.name, row.tokens, row.calls, row.dense_calls) == (NAMES[0], 12, 5, 0)
    assert row.target == pytest.approx(0.8) and row.threshold == threshold.item()
    assert row.active_mean == pytest.approx(active.mean().item()) and row.active_min == pytest.approx(
        active.min().item()
    )
    assert row.active_p5 <= row.active_mean <= row.active_p95
    assert row.union == pytest.approx(sum(unions) / 5)
    assert row.union_by_tokens == pytest.approx({1: active[:4].mean().item(), 8: unions[4]})
    assert row.dead == int((~mask.any(0)).sum())
    assert row.bytes_ratio == pytest.approx(sum((1 + 2 * u) / 3 for u in unions) / 5)
    assert tracker.sparsity == pytest.approx(1 - sum(r.active_mean for r in tracker.report()) / 2)
    assert hooks(model) == 0


def test_tracker_sees_dense_calls(model: Model, ids: torch.Tensor) -> None:
    convert_mlps(model, CatsConfig(threshold=0.05, max_sparse_tokens=4, prefill="dense"))
    model.layers[1].mlp.prefill = "masked"
    rows = sparsity_report(model, [{"input_ids": ids[:1, :5]}, (ids[:1, :3],), ids[:0]])
    assert [(row.calls, row.dense_calls, row.tokens) for row in rows] == [(2, 1, 8)] * 2
    assert rows[0].active_p95 == 1.0 and rows[1].active_p95 < 1.0
    model.requires_grad_(True)
    with track_sparsity(model) as tracker:
        model(ids[:1, :2])
    assert tracker.report()[0].dense_calls == 1
    model.layers[0].mlp.enabled = False
    assert sparsity_report(model, [ids[:1, :2]])[0].active_mean == 1.0


def test_report_without_data(model: Model, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="model: expected CATSMLP"):
        sparsity_report(model)
    convert_mlps(model, CatsConfig(threshold=0.5))
    row = sparsity_report(model)[0]
    assert (row.threshold, row.target, row.tokens, row.active_mean) == (0.5, None, 0, None)
    assert row.to_dict()["threshold"] == 0.5
    with track_sparsity(model) as tracker:
        pass
    assert math.isnan(tracker.sparsity)
    with pytest.raises(RuntimeError), track_sparsity(model):
        model.fail = True
        model(ids)
    assert hooks(model) == 0
    assert revert_mlps(model) == NAMES
