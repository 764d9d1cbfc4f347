"""What the launchers allocate and which tiles they choose for a device. Devices are their properties, so no GPU is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur_kernels.backend import INSTALLED, INTERPRETED, device_of, uses_tf32, uses_triton

if not INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

from secateur_kernels.tiles import HALF, SINGLE, TF32, WIDE, WIDENED, partial_sums, size_class, sum_of_parts, tile_options


def gradient(batch: int, tokens: int) -> Tensor:
    """Return a gradient [B, T, 1] without memory."""
    return torch.empty(batch, tokens, 1, device="meta")


def tiles_met(batch: int, tokens: int, size: int) -> list[int]:
    """Return how many tiles of `size` tokens each example meets."""
    return [((b + 1) * tokens - 1) // size - b * tokens // size + 1 for b in range(batch)]


@pytest.mark.parametrize("size", [64, 128])
def test_no_example_meets_more_tiles_than_there_are_places_and_one_meets_all(size: int) -> None:
    for tokens in range(1, 300):
        for batch in (1, 2, 5, size):
            places = partial_sums(gradient(batch, tokens), 1, {"TOKENS": size}).shape[1]
            most = max(tiles_met(batch, tokens, size))
            assert places == most if batch == size else places >= most, (batch, tokens)


@pytest.mark.parametrize(("batch", "tokens", "bytes_"), [(4096, 8, 234_881_024), (32768, 1, 1_879_048_192)])
def test_short_examples_need_no_more_than_their_scores(batch: int, tokens: int, bytes_: int) -> None:
    """F = 14336. The scores themselves are 4 B F bytes: nothing is allocated beside them, and nothing is copied."""
    partial = partial_sums(gradient(batch, tokens), 14336, {"TOKENS": 128})
    assert partial.nbytes == 4 * batch * 14336 == bytes_
    assert sum_of_parts(partial)._is_view()


@pytest.mark.parametrize("tokens", [1, 8, 100, 127, 128, 129, 256, 300, 512])
def test_places_that_no_tile_writes_are_zero(tokens: int) -> None:
    """Memory is filled with NaN, so that a place that is neither zeroed nor written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        partial = partial_sums(torch.empty(9, tokens, 1), 1, {"TOKENS": 128})
    finally:
        torch.use_deterministic_algorithms(False)
    written = torch.tensor(tiles_met(9, tokens, 128))[:, None] > torch.arange(partial.shape[1])  # [B, tiles]
    assert not partial[..., 0][~written].isnan().any()


KIB = 1024
# Compute capability, shared memory of a program and, where a kernel can opt in to more, that too. AMD's have no second limit.
DEVICES = {
    "P100": (6, 0, 48 * KIB, 48 * KIB),
    "V100": (7, 0, 48 * KIB, 96 * KIB),
    "T4": (7, 5, 48 * KIB, 64 * KIB),
    "A100": (8, 0, 48 * KIB, 163 * KIB),
    "RTX 4090": (8, 9, 48 * KIB, 99 * KIB),
    "H200": (9, 0, 48 * KIB, 227 * KIB),
    "B200": (10, 0, 48 * KIB, 227 * KIB),
    "RTX 5090": (12, 0, 48 * KIB, 99 * KIB),
    "MI300X": (9, 4, 64 * KIB, None),
}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Forget the devices of a test."""
    device_of.cache_clear()
    yield
    device_of.cache_clear()


def plug_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let PyTorch report this device's properties."""
    major, minor, usual, opted = DEVICES[name]
    properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block=usual)
    if opted is not None:
        properties.shared_memory_per_block_optin = opted
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4" if opted is None else None)


def on_cuda(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory that says it is on a CUDA device."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("name", "narrow", "wide"),
    [
        ("T4", WIDENED, WIDENED),
        ("A100", HALF, WIDE),
        ("RTX 4090", HALF, WIDE),
        ("H200", HALF, WIDE),
        ("B200", HALF, WIDE),
        ("RTX 5090", HALF, WIDE),
        ("MI300X", HALF, HALF),
    ],
)
def test_the_tile_of_half_precision_fits_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, narrow: dict[str, int], wide: dict[str, int]
) -> None:
    plug_in(monkeypatch, name)
    for (width, neurons), expected in {(768, 3072): narrow, (4096, 14336): wide}.items():
        options = tile_options(on_cuda(width, neurons, dtype=torch.bfloat16), None)
        assert expected.items() <= options.items(), (name, width, options)


@pytest.mark.parametrize("name", DEVICES)
def test_float32_is_rounded_to_tf32_only_where_it_is_allowed_and_exists(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plug_in(monkeypatch, name)
    weight = on_cuda(768, 3072, dtype=torch.float32)
    exact = {**SINGLE, "PRECISION": "ieee"}
    rounded = {**TF32, "PRECISION": "tf32"} if name not in ("P100", "V100", "T4", "MI300X") else exact
    assert exact.items() <= tile_options(weight, False).items()
    assert rounded.items() <= tile_options(weight, True).items()


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_auto_is_triton_on_devices_that_it_compiles_for(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    plug_in(monkeypatch, name)
    tensor = on_cuda(1, dtype=dtype)
    assert uses_triton("auto", tensor) == (name != "P100")
    if name == "P100":
        with pytest.raises(
            ValueError, match=r"^backend: expected a device of compute capability 7.0 or newer for 'triton', got"
        ):
            uses_triton("triton", tensor)


def test_auto_is_a_constant_of_a_traced_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph may break at the look-up of the device's properties."""
    plug_in(monkeypatch, "T4")
    has_binaries: Any = import_module("secateur_kernels.backend")._has_binaries
    cuda = torch.device("cuda", 0)

    def doubled(x: Tensor) -> Tensor:
        return x * 2 if has_binaries(cuda) else x * 3

    assert torch.compile(doubled, fullgraph=True, backend="aot_eager")(torch.ones(1)).item() == 2


def test_devices_other_than_cuda_have_the_tiles_of_an_h100() -> None:
    assert device_of(torch.device("cpu")).capability == (9, 0)


@pytest.fixture
def matmul() -> Iterator[Any]:
    """Yield PyTorch's settings for float32 products. They are put back."""
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def test_tf32_follows_pytorch_unless_the_call_says_it(matmul: Any) -> None:
    weight = torch.empty(768, 3072, device="meta")
    for precision, tf32 in (("tf32", True), ("ieee", False), ("none", False)):
        matmul.fp32_precision = precision
        assert uses_tf32(None) == tf32
        assert tile_options(weight, None)["PRECISION"] == ("tf32" if tf32 else "ieee")
        assert (uses_tf32(True), uses_tf32(False)) == (True, False)
        assert tile_options(weight, False)["PRECISION"] == "ieee"


def test_tf32_follows_the_older_settings_too(matmul: Any) -> None:
    for high, expected in (("high", True), ("highest", False)):
        torch.set_float32_matmul_precision(high)
        assert uses_tf32(None) == expected
    monkeyed = SimpleNamespace(allow_tf32=True)  # PyTorch 2.8 has no fp32_precision.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cuda, "matmul", monkeyed)
        assert uses_tf32(None)


def keys(monkeypatch: pytest.MonkeyPatch, calls: list[Any], operation: str) -> int:
    """Return how many choices the tuning of a kernel makes in these calls. Nothing is compiled or timed."""
    (tuner,) = (
        value for value in vars(import_module(f"secateur_kernels.{operation}.triton")).values() if hasattr(value, "configs")
    )
    monkeypatch.setattr(tuner, "cache", {})
    monkeypatch.setattr(tuner, "cache_results", False)
    monkeypatch.setattr(tuner, "_bench", lambda *arguments, config, **options: [1.0] * 3)
    monkeypatch.setattr(tuner.fn, "run", lambda *arguments, **options: None)
    for call in calls:
        call()
    return len(tuner.cache)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter tunes nothing")
def test_the_tuning_chooses_for_each_size_and_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = import_module("secateur_kernels.scored_mlp_backward.triton")
    summed = import_module("secateur_kernels.product_sum.triton")

    def call(batch: int, activation: str = "relu", reduction: str = "sum", gated: bool = False) -> Any:
        g, h, weight = (torch.empty(shape, device="meta") for shape in ((batch, 100, 48), (batch, 100, 96), (48, 96)))
        return lambda: scored.launch(g, weight, h, h if gated else None, None, activation, reduction, False)

    different = [call(1), call(8), call(1, "gelu"), call(1, reduction="abs_sum"), call(1, gated=True)]
    assert keys(monkeypatch, [*different, *different], "scored_mlp_backward") == len(different)
    sums = [lambda batch=batch: summed.launch(*(torch.empty(batch, 100, 48, device="meta"),) * 2, None) for batch in (6, 7, 80)]
    assert keys(monkeypatch, sums, "product_sum") == 2  # 600 and 700 rows are 1024 of the key, 8000 are 8192.


def test_sizes_of_the_tuning_s_key_are_powers_of_two() -> None:
    assert [size_class(rows) for rows in (1, 16, 17, 4096, 4097)] == [16, 16, 32, 4096, 8192]


def test_threads_take_turns_in_the_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's tuner holds a launch's arguments as an attribute. Each launch must run with its own."""
    module = import_module("secateur_kernels.product_sum.triton")
    tuner, mixed = module.product_sum_kernel, []

    def slow(x: Any, *arguments: Any, **options: Any) -> None:
        time.sleep(0.01)
        mixed.append(tuner.nargs is None or tuner.nargs["x"] is not x)

    monkeypatch.setattr(tuner, "configs", tuner.configs[:1])
    monkeypatch.setattr(tuner.fn, "run", slow)
    threads = [threading.Thread(target=tuner.run, args=(k,), kwargs={"grid": (1,), "warmup": False}) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed == [False] * 8
