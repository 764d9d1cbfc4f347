"""The choice between the PyTorch reference and the Triton kernel, and the checks that operations share."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "triton"]
Activation = Literal["relu", "gelu", "gelu_new", "silu"]
Norm = Literal["rms_norm", "layer_norm"]
Reduction = Literal["sum", "abs_sum", "square_sum"]

# Both are read once, because a traced function must not depend on a later look-up. The look-up does not import Triton.
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (7, 0)  # The oldest compute capability of CUDA devices that "auto" runs Triton on. Older ones have no binary.


@dataclass(frozen=True)
class Device:
    """What a kernel's tile depends on.

    Attributes:
        capability: The compute capability of a CUDA device, or the version of an AMD device: (9, 4) is gfx942.
        shared: Bytes of shared memory that one program can have. AMD calls it LDS.
        amd: Whether the device is AMD's.
    """

    capability: tuple[int, int]
    shared: int
    amd: bool = False

    @property
    def products(self) -> bool:
        """Whether Triton multiplies half precision on this device's matrix units."""
        return self.amd or self.capability >= (8, 0)

    @property
    def asynchronous(self) -> bool:
        """Whether its matrix units read shared memory themselves, while the program does other work."""
        return not self.amd and self.capability[0] in (9, 10)

    @property
    def tf32(self) -> bool:
        """Whether Triton multiplies float32 in tf32 on this device."""
        return not self.amd and self.capability >= (8, 0)


# Triton's interpreter runs on CPU tensors. It takes the tiles of this device.
H100 = Device((9, 0), 227 * 1024)


@functools.cache
def device_of(where: torch.device) -> Device:
    """Return what tiles depend on, from PyTorch's properties of a device.

    Args:
        where: A CUDA device (AMD's have this type too). Any other device counts as an H100.

    Returns:
        The device.
    """
    if where.type != "cuda":
        return H100
    properties: Any = torch.cuda.get_device_properties(where)
    usual: int = properties.shared_memory_per_block
    # A kernel of Triton opts in to the larger limit, where there is one.
    shared: int = getattr(properties, "shared_memory_per_block_optin", usual)
    return Device((properties.major, properties.minor), max(shared, usual), torch.version.hip is not None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_binaries(where: torch.device) -> bool:
    """Return whether Triton compiles for a CUDA device. A traced function takes the answer as a constant."""
    device = device_of(where)
    return device.amd or device.capability >= OLDEST


def uses_triton(backend: Backend, tensor: Tensor) -> bool:
    """Return whether an operation runs its Triton kernel on tensors like this one.

    The backend is an argument of each call. No global state changes it, so calls in several threads are independent.

    Args:
        backend: "auto": Triton where it is installed, for float32, float16 and bfloat16 tensors on a CUDA device of compute
            capability 7.0 or newer or on an AMD device, and the reference elsewhere. "reference": the PyTorch reference.
            "triton": the Triton kernel, on a CUDA device or under Triton's interpreter (TRITON_INTERPRET=1, set before this
            package is imported).
        tensor: An input of the operation. Its dtype and its device decide.

    Returns:
        True for the Triton kernel, False for the reference.

    Raises:
        ValueError: The backend has another name, or it is "triton" where Triton cannot run.
    """
    if backend == "reference":
        return False
    if backend == "auto":
        return INSTALLED and tensor.is_cuda and tensor.dtype in DTYPES and _has_binaries(tensor.device)
    check_one_of("backend", backend, Backend)
    if not INSTALLED:
        raise ValueError("backend: expected the package triton to be installed for 'triton', found none")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"backend: expected tensors of float32, float16 or bfloat16 for 'triton', got {tensor.dtype}")
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(f"backend: expected CUDA tensors (or TRITON_INTERPRET=1) for 'triton', got {tensor.device}")
    if tensor.is_cuda and not _has_binaries(tensor.device):
        raise ValueError(f"backend: expected a device of compute capability 7.0 or newer for 'triton', got {tensor.device}")
    return True


def uses_tf32(allow_tf32: bool | None) -> bool:
    """Return whether float32 products may be rounded to tf32.

    Args:
        allow_tf32: The answer, or None for PyTorch's own setting: `torch.backends.cuda.matmul.fp32_precision`, which
            `allow_tf32` and `torch.set_float32_matmul_precision` set too.

    Returns:
        True if tf32 is allowed.
    """
    if allow_tf32 is not None:
        return allow_tf32
    matmul: Any = torch.backends.cuda.matmul
    # PyTorch 2.8 has the older setting alone. Later versions refuse to read it after the newer one was set.
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


def accumulator(tensor: Tensor) -> torch.dtype:
    """Return the dtype of an operation's sums.

    Args:
        tensor: An input of the operation.

    Returns:
        float64 for a float64 tensor, otherwise float32.
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_one_of(name: str, value: str, choices: Any) -> None:
    """Check that an argument has one of the allowed values.

    Args:
        name: The argument's name, for the message.
        value: The argument's value.
        choices: A `Literal` type with the allowed values.

    Raises:
        ValueError: The value is not allowed.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_dimensions(name: str, tensor: Tensor, dimensions: str) -> None:
    """Check the number of a tensor's dimensions.

    Args:
        name: The argument's name, for the message.
        tensor: The tensor.
        dimensions: The names of the dimensions, as in "B, T, D".

    Raises:
        ValueError: The tensor has another number of dimensions.
    """
    if tensor.dim() != dimensions.count(",") + 1:
        raise ValueError(f"{name}: expected [{dimensions}], got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Check a tensor's shape.

    Args:
        name: The argument's name, for the message.
        tensor: The tensor, or None, which has any shape.
        shape: The expected sizes.

    Raises:
        ValueError: The tensor has another shape.
    """
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_alike(**tensors: Tensor | None) -> None:
    """Check that tensors have one floating dtype and one device.

    Args:
        tensors: The tensors by argument name. None is left out.

    Raises:
        ValueError: The dtypes differ, a dtype is not floating, or the devices differ.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    if not first.is_floating_point() or any(tensor.dtype != first.dtype for tensor in given.values()):
        dtypes = " and ".join(str(tensor.dtype) for tensor in given.values())
        raise ValueError(f"{', '.join(given)}: expected one floating dtype, got {dtypes}")
    check_device(**tensors)


def check_device(**tensors: Tensor | None) -> None:
    """Check that tensors are on one device.

    Args:
        tensors: The tensors by argument name. None is left out.

    Raises:
        ValueError: The devices differ.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    if any(tensor.device != first.device for tensor in given.values()):
        devices = " and ".join(str(tensor.device) for tensor in given.values())
        raise ValueError(f"{', '.join(given)}: expected one device, got {devices}")
