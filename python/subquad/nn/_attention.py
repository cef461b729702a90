"""What layers in the place of an attention have in common: its parts under their names, its sizes, the attention itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import _checks
from ._inherited import give_back
from ._scores import LLAMA
from ._sharded import split
from ._sizes import NORMS, check_sizes


class AttentionLayer(nn.Module):
    """Base of the attention layers; see the attributes that each of them describes."""

    scores = LLAMA
    original: nn.Module | None
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_idx: int | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def _set_sizes(
        self, hidden_size: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, layer_idx: int | None
    ) -> None:
        """num_kv_heads and head_dim may be None: as many heads, which the width is divided by."""
        check_sizes(hidden_size=hidden_size, num_heads=num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size {hidden_size} without head_dim, got {num_heads}"
            )
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        check_sizes(num_kv_heads=num_kv_heads, head_dim=head_dim)
        _checks.elements(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of {num_heads}, got {num_kv_heads}")
        if layer_idx is not None:
            _checks.size("layer_idx", layer_idx)
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.layer_idx = head_dim, layer_idx

    def to_attention(self) -> nn.Module:
        """The attention this layer was made from, with the parts that this layer has now; what is new in it is left out.

        Raises:
            ValueError: it was not made from one.
        """
        return give_back(self)

    def _whole(self) -> tuple[str, ...]:
        """How the names of parameters begin that are not split with the heads; norms of q and k first."""
        return (*(f"{name}." for name in NORMS), "o_proj.bias")

    def _split(self, mesh: Any, source: int | None = 0, norms: bool = True) -> None:
        """Split the heads over the processes of a mesh of one dimension, which divides them; without `norms`, those of q and k
        stay plain tensors."""
        whole = self._whole()
        dims: dict[str, int | None] = {}
        for name, _ in self.named_parameters(remove_duplicate=False):
            if norms or not name.startswith(whole[: len(NORMS)]):
                dims[name] = None if name.startswith(whole) else int(name == "o_proj.weight")
        split(self, mesh, dims, source=source)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}"
