"""`CATSMLP`: a drop-in for the gated MLP of Llama-like models that skips the neurons its gate leaves small."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .. import _checks
from .._backends import BACKENDS, _warn_once
from ..ops.cats_activation import GRADS
from ..ops.cats_mlp import MASK_MODES, MAX_SPARSE_TOKENS, PREFILLS, cats_mlp
from ..reference._common import upcast
from ..reference.cats_activation import activate, active_mask, cats_glu
from ._children import placement, plain, set_mode
from ._gated import activation_name, gated_parts
from ._loading import Checked
from ._options import CatsConfig
from ._sharded import check_restored, in_parts, mesh_of, relaid, sharded, split, split_like
from ._sizes import check_sizes

DOWN_LAYOUTS = ("auto", "strided", "keep")
DENSE = -1.0  # a threshold below every magnitude
_META_VERSION = 1
_STATE = ("threshold", "cats_meta")


class GatedMLP(nn.Module):
    """The dense block that `CATSMLP` replaces: down(act(gate(x)) * up(x)), x `[..., H]`."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(activate(self.gate_proj(x), self.act_fn) * self.up_proj(x))


class CATSMLP(Checked):
    """Gated MLP with thresholded gate (CATS, arXiv 2404.08763).

    Parameters have the names and shapes of the layer it replaces: `gate_proj`, `up_proj`, `down_proj` (or a fused
    `gate_up_proj` whose first half is the gate). Two buffers come on top, both fp32 whatever `.half()` does to the
    rest: `threshold` (`[]` or `[I]`; -1, the initial value, means dense) and `cats_meta` `[4]`: format version, target
    sparsity (-1 when set by hand), calibration tokens, inclusive. A dense checkpoint loads strictly and leaves both as
    they are; `dense_state_dict` writes one.

    The projections are seen as they are at every call. Plain Linears are read. If one is anything else (an adapter, quantised,
    offloaded, with a hook), all are called: the same function, with every gradient, but nothing is skipped.

    Args:
        hidden_size: H.
        intermediate_size: I, the number of neurons.
        bias: whether all three projections have one.
        activation: "silu", "gelu_tanh", "gelu" or "relu".
        threshold: float or fp32 tensor `[]` or `[I]`; None means dense.
        inclusive: keep neurons whose magnitude equals the threshold.
        mask_mode: "token" (each token its own mask) or "union" (shared within a call of up to `max_sparse_tokens`
            tokens).
        prefill: "masked" (larger calls compute the same function) or "dense" (larger calls ignore the threshold).
        max_sparse_tokens: largest number of tokens per call for the sparse kernel; None for the default of `cats_mlp`.
        grad: "masked" or "ste", see `subquad.cats_activation`.
        backend: as in `cats_mlp`.
        down_layout: where the neuron-major down projection that the sparse kernels want comes from. "strided"
            re-strides the storage of `down_proj.weight` in place: same Parameter, same shape `[H, I]`, strides (1, H),
            no extra memory. "keep" leaves the weight as it is, for what wants contiguous parameters such as FSDP; one that is
            not neuron-major makes sparse calls slower. "auto" is "strided". State dicts are contiguous in any case.
        device, dtype: of the projections.

    Attributes:
        enabled: False computes the dense MLP whatever the threshold.
        original: the dense module it was made from, or None.

    Raises:
        ValueError: for an unknown option or a NaN threshold.
    """

    _optional = _STATE  # which dense checkpoints have not

    threshold: torch.Tensor
    cats_meta: torch.Tensor
    original: nn.Module | None
    gate_proj: Any  # Linears, or what somebody has put in their place
    up_proj: Any
    gate_up_proj: Any
    down_proj: Any

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_sizes(0, hidden_size=hidden_size, intermediate_size=intermediate_size)
        _checks.flag("bias", bias)
        device = _checks.device("device", device)
        self._remember(None)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)
        self._configure(activation_name(activation), CatsConfig(**options))
        self.lay_out()

    @classmethod
    def from_llama_mlp(
        cls,
        mlp: nn.Module,
        *,
        share_weights: bool = True,
        lay_out: bool = True,
        **options: Any,
    ) -> CATSMLP:
        """Build from a dense gated MLP: gate_proj (or a fused gate_up_proj), up_proj, down_proj and an activation.

        Args:
            mlp: a LlamaMLP, MistralMLP, Qwen2MLP, GemmaMLP, Phi3MLP or a module shaped like one.
            share_weights: keep the very same `nn.Linear` objects; False copies them.
            lay_out: False leaves the down projection as it is, for a call of `lay_out` later: nothing of `mlp` has changed then.
            options: the keyword arguments of the class from `threshold` to `down_layout`.

        Raises:
            ValueError: if the module cannot be represented (unknown activation, `pretraining_tp` above 1, a different
                formula), or an option has no such value. `mlp` is then unchanged.
            TypeError: for an unknown option.
        """
        parts = gated_parts(mlp)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        if not share_weights:
            mlp = copy.deepcopy(mlp)
        for name in parts.projections:
            self.add_module(name, getattr(mlp, name))
        self._remember(mlp)
        self._configure(parts.activation, CatsConfig(**options))
        set_mode(self, mlp.training, besides=mlp)
        if lay_out:
            self.lay_out()
        return self

    def _remember(self, original: nn.Module | None) -> None:
        """Keep the dense module without registering it: its parameters are ours already."""
        object.__setattr__(self, "original", original)

    def _configure(self, activation: str, config: CatsConfig) -> None:
        _checks.choice("mask_mode", config.mask_mode, MASK_MODES)
        _checks.choice("prefill", config.prefill, PREFILLS)
        _checks.choice("grad", config.grad, GRADS)
        _checks.choice("down_layout", config.down_layout, DOWN_LAYOUTS)
        _checks.flag("inclusive", config.inclusive)
        limit = config.max_sparse_tokens
        if limit is not None:
            _checks.size("max_sparse_tokens", limit)
        if limit is not None and not 0 <= limit <= MAX_SPARSE_TOKENS:
            raise ValueError(f"max_sparse_tokens: expected 0 to {MAX_SPARSE_TOKENS}, got {limit}")
        if config.backend is not None:
            _checks.choice("backend", config.backend, BACKENDS)
        self.activation, self.backend, self.max_sparse_tokens = activation, config.backend, limit
        self.mask_mode, self.prefill, self.grad = config.mask_mode, config.prefill, config.grad
        self.down_layout = config.down_layout
        self.hidden_size, self.intermediate_size = self.down_proj.out_features, self.down_proj.in_features
        self.enabled = True
        self._fused = "gate_up_proj" in self._modules
        self._layout: tuple[torch.Size, tuple[int, ...]] | None = None  # shape and strides before `lay_out`
        device, _ = placement(self.down_proj)
        self.register_buffer("threshold", torch.full((), DENSE, device=device, dtype=torch.float32))
        meta = torch.tensor([_META_VERSION, -1.0, 0.0, float(config.inclusive)], dtype=torch.float32)
        self.register_buffer("cats_meta", meta.to(device))
        self._inclusive = config.inclusive
        if config.threshold is not None:
            self.set_threshold(config.threshold)
        self.register_state_dict_post_hook(_contiguous_down)
        self.register_load_state_dict_post_hook(_after_load)

    # --- threshold ---------------------------------------------------------------------------------------------------

    @property
    def inclusive(self) -> bool:
        """Whether a neuron exactly at the threshold stays active."""
        return self._inclusive

    @inclusive.setter
    def inclusive(self, value: bool) -> None:
        self._inclusive = bool(value)
        self.cats_meta[3] = float(value)

    def set_threshold(
        self, threshold: float | torch.Tensor, *, target_sparsity: float = -1.0, calibration_tokens: int = 0
    ) -> None:
        """Replace the threshold, in place where the shape allows, so that captured CUDA graphs see it.

        Args:
            threshold: float, or tensor `[]` or `[I]`; stored in fp32. Negative: nothing is skipped.
            target_sparsity: kept in `cats_meta`; -1 when the threshold does not come from a calibration.
            calibration_tokens: kept in `cats_meta`.

        Raises:
            ValueError: if a value is NaN or the shape is neither `[]` nor `[I]`.
            TypeError: it is neither a number nor a tensor.
        """
        try:
            value = torch.as_tensor(threshold, dtype=torch.float32, device=self.threshold.device).detach()
        except TypeError as error:
            raise TypeError(f"threshold: expected a float or a tensor, got {threshold!r}") from error
        if value.shape not in ((), (self.intermediate_size,)):
            raise ValueError(f"threshold: expected shape [] or [{self.intermediate_size}], got {list(value.shape)}")
        if not _checks.traced(value) and bool(value.isnan().any()):
            raise ValueError("threshold: expected numbers, got NaN")
        if value.dim() and (mesh := mesh_of(self.down_proj)) is not None:
            value = split_like(value, mesh)
        if value.shape == self.threshold.shape:
            self.threshold.copy_(value)
        else:
            self.threshold = value.clone()
        meta = [_META_VERSION, target_sparsity, calibration_tokens, self._inclusive]
        self.cats_meta.copy_(torch.tensor(meta, dtype=torch.float32))

    # --- weights -----------------------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        """Bring the down projection into its layout; needed only after replacing `down_proj.weight` by hand."""
        weight = self._own_down()
        if self.down_layout != "keep" and weight is not None and not weight.t().is_contiguous():
            self._layout = weight.shape, weight.stride()  # first, so that an interrupted change can be undone
            self._lay(weight, weight.data.t().contiguous().t())

    def _own_down(self) -> torch.Tensor | None:
        """The weight of the down projection, or this process's part of it; None if it cannot be read."""
        weight = getattr(self.down_proj, "weight", None)
        if mesh_of(self.down_proj) is None:
            return weight if plain(self.down_proj, nn.Linear) else None
        return weight.to_local().detach() if weight.device_mesh.ndim == 1 else None  # type: ignore[union-attr]

    def _lay(self, weight: torch.Tensor, data: torch.Tensor) -> None:
        """Bring what `_own_down` gave to other strides."""
        whole = getattr(self.down_proj, "weight", None)  # an adapter around it has none
        if sharded(whole):
            self.down_proj.weight = relaid(whole, data)
        else:
            weight.data = data

    def set_down_layout(self, down_layout: str) -> None:
        """Change the layout strategy.

        Raises:
            ValueError: if it is none of "auto", "strided" and "keep".
        """
        _checks.choice("down_layout", down_layout, DOWN_LAYOUTS)
        self.restore_layout()
        self.down_layout = down_layout
        self.lay_out()

    def restore_layout(self) -> None:
        """Undo the re-striding of `down_proj.weight`, also where an adapter has come around it."""
        if self._layout is None:
            return
        shape, strides = self._layout
        down = self.down_proj
        inside = (p for p in down.parameters() if p.shape == shape and p.t().is_contiguous())
        weight = own if (own := self._own_down()) is not None else next(inside, None)
        if weight is not None:
            self._lay(weight, _with_layout(weight.data, shape, strides))
        self._layout = None

    def _split_dims(self) -> dict[str, int | None]:
        """How neurons are split over processes: a dimension for every parameter, None for what stays whole."""
        own = {"down_proj.weight": 1, "down_proj.bias": None}
        return {name: own.get(name, 0) for name, _ in self.named_parameters()}

    def _split(self, mesh: Any, source: int | None = 0) -> None:
        """Split the neurons over the processes of a mesh of one dimension. A threshold for all of them stays whole."""
        split(self, mesh, self._split_dims(), "gate_up_proj", source)
        if self.threshold.dim():
            self.threshold = split_like(self.threshold, mesh)
        self._layout = None
        self.lay_out()

    # --- module ------------------------------------------------------------------------------------------------------

    def reads(self, x: torch.Tensor) -> bool:
        """Whether the weights of the projections say what calls of them on x would compute, in layouts that the op takes."""
        return self._unreadable(x) is None

    def _unreadable(self, x: torch.Tensor) -> str | None:
        """The name of a projection that must be called."""
        child: Any
        for name, child in self._modules.items():
            if child is None or not self._readable(name, child) or child.weight.device != x.device:
                return name
            rows, columns = child.weight.stride()
            if columns != 1 and not (name == "down_proj" and rows == 1):
                return name
        return None

    def _readable(self, name: str, child: nn.Module) -> bool:
        """Whether the kernel can read a projection."""
        return plain(child, nn.Linear)

    def share_read(self, woken: torch.Tensor) -> float:
        """Bytes of weights that a sparse call reads, of all: every gate, and the rows of the neurons in `woken`, bool [I]."""
        return (1 + 2 * woken.float().mean().item()) / 3

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """z `[..., I]` of x `[..., H]`: what goes into the activation."""
        if mesh_of(self.down_proj) is not None:
            raise ValueError(
                "mlp: expected whole weights where gates are asked for, got a part; calibrate, then parallelize"
            )
        z: torch.Tensor = self.gate_up_proj(x).chunk(2, dim=-1)[0] if self._fused else self.gate_proj(x)
        return z

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y `[..., H]` of x `[..., H]`, in x's dtype."""
        _checks.tensor("x", x)
        return in_parts(self, self.down_proj, self._computed, x)

    def _computed(self, x: torch.Tensor) -> torch.Tensor:
        return self._read(x) if self.reads(x) else self._called(x)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` by the operator."""
        gate, up, down = self._projections()
        return cats_mlp(
            x,
            gate[0],
            up[0],
            down.weight,
            self.threshold if self.enabled else DENSE,
            b_gate=gate[1],
            b_up=up[1],
            b_down=down.bias,
            **self._options(),
        )

    def _projections(self) -> tuple[tuple[torch.Tensor, Any], tuple[torch.Tensor, Any], Any]:
        """Weight and bias of gate and up, which may be the halves of one, and the down projection."""
        if not self._fused:
            return (
                (self.gate_proj.weight, self.gate_proj.bias),
                (self.up_proj.weight, self.up_proj.bias),
                self.down_proj,
            )
        fused = self.gate_up_proj
        biases = (None, None) if fused.bias is None else fused.bias.chunk(2)
        gate, up = zip(fused.weight.chunk(2), biases, strict=True)
        return gate, up, self.down_proj

    def _options(self) -> dict[str, Any]:
        """Of the operator."""
        return {
            "activation": self.activation,
            "inclusive": self._inclusive,
            "mask_mode": self.mask_mode,
            "prefill": self.prefill,
            "max_sparse_tokens": self.max_sparse_tokens,
            "grad": self.grad,
            "backend": self.backend,
        }

    def _called(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` by calls of the projections."""
        z, u = self.gate_up_proj(x).chunk(2, dim=-1) if self._fused else (self.gate_proj(x), self.up_proj(x))
        limit = MAX_SPARSE_TOKENS if self.max_sparse_tokens is None else self.max_sparse_tokens
        few = z.numel() <= limit * z.shape[-1]
        dense = not self.enabled or (self.prefill == "dense" and not few)
        threshold = torch.full_like(self.threshold, DENSE) if dense else self.threshold
        mask = active_mask(activate(upcast(z.detach()), self.activation), threshold, self._inclusive)
        if self.mask_mode == "union":
            mask = mask.reshape(-1, mask.shape[-1]).any(0).expand_as(mask)
        h = cats_glu(z, u, threshold, activation=self.activation, inclusive=self._inclusive, grad=self.grad, mask=mask)
        if few and not dense and not h.requires_grad and not torch.compiler.is_compiling():
            odd = self._unreadable(x) or "down_proj"
            _warn_once(
                f"CATSMLP: {odd} ({type(self._modules[odd]).__name__}) is no plain Linear, has a hook or a transposed weight; "
                "the projections must be called, so nothing is skipped"
            )
        y: torch.Tensor = self.down_proj(h)
        return y

    def to_dense(self) -> nn.Module:
        """The dense module this one was made from (or a `GatedMLP`), sharing the weights, in their original layout."""
        check_restored(self.down_proj)
        self.restore_layout()
        original = self.original
        if original is None:
            return GatedMLP(self.gate_proj, self.up_proj, self.down_proj, self.activation).train(self.training)
        for name, child in self.named_children():
            setattr(original, name, child)  # children replaced since the conversion
        set_mode(original, self.training, besides=self)
        return original

    def extra_repr(self) -> str:
        text = f"{self.hidden_size}, {self.intermediate_size}, activation={self.activation!r}, "
        if _checks.traced(self.threshold):
            text += "threshold without values"
        elif sharded(self.threshold):  # whose least and greatest value all processes would have to ask for
            text += f"threshold [{self.intermediate_size}] in parts"
        elif self.threshold.dim():
            text += f"threshold [{self.intermediate_size}] in [{self.threshold.min():.4g}, {self.threshold.max():.4g}]"
        else:
            text += f"threshold={self.threshold.item():.4g}"
        if not _checks.traced(self.cats_meta) and self.cats_meta[1] >= 0:
            text += f", target_sparsity={self.cats_meta[1].item():.3g}"
        return text if self.enabled else f"{text}, enabled=False"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CATSMLP:
        """Threshold and metadata follow the device, never the dtype; leaving the meta device makes them dense again."""
        kept = {name: getattr(self, name) for name in _STATE}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            device = getattr(self, name).device
            if old.is_meta and device.type != "meta":
                fresh = [DENSE] if name == "threshold" else [_META_VERSION, -1.0, 0.0, float(self._inclusive)]
                new = torch.tensor(fresh, dtype=torch.float32, device=device)
                setattr(self, name, new.expand_as(old).clone() if old.dim() else new[0])
            else:
                setattr(self, name, old.to(device))
        self.lay_out()
        return self

    def _load(self, given: Mapping[str, torch.Tensor], load: Callable[[], None]) -> None:
        threshold, meta = given.get("threshold"), given.get("cats_meta")
        if threshold is not None and threshold.shape != self.threshold.shape:
            self.threshold = torch.empty_like(threshold, dtype=torch.float32, device=self.threshold.device)
        load()
        for name in _STATE:
            setattr(self, name, getattr(self, name).float())  # assign=True may bring another dtype
        if meta is not None and not _checks.traced(meta):
            self._inclusive = bool(meta[3] != 0)

    def _problem(self, given: Mapping[str, torch.Tensor]) -> str | None:
        threshold, meta = given.get("threshold"), given.get("cats_meta")
        if threshold is not None:
            if threshold.shape not in ((), (self.intermediate_size,)):
                return f"threshold: expected shape [] or [{self.intermediate_size}], got {list(threshold.shape)}"
            values: Any = threshold.to_local() if sharded(threshold) else threshold  # type: ignore[attr-defined]
            if not _checks.traced(values) and bool(values.isnan().any()):
                return "threshold: expected numbers, got NaN"
        if meta is not None:
            if meta.shape != self.cats_meta.shape:
                return f"cats_meta: expected shape [4], got {list(meta.shape)}"
            if not _checks.traced(meta) and meta[0] > _META_VERSION:
                return f"cats_meta: format {int(meta[0])} is newer than {_META_VERSION}, the newest this version reads"
        return None


def _with_layout(data: torch.Tensor, shape: torch.Size, strides: tuple[int, ...]) -> torch.Tensor:
    """The data with these strides; contiguous if it has another shape by now, or the elements would overlap."""
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if data.shape != shape or extent < data.numel():
        return data.contiguous()
    if data.stride() == strides:
        return data
    return torch.empty_strided(shape, strides, dtype=data.dtype, device=data.device).copy_(data)


def _contiguous_down(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State dict hook: safetensors refuses strided tensors. Parameters (`keep_vars=True`) stay as they are."""
    key = prefix + "down_proj.weight"
    weight = state_dict.get(key)
    if weight is not None and not isinstance(weight, nn.Parameter):
        state_dict[key] = weight.contiguous()


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """Load hook: `assign=True` brings weights in their own layout."""
    if isinstance(module, CATSMLP):
        module.lay_out()


def dense_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without what CATS added: it loads strictly into the dense model."""
    _checks.module("module", module)
    state = module.state_dict()
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, CATSMLP):
            for key in _STATE:
                state.pop(f"{name}.{key}" if name else key, None)
    return state
