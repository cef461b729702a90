"""The numbers that all backends read: powers, offsets, lengths, coverage; and that no wrong configuration is made."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import subquad
from subquad import SubquadWarning, SuperlinearConfig
from subquad import superlinear as module

from .dense import README, RELEASED, length, offset, window


def fractional(power: float, **more: Any) -> SuperlinearConfig:
    return SuperlinearConfig(search_power=power, inv_search_power_int=None, **more)


# --- offsets and lengths ----------------------------------------


def test_offsets_that_float32_misses() -> None:
    """At i = 291 the roundings of float32 differ first."""
    offsets = subquad.stripe_offsets(60_000, RELEASED)
    assert [int(offsets[i - 1]) for i in (291, 360, 381, 410, 416)] == [30185, 44444, 49270, 56300, 57807]
    assert offsets.dtype is torch.int64 and offsets.tolist() == [offset(i + 1, RELEASED) for i in range(len(offsets))]


@pytest.mark.parametrize("inverse", [2, 3, 4, 5, 6])
def test_integer_powers_are_exact(inverse: int) -> None:
    config = SuperlinearConfig(inv_search_power_int=inverse)
    offsets = subquad.stripe_offsets(10_000_000, config).tolist()
    assert offsets == [i**inverse for i in range(1, len(offsets) + 1)]
    assert (len(offsets) + 1) ** inverse > 10_000_000
    assert config.exponent == inverse and isinstance(config.exponent, int)


def test_a_power_that_is_whole_takes_the_exact_path() -> None:
    assert fractional(0.5).exponent == 2 and isinstance(fractional(0.5).exponent, int)
    assert isinstance(fractional(0.55).exponent, float)


def test_a_power_close_to_0_has_one_stripe() -> None:
    for power in (0.01, 0.0005):
        assert subquad.stripe_offsets((1 << 31) - 1, fractional(power)).tolist() == [1]
        with pytest.warns(SubquadWarning, match="reached by no span"):
            module.warn_of_gaps(fractional(power))


@pytest.mark.parametrize("config", [README, RELEASED, SuperlinearConfig(), fractional(0.9, sw_index=2)], ids=str)
def test_windows_and_counts(config: SuperlinearConfig) -> None:
    assert config.window_len() == window(config)
    for t in (0, 1, 2, 15, 16, 17, 3000):
        found = [i for i in range(config.sw_index + 1, 3000) if offset(i, config) <= t]
        assert config.num_anchors(t) == len(found)
        if t:
            span = length(t, config.backward_factor, config) + length(t, config.forward_factor, config) + 1
            assert config.max_keys(t) == min(config.num_spans, len(found)) * span + min(t, window(config))


def test_known_windows() -> None:
    assert [SuperlinearConfig(sw_index=i).window_len() for i in (0, 1, 3, 7)] == [0, 3, 15, 63]
    assert RELEASED.window_len() == 2032


def test_the_table_of_a_device_is_one_tensor() -> None:
    first = README.offsets(100)
    assert README.offsets(4096) is first and first.dtype is torch.int32
    assert first.tolist() == [i * i for i in range(4, 65)]
    assert README.offsets(4097).shape[0] > first.shape[0]


LENGTHS = [
    SuperlinearConfig(), README, RELEASED, SuperlinearConfig(backward_factor=0.3, forward_factor=0.3),
    SuperlinearConfig(span_power=0.667, backward_factor=1.5), SuperlinearConfig(backward_factor=1.1, forward_factor=2.2),
]  # fmt: skip


@pytest.mark.parametrize("config", LENGTHS, ids=str)
def test_lengths(config: SuperlinearConfig) -> None:
    seen = torch.tensor([0, 1, 2, 25, 100, 121, 225, 400, 625, 2500, 10_795, 15_895, 60_102, 67_224, 8_300_000])
    back, ahead = subquad.span_lengths(seen, config)
    assert back.dtype is ahead.dtype is torch.int32
    assert back.tolist() == [length(t, config.backward_factor, config) for t in seen.tolist()]
    assert ahead.tolist() == [length(t, config.forward_factor, config) for t in seen.tolist()]


def test_squares_are_not_rounded_up() -> None:
    seen = torch.arange(1, 3000) ** 2
    assert torch.equal(subquad.span_lengths(seen, SuperlinearConfig())[0].long(), 2 * torch.arange(1, 3000))


def test_lengths_as_the_reference_has_them() -> None:
    """ref_f32 is that formula, to the bit, and differs from the exact one where single precision does."""
    exact, single = RELEASED, replace(RELEASED, length_mode="ref_f32")
    seen = torch.arange(0, 70_000)
    for factor, found in zip((3.0, 1.0), subquad.span_lengths(seen, single), strict=True):
        assert torch.equal(found, torch.ceil(factor * seen.float() ** 0.55).int())
    differ = (subquad.span_lengths(seen, exact)[0] != subquad.span_lengths(seen, single)[0]).nonzero().flatten()
    assert 0 < len(differ) < 100
    for t in differ.tolist():
        assert int(subquad.span_lengths(torch.tensor([t]), exact)[0]) == length(t, 3.0, exact)


# --- coverage ----------------------------------------

COMPLETE = [
    SuperlinearConfig(), README, SuperlinearConfig(inv_search_power_int=3, span_power=2 / 3, backward_factor=3.0),
    fractional(0.55, span_power=0.55, backward_factor=3.0, sw_index=2), SuperlinearConfig(sw_index=9, num_spans=1),
]  # fmt: skip
GAPS = [
    SuperlinearConfig(backward_factor=1.0, forward_factor=1.0), SuperlinearConfig(backward_factor=1.5, forward_factor=0.5),
    SuperlinearConfig(backward_factor=0.1, sw_index=1), SuperlinearConfig(inv_search_power_int=3),
    SuperlinearConfig(inv_search_power_int=3, backward_factor=3.0),
]  # fmt: skip


def unreachable(t: int, config: SuperlinearConfig) -> list[int]:
    """Keys of the last query in neither its window nor the span of any of its stripes, one by one."""
    seen = set(range(max(0, t - window(config)), t))
    i = config.sw_index + 1
    while (anchor := t - offset(i, config)) >= 0:
        end = min(anchor + length(t, config.forward_factor, config), t - 1 - window(config))
        seen |= set(range(max(0, anchor - length(t, config.backward_factor, config)), end + 1))
        i += 1
    return sorted(set(range(t)) - seen)


@pytest.mark.parametrize("config", COMPLETE + GAPS, ids=str)
def test_coverage(config: SuperlinearConfig) -> None:
    """As counted key by key; none where the backward reach is at least the distance of stripes."""
    holes = 0
    for t in (*range(150), 299, 500, 1000):
        found = [key for begin, end in subquad.coverage_gaps(t, config) for key in range(begin, end)]
        assert found == unreachable(t, config)
        holes += len(found)
    assert (holes > 0) == (config in GAPS)


@pytest.mark.parametrize("config", GAPS, ids=str)
def test_gaps_of_every_kind_are_told(config: SuperlinearConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned", set())
    with pytest.warns(SubquadWarning, match="reached by no span"):
        module.warn_of_gaps(config)


def test_gaps_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned", set())
    x = torch.randn(1, 5, 1, 4)
    with pytest.warns(SubquadWarning, match="reached by no span.*backward_factor >= 2"):
        subquad.superlinear_attention(x, x, x, x, config=GAPS[0], backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subquad.superlinear_attention(x, x, x, x, config=GAPS[0], backend="reference")
        for config in COMPLETE:
            subquad.superlinear_attention(x, x, x, x, config=config, backend="reference")
    with pytest.warns(SubquadWarning, match="reached by no span"):
        subquad.superlinear_attention_step(
            x[:, :1], x[:, :1], (x, x), torch.tensor([4]), config=GAPS[1], backend="reference"
        )


# --- what is refused ----------------------------------------

WRONG: list[tuple[dict[str, Any], str, type[Exception]]] = [
    ({"sw_index": -1}, "sw_index", ValueError),
    ({"sw_index": 1.0}, "sw_index", TypeError),
    ({"sw_index": True}, "sw_index", TypeError),
    ({"num_spans": 0}, "num_spans", ValueError),
    ({"num_spans": 9}, "num_spans", ValueError),
    ({"num_spans": None}, "num_spans", TypeError),
    ({"backward_factor": 0.0}, "backward_factor", ValueError),
    ({"backward_factor": float("nan")}, "backward_factor", ValueError),
    ({"backward_factor": float("inf")}, "backward_factor", ValueError),
    ({"backward_factor": "2"}, "backward_factor", TypeError),
    ({"forward_factor": -0.1}, "forward_factor", ValueError),
    ({"forward_factor": float("inf")}, "forward_factor", ValueError),
    ({"forward_factor": None}, "forward_factor", TypeError),
    ({"span_power": 0.0}, "span_power", ValueError),
    ({"span_power": 1.0}, "span_power", ValueError),
    ({"span_power": float("nan")}, "span_power", ValueError),
    ({"span_power": torch.tensor(0.5)}, "span_power", TypeError),
    ({"search_power": 0.5}, "search_power", ValueError),
    ({"inv_search_power_int": None}, "search_power", ValueError),
    ({"search_power": 1.0, "inv_search_power_int": None}, "search_power", ValueError),
    ({"search_power": 0.0, "inv_search_power_int": None}, "search_power", ValueError),
    ({"search_power": "half", "inv_search_power_int": None}, "search_power", TypeError),
    ({"inv_search_power_int": 1}, "inv_search_power_int", ValueError),
    ({"inv_search_power_int": 7}, "inv_search_power_int", ValueError),
    ({"inv_search_power_int": 2.0}, "inv_search_power_int", TypeError),
    ({"sm_scale": float("inf")}, "sm_scale", ValueError),
    ({"sm_scale": "1"}, "sm_scale", TypeError),
    ({"search_scale": float("nan")}, "search_scale", ValueError),
    ({"search_scale": None}, "search_scale", TypeError),
    ({"route_per": "token"}, "route_per", ValueError),
    ({"route_per": None}, "route_per", ValueError),
    ({"length_mode": "float"}, "length_mode", ValueError),
]


@pytest.mark.parametrize(("fields", "name", "kind"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_wrong_configurations(fields: dict[str, Any], name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{name}: expected"):
        SuperlinearConfig(**fields)


def test_wrong_arguments_of_the_tables() -> None:
    for call in (subquad.stripe_offsets, subquad.coverage_gaps):
        with pytest.raises(TypeError, match=r"^\w+: expected an int, got float"):
            call(3.0, README)
        with pytest.raises(ValueError, match=r"^\w+: expected at least 0, got -1"):
            call(-1, README)
        with pytest.raises(TypeError, match=r"^config: expected a subquad\.SuperlinearConfig, got int"):
            call(3, 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^\w+: expected at most 2147483647, got 2147483648"):
            call(2**31, README)
    for method in (README.num_anchors, README.max_keys, README.offsets):
        for wrong, kind in ((None, TypeError), (float("inf"), TypeError), (-1, ValueError), (2**70, ValueError)):
            with pytest.raises(kind, match=r"^t(okens)?: expected"):
                method(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^tokens_seen: expected int32 or int64, got torch\.float32"):
        subquad.span_lengths(torch.ones(3), README)
    with pytest.raises(TypeError, match=r"^tokens_seen: expected a torch\.Tensor, got int"):
        subquad.span_lengths(3, README)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^config: expected a subquad\.SuperlinearConfig, got NoneType"):
        subquad.span_lengths(torch.ones(3).int(), None)  # type: ignore[arg-type]
