"""docs/guides/: the code of every guide runs unchanged. tests/model/test_outside_family.py tests add-a-family."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import DOCS, code_blocks, run_block

from secateur_kernels.backend import INSTALLED

GUIDES = DOCS / "guides"

# Checks that run after a guide's last block.
CHECKS = {
    "add-a-criterion": """
plain = secateur.attribute(model, task, examples, per_example=True)
for site in scores:
    expected = plain.per_example[site].double().pow(0.5).sum(0)
    assert ((scores[site] - expected).abs() <= 1e-5 * expected.abs().max()).all(), site
assert scores.criterion["criterion"] == "RootActivation" and scores.criterion["power"] == 0.5
weight = model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo").weight.detach().double()
assert norms["encoder.0.ffn"].allclose(weight.square().sum(0), rtol=1e-6)
assert {site.unit for site in norms.sites} == {"neuron", "head"} and norms.examples == 32
""",
    "add-a-task": """
plain = secateur.TextToText(tokenizer, labels=["good", "bad"])
expected = secateur.attribute(model, plain, rows)
assert all(scores[site].allclose(expected[site], rtol=1e-9) for site in scores)
assert secateur.evaluate(model, task, examples) == secateur.evaluate(model, plain, rows)
assert {"title", "body"}.isdisjoint(rows[0]) and "input" not in examples[0]
""",
    "add-a-budget": """
size = weight_bytes(secateur.prune(model, plan))
assert 0.95 * limit < size <= limit, (size, limit)
try:
    plan_within_bytes(model, scores, 1000)
except secateur.InputError as error:
    assert str(error).startswith("limit: expected")
else:
    raise AssertionError("a limit that no plan meets must be refused")
""",
}

KERNEL = """
import sys
import torch
import secateur_kernels

secateur_kernels.__path__.append(sys.argv[1] if len(sys.argv) > 1 else ".")
from secateur_kernels.abs_sum.api import abs_sum

torch.manual_seed(0)
x = torch.randn(3, 17, 300).transpose(0, 1)[:, :, ::2]  # [17, 3, 150]; no dimension is contiguous
expected = torch.stack([sum(abs(x[b, t].double()) for t in range(3)) for b in range(17)])
for backend in BACKENDS:
    out = abs_sum(x, backend=backend)
    assert out.dtype == torch.float32 and out.shape == (17, 150)
    assert (out.double() - expected).abs().max() < 1e-5, backend
assert torch.equal(abs_sum(x.double()), abs_sum(x.double(), backend="reference"))
assert abs_sum(x.double()).dtype == torch.float64
try:
    abs_sum(x[0])
except ValueError as error:
    assert str(error).startswith("x: expected [B, T, C]")
else:
    raise AssertionError("two dimensions must be refused")
"""


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_guides_code_runs_unchanged(name: str, tmp_path: Path) -> None:
    blocks = [text for _, text in code_blocks(GUIDES / f"{name}.md", "python")]
    assert blocks
    run_block("python", "\n".join([*blocks, CHECKS[name]]), tmp_path)


def test_the_files_of_the_kernel_guide_form_an_operation(tmp_path: Path) -> None:
    blocks = [text for _, text in code_blocks(GUIDES / "add-a-kernel.md", "python")]
    assert len(blocks) == 3
    for text in blocks:
        file = tmp_path / text.partition("\n")[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    backends = ("reference", "triton") if INSTALLED else ("reference",)
    run_block("python", f"BACKENDS = {backends}\n{KERNEL}", tmp_path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.md")), ids=lambda page: page.stem)
def test_a_guide_is_short_and_tested(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 100
    assert page.stem in {*CHECKS, "add-a-kernel", "add-a-family"}
