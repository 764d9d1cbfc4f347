"""A pruned folder as the attempts see it: loading it without secateur, inputs, and the saved model's logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

FAMILIES = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}
SHAPES = ("uniform", "heads", "channels")
SIZES = ((8, 64), (3, 37))


@dataclass(frozen=True)
class Folder:
    """A pruned folder. path: what was saved lies in its subfolder `model`, beside what belongs to the attempts. stock: whether
    transformers' own class takes the config."""

    path: Path
    family: str
    shape: str
    stock: bool

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def name(self) -> str:
        return f"{self.family}-{self.shape}"

    @property
    def auto_class(self) -> str:
        return FAMILIES[self.family]

    def load(self, **options: Any) -> nn.Module:
        """The model as a user without secateur loads it."""
        import transformers

        trust = {} if self.stock else {"trust_remote_code": True}
        model: nn.Module = getattr(transformers, self.auto_class).from_pretrained(self.model, **trust, **options)
        for parameter in model.parameters():
            # How a product rounds depends on where in memory its operands begin.
            parameter.data = parameter.data.clone()
        return model.eval()

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def batches(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and the saved model's logits; the first has 8 x 64 tokens, the second 3 x 37 with padding."""
        found = load_file(self.path / "batches.safetensors")
        made = []
        for number in range(len(SIZES)):
            of = {name.partition(".")[2]: tensor for name, tensor in found.items() if name.startswith(f"{number}.")}
            expected = of.pop("logits")
            made.append((of, expected))
        return made

    @classmethod
    def read(cls, path: Path) -> Folder:
        return cls(path, **json.loads((path / "about.json").read_text()))
