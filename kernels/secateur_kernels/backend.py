"""Which implementation an operation runs: the PyTorch reference or the Triton kernel. And the checks that operations share."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "triton"]
Activation = Literal["relu", "gelu", "gelu_new", "silu"]
Norm = Literal["rms_norm", "layer_norm"]
Reduction = Literal["sum", "abs_sum", "square_sum"]

# Read once: a traced function must not depend on what a look-up finds later. Triton is looked for and not imported.
FOUND = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def uses_triton(backend: Backend, tensor: Tensor) -> bool:
    """Tell whether an operation runs its Triton kernel on tensors like this one.

    The backend is an argument of each call. No global state changes it, so calls in several threads are independent.

    Args:
        backend: "auto": Triton where it is installed, for float32, float16 and bfloat16 tensors on a CUDA device, and the
            reference elsewhere. "reference": the PyTorch reference. "triton": the Triton kernel, on a CUDA device or under
            Triton's interpreter (TRITON_INTERPRET=1, set before this package is imported).
        tensor: An input of the operation. Its dtype and device count.

    Raises:
        ValueError: The backend has another name, or it is "triton" where Triton cannot run.
    """
    if backend == "reference":
        return False
    if backend == "auto":
        return FOUND and tensor.is_cuda and tensor.dtype in DTYPES
    check_one_of("backend", backend, Backend)
    if not FOUND:
        raise ValueError("backend: expected the package triton to be installed for 'triton', found none")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"backend: expected tensors of float32, float16 or bfloat16 for 'triton', got {tensor.dtype}")
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(f"backend: expected CUDA tensors (or TRITON_INTERPRET=1) for 'triton', got {tensor.device}")
    return True


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_one_of(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_dimensions(name: str, tensor: Tensor, dimensions: str) -> None:
    """dimensions: their names, as in "B, T, D"."""
    if tensor.dim() != dimensions.count(",") + 1:
        raise ValueError(f"{name}: expected [{dimensions}], got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_alike(**tensors: Tensor | None) -> None:
    """One floating dtype and one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    if not first.is_floating_point() or any(tensor.dtype != first.dtype for tensor in given.values()):
        found = " and ".join(str(tensor.dtype) for tensor in given.values())
        raise ValueError(f"{', '.join(given)}: expected one floating dtype, got {found}")
    check_device(**tensors)


def check_device(**tensors: Tensor | None) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    if any(tensor.device != first.device for tensor in given.values()):
        found = " and ".join(str(tensor.device) for tensor in given.values())
        raise ValueError(f"{', '.join(given)}: expected one device, got {found}")
