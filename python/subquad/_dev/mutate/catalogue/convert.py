"""Faults of converting layers and of reverting that."""

from __future__ import annotations

from ..fault import Fault, Where

_TESTS = (
    "tests/models/test_convert.py",
    "tests/models/test_cats.py",
    "tests/models/test_lawcat.py",
    "tests/ops/cats_mlp/test_module.py",
)


def _of(file: str, *more: str) -> Where:
    return Where(f"python/subquad/{file}", (*_TESTS, *more), "", ("convert", "revert"))


_REPLACE = _of("convert/replace.py")
_MLPS = _of("convert/mlps.py")
_GATED = _of("nn/_gated.py")
_CHILDREN = _of("nn/_children.py", "tests/ops/cats_mlp/test_children.py")
_MLP = _of("nn/cats_mlp.py")
_INHERITED = _of("nn/_inherited.py")
_CODES = ("tests/models/test_weights.py", "tests/models/test_gguf.py", "tests/ops/quantised_cats_mlp/test_module.py")
_WEIGHTS = Where("python/subquad/convert/weights.py", _CODES)
_GGUF = Where("python/subquad/convert/gguf.py", _CODES)
_BYTES = Where("python/subquad/nn/_codes.py", _CODES)
_QUANTISED = Where("python/subquad/nn/quantised_cats_mlp.py", _CODES)

FAULTS = (
    Fault("convert-no-undo", "state", _REPLACE, "undo.callback(by.unsettle, module)", "pass"),
    Fault(
        "convert-undo-places",
        "state",
        _REPLACE,
        "undo.callback(model.set_submodule, e.name, e.old, strict=True)",
        "pass",
    ),
    Fault("convert-shared-twice", "state", _REPLACE, "if id(old) not in made:", "if True:"),
    Fault("convert-again", "dispatch", _REPLACE, "        if made is None:", "        if True:"),
    Fault(
        "convert-negative-layer",
        "bounds",
        _REPLACE,
        "wanted = layer + count if isinstance(layer, int) and layer < 0 else layer",
        "wanted = layer + count - 1 if isinstance(layer, int) and layer < 0 else layer",
    ),
    Fault(
        "convert-nested",
        "guard",
        _REPLACE,
        'inner = next((name for name in names if name.startswith(f"{outer}.")), None)',
        "inner = None",
    ),
    Fault(
        "convert-tied-modules",
        "bounds",
        _REPLACE,
        "for name, module in model.named_modules(remove_duplicate=False)\n        if replacement_of",
        "for name, module in model.named_modules()\n        if replacement_of",
    ),
    Fault("convert-restores-unconverted", "guard", _REPLACE, "and module.original is not None\n    }", "\n    }"),
    Fault("convert-counts", "formula", _REPLACE, "if id(p) not in new}", "}"),
    Fault(
        "convert-early-layout",
        "state",
        _MLPS,
        "return CATSMLP.from_llama_mlp(mlp, lay_out=False, **options)",
        "return CATSMLP.from_llama_mlp(mlp, **options)",
    ),
    Fault(
        "convert-formula-unchecked",
        "guard",
        _GATED,
        "    _check_formula(mlp, parts)\n    return parts",
        "    return parts",
    ),
    Fault("convert-shapes-unchecked", "guard", _GATED, "    _check_shapes(parts.projections)\n", ""),
    Fault(
        "convert-gelu-kind",
        "formula",
        _GATED,
        'name = "gelu_tanh" if act.approximate == "tanh" else "gelu"',
        'name = "gelu"',
    ),
    Fault(
        "convert-fused-halves",
        "stride",
        _GATED,
        'z, u = parts.projections["gate_up_proj"](x).chunk(2, dim=-1)',
        'u, z = parts.projections["gate_up_proj"](x).chunk(2, dim=-1)',
    ),
    Fault(
        "convert-hooks-ignored",
        "guard",
        _CHILDREN,
        "if child._forward_pre_hooks or child._forward_hooks or child._backward_pre_hooks or child._backward_hooks:",
        "if child._backward_pre_hooks or child._backward_hooks:",
    ),
    Fault(
        "convert-forward-ignored",
        "guard",
        _CHILDREN,
        "if type(child) is not kind or not _forward_is_its_own(child):",
        "if type(child) is not kind:",
    ),
    Fault("convert-mode-shared", "state", _CHILDREN, "if id(part) not in shared:", "if True:"),
    Fault("convert-mode-lost", "state", _MLP, "set_mode(self, mlp.training, besides=mlp)", "pass"),
    Fault(
        "convert-dense-children",
        "stale",
        _MLP,
        "setattr(original, name, child)  # children replaced since the conversion",
        "pass",
    ),
    Fault(
        "convert-dense-layout",
        "state",
        _MLP,
        "self.restore_layout()\n        original = self.original",
        "original = self.original",
    ),
    Fault("convert-attention-children", "stale", _INHERITED, "setattr(original, name, getattr(layer, name))", "pass"),
    Fault(
        "convert-attention-dropout",
        "guard",
        _INHERITED,
        'for name in ("attention_dropout",) if sinks else ("attention_dropout", "sinks"):',
        'for name in () if sinks else ("sinks",):',
    ),
    Fault(
        "weights-kept-by-originals",
        "stale",
        _WEIGHTS,
        "            setattr(original, child, e.new)",
        "            pass",
    ),
    Fault(
        "weights-originals-not-undone",
        "state",
        _WEIGHTS,
        "            undo.callback(setattr, original, child, e.old)",
        "            pass",
    ),
    Fault("weights-of-new-parameters", "guard", _WEIGHTS, " and id(module.weight) not in new", ""),
    Fault("weights-mixed-mlp", "guard", _WEIGHTS, "    if dense and len(dense) < len(parts):", "    if False:"),
    Fault(
        "weights-twice",
        "state",
        _WEIGHTS,
        "    known = weights.get(id(linear.weight))",
        "    known = None",
    ),
    Fault("weights-untied", "stale", _BYTES, "            if new is not old and", "            if False and"),
    Fault("weights-dense-checkpoint", "guard", _BYTES, "value.dtype != torch.uint8", "False"),
    Fault("gguf-other-model", "guard", _GGUF, "linear.weight, 0, 0, equal_nan=True", "linear.weight, 1, 1"),
    Fault("gguf-rows-as-they-are", "stride", _GGUF, "for heads in self._heads if name", "for heads in () if name"),
    Fault(
        "quantised-gate-format",
        "dispatch",
        _QUANTISED,
        'if name == "gate_proj" and gate_weights',
        "if False and gate_weights",
    ),
    Fault(
        "quantised-threshold-lost",
        "state",
        _QUANTISED,
        "self.threshold, self.cats_meta = mlp.threshold.clone(), mlp.cats_meta.clone()",
        "pass",
    ),
    Fault(
        "quantised-blocks-shifted",
        "bounds",
        _QUANTISED,
        "own = None if scales is None else scales[i // GROUP :",
        "own = None if scales is None else scales[0 * i :",
    ),
)
