"""Faults of what stands between a call and its kernel: checks, casts, layouts, backends, autograd, packing."""

from __future__ import annotations

from ..fault import Fault, Where, tests_of

_K = "not triton and not simt"


def _of(file: str, *tests: str, first: tuple[str, ...] = ()) -> Where:
    return Where(f"python/subquad/{file}", tests, _K, first)


_PATH = ("tests/package/test_call_path.py", "tests/package/test_state_laws.py")
_CALL = _of(
    "ops/_call.py", *_PATH, "tests/ops/cats_activation", "tests/ops/causal_conv1d", "tests/ops/interval_attention"
)
_AT_ONCE = _of("ops/_call.py", "tests/package/test_at_once.py", "tests/package/test_call_path.py")
_UNSHARED = Where("csrc/torch/unshared.h", ("tests/package/test_at_once.py",), _K, library="native")
_FINITE = Where("csrc/torch/checks.h", ("tests/package/test_at_once.py",), _K, library="native")
_LINEAR_STEP = Where(
    "csrc/ops/gated_linear_attention/arguments.h", ("tests/package/test_at_once.py",), _K, library="native"
)
_AUTOGRAD = _of("ops/_autograd.py", *_PATH, "tests/ops/cats_mlp", "tests/ops/cats_activation")
_SCHEMA = _of("ops/_schema.py", *_PATH, "tests/package/test_schemas.py", "tests/ops/gated_linear_attention")
_LINEAR = _of("ops/_linear.py", "tests/ops/cats_mlp")
_CHECKS = _of("_checks.py", *_PATH, "tests/ops/cats_mlp", "tests/ops/cats_activation", "tests/ops/lawcat_decode_step")
_BACKENDS = _of("_backends.py", "tests/package/test_backends.py", *_PATH)
_PACKING = _of("_packing.py", *_PATH, "tests/ops/causal_conv1d", "tests/ops/gated_linear_attention")
_MLP = _of("ops/cats_mlp.py", *tests_of("cats_mlp"))
_ATTENTION = _of("ops/interval_attention.py", *tests_of("interval_attention"))
_PLANS = Where("python/subquad/ops/interval_attention.py", ("tests/ops/interval_attention",), "triton")
_GLA = _of("ops/gated_linear_attention.py", *tests_of("gated_linear_attention"))
_CONV = _of("ops/causal_conv1d.py", *tests_of("causal_conv1d"))
_DECODE = _of("ops/lawcat_decode_step.py", *tests_of("lawcat_decode_step"))

FAULTS = (
    Fault(
        "ops-autocast-double",
        "dispatch",
        _CALL,
        "_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)",
        "_CASTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)",
    ),
    Fault(
        "ops-autocast-state",
        "dispatch",
        _CALL,
        "if to is None else to.dtype",
        "if to is not None else torch.get_autocast_dtype(leader.device.type)",
    ),
    Fault(
        "ops-strided-copy",
        "stride",
        _CALL,
        "if x is not None and x.stride(-1) != 1 and x.shape[-1] != 1:",
        "if x is not None and x.stride(-1) == 0:",
    ),
    Fault(
        "ops-contiguous-copy",
        "stride",
        _CALL,
        "laid_out[i] = _dense(signature.names[i], laid_out[i])",
        "laid_out[i] = laid_out[i]",
    ),
    Fault(
        "ops-few-in-training",
        "dispatch",
        _CALL,
        'if device == "cuda" and tokens is not None and not training:',
        'if device == "cuda" and tokens is not None:',
    ),
    Fault("ops-at-once-meta", "guard", _AT_ONCE, "x.is_meta\n", "False\n"),
    Fault("ops-at-once-gradient", "gradient", _AT_ONCE, "(differentiates and x.requires_grad)", "False"),
    Fault("ops-at-once-autocast", "dispatch", _AT_ONCE, "or torch._C._is_any_autocast_enabled()\n", "\n"),
    Fault("ops-at-once-types", "guard", _AT_ONCE, "if not signature.takes(types):", "if False:"),
    Fault("ops-unshared-written", "guard", _UNSHARED, "size_t j = i + 1; j < W + R;", "size_t j = W; j < W + R;"),
    Fault("ops-unshared-itself", "guard", _UNSHARED, "!written || size == 1 ||", "!written || size >= 1 ||"),
    Fault("ops-unshared-end", "guard", _UNSHARED, "reach += stride * (size - 1);", "reach = stride * (size - 1);"),
    Fault(
        "ops-finite-infinity",
        "guard",
        _FINITE,
        "std::abs(value) <= std::numeric_limits<float>::max()",
        "value == value",
    ),
    Fault("ops-linear-step-heads", "guard", _LINEAR_STEP, "p.states == states,", "p.states >= states,"),
    Fault(
        "ops-absent-gradient",
        "gradient",
        _CALL,
        "upstream = [None if i in ctx.absent else grad.contiguous() for i, grad in enumerate(grads)]",
        "upstream = [grad.contiguous() for i, grad in enumerate(grads)]",
    ),
    Fault("ops-given-ignored", "gradient", _CALL, "found.get(argument) if given else None", "found.get(argument)"),
    Fault("ops-state-copy-back", "state", _CALL, "arguments[i].copy_(prepared[i])", "prepared[i].copy_(arguments[i])"),
    Fault("ops-reference-state", "state", _CALL, "arguments[i].copy_(state)", "state.copy_(arguments[i])"),
    Fault("ops-step-gradient", "guard", _CALL, "_checks.no_gradient(signature.names[i], arguments[i], hint)", "pass"),
    Fault(
        "ops-step-shared",
        "guard",
        _CALL,
        "_checks.unshared(signature.names, arguments, signature.tensors, signature.written)",
        "",
    ),
    Fault("ops-step-copy-silent", "guard", _CALL, "if operator not in _warned:", "if operator in _warned:"),
    Fault(
        "ops-double-kernel",
        "guard",
        _CALL,
        "_checks.not_double(signature.names[0], arguments[0], name)\n"
        "    prepared = _laid_out(arguments, signature)\n    if prepare",
        "prepared = _laid_out(arguments, signature)\n    if prepare",
    ),
    Fault(
        "ops-functorch",
        "dispatch",
        _CALL,
        "if torch._C._are_functorch_transforms_active():\n        return True",
        "if torch._C._are_functorch_transforms_active():\n        return False",
    ),
    Fault(
        "ops-second-derivative",
        "gradient",
        _AUTOGRAD,
        "return _Raise.apply(len(outputs), *outputs, *grads, *ctx.saved_tensors)",
        "return outputs",
    ),
    Fault(
        "ops-backward-autocast",
        "dispatch",
        _AUTOGRAD,
        "return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()",
        "return nullcontext()",
    ),
    Fault(
        "ops-saved-outputs",
        "gradient",
        _SCHEMA,
        'sources.append(("saved", len(saved_arguments) + saved_outputs.index(spec.outputs.index(a.name))))',
        'sources.append(("saved", saved_outputs.index(spec.outputs.index(a.name))))',
    ),
    Fault(
        "ops-linear-blocks",
        "stride",
        _LINEAR,
        "for block in weight.split(rows)], dim=1)",
        "for block in weight.split(rows)][::-1], dim=1)",
    ),
    Fault(
        "ops-linear-narrow-bias",
        "rounding",
        _LINEAR,
        "return y if wide_bias is None else y + wide_bias\n\n",
        "return y if wide_bias is None else (y + wide_bias).to(weight.dtype).float()\n\n",
    ),
    Fault("ops-threshold-nan", "guard", _CHECKS, "if value != value:  # NaN", "if value is None:  # NaN"),
    Fault("ops-threshold-large", "guard", _CHECKS, "value = math.inf if value > 0 else -math.inf", "value = math.inf"),
    Fault(
        "ops-indices-repeated", "guard", _CHECKS, "if len(set(used)) != len(used):", "if len(set(used)) > len(used):"
    ),
    Fault(
        "ops-indices-range",
        "guard",
        _CHECKS,
        "if any(not -1 <= n < pool for n in numbers):",
        "if any(not -1 <= n <= pool for n in numbers):",
    ),
    Fault(
        "ops-overlap-interleaved",
        "guard",
        _CHECKS,
        "return _meet(into, a[1:], b[1:]) or _meet(into - stride, a[1:], b[1:])",
        "return _meet(into, a[1:], b[1:])",
    ),
    Fault("ops-overlap-itself", "guard", _CHECKS, "if stride <= reach:", "if stride < reach:"),
    Fault(
        "ops-use-backend-sticks",
        "dispatch",
        _BACKENDS,
        "    finally:\n        _override = previous",
        "    finally:\n        _override = name",
    ),
    Fault(
        "ops-backend-order",
        "dispatch",
        _BACKENDS,
        "return requested if requested is not None else (_override if _override is not None else _from_env)",
        "return _override if _override is not None else (requested if requested is not None else _from_env)",
    ),
    Fault(
        "ops-backend-choice-stale",
        "stale",
        _BACKENDS,
        "_choices.pop((stem, device, few), None)",
        "_choices.get((stem, device, few), None)",
    ),
    Fault(
        "ops-backend-unwritten",
        "dispatch",
        _BACKENDS,
        "if has(backward, backend, device):\n        return backend",
        "return backend",
    ),
    Fault(
        "ops-packed-remembered",
        "stale",
        _PACKING,
        "_REMEMBERED.get(cu_seqlens, (x.shape[1],), lambda: cls.of(cu_seqlens, x)), x)",
        "_REMEMBERED.get(cu_seqlens, (), lambda: cls.of(cu_seqlens, x)), x)",
    ),
    Fault(
        "ops-packed-alias",
        "stale",
        _PACKING,
        "cu.detach().to(t, copy=True).contiguous()",
        "cu.detach().to(t).contiguous()",
    ),
    Fault(
        "ops-packed-boundary",
        "bounds",
        _PACKING,
        "torch.searchsorted(self.int32, place, right=True, out_int32=True) - 1",
        "torch.searchsorted(self.int32, place, out_int32=True) - 1",
    ),
    Fault(
        "ops-packed-decreasing",
        "guard",
        _PACKING,
        "any(a > b for a, b in pairwise(numbers))",
        "any(a > b + 1 for a, b in pairwise(numbers))",
    ),
    Fault(
        "ops-mlp-prefill",
        "mask",
        _MLP,
        'if prefill == "dense" and tokens > limit:',
        'if prefill == "dense" and tokens >= limit:',
    ),
    Fault(
        "ops-mlp-union-training",
        "mask",
        _MLP,
        "woken = active_mask(activate(z, activation), t, inclusive).any(0)",
        "woken = active_mask(activate(z, activation), t, inclusive).all(0)",
    ),
    Fault(
        "ops-mlp-grad-x",
        "gradient",
        _MLP,
        "(linear_fp32(dz, w_gate.t()) + linear_fp32(du, w_up.t())).to(x.dtype) if need_x else None",
        "linear_fp32(dz, w_gate.t()).to(x.dtype) if need_x else None",
    ),
    Fault(
        "ops-mlp-grad-h-dropped",
        "gradient",
        _MLP,
        "h if w_down.requires_grad else None, t)",
        "h.relu() if w_down.requires_grad else None, t)",
    ),
    Fault(
        "ops-mlp-bias-dtype",
        "gradient",
        _MLP,
        "grad_b_down = grad_y.float().sum(0).to(ctx.biases[2]) if need_b_down else None",
        "grad_b_down = grad_y.sum(0) if need_b_down else None",
        equivalent="biases have the dtype of x, and torch sums 16-bit numbers in float32",
    ),
    Fault(
        "ops-attention-sink-gradient",
        "sink",
        _ATTENTION,
        'grads["sink_logits"] = -(weight * found["delta"]).sum((0, 1))',
        'grads["sink_logits"] = (weight * found["delta"]).sum((0, 1))',
    ),
    Fault(
        "ops-attention-bias-gradient",
        "gradient",
        _ATTENTION,
        'found["dkey_bias"].sum_to_size(bias.shape)',
        'found["dkey_bias"].mean(0, keepdim=True).sum_to_size(bias.shape)',
    ),
    Fault(
        "ops-attention-plan-slots",
        "mask",
        _PLANS,
        "arguments[-1] = mask.plan(per_slot=queries.shape[3] > 1)",
        "arguments[-1] = mask.plan(per_slot=False)",
    ),
    Fault(
        "ops-attention-shift-heads",
        "stride",
        _ATTENTION,
        "shift = mask.shift.transpose(1, 2)",
        "shift = mask.shift.transpose(1, 2).flip(-1)",
    ),
    Fault(
        "ops-attention-mask-batch",
        "guard",
        _ATTENTION,
        "if tensor.shape[0] not in (1, batch) or tensor.shape[1] not in (1, heads):",
        "if tensor.shape[0] not in (1, batch):",
    ),
    Fault(
        "ops-gla-wide-state",
        "state",
        _GLA,
        "return wide[..., :-1].contiguous(), wide[..., -1].contiguous()",
        "return wide[..., 1:].contiguous(), wide[..., 0].contiguous()",
    ),
    Fault(
        "ops-gla-scale",
        "formula",
        _GLA,
        'scale = q.shape[3] ** -0.5 if scale is None else _checks.number("scale", scale)',
        'scale = v.shape[3] ** -0.5 if scale is None else _checks.number("scale", scale)',
    ),
    Fault("ops-conv-wide-state", "state", _CONV, "state = state[:, :, 1:]", "state = state[:, :, :-1]"),
    Fault(
        "ops-conv-long-ring",
        "index width",
        _CONV,
        "lengths = lengths if lengths.dtype is torch.int32 else lengths.remainder(max(1, length))",
        "",
    ),
    Fault(
        "ops-conv-index-wrap",
        "index width",
        _CONV,
        "indices.clamp(-1, pool).to(torch.int32)",
        "indices.to(torch.int32)",
    ),
    Fault(
        "ops-conv-residual-gradient", "gradient", _CONV, 'return {**found, "residual": given["grad_y"]}', "return found"
    ),
    Fault("ops-decode-key-map", "dispatch", _DECODE, "wphi_k = wphi if wphi_k is None else wphi_k", "wphi_k = wphi"),
    Fault(
        "ops-decode-scale",
        "formula",
        _DECODE,
        "scale = state.shape[2] ** -0.5 if scale is None else scale",
        "scale = q0.shape[2] ** -0.5 if scale is None else scale",
    ),
)
