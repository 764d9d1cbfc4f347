"""The kernels of the GPU report: what each does, its time beside eager PyTorch and torch.compile, and the GPU's ceilings.

python -m bench.measurements.gpu_kernels
    prints the table of predictions in bench/README.md; needs no GPU

`gpu_report` measures the rows. The module needs only torch and triton. A row is timed only after its result is checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur_kernels import interpolated_norm, neuron_attribution, product_sum, scored_mlp_backward
from secateur_kernels.backend import INTERPRETED, Activation, Backend
from secateur_kernels.scored_mlp_backward.reference import ACTIVATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND: Backend = "triton" if DEVICE == "cuda" or INTERPRETED else "reference"  # A rehearsal on a CPU may interpret Triton.
NODES = 8
BYTES = 2  # Bytes of a bfloat16 number.


@dataclass(frozen=True)
class Shape:
    """The feed-forward of a model: d_model, d_ff, the tokens of a batch and of an example, and the activation."""

    model: str
    width: int
    neurons: int
    tokens: int
    gated: bool
    activation: Activation
    length: int = 512


LLAMA_8B = Shape("Llama-8B", 4096, 14336, 65536, True, "silu")
T5_BASE = Shape("T5-base", 768, 3072, 65536, False, "relu")
FLAN_T5 = Shape("FLAN-T5-base", 768, 2048, 65536, True, "gelu_new")
BERT_BASE = Shape("BERT-base", 768, 3072, 65536, False, "gelu")
OTHERS = (
    Shape("T5-base", 768, 3072, 4096, False, "relu"),
    Shape("T5-3B", 1024, 16384, 65536, False, "relu"),
    Shape("TinyLlama", 2048, 5632, 32768, True, "silu"),
    Shape("Llama-1B", 2048, 8192, 32768, True, "silu"),
)
REHEARSED = (Shape("tiny, gated", 32, 48, 32, True, "gelu_new", 16), Shape("tiny", 32, 48, 32, False, "gelu", 16))
# NVIDIA H100 SXM5 80 GB, datasheet: HBM3 in bytes/s, dense bf16 in operations/s. Only the predictions use it.
H100 = (3.35e12, 989e12)

Function = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """The work of an operation: the fewest bytes that it reads and writes, and the operations of its matrix product."""

    operation: str
    shape: Shape
    bytes: int
    operations: int

    def floor(self, copy: float, product: float) -> float:
        """Return the seconds that no version beats by much, from the copy rate and the product rate."""
        return max(self.bytes / copy, self.operations / product)


@dataclass
class Case:
    """The functions of one row.

    Attributes:
        triton: The kernel.
        eager: The same operation in eager PyTorch.
        compiled: The function and the arguments for torch.compile. Without arguments, the function compiles by itself.
        expected: Returns the result for the first example, computed in float32.
        computed: Returns the kernel's result for the first example, which is compared with `expected`.
        others: Further functions that are timed beside eager PyTorch.
        compiled_others: Further functions and their arguments for torch.compile.
        captured: Whether a CUDA graph can capture the functions. A backward pass runs on its forward pass's stream.
    """

    triton: Function
    eager: Function
    compiled: tuple[Callable[..., Any], tuple[Any, ...]]
    expected: Function
    computed: Function
    others: dict[str, Function] = field(default_factory=dict)
    compiled_others: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = field(default_factory=dict)
    captured: bool = True


def works(shape: Shape) -> Iterator[Work]:
    """Yield the work of each operation at a shape."""
    d, f, n = shape.width, shape.neurons, shape.tokens
    scores, product = 4 * f * (n // shape.length), 2 * n * d * f
    yield Work("scored_mlp_backward", shape, BYTES * (n * d + d * f + (4 if shape.gated else 2) * n * f) + scores, product)
    yield Work("neuron_attribution", shape, BYTES * (n * f + n * d + d * f) + scores, product)
    yield Work("product_sum", shape, BYTES * 2 * n * f + scores, 0)
    yield Work("interpolated_norm", shape, BYTES * (2 + 2 * NODES) * n * d, 0)
    yield Work("interpolated_norm_backward", shape, BYTES * (2 * NODES + 2 + 1) * n * d, 0)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Return random bfloat16 numbers on the device."""
    return (torch.randn(shape, device=DEVICE) * scale).to(torch.bfloat16)


def examples(shape: Shape, *widths: int) -> tuple[list[Tensor], Tensor]:
    """Return random tensors [B, T, width], and a padding mask [B, T] with random lengths."""
    batch, length = shape.tokens // shape.length, shape.length
    lengths = torch.randint(length // 2, length + 1, (batch, 1), device=DEVICE)
    return [random(batch, length, width) for width in widths], torch.arange(length, device=DEVICE) < lengths


def product_sum_case(work: Work) -> Case:
    """Return the functions of product_sum."""
    (x, dx), mask = examples(work.shape, work.shape.neurons, work.shape.neurons)

    def eager(x: Tensor, dx: Tensor, mask: Tensor) -> Tensor:
        return (x * dx * mask.unsqueeze(-1)).sum(1, dtype=torch.float32)

    return Case(
        triton=lambda: product_sum(x, dx, mask, backend=BACKEND),
        eager=lambda: eager(x, dx, mask),
        compiled=(eager, (x, dx, mask)),
        expected=lambda: product_sum(x[:1].float(), dx[:1].float(), mask[:1], backend="reference"),
        computed=lambda: product_sum(x, dx, mask, backend=BACKEND)[:1],
    )


def neuron_attribution_case(work: Work) -> Case:
    """Return the functions of neuron_attribution."""
    shape = work.shape
    (h, g), mask = examples(shape, shape.neurons, shape.width)
    weight = random(shape.width, shape.neurons, scale=shape.width**-0.5)

    def eager(h: Tensor, g: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return (h * (g @ weight) * mask.unsqueeze(-1)).sum(1, dtype=torch.float32)

    return Case(
        triton=lambda: neuron_attribution(h, g, weight, mask, backend=BACKEND),
        eager=lambda: eager(h, g, weight, mask),
        compiled=(eager, (h, g, weight, mask)),
        expected=lambda: neuron_attribution(h[:1].float(), g[:1].float(), weight.float(), mask[:1], backend="reference"),
        computed=lambda: neuron_attribution(h, g, weight, mask, backend=BACKEND)[:1],
        others={"product_alone": lambda: g @ weight},
    )


def scored_mlp_backward_case(work: Work) -> Case:
    """Return the functions of scored_mlp_backward."""
    shape, activation = work.shape, work.shape.activation
    (g, pre, factor), mask = examples(shape, shape.width, shape.neurons, shape.neurons)
    weight, up = random(shape.width, shape.neurons, scale=shape.width**-0.5), factor if shape.gated else None
    function, backward = ACTIVATIONS[activation]

    def all_tensors(g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None) -> tuple[Tensor, ...]:
        """Return the gradients, h and dh."""
        dh, value = g @ weight, function(pre)
        if up is None:
            return backward(dh, pre), value, dh
        return backward(dh * up, pre), dh * value, value * up, dh

    def bare(*values: Any) -> tuple[Tensor, ...]:
        return all_tensors(*values)[:-2]

    def eager(g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None, mask: Tensor) -> tuple[Tensor, ...]:
        *gradients, h, dh = all_tensors(g, weight, pre, up)
        return *gradients, (h * dh * mask.unsqueeze(-1)).sum(1, dtype=torch.float32)

    def first(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[:1].float()

    def expected() -> Tensor:
        values = first(g), weight.float(), first(pre), first(up), mask[:1]
        return pack(scored_mlp_backward(*values, activation=activation, backend="reference"))

    both: dict[str, Function] = {}
    if BACKEND == "triton":  # The operation takes the faster one of these.
        from secateur_kernels.scored_mlp_backward.triton import launch
        from secateur_kernels.scored_mlp_backward.two_steps import launch_two_steps

        both["one_kernel"] = lambda: launch(g, weight, pre, up, mask, activation, "sum", None)
        both["two_steps"] = lambda: launch_two_steps(g, weight, pre, up, mask, activation, "sum")
    return Case(
        triton=lambda: scored_mlp_backward(g, weight, pre, up, mask, activation=activation, backend=BACKEND),
        eager=lambda: eager(g, weight, pre, up, mask),
        compiled=(eager, (g, weight, pre, up, mask)),
        expected=expected,
        computed=lambda: pack(scored_mlp_backward(g, weight, pre, up, mask, activation=activation, backend=BACKEND)),
        others={"without_scores": lambda: bare(g, weight, pre, up), "product_alone": lambda: g @ weight, **both},
        compiled_others={"compiled_without_scores": (bare, (g, weight, pre, up))},
    )


def pack(outputs: tuple[Tensor | None, ...]) -> Tensor:
    """Return the first example's outputs in one vector. Gradients and scores are each scaled to a norm of 1."""
    parts = [tensor[:1].flatten().float() for tensor in outputs if tensor is not None]
    return torch.cat([part / part.norm() for part in parts])


def interpolated_norm_case(work: Work, backward: bool = False) -> Case:
    """Return the functions of interpolated_norm, or of its backward pass."""
    (r, u), _ = examples(work.shape, work.shape.width, work.shape.width)
    r.requires_grad_(backward)
    scale, nodes = random(work.shape.width), torch.rand(NODES, device=DEVICE)
    cotangents = [random(NODES, *r.shape) for _ in range(2)] if backward else []

    def kernel(r: Tensor, u: Tensor, backend: Any = BACKEND) -> tuple[Tensor, Tensor]:
        return interpolated_norm(r, u, None, nodes.to(r.device), scale.to(r.dtype), None, 1e-6, "rms_norm", backend=backend)

    def eager(r: Tensor, u: Tensor, nodes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        residuals = r + nodes[:, None, None, None].to(u.dtype) * u
        return residuals, functional.rms_norm(residuals, scale.shape, scale, 1e-6)

    if not backward:
        return Case(
            triton=lambda: kernel(r, u),
            eager=lambda: eager(r, u, nodes, scale),
            compiled=(eager, (r, u, nodes, scale)),
            expected=lambda: pack(tuple(x[:, :1].flatten()[None] for x in kernel(r[:1].float(), u[:1].float(), "reference"))),
            computed=lambda: pack(tuple(x[:, :1].flatten()[None] for x in kernel(r, u))),
        )

    def gradient(function: Callable[..., Any], *values: Any) -> Function:
        """Return the backward pass alone. Its forward pass runs once, at the first call."""
        outputs: list[Tensor] = []

        def run() -> Tensor:
            if not outputs:
                outputs.extend(function(*values))
            grad: Tensor = torch.autograd.grad(outputs, values[0], cotangents, retain_graph=True)[0]
            return grad

        return run

    def expected() -> Tensor:
        start = r[:1].detach().float().requires_grad_()
        outputs = kernel(start, u[:1].float(), "reference")
        return torch.autograd.grad(outputs, start, [c[:, :1].float() for c in cotangents])[0]

    run = gradient(kernel, r, u)
    return Case(
        triton=run,
        eager=gradient(eager, r, u, nodes, scale),
        compiled=(gradient(torch.compile(eager, dynamic=False), r, u, nodes, scale), ()),
        expected=expected,
        computed=lambda: run()[:1],
        captured=False,
    )


CASES: dict[str, Callable[[Work], Case]] = {
    "product_sum": product_sum_case,
    "neuron_attribution": neuron_attribution_case,
    "scored_mlp_backward": scored_mlp_backward_case,
    "interpolated_norm": interpolated_norm_case,
    "interpolated_norm_backward": lambda work: interpolated_norm_case(work, backward=True),
}


def seconds(function: Function, *, captured: bool = True) -> tuple[float, str]:
    """Return the median time of a function on the device after its warm-up, and how it was measured.

    "graph": the calls are captured in a CUDA graph, so the launches cost nothing. "events": they are launched one by one, and
    the second-level cache is emptied before each; a short kernel then waits for its launch. "clock": on a CPU.
    """
    for _ in range(3):  # Compilation and tuning happen here.
        function()
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start, "clock"
    from triton.testing import do_bench, do_bench_cudagraph

    torch.cuda.synchronize()
    if captured:
        try:
            return float(do_bench_cudagraph(function, rep=30, return_mode="median")) / 1e3, "graph"
        except RuntimeError as error:  # Such as a library's product that allocates while it is captured.
            print(f"not captured in a graph: {str(error)[:100]}", flush=True)
            torch.cuda.synchronize()
    return float(do_bench(function, warmup=30, rep=150, return_mode="median")) / 1e3, "events"


def ceilings(sizes: tuple[tuple[int, int, int], ...], copied: int) -> dict[str, float]:
    """Measure bytes/s of a device copy (reads plus writes) and operations/s of the fastest of some bf16 products.

    Args:
        sizes: The products, as (m, n, k).
        copied: The number of elements that are copied.
    """
    source = random(copied)
    target = torch.empty_like(source)
    copy = 2 * BYTES * copied / seconds(lambda: target.copy_(source))[0]
    products = []
    for m, n, k in sizes:
        a, b = random(m, k), random(k, n)
        products.append(2 * m * n * k / seconds(lambda a=a, b=b: a @ b)[0])  # type: ignore[misc]
    return {"copy_bytes_per_second": copy, "product_operations_per_second": max(products)}


def measure(work: Work, rates: dict[str, float]) -> dict[str, Any]:
    """Check the result of an operation, then time its versions but those of torch.compile.

    Args:
        work: The operation and its shape.
        rates: The result of `ceilings`.
    """
    case = CASES[work.operation](work)
    floor = work.floor(rates["copy_bytes_per_second"], rates["product_operations_per_second"])
    row = {"operation": work.operation, **vars(work.shape), "bytes": work.bytes, "operations": work.operations}
    row["floor_ms"] = 1e3 * floor
    computed, expected = case.computed().float(), case.expected().float()
    row["relative_error"] = float((computed - expected).norm() / expected.norm())
    if not row["relative_error"] < 1e-2:
        return {**row, "error": "wrong result: not timed"}
    for name, function in {"triton": case.triton, "eager": case.eager, **case.others}.items():
        _time(row, name, function, case.captured)
    if "triton_ms" in row:
        row["of_floor"] = row["floor_ms"] / row["triton_ms"]
    return row


def compiled_columns(work: Work, **options: Any) -> dict[str, Any]:
    """Return the times of a row's versions by torch.compile.

    Args:
        work: The operation and its shape.
        options: Further options of torch.compile.
    """
    case, row = CASES[work.operation](work), dict[str, Any]()
    for name, (function, values) in {"compiled": case.compiled, **case.compiled_others}.items():
        compiled = torch.compile(function, dynamic=False, **options) if values else function
        _time(row, name, lambda compiled=compiled, values=values: compiled(*values), case.captured)  # type: ignore[misc]
    torch.compiler.reset()
    return row


def _time(row: dict[str, Any], name: str, function: Function, captured: bool) -> None:
    """Add a function's milliseconds to a row, and how they were measured; or its error."""
    try:
        taken, row[f"{name}_by"] = seconds(function, captured=captured)
        row[f"{name}_ms"] = 1e3 * taken
    except Exception as error:
        row[f"{name}_error"] = f"{type(error).__name__}: {str(error)[:300]}"


def predict() -> None:
    """Print the table of predictions in bench/README.md."""
    print("| operation | model | d_model, d_ff, tokens | GB | TFLOP | bytes, ms | product, ms | floor, ms |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    shapes = (LLAMA_8B, T5_BASE, FLAN_T5, BERT_BASE, *OTHERS)
    for work in sorted((work for shape in shapes for work in works(shape)), key=lambda work: list(CASES).index(work.operation)):
        shape = f"{work.shape.width}, {work.shape.neurons}, {work.shape.tokens}"
        moved, multiplied = 1e3 * work.bytes / H100[0], 1e3 * work.operations / H100[1]
        figures = f"{work.bytes / 1e9:.2f} | {work.operations / 1e12:.2f} | {moved:.3f} | {multiplied:.3f}"
        print(f"| {work.operation} | {work.shape.model} | {shape} | {figures} | {1e3 * work.floor(*H100):.3f} |")


if __name__ == "__main__":
    predict()
