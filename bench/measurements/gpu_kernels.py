"""Time the Triton kernels on this GPU and compare them with eager PyTorch, torch.compile, and the GPU's own limits.

python -m bench.measurements.gpu_kernels [--seconds 450] [--out FILE]
    measures; the last line is JSON, which is also written to bench/results/<device>-<commit>.json
python -m bench.measurements.gpu_kernels --predict
    prints the table of predictions in bench/README.md; needs no GPU

The module needs only torch and triton. A row is timed only after its result is checked in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor
from torch.nn import functional

from bench.support.provenance import RESULTS, ROOT
from secateur_kernels import interpolated_norm, neuron_attribution, product_sum, scored_mlp_backward

NODES = 8
LENGTH = 512  # Tokens in an example.
BYTES = 2  # Bytes of a bfloat16 number.
# Name, d_model, d_ff, tokens in the batch, gated MLP.
SHAPES = [
    ("T5-base", 768, 3072, 4096, False),
    ("T5-base", 768, 3072, 65536, False),
    ("T5-3B", 1024, 16384, 65536, False),
    ("TinyLlama", 2048, 5632, 32768, True),
    ("Llama-1B", 2048, 8192, 32768, True),
    ("Llama-8B", 4096, 14336, 65536, True),
]
# NVIDIA H100 SXM5 80 GB, datasheet: HBM3 in bytes/s, dense bf16 in operations/s. Only --predict uses it.
H100 = (3.35e12, 989e12)

Function = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """The work of an operation: the fewest bytes that it reads and writes, and the operations of its matrix product."""

    operation: str
    model: str
    width: int
    neurons: int
    tokens: int
    gated: bool
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
        compiled: The function and the arguments for torch.compile.
        expected: Returns the result for the first example, computed in float32.
        computed: Returns the kernel's result for the first example, which is compared with `expected`.
        others: Further functions that are timed.
    """

    triton: Function
    eager: Function
    compiled: tuple[Callable[..., Any], tuple[Any, ...]]
    expected: Function
    computed: Function
    others: dict[str, Function] = field(default_factory=dict)


def works() -> Iterator[Work]:
    """Yield the work of each operation at each shape."""
    for model, d, f, n, gated in SHAPES:
        scores = 4 * f * (n // LENGTH)

        def work(
            operation: str, bytes_: int, operations: int = 0, shape: tuple[str, int, int, int, bool] = (model, d, f, n, gated)
        ) -> Work:
            return Work(operation, *shape, bytes_, operations)

        yield work("product_sum", BYTES * 2 * n * f + scores)
        yield work("neuron_attribution", BYTES * (n * f + n * d + d * f) + scores, 2 * n * d * f)
        yield work("scored_mlp_backward", BYTES * (n * d + d * f + (4 if gated else 2) * n * f) + scores, 2 * n * d * f)
        yield work("interpolated_norm", BYTES * (2 + 2 * NODES) * n * d)
        yield work("interpolated_norm_backward", BYTES * (2 * NODES + 2 + 1) * n * d)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Return random bfloat16 numbers on the GPU."""
    return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)


def ragged(batch: int) -> Tensor:
    """Return a padding mask [batch, LENGTH] with random lengths."""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (batch, 1), device="cuda")
    return torch.arange(LENGTH, device="cuda") < lengths


def product_sum_case(work: Work) -> Case:
    """Return the functions of product_sum."""
    batch = work.tokens // LENGTH
    x, dx, mask = random(batch, LENGTH, work.neurons), random(batch, LENGTH, work.neurons), ragged(batch)

    def eager(x: Tensor, dx: Tensor, mask: Tensor) -> Tensor:
        return (x * dx * mask.unsqueeze(-1)).sum(1, dtype=torch.float32)

    return Case(
        triton=lambda: product_sum(x, dx, mask, backend="triton"),
        eager=lambda: eager(x, dx, mask),
        compiled=(eager, (x, dx, mask)),
        expected=lambda: product_sum(x[:1].float(), dx[:1].float(), mask[:1], backend="reference"),
        computed=lambda: product_sum(x, dx, mask, backend="triton")[:1],
    )


def neuron_attribution_case(work: Work) -> Case:
    """Return the functions of neuron_attribution."""
    batch = work.tokens // LENGTH
    h, g, mask = random(batch, LENGTH, work.neurons), random(batch, LENGTH, work.width), ragged(batch)
    weight = random(work.width, work.neurons, scale=work.width**-0.5)

    def eager(h: Tensor, g: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return (h * (g @ weight) * mask.unsqueeze(-1)).sum(1, dtype=torch.float32)

    return Case(
        triton=lambda: neuron_attribution(h, g, weight, mask, backend="triton"),
        eager=lambda: eager(h, g, weight, mask),
        compiled=(eager, (h, g, weight, mask)),
        expected=lambda: neuron_attribution(h[:1].float(), g[:1].float(), weight.float(), mask[:1], backend="reference"),
        computed=lambda: neuron_attribution(h, g, weight, mask, backend="triton")[:1],
        others={"product_alone": lambda: g @ weight},
    )


def scored_mlp_backward_case(work: Work) -> Case:
    """Return the functions of scored_mlp_backward."""
    batch = work.tokens // LENGTH
    g, mask = random(batch, LENGTH, work.width), ragged(batch)
    weight = random(work.width, work.neurons, scale=work.width**-0.5)
    pre = random(batch, LENGTH, work.neurons)
    up = random(batch, LENGTH, work.neurons) if work.gated else None
    activation: Any = "silu" if work.gated else "relu"

    def bare(g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None) -> tuple[Tensor, ...]:
        dh = g @ weight
        if up is None:
            return (torch.ops.aten.threshold_backward(dh, pre, 0), functional.relu(pre), dh)
        value = functional.silu(pre)
        return torch.ops.aten.silu_backward(dh * up, pre), dh * value, value * up, dh

    def eager(g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None, mask: Tensor) -> tuple[Tensor, ...]:
        *gradients, h, dh = bare(g, weight, pre, up)
        return *gradients, (h * dh * mask.unsqueeze(-1)).sum(1, dtype=torch.float32)

    def first(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[:1].float()

    def expected() -> Tensor:
        values = first(g), weight.float(), first(pre), first(up), mask[:1]
        return pack(scored_mlp_backward(*values, activation=activation, backend="reference"))

    def bare_gradients(*values: Any) -> tuple[Tensor, ...]:
        return bare(*values)[: 2 if work.gated else 1]

    compiled_bare = torch.compile(bare_gradients, dynamic=False)
    return Case(
        triton=lambda: scored_mlp_backward(g, weight, pre, up, mask, activation=activation, backend="triton"),
        eager=lambda: eager(g, weight, pre, up, mask),
        compiled=(eager, (g, weight, pre, up, mask)),
        expected=expected,
        computed=lambda: pack(scored_mlp_backward(g, weight, pre, up, mask, activation=activation, backend="triton")),
        others={"compiled_without_scores": lambda: compiled_bare(g, weight, pre, up)},
    )


def pack(outputs: tuple[Tensor | None, ...]) -> Tensor:
    """Return the first example's outputs in one vector. Gradients and scores are each scaled to a norm of 1."""
    parts = [tensor[:1].flatten().float() for tensor in outputs if tensor is not None]
    return torch.cat([part / part.norm() for part in parts])


def interpolated_norm_case(work: Work, backward: bool = False) -> Case:
    """Return the functions of interpolated_norm, or of its backward pass."""
    batch = work.tokens // LENGTH
    r, u = random(batch, LENGTH, work.width).requires_grad_(backward), random(batch, LENGTH, work.width)
    scale, nodes = random(work.width), torch.rand(NODES, device="cuda")
    cotangents = [random(NODES, batch, LENGTH, work.width) for _ in range(2)] if backward else []

    def kernel(r: Tensor, u: Tensor, backend: Any = "triton") -> tuple[Tensor, Tensor]:
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
    compiled = torch.compile(eager, dynamic=False)
    return Case(
        triton=run,
        eager=gradient(eager, r, u, nodes, scale),
        compiled=(gradient(compiled, r, u, nodes, scale), ()),
        expected=expected,
        computed=lambda: run()[:1],
    )


CASES: dict[str, Callable[[Work], Case]] = {
    "product_sum": product_sum_case,
    "neuron_attribution": neuron_attribution_case,
    "scored_mlp_backward": scored_mlp_backward_case,
    "interpolated_norm": interpolated_norm_case,
    "interpolated_norm_backward": lambda work: interpolated_norm_case(work, backward=True),
}


def seconds(function: Function) -> float:
    """Return the median time on the device. The second-level cache is emptied before each run."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=30, rep=150, return_mode="median")) / 1e3


def copying(source: Tensor) -> Function:
    """Return a function that copies a tensor on the device."""
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def ceilings() -> dict[str, float]:
    """Measure bytes/s of a device copy (reads plus writes) and operations/s of the fastest of three bf16 products."""
    copy = 2 * BYTES * 2**29 / seconds(copying(random(2**14, 2**15)))
    products = []
    for m, n, k in [(8192, 8192, 8192), (16384, 8192, 4096), (65536, 14336, 4096)]:
        a, b = random(m, k), random(k, n)
        products.append(2 * m * n * k / seconds(lambda a=a, b=b: a @ b))  # type: ignore[misc]
    return {"copy_bytes_per_second": copy, "product_operations_per_second": max(products)}


def measure(work: Work, copy: float, product: float, deadline: float) -> dict[str, Any]:
    """Check the result of an operation, then time its versions."""
    row: dict[str, Any] = {**vars(work)}
    row["floor_ms"] = round(1e3 * work.floor(copy, product), 4)
    case = CASES[work.operation](work)
    computed, expected = case.computed().float(), case.expected().float()
    row["relative_error"] = float((computed - expected).norm() / expected.norm())
    if not row["relative_error"] < 1e-2:
        return {**row, "error": "wrong result: not timed"}
    functions = {"triton": case.triton, "eager": case.eager}
    if time.monotonic() < deadline:
        function, values = case.compiled
        compiled = torch.compile(function, dynamic=False) if values else function
        functions |= {"compiled": lambda: compiled(*values), **case.others}
    else:
        row["not_measured"] = "torch.compile and parts: no time left (--seconds)"
    for name, function in functions.items():
        try:
            row[f"{name}_ms"] = round(1e3 * seconds(function), 4)
        except Exception as error:
            row[f"{name}_error"] = f"{type(error).__name__}: {str(error)[:300]}"
    if "triton_ms" in row:
        row["of_floor"] = round(row["floor_ms"] / row["triton_ms"], 3)
        row["times_faster"] = {
            name: round(row[f"{name}_ms"] / row["triton_ms"], 3)
            for name in functions
            if name != "triton" and f"{name}_ms" in row
        }
    return row


def describe(row: dict[str, Any]) -> str:
    """Return the printed line of a row."""

    def milliseconds(name: str) -> str:
        return f"{row[f'{name}_ms']:9.3f}" if f"{name}_ms" in row else "        -"

    times = " ".join(milliseconds(name) for name in ("floor", "triton", "eager", "compiled"))
    name = f"{row['operation']:26} {row['model']:9} {row['width']:5} {row['neurons']:6} {row['tokens']:6}"
    problems = [f"{key}: {value}" for key, value in row.items() if key.endswith("error") and isinstance(value, str)]
    return f"{name} {times} {row.get('of_floor', float('nan')):6.2f}  {'; '.join(problems)[:120]}"


def environment() -> dict[str, Any]:
    """Return the device, the versions and the commit."""
    import triton

    described = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": described.stdout.strip() or None,
    }


def result_path(about: dict[str, Any], suffix: str = "") -> Path:
    """Return the result file of this device and commit."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{about['device'].replace(' ', '-')}-{about['commit'] or 'uncommitted'}{suffix}.json"


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot the floor of the time divided by the time of each version, for each row."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print(f"not drawn: {path} (matplotlib is not installed)")
        return
    from secateur.support.figures import PALETTE, figure, legend, png

    rows = [row for row in result["rows"] if "triton_ms" in row]
    plot, ((axes,),) = figure(
        1, 1, (10, 1.6 + 0.32 * len(rows)),
        title=f"kernels against the floor of their time (n = {len(rows)} shapes, {result['device']})",
        caption="Bars: floor of the time / median time of the runs; 1 is the hardware's limit. No error bars. The floor "
        "follows from the measured copy and matrix product.",
    )  # fmt: skip
    for k, name in enumerate(("triton", "compiled", "eager")):
        shares = [row["floor_ms"] / row[f"{name}_ms"] if f"{name}_ms" in row else 0.0 for row in rows]
        axes.barh([place + 0.27 * k for place in range(len(rows))], shares, height=0.25, color=PALETTE[k], label=name)
    axes.set_yticks([place + 0.27 for place in range(len(rows))])
    axes.set_yticklabels([f"{row['operation']}, {row['model']}, {row['tokens']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("floor of the time / time")
    legend(plot)
    path.write_bytes(png(plot))
    print(f"drawn: {path}")


def run(limit: float, out: Path | None) -> None:
    """Measure all rows and write the results."""
    deadline = time.monotonic() + limit
    torch.manual_seed(0)
    functorch.donated_buffer = False  # A backward pass is timed many times on one graph.
    result: dict[str, Any] = {**environment(), **ceilings(), "rows": []}
    copy, product = result["copy_bytes_per_second"], result["product_operations_per_second"]
    print(f"{result['device']}: copy {copy / 1e9:.0f} GB/s, bf16 product {product / 1e12:.0f} TFLOP/s")
    print(f"{'milliseconds':61} {'floor':>9} {'triton':>9} {'eager':>9} {'compiled':>9} {'floor/triton':>6}")
    for work in works():
        try:
            row = measure(work, copy, product, deadline)
        except Exception as error:
            row = {**vars(work), "error": f"{type(error).__name__}: {str(error)[:300]}"}
        result["rows"].append(row)
        print(describe(row), flush=True)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    shares = [row["of_floor"] for row in result["rows"] if "of_floor" in row]
    if shares:
        result["median_of_floor"] = round(statistics.median(shares), 3)
    path = out or result_path(result)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
    draw(result, path.with_suffix(".png"))
    print(json.dumps(result))


def predict() -> None:
    """Print the table of predictions in bench/README.md."""
    print("| operation | model | d_model, d_ff, tokens | GB | TFLOP | bytes, ms | product, ms | floor, ms |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for work in sorted(works(), key=lambda work: list(CASES).index(work.operation)):
        shape = f"{work.width}, {work.neurons}, {work.tokens}"
        moved, multiplied = 1e3 * work.bytes / H100[0], 1e3 * work.operations / H100[1]
        figures = f"{work.bytes / 1e9:.2f} | {work.operations / 1e12:.2f} | {moved:.3f} | {multiplied:.3f}"
        print(f"| {work.operation} | {work.model} | {shape} | {figures} | {1e3 * work.floor(*H100):.3f} |")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450, help="after this time, torch.compile is no longer timed")
    parser.add_argument("--out", type=Path, help="file for the JSON document")
    parser.add_argument("--predict", action="store_true", help="print the predictions for an H100 and stop")
    arguments = parser.parse_args()
    if arguments.predict:
        predict()
    elif not torch.cuda.is_available():
        parser.exit(2, "bench/measurements/gpu_kernels.py: expected a CUDA device, found none (--predict needs none)\n")
    else:
        run(arguments.seconds, arguments.out)


if __name__ == "__main__":
    main()
