"""Faults of what meets transformers or other processes, and of the functions that have the names of other packages."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str, *tests: str) -> Where:
    return Where(f"python/subquad/{file}", tests, "", ())


_ATTENTION = _of("integrations/transformers/attention.py", "tests/models/test_attention.py")
_MASKS = _of(
    "integrations/transformers/masks.py",
    "tests/models/test_attention.py",
    "tests/models/test_masks.py",
    "tests/models/test_tokens.py",
)
_ADDITIVE = _of("masks/additive.py", "tests/models/test_masks.py", "tests/models/test_tokens.py")
_GIVEN = _of("integrations/transformers/given.py", "tests/models/test_attention.py", "tests/models/test_masks.py")
_PREDICATES = _of(
    "integrations/transformers/predicates.py", "tests/models/test_attention.py", "tests/models/test_masks.py"
)
_CACHE = _of(
    "integrations/transformers/cache.py",
    "tests/models/test_rollback.py",
    "tests/models/test_lawcat.py",
    "tests/package/test_state_laws.py",
)
_CONVERT = _of("integrations/transformers/convert.py", "tests/models/test_convert.py")
_SAVING = _of("integrations/transformers/saving.py", "tests/models/test_saving.py", "tests/models/test_weights.py")
_CONTEXT = _of("distributed/context.py", "tests/distributed/test_context.py")
_WALKS = _of(
    "distributed/gated_linear_attention.py", "tests/distributed/test_walk.py", "tests/distributed/test_operators.py"
)
_SHARDS = _of("distributed/lawcat.py", "tests/distributed/test_lawcat_window.py")
_HALO = _of("distributed/exchange.py", "tests/distributed/test_lawcat_window.py")
_DELAYED = _of("nn/_window.py", "tests/distributed/test_lawcat_window.py")
_RING = _of("distributed/ring.py", "tests/distributed/test_ring.py")
_PARTS = _of("masks/parts.py", "tests/distributed/test_ring.py", "tests/distributed/test_operators.py")
_FLA = _of("compat/fla.py", "tests/package/test_compat_fla.py")
_CONV = _of("compat/causal_conv1d.py", "tests/ops/causal_conv1d")

FAULTS = (
    Fault(
        "distributed-gla-eps",
        "gradient",
        _WALKS,
        "(call.scale / (den + call.eps)).unsqueeze(-1)",
        "(call.scale / den).unsqueeze(-1)",
    ),
    Fault(
        "distributed-gla-dden",
        "gradient",
        _WALKS,
        "-(numerator * o).sum(-1, keepdim=True)",
        "torch.zeros_like(numerator[..., :1])",
    ),
    Fault("distributed-gla-final", "gradient", _WALKS, "    y[:, :, 0] = last[..., :columns]\n", ""),
    Fault(
        "distributed-gla-final-per-query",
        "gradient",
        _WALKS,
        "y[:, :, 0] = last[..., :columns]",
        "y[:] = last[:, :, None, :, :columns]",
    ),
    Fault(
        "distributed-gla-gate-of-the-token-after",
        "gradient",
        _WALKS,
        "g[:, low + 1 : high + 1].float().flip(1)",
        "g[:, low:high].float().flip(1)",
    ),
    Fault(
        "distributed-gla-first-gate",
        "gradient",
        _WALKS,
        "        y = y * _log_decay(g[:, :1], y).exp()\n",
        "        pass\n",
    ),
    Fault(
        "distributed-gla-early-final",
        "state",
        _WALKS,
        "        self.s[first] += torch.where(s == 0, 0.0, decay.unsqueeze(-1) * s)\n",
        "",
    ),
    Fault(
        "distributed-gla-early-decay",
        "state",
        _WALKS,
        "else self.decay[last]\n",
        "else torch.ones_like(self.decay[last])\n",
    ),
    Fault(
        "distributed-gla-forgets",
        "dispatch",
        _WALKS,
        "if bool((total < _FORGOTTEN).all())",
        "if bool((total < _FORGOTTEN).any())",
    ),
    Fault(
        "distributed-gla-passing",
        "state",
        _WALKS,
        "                if run.passes:",
        "                if not run.continues:",
    ),
    Fault(
        "ring-sink-twice",
        "sink",
        _RING,
        "        if sinks is not None:\n            sums.join(",
        "        for _ in range(0 if sinks is None else 2):\n            sums.join(",
    ),
    Fault("ring-keys-not-returned", "gradient", _RING, "dkeys[:, around.give[rank]] += part", "pass"),
    Fault("ring-own-log-sum", "gradient", _RING, "        stats = sums.stats()\n", ""),
    Fault(
        "ring-log-sum-gradient", "gradient", _RING, "(grad_out * out).sum(-1) - grad_lse", "(grad_out * out).sum(-1)"
    ),
    Fault("ring-rounded-blocks", "rounding", _RING, "sums.join(out, stats", "sums.join(out.to(q.dtype), stats"),
    Fault(
        "ring-rows-that-see-nothing", "nan", _RING, "stats[..., 1].exp().masked_fill(empty, 0.0)", "stats[..., 1].exp()"
    ),
    Fault(
        "ring-no-wait",
        "state",
        _RING,
        "                arrived()\n            block =",
        "                pass\n            block =",
    ),
    Fault("ring-sends-all", "bounds", _RING, "        if not len(rows):\n            return []\n", ""),
    Fault("parts-sinks-of-a-block", "sink", _PARTS, "plain and (mask.sink_tokens == 0 or int(rows[0]) == 0)", "plain"),
    Fault("parts-lifetimes", "mask", _PARTS, "mask.starts is None and mask.key_start is None", "mask.starts is None"),
    Fault(
        "parts-block-lifetimes",
        "mask",
        _PARTS,
        "mask.plain_causal and mask.key_start is None and",
        "mask.plain_causal and",
    ),
    Fault(
        "parts-block-full", "mask", _PARTS, "if found.key_start is None and bool(every.all())", "if bool(every.all())"
    ),
    Fault("hf-codes-unchecked", "guard", _SAVING, "        _check_codes(self, files)\n", ""),
    Fault("hf-codes-of-another-shape", "guard", _SAVING, "shape != list(tensor.shape) or ", ""),
    Fault(
        "hf-context-mask-of-another",
        "stale",
        _CONTEXT,
        "derived.get(padding, (window,), padded)",
        "made.setdefault(~window, padded())",
    ),
    Fault("shards-window-short", "bounds", _SHARDS, "if late else window - 1", "if late else window - 2"),
    Fault("shards-window-oldest", "bounds", _SHARDS, ">= past - run.low + first_seen", "> past - run.low + first_seen"),
    Fault(
        "shards-window-other-sequence",
        "mask",
        _SHARDS,
        "sequence = None if pieces is None else F.pad(pieces.sequence, (past, 0))[None]",
        "sequence = None",
    ),
    Fault(
        "shards-late-twice",
        "accumulator",
        _SHARDS,
        "    if late:\n        k, wide =",
        "    if late:\n        _, wide =",
    ),
    Fault("shards-late-no-tokens", "gradient", _DELAYED, "if gates is not None:", "if gates is not None and t:"),
    Fault("shards-late-nothing", "mask", _SHARDS, "features.float().masked_fill(gone, 0)", "features.float()"),
    Fault(
        "shards-first-piece",
        "state",
        _SHARDS,
        "F.pad(x, (0, 0) * (x.dim() - 1) + (0, pieces.sequences - 1))",
        "x.repeat(pieces.sequences, *[1] * (x.dim() - 1))",
    ),
    Fault(
        "shards-halo-other-sequence",
        "mask",
        _HALO,
        "max(layout.begin(run.low), run.low - tokens) if run.continues",
        "max(0, run.low - tokens) if run.continues",
    ),
    Fault("hf-scale-dropped", "formula", _ATTENTION, "scale=scaling,", "scale=None,"),
    Fault("hf-sinks-dropped", "sink", _ATTENTION, "sink_logits=s_aux,", "sink_logits=None,"),
    Fault(
        "hf-made-window",
        "mask",
        _GIVEN,
        "padded_causal=causal, autoregressive=causal, sliding_window=width, first_row=tk - tq,",
        "padded_causal=causal, autoregressive=causal, sliding_window=-1, first_row=tk - tq,",
    ),
    Fault(
        "hf-window-ignored",
        "mask",
        _GIVEN,
        "mask = mask & plain(True, window, tq, tk, mask.first_row, query.device)",
        "pass",
    ),
    Fault(
        "hf-dropout-silent",
        "guard",
        _ATTENTION,
        "if dropout and module.training:",
        "if dropout and not module.training:",
    ),
    Fault(
        "hf-softcap-silent",
        "guard",
        _ATTENTION,
        "if kwargs.get(name) is not None and kwargs[name] is not False:",
        "if kwargs.get(name) is True:",
    ),
    Fault("hf-softcap-dropped", "formula", _ATTENTION, "softcap=softcap or 0.0,", "softcap=0.0,"),
    Fault("hf-positions-ignored", "mask", _GIVEN, "        if ids is None:\n", "        if True:\n"),
    Fault("hf-blocks-uncut", "mask", _MASKS, "block = own if pattern.cut else run_starts", "block = run_starts"),
    Fault("hf-padding-columns", "bounds", _MASKS, "[:, kv_offset : kv_offset + kv_length]", "[:, :kv_length]"),
    Fault(
        "hf-padding-short-mask",
        "guard",
        _MASKS,
        "nn.functional.pad(mask.bool(), (0, missing)) if missing > 0",
        "nn.functional.pad(mask.bool(), (0, missing), value=True) if missing > 0",
    ),
    Fault(
        "hf-static-window",
        "bounds",
        _MASKS,
        "start, stop = (own + 1 - window if window >= 0 else torch.zeros_like(own)), own + 1",
        "start, stop = (own - window if window >= 0 else torch.zeros_like(own)), own + 1",
    ),
    Fault(
        "hf-static-offset",
        "mask",
        _MASKS,
        "    own = torch.arange(tq, device=device) + first_row\n",
        "    own = torch.arange(tq, device=device) + tk - tq\n",
    ),
    Fault("hf-first-row", "mask", _MASKS, "first_row = q_offset - kv_offset\n", "first_row = q_offset\n"),
    Fault(
        "hf-additive-mask", "mask", _ADDITIVE, "hidden = mask < HIDDEN", "hidden = mask <= torch.finfo(mask.dtype).min"
    ),
    Fault("hf-additive-bias", "guard", _ADDITIVE, "elif not bool(only):\n", "elif False:\n"),
    Fault(
        "hf-predicate-window",
        "mask",
        _PREDICATES,
        'return Pattern(window=inside["sliding_window"])',
        "return Pattern()",
    ),
    Fault(
        "hf-predicate-unknown",
        "mask",
        _PREDICATES,
        "return parts if len(parts) == 2 else None",
        "return parts[:2] if len(parts) >= 2 else None",
    ),
    Fault(
        "hf-cache-columns",
        "mask",
        _CACHE,
        "if self.columns is not None:\n            return self.columns, 0",
        "if self.columns is not None:\n            return self.state.seen + query_length, 0",
    ),
    Fault("hf-cache-crop", "bounds", _CACHE, "self.state.rollback(tokens)", "self.state.rollback(0)"),
    Fault("hf-cache-crop-unchecked", "guard", _CACHE, "if tokens > kept:", "if False:"),
    Fault(
        "hf-cache-beams",
        "state",
        _CACHE,
        "def reorder_cache(self, beam_idx: torch.Tensor) -> None:\n        self.state.select(beam_idx)",
        "def reorder_cache(self, beam_idx: torch.Tensor) -> None:\n        pass",
    ),
    Fault(
        "hf-cache-repeat",
        "stride",
        _CACHE,
        "self.state.select(torch.arange(count).repeat_interleave(repeats))",
        "self.state.select(torch.arange(count).repeat(repeats))",
    ),
    Fault("hf-cache-used-layer", "guard", _CACHE, "return bool(layer.get_seq_length() > 0)", "return False"),
    Fault("hf-cache-recording", "state", _CACHE, "self.state.keep(self.depth if first else 0)", "self.state.keep(0)"),
    Fault("hf-cache-reset", "state", _CACHE, "self.state.reset()\n", "pass\n"),
    Fault(
        "hf-convert-options",
        "guard",
        _CONVERT,
        "return known[value], config(**options)",
        "return known[value], config()",
    ),
    Fault(
        "fla-reverse-bounds",
        "mask",
        _FLA,
        "cu_seqlens = q.shape[1] - cu_seqlens.flip(0)",
        "cu_seqlens = cu_seqlens.flip(0)",
    ),
    Fault(
        "fla-reverse-states",
        "state",
        _FLA,
        "final = final if cu_seqlens is None else _in_opposite_order(final)",
        "final = final",
    ),
    Fault(
        "fla-state-layout",
        "stride",
        _FLA,
        "return o, (s.mT.contiguous() if state_v_first else s, z.unsqueeze(1))",
        "return o, (s, z.unsqueeze(1))",
    ),
    Fault(
        "conv-package-bounds",
        "bounds",
        _CONV,
        "begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]",
        "begins[:, 1:] = seq_idx[:, 1:] > seq_idx[:, :-1]",
    ),
    Fault(
        "conv-package-negative",
        "mask",
        _CONV,
        "y = torch.where((seq_idx < 0)[..., None], torch.zeros_like(y), y)",
        "pass",
    ),
    Fault("conv-package-states-out", "state", _CONV, "final = final_states_out.copy_(final)", "pass"),
)
