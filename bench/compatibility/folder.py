"""A pruned folder for the attempts: loading without secateur, inputs, and the saved model's logits."""

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
    """A pruned folder.

    Attributes:
        path: The folder. Its subfolder `model` holds the saved model. The other files belong to the attempts.
        family: The model's family.
        shape: How the widths differ between layers.
        stock: Whether transformers' own class accepts the config.
    """

    path: Path
    family: str
    shape: str
    stock: bool

    @property
    def model(self) -> Path:
        """The folder of the saved model."""
        return self.path / "model"

    @property
    def name(self) -> str:
        """Family and shape."""
        return f"{self.family}-{self.shape}"

    @property
    def auto_class(self) -> str:
        """The name of transformers' class that loads the model."""
        return FAMILIES[self.family]

    def load(self, **options: Any) -> nn.Module:
        """Return the model, loaded as a user without secateur loads it."""
        import transformers

        trust = {} if self.stock else {"trust_remote_code": True}
        model: nn.Module = getattr(transformers, self.auto_class).from_pretrained(self.model, **trust, **options)
        for parameter in model.parameters():
            # The rounding of a matrix product depends on where in memory its operands begin.
            parameter.data = parameter.data.clone()
        return model.eval()

    def tokenizer(self) -> Any:
        """Return the folder's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def batches(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Return inputs and the saved model's logits of two batches: 8 x 64 tokens, and 3 x 37 tokens with padding."""
        tensors = load_file(self.path / "batches.safetensors")
        batches = []
        for number in range(len(SIZES)):
            inputs = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
            expected = inputs.pop("logits")
            batches.append((inputs, expected))
        return batches

    @classmethod
    def read(cls, path: Path) -> Folder:
        """Read the description of a folder."""
        return cls(path, **json.loads((path / "about.json").read_text()))
