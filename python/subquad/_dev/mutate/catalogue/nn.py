"""Faults of modules, of rotations and of what teaches and calibrates them."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str, *tests: str) -> Where:
    return Where(f"python/subquad/{file}", tests, "", ())


_LAWCAT_TESTS = (
    "tests/models/test_tokens.py",
    "tests/models/test_lawcat_module.py",
    "tests/models/test_lawcat.py",
    "tests/models/test_rollback.py",
    "tests/models/test_caches.py",
    "tests/models/test_compile.py",
)
_LAWCAT = _of("nn/lawcat.py", *_LAWCAT_TESTS)
_STEPS = _of("nn/_lawcat_steps.py", *_LAWCAT_TESTS)
_WINDOW = _of("nn/_window.py", *_LAWCAT_TESTS)
_SEQUENCES = _of("nn/_sequences.py", *_LAWCAT_TESTS)
_SCORES = _of("nn/_scores.py", *_LAWCAT_TESTS)
_TOKENS = _of("nn/_tokens.py", *_LAWCAT_TESTS)
_CATS = _of(
    "nn/cats_mlp.py",
    "tests/ops/cats_mlp/test_module.py",
    "tests/ops/cats_mlp/test_children.py",
    "tests/models/test_cats.py",
)
_CONV = _of("nn/causal_conv1d.py", "tests/ops/causal_conv1d", "tests/models/test_lawcat_module.py")
_MAP = _of("nn/feature_map.py", "tests/ops/feature_map/test_module.py", "tests/models/test_lawcat_module.py")
_TRANSFER = _of("distillation.py", "tests/models/test_lawcat.py")
_ROPE = _of("rope.py", "tests/ops/interval_attention")
_SKETCH = _of("calibration/sketch.py", "tests/models/test_calibration.py")
_CALIBRATOR = _of("calibration/calibrator.py", "tests/models/test_calibration.py", "tests/models/test_cats.py")

FAULTS = (
    Fault(
        "nn-lawcat-seen",
        "state",
        _LAWCAT,
        "(seen.to(hidden_states.device) if isinstance(seen, torch.Tensor) else seen) + t",
        "(seen.to(hidden_states.device) if isinstance(seen, torch.Tensor) else seen) + 1",
    ),
    Fault(
        "nn-lawcat-padding-output-gate",
        "mask",
        _LAWCAT,
        "hidden_states = torch.where(tokens.real[..., None], hidden_states, 0)",
        "pass",
    ),
    Fault("nn-lawcat-sequences-left", "mask", _LAWCAT, "sequences.leave(inner, state)", "pass"),
    Fault(
        "nn-lawcat-state-z",
        "state",
        _LAWCAT,
        "initial = (state.s, state.z) if self.normalize else state.s",
        "initial = (state.s, torch.zeros_like(state.z)) if self.normalize else state.s",
    ),
    Fault(
        "nn-lawcat-key-norm",
        "formula",
        _LAWCAT,
        "q, k = normed(self.q_norm, q), normed(self.k_norm, k)",
        "q, k = normed(self.q_norm, q), normed(self.q_norm, k)",
    ),
    Fault(
        "nn-lawcat-rope-keys",
        "formula",
        _LAWCAT,
        "q, k = self.scores.rotate(q, positions), self.scores.rotate(k, positions)",
        "q = self.scores.rotate(q, positions)",
    ),
    Fault(
        "nn-lawcat-output-gate",
        "formula",
        _LAWCAT,
        "gate = F.silu(self.output_gate(hidden_states))",
        "gate = self.output_gate(hidden_states).sigmoid()",
    ),
    Fault(
        "nn-lawcat-positions-packed",
        "stride",
        _LAWCAT,
        "cos, sin = (sequences.gather(p.expand(b, t, -1)) for p in positions)",
        "cos, sin = (p.expand(b, t, -1).flatten(0, 1)[None, : sequences.packed.tokens] for p in positions)",
    ),
    Fault(
        "nn-lawcat-early-part",
        "bounds",
        _LAWCAT,
        "pair = None if positions is None else (positions[0][:, columns], positions[1][:, columns])",
        "pair = positions",
    ),
    Fault("nn-lawcat-fuses-kind", "dispatch", _LAWCAT, 'phi.kind == "softmax" and phi.fullspace', "phi.fullspace"),
    Fault(
        "nn-lawcat-step-gradient",
        "gradient",
        _LAWCAT,
        "return not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in self.parameters()))",
        "return True",
    ),
    Fault(
        "nn-lawcat-conv-in-place",
        "state",
        _LAWCAT,
        "past = None if past is None else past.clone()  # the module works in place",
        "",
    ),
    Fault(
        "nn-step-skipped-rows",
        "guard",
        _STEPS,
        "torch.where(tokens[:, 0], torch.arange(x.shape[0], device=x.device), -1).int()",
        "torch.arange(x.shape[0], device=x.device).int()",
    ),
    Fault(
        "nn-step-clamp",
        "formula",
        _STEPS,
        '{"tau": gate.normalizer, "clamp_min": gate.clamp_min}',
        '{"tau": gate.normalizer}',
    ),
    Fault(
        "nn-window-size",
        "bounds",
        _WINDOW,
        "near = (column > row) & (column <= row + window)",
        "near = (column >= row) & (column <= row + window)",
    ),
    Fault("nn-window-blocks", "bounds", _WINDOW, "blocks = max(-(-t // window), 1)", "blocks = max(t // window, 1)"),
    Fault(
        "nn-window-invisible",
        "mask",
        _WINDOW,
        "seen = near & blocks_of(visible)[:, :, None]",
        "seen = near & (blocks_of(visible)[:, :, None] | True)",
    ),
    Fault(
        "nn-window-view",
        "state",
        _WINDOW,
        "streams = Streams(layer.window_size - 1, k.shape[1], packed)",
        "streams = Streams(layer.window_size, k.shape[1], packed)",
    ),
    Fault(
        "nn-window-delayed-gate",
        "formula",
        _WINDOW,
        "passed = gates[:, 1:].unfold(1, window, 1).sum(-1)",
        "passed = gates[:, :-1].unfold(1, window, 1).sum(-1)",
    ),
    Fault(
        "nn-window-factor", "formula", _WINDOW, "rest_of = 1 - factor if layer.affine_window else 1.0", "rest_of = 1.0"
    ),
    Fault(
        "nn-tokens-preallocated",
        "mask",
        _TOKENS,
        "past = width - length if seen is None else min(seen, width - length)",
        "past = width - length",
    ),
    Fault(
        "nn-tokens-first-row", "mask", _TOKENS, "first = 0 if mask.first_row is None else mask.first_row", "first = 0"
    ),
    Fault(
        "nn-tokens-not-causal",
        "guard",
        _TOKENS,
        "    if not mask.padded_causal:\n        return _of_pairs(mask.to_dense(), batch, length, window, seen)\n",
        "    pass\n",
    ),
    Fault("nn-rotate-sign", "formula", _SCORES, "across = torch.cat([-b, a], -1)", "across = torch.cat([b, a], -1)"),
    Fault(
        "nn-sequences-go-on",
        "state",
        _SEQUENCES,
        "source = source.index_copy(0, F.pad(last[:-1] + 1, (1, 0)), of_row)",
        "source = source",
    ),
    Fault(
        "nn-sequences-padding",
        "nan",
        _SEQUENCES,
        "flat = torch.where(self._shown(flat), flat, 0)\n        return flat[None]",
        "pass\n        return flat[None]",
    ),
    Fault("nn-sequences-forget", "mask", _SEQUENCES, "resets[..., None], -torch.inf, g)", "resets[..., None], 0.0, g)"),
    Fault(
        "nn-streams-tail",
        "state",
        _SEQUENCES,
        "return stream[:, self.length :].clone()",
        "return stream[:, : self.lead].clone()",
    ),
    Fault(
        "nn-cats-adapter-layout",
        "stale",
        _CATS,
        "weight = own if (own := self._own_down()) is not None else next(inside, None)",
        "weight = self._own_down()",
    ),
    Fault(
        "nn-cats-reads-anything",
        "stale",
        _CATS,
        "if child is None or not self._readable(name, child) or child.weight.device != x.device:",
        "if child.weight.device != x.device:",
    ),
    Fault("nn-cats-enabled", "dispatch", _CATS, "self.threshold if self.enabled else DENSE", "self.threshold"),
    Fault("nn-cats-threshold-dtype", "rounding", _CATS, "setattr(self, name, old.to(device))", "pass"),
    Fault("nn-cats-inclusive-loaded", "state", _CATS, "self._inclusive = bool(meta[3] != 0)", "pass"),
    Fault(
        "nn-cats-layout-undone",
        "state",
        _CATS,
        "self._lay(weight, _with_layout(weight.data, shape, strides))",
        "self._lay(weight, weight.data.contiguous())",
    ),
    Fault(
        "nn-cats-fused-halves",
        "stride",
        _CATS,
        "gate, up = zip(fused.weight.chunk(2), biases, strict=True)",
        "up, gate = zip(fused.weight.chunk(2), biases, strict=True)",
    ),
    Fault("nn-cats-saved-layout", "guard", _CATS, "state_dict[key] = weight.contiguous()", "pass"),
    Fault(
        "nn-conv-mask",
        "mask",
        _CONV,
        "x = torch.where(mask.bool()[..., None], x, torch.zeros_like(x))",
        "x = x * mask[..., None]",
    ),
    Fault(
        "nn-conv-cache-alias",
        "state",
        _CONV,
        "return y, state if differentiable else cache.copy_(state)",
        "return y, state",
    ),
    Fault("nn-conv-identity", "formula", _CONV, "self.weight[..., -1] = 1.0", "self.weight[..., 0] = 1.0"),
    Fault(
        "nn-transfer-mask",
        "mask",
        _TRANSFER,
        "error = difference.square().sum() / (keep.sum() * p.shape[2]).clamp_min(1)",
        "error = difference.square().mean()",
    ),
    Fault(
        "nn-transfer-layers",
        "gradient",
        _TRANSFER,
        "return total * (mse_factor / len(pred))",
        "return total * mse_factor",
    ),
    Fault(
        "nn-transfer-detach",
        "gradient",
        _TRANSFER,
        "pred = layer.mix(hidden_states.detach(), **kwargs)",
        "pred = layer.mix(hidden_states, **kwargs)",
    ),
    Fault(
        "nn-rope-precision",
        "rounding",
        _ROPE,
        "phase = each * self.turns(positions.device)  # wraps modulo one turn",
        "phase = (each.float() * self.turns(positions.device).float()).long()",
    ),
    Fault("nn-rope-pairs", "stride", _ROPE, "a, b = turned[..., ::2], turned[..., 1::2]", "a, b = turned.chunk(2, -1)"),
    Fault(
        "nn-sketch-bins",
        "bounds",
        _SKETCH,
        "MIN_EXPONENT, MAX_EXPONENT = -40, 17",
        "MIN_EXPONENT, MAX_EXPONENT = -40, 2",
    ),
    Fault(
        "nn-calibrator-padding",
        "mask",
        _CALIBRATOR,
        "selected = self._by_position(mask[:, :end] != 0)[:, end - shape[1] :]",
        "selected = self._by_position(mask[:, :end] >= 0)[:, end - shape[1] :]",
    ),
    Fault(
        "nn-calibrator-limit",
        "bounds",
        _CALIBRATOR,
        "rows = rows[: self.max_tokens - self.tokens[name]]",
        "rows = rows[: self.max_tokens]",
    ),
    Fault(
        "nn-calibrator-fused-half",
        "stride",
        _CALIBRATOR,
        "z.chunk(2, dim=-1)[0] if fused else z",
        "z.chunk(2, dim=-1)[1] if fused else z",
    ),
    Fault(
        "nn-calibrator-merge",
        "accumulator",
        _CALIBRATOR,
        "self.tokens[name] += other.tokens[name]",
        "self.tokens[name] = other.tokens[name]",
    ),
)
