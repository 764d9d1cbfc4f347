"""docs/usage/serving.md: the code for vLLM runs with a stand-in for its two classes, and gives secateur's probabilities."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
from cases import CASES
from pages import DOCS, ROOT, code_blocks, run_block

import secateur

# As vLLM answers: the log-probabilities of the asked pieces after the prompt. It refuses parameters that vLLM does not have.
STAND_IN = """
from dataclasses import dataclass, field
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM

@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    detokenize: bool
    logprobs: int
    logprob_token_ids: list[int]

class LLM:
    def __init__(self, model, *, enable_prefix_caching):
        assert enable_prefix_caching
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()

    @torch.inference_mode()
    def generate(self, prompts, parameters):
        outputs = []
        for prompt, asked in zip(prompts, parameters, strict=True):
            assert asked.logprobs == len(asked.logprob_token_ids) and asked.max_tokens == 1
            after = self.model(torch.tensor([prompt["prompt_token_ids"]])).logits[0, -1].log_softmax(-1)
            found = {token: SimpleNamespace(logprob=float(after[token])) for token in asked.logprob_token_ids}
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(logprobs=[found])]))
        return outputs
"""


def test_the_code_for_vllm_gives_the_probabilities_of_secateur(tmp_path: Path) -> None:
    case = CASES["llama"]
    model, tokenizer = case.model(), case.task.reader
    secateur.save(model, tmp_path / "DIR", tokenizer=tokenizer)
    assert "auto_map" not in (tmp_path / "DIR" / "config.json").read_text()
    (tmp_path / "vllm.py").write_text(STAND_IN)
    ((_, block),) = [found for found in code_blocks(DOCS / "usage" / "serving.md", "python") if "from vllm" in found[1]]
    paths = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels"), str(tmp_path)])
    lines = run_block("python", block, tmp_path, PYTHONPATH=paths).splitlines()
    constants: dict[str, Any] = {}
    for node in ast.parse(block).body[3:5]:
        exec(compile(ast.Module([node], []), "page", "exec"), constants)
    task = secateur.CausalLM(tokenizer, labels=constants["labels"])
    assert len(lines) == len(constants["documents"]) == 3
    assert max(len(label) for label in task._label_ids()) > 1
    inputs = [{"input": constants["prompt"].replace("{input}", document)} for document in constants["documents"]]
    expected = task.ranked(model, inputs, 1 << 12).softmax(1)  # [documents, labels]
    for line, of_document, document in zip(lines, expected, constants["documents"], strict=True):
        given = ast.literal_eval(line.removeprefix(document).strip())
        assert list(given) == constants["labels"]
        assert list(given.values()) == pytest.approx(of_document.tolist(), rel=1e-4)
