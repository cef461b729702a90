"""What launchers check of tensors so that kernels stay inside them; the public functions check the rest, with better words."""

from __future__ import annotations

import torch


def refuse(name: str, expected: str, tensor: torch.Tensor) -> None:
    """Raise ValueError that says what the tensor is."""
    got = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
    raise ValueError(f"{name}: expected {expected}, got {got}")


def require(condition: bool, name: str, expected: str, tensor: torch.Tensor) -> None:
    if not condition:
        refuse(name, expected, tensor)


def check_packed(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Contiguous, of this shape and of the dtype of `like`, or None."""
    if tensor is not None and not (tensor.shape == shape and tensor.dtype == like.dtype and tensor.is_contiguous()):
        refuse(name, f"a contiguous tensor of shape {list(shape)} and {like.dtype}", tensor)


def check_rows(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """The same with strides between rows, or None."""
    if tensor is not None and not (
        tensor.shape == shape and tensor.dtype == like.dtype and (tensor.stride(-1) == 1 or shape[-1] <= 1)
    ):
        refuse(name, f"shape {list(shape)}, {like.dtype} and a contiguous last dimension", tensor)


def check_integers(name: str, tensor: torch.Tensor | None, size: int, dtype: torch.dtype = torch.int32) -> None:
    """Contiguous `[size]`, or None."""
    if tensor is not None and not (tensor.shape == (size,) and tensor.dtype == dtype and tensor.is_contiguous()):
        refuse(name, f"{str(dtype).removeprefix('torch.')} [{size}]", tensor)


def check_threshold(threshold: torch.Tensor, channels: int) -> None:
    """fp32, one or one per channel."""
    if not (threshold.dim() == 1 and threshold.numel() in (1, channels) and threshold.dtype == torch.float32):
        refuse("threshold", f"fp32 [1] or [{channels}]", threshold)
