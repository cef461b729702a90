"""What a LAWCAT layer remembers between calls, and how it takes back the last tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F

from ..ops.gated_linear_attention import gated_linear_attention
from .state import TensorState, adapter_for, check_rollback

KEPT = 64  # tokens that a cache keeps for a rollback unless told otherwise: three times what transformers drafts


@dataclass
class LawcatState(TensorState):
    """The memory of one layer, constant in size: N sequences, raw inputs of the convolutions, sums over all tokens.

    With `keep(m)` it also holds what the sums were some tokens ago and the rows that came since, from which `rollback`
    computes every state in between: m to 2 m rows between two calls of `keep`, each of the features of a token.

    Attributes:
        conv_q, conv_k: last conv_size - 1 queries [N, HQ d, W-1] and keys [N, HKV d, W-1] before the convolution.
        conv_v: such values, where they are convolved.
        s, z: states of `gated_linear_attention`, [N, HS, K, V] and [N, HS, K] float32.
        window_k, window_v: last window_size - 1 rotated keys and values [N, w-1, HKV, d] of the hybrid.
        window_visible: bool [N, w-1], False where there is none yet.
        late_k, late_v, late_g: features, values and gates of the last window_size tokens, which a linear branch that does not
            cover the window has not seen yet.
        seen: tokens that went by, padding included: an int, or where a cache is preallocated an int64 tensor, which compiled code
            advances in one graph.
        depth: tokens to keep for a rollback, m.
        base: the tensors above as they were `kept` tokens ago; None while nothing is kept.
        rows: by name, what came since [N, kept, ...]: the rows that enter a tensor above, and k, v, g of the sums.
        backend: of the operator that computes the sums again.
    """

    conv_q: torch.Tensor | None = None
    conv_k: torch.Tensor | None = None
    conv_v: torch.Tensor | None = None
    s: torch.Tensor | None = None
    z: torch.Tensor | None = None
    window_k: torch.Tensor | None = None
    window_v: torch.Tensor | None = None
    window_visible: torch.Tensor | None = None
    late_k: torch.Tensor | None = None
    late_v: torch.Tensor | None = None
    late_g: torch.Tensor | None = None
    seen: int | torch.Tensor = 0
    depth: int = 0
    base: dict[str, torch.Tensor] | None = None
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    backend: str | None = None

    counters = ("seen", "depth", "backend")
    advice = "LawcatConfig(keep=...), or LawcatAttention.keep, says how many"

    @property
    def late(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """late_k, late_v and late_g; None before the first call."""
        return None if self.late_k is None or self.late_v is None else (self.late_k, self.late_v, self.late_g)

    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:  # type: ignore[override]
        """Of the queries, 0, and keys, 1."""
        return {0: self.conv_q, 1: self.conv_k}

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:  # type: ignore[override]
        """S, 0, and z, 1."""
        return {0: self.s, 1: self.z}

    def current(self) -> dict[str, torch.Tensor]:
        """The state itself, by name, without what is kept for a rollback."""
        values = ((name, getattr(self, name)) for name in _TENSORS)
        return {name: value for name, value in values if value is not None}

    def tensors(self) -> dict[str, torch.Tensor]:
        kept = {"base": self.base or {}, "rows": self.rows}
        return self.current() | {f"{part}.{name}": x for part, named in kept.items() for name, x in named.items()}

    def suit(self, dtype: torch.dtype) -> None:
        """Be of the dtype and the mode of a call, which another one before it may not have had: autocast, inference mode."""
        normal = not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
        for name, value in self.current().items():
            if name.startswith("conv") and value.dtype is not dtype:
                setattr(self, name, value.to(dtype))
            elif (
                normal and value.is_inference()
            ):  # such a tensor can neither be written to nor saved for a backward pass
                setattr(self, name, value.clone())

    def put(self, name: str, value: torch.Tensor) -> None:
        part, _, inner = name.rpartition(".")
        if inner not in (*_TENSORS, *_ENTERING) or part not in ("", "base", "rows"):
            raise ValueError(f"state: expected names of a LawcatState, got {name!r}")
        if part == "rows":
            self.rows[inner] = value
            self.base = {} if self.base is None else self.base  # empty before the first token
        elif part == "base":
            self.base = {**(self.base or {}), inner: value}
        else:
            setattr(self, name, value)

    def reset(self, mask: torch.Tensor | None = None) -> None:
        self.keep(self.depth)
        if mask is not None:
            for value in self.current().values():
                value[mask.to(value.device)] = 0
            return
        for name in _TENSORS:
            setattr(self, name, None)
        self.seen = torch.zeros_like(self.seen) if isinstance(self.seen, torch.Tensor) else 0

    # --- taking tokens back ----------------------------------------

    @property
    def kept(self) -> int:
        return next((x.shape[1] for x in self.rows.values()), 0)

    def keep(self, tokens: int) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"tokens: expected an int >= 0, got {tokens!r}")
        self.depth, self.base, self.rows = tokens, None, {}

    def record(self, before: dict[str, torch.Tensor], rows: dict[str, torch.Tensor], backend: str | None) -> None:
        """Keep the rows of a call, and what the state was before it if nothing is kept yet."""
        self.backend = backend
        rows = {name: x.detach() for name, x in rows.items()}
        if self.base is None:
            self.base, self.rows = before, rows
        else:
            for one, other in ((self.rows, rows), (rows, self.rows)):
                if "real" in one and "real" not in other:
                    other["real"] = torch.ones_like(other["conv_q"][..., 0], dtype=torch.bool)
            self.rows = {name: _joined(x, rows[name], 1) for name, x in self.rows.items()}
        if self.kept > 2 * self.depth:
            extra = self.kept - self.depth
            self.base, self.rows = self._after(extra), {name: x[:, extra:].clone() for name, x in self.rows.items()}

    @torch.no_grad()
    def rollback(self, tokens: int) -> None:
        check_rollback(tokens, self.kept)
        if not tokens:
            return
        left = self.kept - tokens
        past = self._after(left)
        for name in _TENSORS:
            setattr(self, name, past.get(name))
        self.rows = {name: x[:, :left].clone() for name, x in self.rows.items()} if left else {}
        self.base = self.base if left else None
        self.seen = self.seen - tokens

    def _after(self, count: int) -> dict[str, torch.Tensor]:
        """The state `count` tokens after `base`."""
        assert self.base is not None
        if not count:
            return self.base
        found = {n: self._tail(n, x, count) for n, x in self.current().items() if n not in ("s", "z")}
        k, v, g = (None if n not in self.rows else self.rows[n][:, :count] for n in ("k", "v", "g"))
        assert k is not None and v is not None and self.s is not None
        wide = torch.promote_types(k.dtype, v.dtype)
        k, v = k.to(wide), v.to(wide)
        sums: Any = self.base.get("s") if self.z is None else (self.base.get("s"), self.base.get("z"))
        _, final = gated_linear_attention(
            k[:, :, :1].expand(-1, -1, self.s.shape[1], -1), k, v, g, normalize=self.z is not None,
            initial_state=sums if "s" in self.base else None, output_final_state=True, backend=self.backend,
        )  # fmt: skip
        pair = final if isinstance(final, tuple) else (final, None)
        return found | {name: x for name, x in zip(("s", "z"), pair, strict=True) if x is not None}

    def _tail(self, name: str, now: torch.Tensor, count: int) -> torch.Tensor:
        """The last rows of a stream, as many as the tensor has, `count` tokens after `base`."""
        assert self.base is not None
        along = 2 if name.startswith("conv") else 1
        size, past = now.shape[along], self.base.get(name)
        if name == "window_visible":
            rows = now.new_ones(now.shape[0], count)
        else:
            rows = self.rows[name][:, :count]
            rows = (rows.mT if along == 2 else rows).to(now.dtype)
        stream = torch.cat([torch.zeros_like(now) if past is None else past.to(now.dtype), rows], along)
        real = self.rows.get("real")
        if real is None:
            return stream.narrow(along, count, size).clone()
        # Padding inside a sequence is not there: real rows go last, in their order.
        order = F.pad(real[:, :count], (size, 0), value=True).to(torch.uint8).argsort(stable=True, dim=1)
        order = order[:, order.shape[1] - size :]
        order = order[:, None] if along == 2 else order.view(*order.shape, *(1,) * (stream.dim() - 2))
        return stream.take_along_dim(order, along)


def _joined(x: torch.Tensor, y: torch.Tensor, along: int) -> torch.Tensor:
    """Both, in a dtype that holds both: autocast lets `cat` refuse bfloat16 beside float16."""
    wide = torch.promote_types(x.dtype, y.dtype)
    return torch.cat([x.to(wide), y.to(wide)], along)


_TENSORS = tuple(f.name for f in fields(LawcatState) if f.name not in ("seen", "depth", "base", "rows", "backend"))
_ENTERING = ("k", "v", "g", "real")


class LawcatCache:
    """States by `layer_idx`, for `LawcatAttention` without the transformers library.

    Args:
        keep: tokens that `rollback` can take back at any time; more memory and slower single tokens. 0: none.
    """

    def __init__(self, keep: int = 0) -> None:
        self.states: dict[int, LawcatState] = {}
        self.depth = keep

    def state(self, layer_idx: int) -> LawcatState:
        """The state of a layer, made at its first use."""
        return self.states.setdefault(layer_idx, LawcatState(depth=self.depth))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with these sequences [M]."""
        for state in self.states.values():
            state.select(beam_idx)

    def rollback(self, tokens: int) -> None:
        """Be as before the last `tokens` columns.

        Raises:
            ValueError: more than every layer keeps, or less than 0; nothing has changed then.
        """
        check_rollback(tokens, min((state.kept for state in self.states.values()), default=0))
        for state in self.states.values():
            state.rollback(tokens)

    def reset(self, mask: torch.Tensor | None = None) -> None:
        """Forget everything, or the sequences where the bool mask [N] is True."""
        for state in self.states.values():
            state.reset(mask)

    @property
    def nbytes(self) -> int:
        """Memory of all layers."""
        return sum(state.nbytes for state in self.states.values())


def state_of(cache: Any, layer_idx: int | None, keep: int = 0) -> LawcatState | None:
    """The state of a layer in a cache, made at its first use; None without a cache.

    In a cache of the transformers library the layer's entry becomes one that holds the state.

    Args:
        cache: a `LawcatCache` or a `Cache` of transformers.
        layer_idx: number of the layer.
        keep: tokens that a new state in a cache of transformers keeps for a rollback from the start.

    Raises:
        ValueError: no `layer_idx`, an entry that holds keys already, or a cache of another kind.
    """
    if cache is None:
        return None
    if layer_idx is None:
        raise ValueError("layer_idx: expected the layer's number, since past_key_values is given, got None")
    if isinstance(cache, LawcatCache):
        return cache.state(layer_idx)
    adapter = adapter_for(cache)
    if adapter is None:
        raise ValueError(
            f"past_key_values: expected a LawcatCache or a Cache of transformers, got {type(cache).__name__}"
        )
    state = adapter(cache, layer_idx, LawcatState, keep)
    if not isinstance(state, LawcatState):
        raise ValueError(
            f"past_key_values: expected layer {layer_idx} to hold a LawcatState, got {type(state).__name__}"
        )
    return state
