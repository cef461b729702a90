"""What defines Superlinear attention beside its weights: powers, stripes, spans, and the tables that every backend reads."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, field

import torch

from . import _checks
from ._backends import SubquadWarning

MAX_SPANS = 8
_INT32 = torch.iinfo(torch.int32).max
_INTEGER_POWERS = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class SuperlinearConfig:
    r"""Which keys a query of Superlinear attention may see (arXiv 2601.18401; the code of `superlinear` 0.1.0 where they differ).

    A query at position p sees a window of its last W keys and `num_spans` spans around anchors, which it chooses among the
    stripes p + 1 - o_i, o_i = floor(i ** (1 / power)), i > sw_index. W = o_{sw_index + 1} - 1, so that window and stripes meet.
    With t tokens seen a span reaches ceil(backward_factor * t ** span_power) keys back from its anchor and
    ceil(forward_factor * t ** span_power) ahead, and never into the window.

    Attributes:
        sw_index: stripes that the window takes the place of.
        num_spans: spans of a query, 1..8.
        backward_factor, forward_factor: lengths of a span, > 0 and >= 0.
        span_power: exponent of the lengths, between 0 and 1.
        search_power: the power, between 0 and 1; `inv_search_power_int` is then None.
        inv_search_power_int: 1 / power where that is 2..6; exactly one of the two is given.
        sm_scale: factor of attention's scores; None for D ** -0.5.
        search_scale: factor of the search's scores, which the gate is the softmax of.
        route_per: "head": every query head chooses anchors of its own; "group": the heads of a key head choose together, by the
            sum of their scores, and each gates with its own.
        length_mode: "exact": lengths in double precision; "ref_f32": in single, as the reference package's torch code has them.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range; both powers, or neither.

    Example:
        >>> import subquad
        >>> subquad.SuperlinearConfig(sw_index=3, backward_factor=3.0, forward_factor=1.0).window_len()
        15
    """

    sw_index: int = 0
    num_spans: int = 3
    backward_factor: float = 2.0
    forward_factor: float = 0.0
    span_power: float = 0.5
    search_power: float | None = None
    inv_search_power_int: int | None = 2
    sm_scale: float | None = None
    search_scale: float = 1.0
    route_per: str = "head"
    length_mode: str = "exact"
    _stripes: str = field(init=False, repr=False, compare=False)
    _window: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _checks.size("sw_index", self.sw_index)
        _checks.size("num_spans", self.num_spans, 1)
        if self.num_spans > MAX_SPANS:
            raise ValueError(f"num_spans: expected 1..{MAX_SPANS}, got {self.num_spans}")
        if not _checks.number("backward_factor", self.backward_factor) > 0:
            raise ValueError(f"backward_factor: expected a number above 0, got {self.backward_factor}")
        if not _checks.number("forward_factor", self.forward_factor) >= 0:
            raise ValueError(f"forward_factor: expected at least 0, got {self.forward_factor}")
        _between("span_power", self.span_power)
        if (self.search_power is None) == (self.inv_search_power_int is None):
            got = f"{self.search_power} and {self.inv_search_power_int}"
            raise ValueError(f"search_power: expected either it or inv_search_power_int, and the other None, got {got}")
        if self.search_power is not None:
            _between("search_power", self.search_power)
        if self.inv_search_power_int is not None:
            _checks.size("inv_search_power_int", self.inv_search_power_int)
            if self.inv_search_power_int not in _INTEGER_POWERS:
                raise ValueError(f"inv_search_power_int: expected one of 2..6, got {self.inv_search_power_int}")
        if self.sm_scale is not None:
            _checks.number("sm_scale", self.sm_scale)
        _checks.number("search_scale", self.search_scale)
        _checks.choice("route_per", self.route_per, ("head", "group"))
        _checks.choice("length_mode", self.length_mode, ("exact", "ref_f32"))
        object.__setattr__(self, "_stripes", f"{self.exponent!r} {self.sw_index}")
        object.__setattr__(self, "_window", min(_offset(self.sw_index + 1, self.exponent) - 1, _INT32))

    @property
    def exponent(self) -> int | float:
        """1 / power, of the offsets; an int where it is 2..6."""
        if self.inv_search_power_int is not None:
            return self.inv_search_power_int
        assert self.search_power is not None
        inverse = 1.0 / self.search_power
        return int(inverse) if inverse in _INTEGER_POWERS else inverse

    def window_len(self) -> int:
        """W, the keys of the window, the query's own among them; 0 for none. At most 2^31 - 1, more than any sequence has."""
        return self._window

    def num_anchors(self, t: int) -> int:
        """Stripes that the last of t tokens chooses among."""
        _tokens("t", t)
        return max(0, len(_offsets(self.exponent, t)) - self.sw_index)

    def max_keys(self, t: int) -> int:
        """Keys that the last of t tokens sees at most, each as often as it is in a span or the window."""
        _tokens("t", t)
        back, ahead = (int(x) for x in span_lengths(torch.tensor([t]), self))
        return min(self.num_spans, self.num_anchors(t)) * (back + ahead + 1) + min(t, self.window_len())

    def offsets(self, tokens: int, device: torch.device | str | None = None) -> torch.Tensor:
        """int32: o_i with i > sw_index, ascending, all of those up to `tokens` and perhaps more. The same tensor every time."""
        _tokens("tokens", tokens)
        table = torch.ops.subquad.span_offsets if torch.compiler.is_compiling() else _searched_offsets
        return table(self._stripes, _capacity(tokens), torch.device("cpu" if device is None else device))


def check_config(config: object) -> None:
    """`config` is a `SuperlinearConfig`."""
    if not isinstance(config, SuperlinearConfig):
        raise TypeError(f"config: expected a subquad.SuperlinearConfig, got {type(config).__name__}")


def _between(name: str, value: object) -> None:
    if not 0 < _checks.number(name, value) < 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")


def _tokens(name: str, value: int) -> None:
    """A number of tokens that a sequence may have."""
    _checks.size(name, value)
    if value > _INT32:
        raise ValueError(f"{name}: expected at most {_INT32}, got {value}")


# --- stripes ----------------------------------------


def stripe_offsets(
    max_tokens: int, config: SuperlinearConfig, device: torch.device | str | None = None
) -> torch.Tensor:
    """o_1, o_2, ... up to `max_tokens`, int64 [S]: exact for integer exponents, else of a power in double precision."""
    _tokens("max_tokens", max_tokens)
    check_config(config)
    return torch.tensor(_offsets(config.exponent, max_tokens), dtype=torch.int64, device=device)


def _offset(i: int, exponent: int | float) -> int:
    try:
        return i**exponent if isinstance(exponent, int) else int(float(i) ** exponent)
    except OverflowError:  # of a power close to 0
        return 1 << 62


def _offsets(exponent: int | float, limit: int) -> list[int]:
    """All of at most `limit`."""
    return [o for o in _offsets_of_capacity(exponent, _capacity(limit)) if o <= limit]


def _capacity(tokens: int) -> int:
    """Of a table for so many tokens: a power of two, so that the graph of a growing cache is compiled anew at doublings only."""
    capacity = 1 << 12
    while capacity < tokens:
        capacity *= 2
    return capacity


@functools.lru_cache(maxsize=64)
def _offsets_of_capacity(exponent: int | float, capacity: int) -> tuple[int, ...]:
    found: list[int] = []
    while (o := _offset(len(found) + 1, exponent)) <= capacity:
        found.append(o)
    return tuple(found)


# torch.compile may take the numbers of an object for variables, so that what tables depend on is a string to it.


def _parsed(stripes: str) -> tuple[int | float, int]:
    exponent, sw_index = stripes.split()
    return int(exponent) if exponent.isdigit() else float(exponent), int(sw_index)


_tables: dict[tuple[str, int, torch.device], torch.Tensor] = {}


def _searched_offsets(stripes: str, capacity: int, device: torch.device) -> torch.Tensor:
    key = (stripes, capacity, device)
    if key not in _tables:
        exponent, sw_index = _parsed(stripes)
        numbers = _offsets_of_capacity(exponent, capacity)[sw_index:]
        _tables[key] = torch.tensor(numbers, dtype=torch.int32, device=device)
    return _tables[key]


def _traced_offsets(stripes: str, capacity: int, device: torch.device) -> torch.Tensor:
    """The table inside of a graph, which takes a tensor that comes from nowhere for one that may change."""
    return _searched_offsets(stripes, capacity, device).clone()


def _fake_offsets(stripes: str, capacity: int, device: torch.device) -> torch.Tensor:
    exponent, sw_index = _parsed(stripes)
    return torch.empty(len(_offsets_of_capacity(exponent, capacity)[sw_index:]), dtype=torch.int32, device=device)


_LIBRARY = torch.library.Library("subquad", "FRAGMENT")
_LIBRARY.define("span_offsets(str stripes, int capacity, Device device) -> Tensor")
_LIBRARY.impl("span_offsets", _traced_offsets, "CompositeExplicitAutograd")
torch.library.register_fake("subquad::span_offsets", _fake_offsets, lib=_LIBRARY)


# --- spans ----------------------------------------


def span_lengths(tokens_seen: torch.Tensor, config: SuperlinearConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that a span reaches back from its anchor, and ahead: int32, of the shape of `tokens_seen` (int32 or int64, >= 0)."""
    _checks.integers("tokens_seen", tokens_seen)
    check_config(config)
    if config.length_mode == "ref_f32":
        power = tokens_seen.float() ** config.span_power
        return tuple(_int32(torch.ceil(f * power)) for f in (config.backward_factor, config.forward_factor))  # type: ignore[return-value]
    wide = tokens_seen.double()
    power = wide.sqrt() if config.span_power == 0.5 else wide.pow(config.span_power)
    return _ceil(config.backward_factor * power), _ceil(config.forward_factor * power)


def _ceil(x: torch.Tensor) -> torch.Tensor:
    """Numbers that are whole but for rounding are whole."""
    nearest = x.round()
    whole = (x - nearest).abs() <= 1e-9 * x.clamp(min=1.0)
    return _int32(torch.where(whole, nearest, x.ceil()))


def _int32(x: torch.Tensor) -> torch.Tensor:
    """Of whole numbers from 0 on, the largest where they are larger; float32 has no number between it and 2^31 to clamp to."""
    return x.double().clamp(max=_INT32).int()


# --- coverage ----------------------------------------


def coverage_gaps(t: int, config: SuperlinearConfig) -> list[tuple[int, int]]:
    """Keys that the last of t tokens cannot see whatever it chooses: intervals [begin, end), ascending.

    None at any t where span_power >= 1 - power and backward_factor >= 1 / power.
    """
    _tokens("t", t)
    check_config(config)
    back, ahead = (int(x) for x in span_lengths(torch.tensor([t]), config))
    window = config.window_len()
    covered = [(max(0, t - window), t)] if window and t else []
    for o in _offsets(config.exponent, t)[config.sw_index :]:
        anchor = t - o
        covered.append((max(0, anchor - back), min(anchor + ahead, t - 1 - window) + 1))
    gaps, reached = [], 0
    for begin, end in sorted(covered):
        if begin > reached:
            gaps.append((reached, begin))
        reached = max(reached, end)
    return gaps + ([(reached, t)] if reached < t else [])


_warned: set[SuperlinearConfig] = set()
_FARTHEST = 1 << 24
_PROBED = (64, 1000, 4096, 30_000)  # tokens beyond the window


def warn_of_gaps(config: SuperlinearConfig) -> None:
    """Say once for a configuration that some keys can never be seen."""
    if torch.compiler.is_compiling() or config in _warned:  # a graph must not depend on who was warned
        return
    _warned.add(config)
    enough = config.span_power >= 1 - 1 / config.exponent and config.backward_factor >= config.exponent
    if enough:
        return
    for beyond in _PROBED:
        # Just before a stripe comes into reach, when the farthest one leaves most to be reached backwards.
        least = config.window_len() + beyond
        t = min(_offset(len(_offsets(config.exponent, least - 1)) + 1, config.exponent) - 1, _FARTHEST)
        gaps = coverage_gaps(t, config)
        if gaps:
            keys = sum(end - begin for begin, end in gaps)
            needs = f"span_power >= {1 - 1 / config.exponent:.3g} and backward_factor >= {config.exponent:.3g}"
            warnings.warn(
                f"subquad: {config}: {keys} of the first {t} keys are reached by no span of query {t - 1}, such as key "
                f"{gaps[0][0]}; {needs} reach all",
                SubquadWarning,
                stacklevel=3,
            )
            return


def scale_of(config: SuperlinearConfig, head_dim: int) -> float:
    """The factor of attention's scores."""
    return 1.0 / math.sqrt(head_dim) if config.sm_scale is None else float(config.sm_scale)
