"""LAWCAT: causal convolution, feature map and gated linear attention in the place of softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks
from .._packing import Packed
from ..cache.lawcat import LawcatState, state_of
from ..masks import IntervalMask
from ..masks.model_mask import ModelMask
from ..ops.conv_feature_map import conv_feature_map
from ..ops.gated_linear_attention import gated_linear_attention
from ..ops.lawcat_decode_step import MAX_DIM
from ._attention import AttentionLayer
from ._children import plain
from ._inherited import Inherited, remember
from ._lawcat_steps import step
from ._options import LawcatConfig
from ._scores import normed, scores_of
from ._sequences import Sequences
from ._sharded import HEADS, check_heads, check_placed, in_parts, mesh_of
from ._sizes import NORMS, PROJECTIONS, add_projections, check_sizes
from ._tied import tie, tied_again
from ._tokens import Tokens, of_one_kind, read, sliding_window
from ._tokens import tokens_of as tokens_of
from ._window import hybrid
from .causal_conv1d import ShortConvolution
from .feature_map import LearnedFeatureMap


class GateProjection(nn.Sequential):
    r"""g = logsigmoid(x Wa Wb + b) / normalizer, the logarithm of a decay, in float32 (GLA, arXiv 2312.06635).

    Args:
        hidden_size, out_dim: of the input and of the gates.
        rank: of the low-rank product; None for one full matrix.
        normalizer: larger is slower decay; 16 gives a half-life of 16 tokens at the start.
        clamp_min: least g, or None.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        out_dim: int,
        rank: int | None = 16,
        normalizer: float = 16.0,
        clamp_min: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        last = nn.Linear(hidden_size if rank is None else rank, out_dim, **options)
        super().__init__(*([] if rank is None else [nn.Linear(hidden_size, rank, bias=False, **options)]), last)
        self.normalizer, self.clamp_min = normalizer, clamp_min
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Small random weights and no bias: every gate starts near log(1/2) / normalizer."""
        for layer in self:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.006)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """g [..., out_dim] float32 of x [..., hidden_size]."""
        g = F.logsigmoid(self.logits(x).float()) / self.normalizer
        return g if self.clamp_min is None else g.clamp_min(self.clamp_min)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x Wa Wb + b, of which `forward` makes the gates."""
        return super().forward(x)


class LawcatAttention(AttentionLayer):
    r"""Linear attention with convolved, learned features in place of softmax attention (LAWCAT, arXiv 2509.18467).

    q and k go through a depthwise causal convolution and a feature map, phi = [softmax(y), softmax(-y)]; then
    `subquad.gated_linear_attention`, normalised, with a gate for every key channel that the query heads of a group share.
    Time is linear in T and the memory of decoding constant.

    Args:
        hidden_size: width of the input.
        num_heads, num_kv_heads: HQ and HKV, which divides it; None for as many.
        head_dim: d; None for hidden_size / num_heads.
        feature_dim: f, of each half of the features; None for head_dim / 2.
        conv_size: taps W of the convolutions, 1 to 8.
        conv_bias, qk_activation: of the convolutions; None or "silu".
        share_qk_conv: one convolution for q and k.
        conv_on_v: one for v, too.
        qk_norm: RMSNorm of every head of q and k before everything else.
        tie_qk_feature_map: one feature map for q and k.
        gate: "vector" (per key channel), "scalar" (per head) or "none".
        gate_rank, gate_logit_normalizer, clamp_min: see `GateProjection`.
        normalize, eps: see `subquad.gated_linear_attention`.
        rope: "linear" rotates q and k of the linear branch; "none" leaves position to convolution and decay.
        window_size: keys of an additional softmax over the last tokens, 0 for none. Both branches are divided by one common
            denominator; the softmax is that of the original, rotated where it is, whatever `rope` is, and of no more keys
            than its sliding window has.
        affine_window: weigh the branches by w and 1 - w instead of w and 1.
        linear_covers_window: False: the linear branch sees only the tokens before the window, as in LoLCATs (2410.10254).
        linear_scale: factor of the linear branch's scores beside a window; None for K ** -0.5, in LoLCATs 1.
        use_output_gate: o is normalised (RMSNorm) and multiplied by silu(x Wg) before `o_proj`, as in GLA.
        share_kv_features: keys are convolved and mapped once per key-value head, not per query head: HKV states instead of HQ.
        feature_init: "eye" or "kaiming".
        keep: tokens that the layer's state in a new cache of transformers keeps for a rollback from the start. 0: those of the
            first call, and more once `generate` announces that it will roll back. A model that drafts for another needs 64.
        proj_bias: whether the projections have a bias.
        layer_idx: number of the layer in a cache.
        parts: modules to use instead of new ones, by name: projections, q_norm, k_norm.
        backend: of the operators.
        device, dtype: of the parameters.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: as in transformers' attention.
        original: the attention that `from_attention` was given, or None; not a submodule.
        config: the options it was made with.
        keep: as the option; it may be set at any time.
        scores: how the window scores keys, and how `rope` rotates: as the original does.

    Raises:
        TypeError: wrong type of an option.
        ValueError: sizes that do not fit, unknown options.

    Example:
        >>> import torch, subquad
        >>> layer = subquad.nn.LawcatAttention(64, 4, 2)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    keep: int = 0

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        qk_norm: bool = False,
        proj_bias: bool = False,
        layer_idx: int | None = None,
        parts: Mapping[str, nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = config = LawcatConfig(**options)
        self._set_sizes(hidden_size, num_heads, num_kv_heads, head_dim, layer_idx)
        self.feature_dim = max(self.head_dim // 2, 1) if config.feature_dim is None else config.feature_dim
        check_sizes(feature_dim=self.feature_dim)
        config.check(num_heads == self.num_kv_heads)
        self.normalize, self.eps, self.rope = config.normalize, config.eps, config.rope
        self.window_size, self.affine_window = config.window_size, config.affine_window
        self.linear_covers_window, self.share_kv_features = config.linear_covers_window, config.share_kv_features
        self.linear_scale = None if config.linear_scale is None else _checks.number("linear_scale", config.linear_scale)
        self.gate_kind, self.backend, self.keep = config.gate, config.backend, config.keep
        made: dict[str, Any] = {"device": _checks.device("device", device), "dtype": dtype}
        add_projections(self, parts, bias=proj_bias, qk_norm=qk_norm, **made)
        self._add(config, made)
        self._transfer: Callable[..., tuple[torch.Tensor, None]] | None = None
        remember(self, None)

    def _add(self, config: LawcatConfig, options: dict[str, Any]) -> None:
        """What softmax attention has not: convolutions, feature maps, gates."""
        width, heads, kv_heads = self.head_dim, self.num_heads, self.num_kv_heads
        key_heads = kv_heads if config.share_kv_features else heads
        conv: dict[str, Any] = {"bias": config.conv_bias, "activation": config.qk_activation, "init": "identity"}
        conv |= {"backend": config.backend} | options
        self.conv_q = ShortConvolution(heads * width, config.conv_size, **conv)
        self.conv_k = ShortConvolution(
            key_heads * width, config.conv_size, channel_groups=key_heads // kv_heads, head_dim=width, **conv
        )
        self.conv_v = ShortConvolution(kv_heads * width, config.conv_size, **conv) if config.conv_on_v else None
        if config.share_qk_conv:
            tie(self, "conv_k", "conv_q")
        # Tied maps of different head counts are one map per key head, which its group of queries shares.
        maps = (key_heads, 0) if config.tie_qk_feature_map else (heads, key_heads)
        phi: dict[str, Any] = {"init": config.feature_init, "backend": config.backend} | options
        self.feature_map = LearnedFeatureMap(maps[0], width, self.feature_dim, **phi)
        self.feature_map_k = LearnedFeatureMap(maps[1], width, self.feature_dim, **phi) if maps[1] else None
        gates = {"vector": kv_heads * self.feature_map.out_dim, "scalar": kv_heads, "none": 0}[config.gate]
        gate: dict[str, Any] = {"rank": config.gate_rank, "normalizer": config.gate_logit_normalizer}
        gate |= {"clamp_min": config.clamp_min} | options
        self.gate = GateProjection(self.hidden_size, gates, **gate) if gates else None
        self.window_factor = nn.Parameter(torch.full((heads,), -2.197, **options)) if config.window_size else None
        output = config.use_output_gate
        self.output_gate = nn.Linear(self.hidden_size, heads * width, bias=False, **options) if output else None
        self.output_norm = nn.RMSNorm(width, eps=1e-5, **options) if output else None

    @classmethod
    def from_attention(cls, attention: nn.Module, **options: Any) -> LawcatAttention:
        """A layer with the projections (and norms of q and k) of a softmax attention, shared, not copied.

        Args:
            attention: a module of transformers with q_proj, k_proj, v_proj, o_proj and head_dim: Llama, Mistral, Qwen, SmolLM.
            options: arguments of the constructor.

        Raises:
            ValueError: one of another form, or with chunks, dropout, sinks or parts that linear attention has no place for; with
                a window or `rope`, one that scores keys in a way that `scores` cannot say.
        """
        check_placed(attention, HEADS)
        given = Inherited.of(attention, "linear attention")
        defaults = {"layer_idx": given.layer_idx, "device": given.device, "dtype": given.dtype}
        sizes: dict[str, Any] = {"num_kv_heads": given.kv_heads, "head_dim": given.head_dim, "parts": given.parts}
        layer = cls(given.hidden_size, given.heads, **sizes, **(defaults | options))
        if layer._positioned():
            layer.scores = scores_of(attention, given.heads, given.kv_heads, given.head_dim)
        layer.window_size = min(layer.window_size, sliding_window(attention) or layer.window_size)
        remember(layer, attention)
        if (mesh := mesh_of(layer.o_proj)) is not None:  # transformers has split the projections: the rest follows
            check_heads(layer, mesh.size())
            layer._split(mesh, norms=False)
        return layer

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LawcatAttention:
        with tied_again(self):
            super()._apply(fn, recurse)
        return self

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """What LAWCAT adds to the projections, by name: convolutions, feature maps, gate, window factor."""
        inherited = tuple(f"{name}." for name in PROJECTIONS + NORMS)
        return {name: p for name, p in self.named_parameters() if not name.startswith(inherited)}

    def _whole(self) -> tuple[str, ...]:
        low_rank = self.gate is not None and len(self.gate) > 1
        return (*super()._whole(), "output_norm.", *(("gate.0.",) if low_rank else ()))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | IntervalMask | None = None,
        past_key_values: Any = None,
        cu_seqlens: torch.Tensor | Packed | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As transformers' attention is called.

        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: (cos, sin) [B|1, T, d], for `rope` and the window.
            attention_mask: None; 0 or 1 [B, >= T], of which the last T count, or those after what a cache has seen; or a
                causal mask with padding or packed sequences in four dimensions, bool or additive, or transformers' with
                attn_implementation="subquad"; or a mapping of such masks by kind of layer. Padding changes nothing, wherever
                it is.
            past_key_values: a `LawcatCache`, or a cache of transformers; it is advanced. Of packed sequences the last goes on.
            cu_seqlens: [N + 1], bounds of sequences packed into B = 1, before the cache has seen tokens.
            cache: another name of `past_key_values`, which transformers uses from 5.24 on.
            kwargs: what else the model passes. Bounds named `cu_seq_lens_q`, `seq_idx` [B, T], and `position_ids` that start
                again tell packed sequences apart too; `output_attentions` is refused.

        Returns:
            (output [B, T, hidden_size], None). Rows of padding are o_proj of 0.

        Raises:
            TypeError: a mask that is none.
            ValueError: a mask that is not causal with padding or packed sequences; options that this attention does not have.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        kwargs |= {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        if self._transfer is not None:
            return self._transfer(
                self,
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self.o_proj(self.mix(x, position_embeddings, attention_mask, past_key_values, **kwargs))

        return in_parts(self, self.o_proj, attend, hidden_states), None

    def mix(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | IntervalMask | None = None,
        past_key_values: Any = None,
        cu_seqlens: torch.Tensor | Packed | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The output before `o_proj`, [B, T, HQ d]; arguments of `forward`."""
        if position_embeddings is None and self._positioned() and self.scores.positions_needed:
            raise ValueError("position_embeddings: expected (cos, sin), for rope or a window, got None")
        _checks.hidden(hidden_states, self.hidden_size)
        mask = of_one_kind(attention_mask)
        if isinstance(mask, ModelMask) and mask.mix is not None:
            if past_key_values is not None:
                raise ValueError("past_key_values: expected None for tokens that lie on several ranks")
            return mask.mix(self, hidden_states, position_embeddings)
        b, t, _ = hidden_states.shape
        window = None if self.original is None else sliding_window(self.original)
        state = state_of(past_key_values, self.layer_idx, self.keep)
        seen = None if state is None else state.seen
        tokens = read(attention_mask, b, t, window, seen, position_embeddings, **kwargs, cu_seqlens=cu_seqlens)
        mixed = self._advance(hidden_states, position_embeddings, tokens, state)
        if state is not None:
            seen = state.seen  # not in place: whoever was told it goes on to hold the old number
            state.seen = (seen.to(hidden_states.device) if isinstance(seen, torch.Tensor) else seen) + t
        if self.output_gate is None or self.output_norm is None:
            return mixed
        if tokens.real is not None:
            hidden_states = torch.where(tokens.real[..., None], hidden_states, 0)
        gate = F.silu(self.output_gate(hidden_states))
        normed: torch.Tensor = self.output_norm(mixed.unflatten(-1, (-1, self.head_dim)))
        return normed.flatten(-2) * gate

    def _advance(
        self,
        x: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: Tokens,
        state: LawcatState | None,
    ) -> torch.Tensor:
        """`_mixed`; where the state keeps tokens for a rollback, those alone are recorded, and what comes before them is not."""
        early = 0 if state is None else x.shape[1] - state.depth
        apart = tokens.packed is not None or tokens.begins is not None
        if state is None or not state.depth or apart:
            if state is not None and apart:
                state.keep(state.depth)  # a sum cannot be computed again over the beginning of a sequence
            return self._mixed(x, positions, tokens, state)
        if early <= 0:
            return self._recorded(x, positions, tokens, state)
        state.keep(state.depth)
        parts = []
        for mix, columns in ((self._mixed, slice(early)), (self._recorded, slice(early, None))):
            pair = None if positions is None else (positions[0][:, columns], positions[1][:, columns])
            parts.append(mix(x[:, columns], pair, tokens[columns], state))
        return torch.cat(parts, 1)

    def _recorded(
        self,
        x: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: Tokens,
        state: LawcatState,
    ) -> torch.Tensor:
        """`_mixed`, whose tokens can be taken back."""
        before = state.current()
        entering: dict[str, torch.Tensor] = {}
        mixed = self._mixed(x, positions, tokens, state, entering)
        state.record(before, entering, self.backend)
        return mixed

    def _mixed(
        self,
        x: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: Tokens,
        state: LawcatState | None,
        entering: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of the tokens there are, 0 at the others: one step in place, or sequences.

        `entering` is filled with the rows [B, T, ...] that enter the state, for `LawcatState.record`.
        """
        b, t, _ = x.shape
        alone = t == 1 and entering is None and not self.window_size and tokens.begins is None and tokens.packed is None
        if alone and state is not None and state.s is not None and self._steps(x):
            return step(self, x, positions, tokens.real, state)
        sequences = Sequences.of(tokens, b, t)
        if sequences is None:
            return self._sequences(x, positions, state, None, entering)
        # Without the padding: chunks then begin where they do in a sequence alone, and the operators give the same bits.
        if positions is not None:
            cos, sin = (sequences.gather(p.expand(b, t, -1)) for p in positions)
            positions = (cos, sin)
        inner = sequences.enter(state)
        mixed = self._sequences(sequences.gather(x), positions, inner, sequences, entering)
        sequences.leave(inner, state)
        if entering is not None:
            entering.update({name: sequences.spread(y) for name, y in entering.items()})
            if tokens.real is not None:
                entering["real"] = tokens.real
        return sequences.spread(mixed)

    def _positioned(self) -> bool:
        return bool(self.window_size) or self.rope != "none"

    def _steps(self, x: torch.Tensor) -> bool:
        """Whether states may be changed in place: no gradient can flow, and the convolutions are those of this package."""
        convolutions = (self.conv_q, self.conv_k, self.conv_v)
        if not all(conv is None or plain(conv, ShortConvolution) for conv in convolutions):
            return False
        return not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _heads(
        self, x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, T, HQ, d] and k [B, T, HKV, d] of the linear branch, and v."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        if self.rope == "linear":
            q, k = self.scores.rotate(q, positions), self.scores.rotate(k, positions)
        return q, k, v

    def _gates(self, x: torch.Tensor, logits: bool = False) -> torch.Tensor | None:
        """g [B, T, HKV, K] or [B, T, HKV], or what `GateProjection` makes it of."""
        if self.gate is None:
            return None
        g: torch.Tensor = self.gate.logits(x) if logits else self.gate(x)
        if not logits and g.dtype in (torch.bfloat16, torch.float16):  # of a gate of another class
            g = g.float()
        return g.unflatten(-1, (self.num_kv_heads, -1)) if self.gate_kind == "vector" else g

    def _features(
        self, q: torch.Tensor, k: torch.Tensor, state: LawcatState | None, cu_seqlens: Packed | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolution and map, in one pass over memory where one operator has both."""
        features = []
        for name, x, phi in (("conv_q", q, self.feature_map), ("conv_k", k, self._key_map())):
            conv = getattr(self, name)
            if plain(conv, ShortConvolution) and plain(phi, LearnedFeatureMap) and not phi.skip_connection:
                past = None if state is None else getattr(state, name)
                mapped, last = conv_feature_map(
                    x, conv.weight, phi.layer, conv.bias, initial_state=past, output_final_state=state is not None,
                    activation=conv.activation, cu_seqlens=cu_seqlens, kind=phi.kind, fullspace=phi.fullspace,
                    eps=phi.eps, backend=self.backend,
                )  # fmt: skip
                if state is not None:
                    setattr(state, name, last)
            else:
                mapped = _mapped(phi, self._convolve(name, x, state, cu_seqlens))
            features.append(mapped)
        return features[0], features[1]

    def _convolve(
        self, name: str, x: torch.Tensor, state: LawcatState | None, cu_seqlens: Packed | None
    ) -> torch.Tensor:
        """x [B, T, H, d] through the convolution of this name, whose past in the state is replaced, not written to."""
        past = None if state is None else getattr(state, name)
        past = None if past is None else past.clone()  # the module works in place
        conv = getattr(self, name)
        ours = cu_seqlens is None or isinstance(conv, ShortConvolution)
        bounds = cu_seqlens if ours else cu_seqlens.int64  # type: ignore[union-attr]
        flat, last = conv(x.flatten(2), cache=past, output_final_state=state is not None, cu_seqlens=bounds)
        if state is not None:
            setattr(state, name, last)
        return flat.unflatten(-1, (-1, self.head_dim))

    def _key_map(self) -> nn.Module:
        return self.feature_map if self.feature_map_k is None else self.feature_map_k

    def _map_q(self, q: torch.Tensor) -> torch.Tensor:
        return _mapped(self.feature_map, q)

    def _map_k(self, k: torch.Tensor) -> torch.Tensor:
        return _mapped(self._key_map(), k)

    def _sequences(
        self,
        x: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor] | None,
        state: LawcatState | None,
        sequences: Sequences | None,
        entering: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        packed = None if sequences is None else sequences.packed
        q0, k0, v = self._heads(x, positions)
        g = self._gates(x)
        if state is not None:
            state.suit(q0.dtype)
        if entering is not None:
            entering |= {"conv_q": q0.flatten(2), "conv_k": k0.flatten(2)}
            entering |= {} if self.conv_v is None else {"conv_v": v.flatten(2)}
        q, k = self._features(q0, k0, state, packed)
        if self.conv_v is not None:
            v = self._convolve("conv_v", v, state, packed)
        if sequences is not None and sequences.resets is not None:
            g = sequences.forget(g)
        if self.window_size:
            return hybrid(self, q0, k0, q, k, v, g, positions, state, sequences, entering)
        if entering is not None:
            entering |= {"k": k, "v": v} | ({} if g is None else {"g": g})
        started = state is not None and state.s is not None
        initial: Any = None
        if started:
            assert state is not None
            initial = (state.s, state.z) if self.normalize else state.s
        o, final = gated_linear_attention(
            q, k, v, g, initial_state=initial, output_final_state=state is not None,
            cu_seqlens=None if sequences is None else sequences.sums,
            normalize=self.normalize, eps=self.eps, backend=self.backend,
        )  # fmt: skip
        if state is not None:
            state.s, state.z = final if isinstance(final, tuple) else (final, None)
        return o.flatten(2)

    def _fuses(self) -> bool:
        """Whether one operator has it all: children of LAWCAT's form, which a user may have exchanged."""
        one, other = self.conv_q, self.conv_k
        if (one.kernel_size, one.activation) != (other.kernel_size, other.activation) or one.channel_groups != 1:
            return False
        if other.channel_groups != 1 and other.head_dim != self.head_dim:
            return False
        if self.gate is not None and not plain(self.gate, GateProjection):
            return False
        return all(
            plain(phi, LearnedFeatureMap) and phi.kind == "softmax" and phi.fullspace and not phi.skip_connection
            and phi.out_dim <= MAX_DIM and phi.eps == self.feature_map.eps
            for phi in (self.feature_map, self._key_map())
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, gate={self.gate_kind!r}"
        return text + (f", window_size={self.window_size}" if self.window_size else "")


def _mapped(phi: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """phi(x) of x [B, T, H, d]. Where phi has fewer heads, H / M in a row share one, and the group stands in for tokens."""
    b, t, heads, width = x.shape
    maps = getattr(phi, "num_heads", heads)
    if maps == heads:
        features: torch.Tensor = phi(x)
        return features
    grouped = x.reshape(b, t, maps, heads // maps, width).transpose(2, 3).reshape(b, -1, maps, width)
    return phi(grouped).reshape(b, t, heads // maps, maps, -1).transpose(2, 3).reshape(b, t, heads, -1)
