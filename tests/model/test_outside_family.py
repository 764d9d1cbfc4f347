"""The code of docs/guides/add-a-family.md runs unchanged on a model whose class is not part of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LABELS, labelled, word_tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import secateur
from secateur.model import families
from secateur.model.families import registry
from secateur.pruning.masked import masked

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "add-a-family.md"


class ToyConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "toy"

    def __init__(self, heads: int = 3, head_dim: int = 8, inner: int = 37, **options: Any) -> None:
        super().__init__(**options)
        self.heads, self.head_dim, self.inner, self.vocab_size = heads, head_dim, inner, 31


class Mix(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q, self.k, self.v = (nn.Linear(24, config.heads * config.head_dim) for _ in range(3))
        self.o = nn.Linear(config.heads * config.head_dim, 24)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        return self.o(mixed.transpose(1, 2).flatten(2)), None


class Block(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.mix, self.up, self.down = Mix(config), nn.Linear(24, config.inner), nn.Linear(config.inner, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(nn.functional.layer_norm(x, x.shape[-1:]))[0]
        mixed: Tensor = x + self.down(torch.tanh(self.up(nn.functional.layer_norm(x, x.shape[-1:]))))
        return mixed


class ToyModel(PreTrainedModel):  # type: ignore[misc]
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, 24)
        self.blocks = nn.ModuleList([Block(config), Block(config)])
        self.head = nn.Linear(24, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Any = None, logits_to_keep: Any = None, **_: Any) -> CausalLMOutput:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(x if logits_to_keep is None else x[:, logits_to_keep]))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyModel:
    """Return the model. The page's code registers its family for the duration of the test."""
    monkeypatch.setattr(registry, "_FAMILIES", list(registry._FAMILIES))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "toy" not in families.supported()
    exec(compile(code, str(PAGE), "exec"), {})
    assert "toy" in families.supported()
    torch.manual_seed(0)
    model: ToyModel = ToyModel(ToyConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def task() -> secateur.CausalLM:
    return secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS)


def logits(model: nn.Module) -> Tensor:
    items = task().items(model, labelled(LABELS))
    with torch.no_grad():
        return torch.cat([task().logits(model, b)[b.labels != -100] for b in task().batches(items, torch.device("cpu"), 60)])


@pytest.mark.parametrize("criterion", ["ap", "ig"])
@pytest.mark.parametrize("unit", ["head", "channel"])
def test_a_model_of_the_guides_family_is_attributed_and_pruned(toy: ToyModel, unit: Any, criterion: str) -> None:
    model = toy.double()
    scores = secateur.attribute(model, task(), labelled(LABELS), unit=unit, criterion=criterion)
    assert next(site.name for site in scores.sites).startswith("decoder.0.self_attention")
    plan = secateur.plan(scores, keep=0.5)
    with masked(model, plan):
        expected = logits(model)
    pruned = secateur.prune(model, plan)
    assert float((logits(pruned) - expected).abs().max() / expected.abs().max()) < 1e-10
    assert secateur.cost.parameters(pruned) < secateur.cost.parameters(model)


def test_its_own_class_loads_a_uniformly_pruned_folder(toy: ToyModel, tmp_path: Path) -> None:
    scores = secateur.attribute(toy, task(), labelled(LABELS), select="ffn")
    pruned = secateur.prune(toy, secateur.plan(scores, keep=0.5))
    secateur.save(pruned, tmp_path / "toy")
    loaded = ToyModel.from_pretrained(tmp_path / "toy").eval()
    assert loaded.config.inner < 37
    assert torch.equal(logits(loaded), logits(pruned))


def test_saving_an_uneven_shape_of_a_class_outside_transformers_is_refused(toy: ToyModel, tmp_path: Path) -> None:
    scores = secateur.attribute(toy, task(), labelled(LABELS), select="ffn.0")
    pruned = secateur.prune(toy, secateur.plan(scores, keep=0.5))
    with pytest.raises(secateur.InputError, match=r"^model: expected a class of transformers, .* got ToyModel"):
        secateur.save(pruned, tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_deleting_a_layer_equals_zeroing_its_output(toy: ToyModel) -> None:
    shallower = secateur.delete_layers(toy.double(), ["decoder.1.ffn"])
    with torch.no_grad():
        toy.blocks[1].down.weight.zero_()  # type: ignore[union-attr, operator]
        toy.blocks[1].down.bias.zero_()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(logits(shallower), logits(toy), rtol=1e-12, atol=1e-12)
