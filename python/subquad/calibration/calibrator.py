"""`CatsCalibrator`: thresholds for a target sparsity, from the gate activations of a model on sample data."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .._backends import SubquadWarning
from ..convert import CatsConfig, convert_mlps, find_mlps, match_layer, restore
from ..nn._gated import gated_activation
from ..nn._sharded import mesh_of
from ..nn._tokens import padding_of
from ..nn.cats_mlp import CATSMLP
from ..reference.cats_activation import activate
from .sketch import SLOTS, MagnitudeSketch

FORMAT_VERSION = 1
Sparsity = float | Mapping[int | str, float] | Callable[[str], float | None]
TokenMask = torch.Tensor | Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor | None]


class CatsCalibrator:
    """Collect magnitudes of gate activations, then choose one threshold per layer (CATS, arXiv 2404.08763, section 3).

    Inside the `with` block every forward of the model is observed and computed densely, also where the model is
    converted already; leaving it, by an exception or not, removes all hooks and restores what was switched off. Memory:
    58 KB per layer. Padding does not count, in whatever form the model is told of it: an `attention_mask` [B, S], one in four
    dimensions, one by kind of layer, with any cache. Positions are counted along a mask [B, S], or otherwise taken from
    `position_ids`.

    Args:
        model: a model with gated MLPs, converted to CATS or not.
        layers: which of them, as in `subquad.integrations.transformers.convert`.
        token_mask: further `[B, T]` mask of tokens to count, nonzero to count: a tensor that holds for every forward
            until the attribute of that name is changed, or a callable given the forward's `(args, kwargs)`.
        skip_first_tokens: leave out that many tokens at the start of each sequence (attention sinks are not typical).
        only_last_fraction: count only the last part of each sequence, e.g. 0.5 for its second half.
        max_tokens: stop counting after that many tokens per layer.

    Raises:
        ValueError: if the model has no gated MLP, or an option is out of range.

    Example:
        >>> import torch, subquad
        >>> mlp = subquad.nn.CATSMLP(16, 64)
        >>> with subquad.CatsCalibrator(mlp) as calibrator:
        ...     _ = mlp(torch.randn(100, 16))
        >>> calibrator.apply(sparsity=0.5)
        ['']
        >>> bool(mlp.threshold > 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[int | str] | None = None,
        token_mask: TokenMask | None = None,
        skip_first_tokens: int = 0,
        only_last_fraction: float = 1.0,
        max_tokens: int | None = None,
    ) -> None:
        if skip_first_tokens < 0:
            raise ValueError(f"skip_first_tokens: expected 0 or more, got {skip_first_tokens}")
        if not 0.0 < only_last_fraction <= 1.0:
            raise ValueError(f"only_last_fraction: expected a number in (0, 1], got {only_last_fraction}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: expected 1 or more, got {max_tokens}")
        self.model = model
        self.token_mask = token_mask
        self.skip_first_tokens, self.only_last_fraction = skip_first_tokens, only_last_fraction
        self.max_tokens = max_tokens
        mlps = find_mlps(model, layers)
        self.sketches = {name: MagnitudeSketch(_device(mlp)) for name, mlp in mlps.items()}
        self.tokens = dict.fromkeys(mlps, 0)
        self._neurons = {name: _neurons(mlp) for name, mlp in mlps.items()}
        self._stack: ExitStack | None = None
        self._selected: torch.Tensor | None = None

    # --- collecting --------------------------------------------------------------------------------------------------

    def __enter__(self) -> CatsCalibrator:
        if self._stack is not None:
            raise RuntimeError("this calibrator is collecting already")
        with ExitStack() as stack:
            # The model's own hooks go first: a model that is itself an MLP needs its mask before it is observed.
            stack.callback(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            stack.callback(self.model.register_forward_hook(self._after_model, always_call=True).remove)
            for name, mlp in find_mlps(self.model, self.sketches).items():
                self._observe(stack, name, mlp)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._stack, self._selected = self._stack, None, None
        if stack is not None:
            stack.close()

    def _observe(self, stack: ExitStack, name: str, mlp: nn.Module) -> None:
        if isinstance(mlp, CATSMLP):
            stack.callback(setattr, mlp, "enabled", mlp.enabled)
            mlp.enabled = False
            activation = mlp.activation
        else:
            activation = gated_activation(mlp)
        if mesh_of(mlp.down_proj) is not None:  # type: ignore[arg-type]
            raise ValueError(f"{name}: expected whole weights, got a part of them; calibrate before the model is split")
        fused = isinstance(getattr(mlp, "gate_up_proj", None), nn.Module)

        def after(module: nn.Module, args: Any, z: torch.Tensor) -> None:
            self._count(name, z.chunk(2, dim=-1)[0] if fused else z, activation)

        projection: nn.Module = mlp.get_submodule("gate_up_proj" if fused else "gate_proj")
        stack.callback(projection.register_forward_hook(after).remove)

    @torch.no_grad()
    def _count(self, name: str, z: torch.Tensor, activation: str) -> None:
        rows = z.detach().reshape(-1, z.shape[-1])
        if self._selected is not None:
            if self._selected.numel() != rows.shape[0]:
                raise ValueError(
                    f"attention_mask or token_mask: expected one value per token of {name!r} ({list(z.shape[:-1])}), "
                    f"got {list(self._selected.shape)}"
                )
            rows = rows[self._selected.flatten().to(rows.device)]
        else:
            rows = rows[self._by_position(torch.ones(z.shape[:-1], dtype=torch.bool)).flatten().to(rows.device)]
        if self.max_tokens is not None:
            rows = rows[: self.max_tokens - self.tokens[name]]
        self.tokens[name] += rows.shape[0]
        self.sketches[name].update(activate(rows.float(), activation))

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, position_ids, tokens, embeds, cache, old = (
            _argument(module, args, kwargs, name)
            for name in ("attention_mask", "position_ids", "input_ids", "inputs_embeds", "cache", "past_key_values")
        )
        tokens = embeds if tokens is None else tokens
        custom = self.token_mask(args, kwargs) if callable(self.token_mask) else self.token_mask
        known = isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2 and tokens is not None
        selected: torch.Tensor | None = None
        if mask is not None and tokens is None:
            selected = self._by_position(mask != 0)
        elif mask is not None:
            shape = tokens.shape[:2]
            cache = old if cache is None else cache
            seen = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
            real = padding_of(mask, shape[0], shape[1], seen)
            real = torch.ones(shape, dtype=torch.bool, device=tokens.device) if real is None else real
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # it tells the positions, too
                end = mask.shape[1] if seen is None else min(int(seen) + shape[1], mask.shape[1])
                selected = self._by_position(mask[:, :end] != 0)[:, end - shape[1] :]
            else:
                place = (
                    position_ids.expand(shape) if known else real.long().cumsum(-1) - 1 + (0 if seen is None else seen)
                )
                selected = self._by_position(real, place)
        elif known:
            # A mask without padding may be dropped by the caller; a cached call is then known by its positions.
            position_ids = position_ids.expand(tokens.shape[:2])
            selected = self._by_position(torch.ones_like(position_ids, dtype=torch.bool), position_ids)
        elif custom is not None:
            selected = self._by_position(custom != 0)
        if custom is not None and selected is not None:
            selected = selected & (custom != 0).to(selected.device)
        self._selected = selected

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._selected = None

    def _by_position(self, mask: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """Narrow a `[..., T]` mask to the tokens that the position options keep; padding does not shift positions."""
        if (self.skip_first_tokens == 0 and self.only_last_fraction == 1.0) or mask.dim() == 0:
            return mask
        if position is None:
            position = mask.long().cumsum(-1) - 1
        length = position.amax(-1, keepdim=True) + 1
        kept = torch.ceil(length.double() * self.only_last_fraction).long()
        return mask & (position >= self.skip_first_tokens) & (position >= length - kept)

    @property
    def done(self) -> bool:
        """Whether `max_tokens` has been reached in every layer, so that further data would not count."""
        return self.max_tokens is not None and min(self.tokens.values()) >= self.max_tokens

    # --- using -------------------------------------------------------------------------------------------------------

    def thresholds(self, sparsity: Sparsity) -> dict[str, float]:
        """Threshold per layer, by module name: the smallest t that makes at least `sparsity` of the neurons inactive.

        Args:
            sparsity: share of inactive neurons, 0 to 1, for all layers; or a mapping from layer name or number; or a
                callable from name to share or None. Layers left out are not in the result. 0 gives -1 (dense), 1 the
                largest magnitude.

        Raises:
            ValueError: if a share is out of range, a key names no layer, or a layer has seen no token.
        """
        shares = self._shares(sparsity)
        result = {}
        for name, share in shares.items():
            try:
                result[name] = self.sketches[name].threshold(share)
            except ValueError as error:
                raise ValueError(f"{name or 'model'}: {error}") from error
        nans = {name: self.sketches[name].nan_count for name in result if self.sketches[name].nan_count}
        if nans:
            name, count = next(iter(nans.items()))
            warnings.warn(
                f"NaN gate activations in {len(nans)} layers, first {name!r} with {count}: left out of the thresholds",
                SubquadWarning,
                stacklevel=2,
            )
        return result

    def _shares(self, sparsity: Sparsity) -> dict[str, float]:
        if isinstance(sparsity, Mapping):
            named: dict[str, float] = {}
            for key, share in sparsity.items():
                named.update(dict.fromkeys(match_layer(self.sketches, key, "sparsity"), float(share)))
            return named
        if callable(sparsity):
            chosen = {name: sparsity(name) for name in self.sketches}
            return {name: float(share) for name, share in chosen.items() if share is not None}
        return dict.fromkeys(self.sketches, float(sparsity))

    def apply(self, sparsity: Sparsity = 0.5, *, config: CatsConfig | None = None) -> list[str]:
        """Set the thresholds in the model, converting the layers concerned where they are still dense.

        All or nothing: on an error the model is as it was.

        Args:
            sparsity: as in `thresholds`.
            config: options for layers that have to be converted; its threshold is not used.

        Returns:
            Names of the layers set.

        Raises:
            ValueError: as `thresholds` and `convert`.
            RuntimeError: inside the calibrator's own `with` block.
        """
        if self._stack is not None:
            raise RuntimeError("apply: leave the calibrator's with block first")
        thresholds, shares = self.thresholds(sparsity), self._shares(sparsity)
        present = find_mlps(self.model)
        gone = [name for name in thresholds if name not in present]
        if gone:
            raise ValueError(f"model: expected a gated MLP at {gone[0]!r}, which was there at calibration")
        with ExitStack() as undo:
            if any(not isinstance(present[name], CATSMLP) for name in thresholds):
                undo.callback(restore, self.model, "mlp", layers=convert_mlps(self.model, config, thresholds))
                present = find_mlps(self.model)
            for name, threshold in thresholds.items():
                module = present[name]
                assert isinstance(module, CATSMLP)
                undo.callback(_put_back, module, module.threshold, module.threshold.clone(), module.cats_meta.clone())
                module.set_threshold(threshold, target_sparsity=shares[name], calibration_tokens=self.tokens[name])
            undo.pop_all()
        return list(thresholds)

    # --- keeping -----------------------------------------------------------------------------------------------------

    def merge(self, other: CatsCalibrator) -> None:
        """Add what another calibrator has collected on a model of the same shape.

        Raises:
            ValueError: if layers or their sizes differ.
        """
        self._check_same(other._neurons)
        for name, sketch in self.sketches.items():
            sketch.merge(other.sketches[name])
            self.tokens[name] += other.tokens[name]

    def all_reduce(self, group: Any = None) -> None:
        """Add up what the processes of a `torch.distributed` group have collected; every one ends with the total."""
        import torch.distributed as dist

        for name, sketch in self.sketches.items():
            dist.all_reduce(sketch.counts, op=dist.ReduceOp.SUM, group=group)
            dist.all_reduce(sketch.maximum, op=dist.ReduceOp.MAX, group=group)
            tokens = torch.tensor(self.tokens[name], device=sketch.counts.device)
            dist.all_reduce(tokens, op=dist.ReduceOp.SUM, group=group)
            self.tokens[name] = int(tokens)

    def save(self, path: Any) -> None:
        """Write everything collected to a safetensors file: counts and maximum per layer, the rest as metadata."""
        from safetensors.torch import save_file

        tensors = {}
        for name, sketch in self.sketches.items():
            tensors[f"{name}|counts"] = sketch.counts.cpu()
            tensors[f"{name}|maximum"] = sketch.maximum.cpu()
        header = {"version": FORMAT_VERSION, "neurons": self._neurons, "tokens": self.tokens}
        save_file(tensors, path, metadata={"subquad_cats": json.dumps(header)})

    def load(self, path: Any) -> CatsCalibrator:
        """Replace what was collected by the contents of a file; returns self.

        Raises:
            ValueError: if the file is of another kind or version, or of a model with other layers.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("subquad_cats", "{}"))
            version = header.get("version")
            if version != FORMAT_VERSION:
                raise ValueError(f"path: expected a calibration file of version {FORMAT_VERSION}, got {version}")
            self._check_same(header["neurons"])
            counts = {name: file.get_tensor(f"{name}|counts") for name in self.sketches}
            maxima = {name: file.get_tensor(f"{name}|maximum") for name in self.sketches}
        if any(c.shape != (SLOTS,) or c.dtype != torch.int64 for c in counts.values()):
            raise ValueError(f"path: expected int64 counts of shape [{SLOTS}]")
        for name, sketch in self.sketches.items():
            sketch.counts.copy_(counts[name])
            sketch.maximum.copy_(maxima[name])
        self.tokens = {name: int(header["tokens"][name]) for name in self.sketches}
        return self

    def _check_same(self, neurons: Mapping[str, int]) -> None:
        if dict(neurons) != self._neurons:
            odd = sorted(set(neurons.items()) ^ set(self._neurons.items()))[0]
            raise ValueError(f"layers: expected the same names and sizes on both sides; first difference: {odd}")


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of the module's forward, whether it was passed by position or by name; None where it was not."""
    value = kwargs.get(name)
    if value is None and args:
        names = list(inspect.signature(module.forward).parameters)
        if name in names and names.index(name) < len(args):
            value = args[names.index(name)]
    return value


def _put_back(module: CATSMLP, threshold: torch.Tensor, values: torch.Tensor, meta: torch.Tensor) -> None:
    module.threshold = threshold.copy_(values)
    module.cats_meta.copy_(meta)


def _neurons(mlp: nn.Module) -> int:
    down: Any = mlp.get_submodule("down_proj")
    return int(down.in_features)  # adapters and quantised layers have it too


def _device(mlp: nn.Module) -> torch.device:
    device = next(iter((*mlp.parameters(), *mlp.buffers()))).device
    return torch.device("cpu") if device.type == "meta" else device
