"""Dense layers, the two directions of language models, gate penalties, and deletion of layers without a change of logits."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.learned.ldnet.deletion import delete_closed, flops_per_word
from secateur.learned.ldnet.dense_lm import ContextStates, DenseLSTM, LanguageModels, reverse
from secateur.learned.ldnet.folders import LMConfig, load_lm, load_tagger, save_lm, save_tagger
from secateur.learned.ldnet.lm_training import default_cutoffs, perplexity
from secateur.learned.ldnet.tagger import LONGEST_WORD, Tagger, TaggerSettings, Vocabularies, collate
from secateur.learned.ldnet.tagger_training import GatePenalty, project_
from secateur.learned.ldnet.tagging import tag
from secateur.learned.ldnet.vocabulary import Vocabulary
from secateur.learned.shared.gate_regularisers import r1, r2, r3
from secateur.support.errors import InputError

WORDS = Vocabulary(["<unk>", "<s>", *"abcdefgh"])
SENTENCES = [list("abcade"), ["h"], ["g", "unheard-of", "a", "B2"]]
WIDTHS = (3, 5, 2)


def tagger(**settings: Any) -> Tagger:
    """Build a tagger in float64 and eval mode, with random gates."""
    chosen_settings = TaggerSettings(
        tags=("O", "B-x", "E-x", "S-x"), scheme="bioes", lm_width=4, ahead=WIDTHS, back=(4, 1, 3), features=6, word_width=3,
        character_width=3, character_filters=4, hidden=5, **settings,
    )  # fmt: skip
    built = Tagger(chosen_settings, Vocabularies(WORDS, WORDS, WORDS)).double().eval()
    with torch.no_grad():
        for gates in built.gates:
            gates.uniform_(0.2, 1.0)
    return built


def batch(on: Tagger) -> dict[str, Tensor]:
    return collate([on.featurise(tokens) for tokens in SENTENCES])


def test_each_layer_reads_all_before_it() -> None:
    dense = DenseLSTM(4, WIDTHS).double()
    with torch.no_grad():
        dense.gates.copy_(torch.tensor([0.5, 0.0, 0.9]))
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    states = [x]
    for layer, gate in zip(dense.layers, dense.gates, strict=True):
        states.append(gate * layer(torch.cat(states, -1))[0])
    assert [layer.input_size for layer in dense.layers] == [4, 7, 12]
    assert dense.output_size == 14
    assert torch.equal(dense(x), torch.cat(states, -1))


def test_a_dropped_layer_is_hidden_from_later_ones_but_reaches_the_output() -> None:
    dense = DenseLSTM(4, WIDTHS, layer_dropout=0.5).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    seen = set()
    for _ in range(40):
        state = torch.get_rng_state()
        hidden = tuple((torch.rand(3) < 0.5).tolist())
        torch.set_rng_state(state)
        outputs = dense.train()(x)
        output, visible = [x], [x]
        for layer, is_hidden in zip(dense.layers, hidden, strict=True):
            output.append(layer(torch.cat(visible, -1))[0])
            visible.append(output[-1] * (not is_hidden))
        torch.testing.assert_close(outputs, torch.cat(output, -1), rtol=0, atol=1e-15)
        seen.add(hidden)
    assert len(seen) == 8  # All subsets of the layers.
    whole = DenseLSTM(4, WIDTHS).double()
    whole.load_state_dict(dense.state_dict())
    assert torch.equal(dense.eval()(x), whole(x))


def test_a_hidden_layer_learns_through_the_output_alone() -> None:
    dense = DenseLSTM(2, (3, 3), layer_dropout=0.999)
    first_layer: Any = dense.layers[0]
    outputs = dense.train()(torch.randn(1, 4, 2))
    weight = first_layer.weight_ih_l0
    (gradient,) = torch.autograd.grad(outputs[..., 5:].sum(), weight, retain_graph=True, materialize_grads=True)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(outputs[..., 2:5].sum(), weight)
    assert gradient.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseLSTM(4, (3, 0)), "width: expected at least 1, got 0"),
        (lambda: DenseLSTM(0, (3,)), "width: expected at least 1, got 0"),
        (lambda: DenseLSTM(4, (3,), layer_dropout=1.0), r"layer_dropout: expected a probability in \[0, 1\), got 1.0"),
        (lambda: DenseLSTM(4, (3,), dropout=-0.1), r"dropout: expected a probability in \[0, 1\), got -0.1"),
        (lambda: GatePenalty(-1, 2), "lambda0: expected at least 0, got -1"),
        (lambda: GatePenalty(1, 2, "r4"), "regulariser: expected R1, R2, R3, got 'r4'"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def test_reversal_leaves_padding() -> None:
    rows = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
    mask = rows > 0
    assert reverse(rows, mask).tolist() == [[3, 2, 1, 0], [4, 0, 0, 0], [8, 7, 6, 5]]
    states = torch.randn(3, 4, 2)
    assert torch.equal(reverse(reverse(states, mask), mask), states)


def language_models(**options: float) -> LanguageModels:
    return LanguageModels(len(WORDS), 4, WIDTHS, [4], **options).double().eval()


def test_the_backward_model_reads_reversed_text() -> None:
    """The backward model has the same losses as a forward model with the same weights on the reversed sentences."""
    models = language_models()
    models.back.load_state_dict(models.ahead.state_dict())
    rows = [[1, 2, 3, 4, 1], [1, 5, 1], [1, 6, 7, 1]]
    pad = [row + [0] * (5 - len(row)) for row in rows]
    turned = [row[::-1] + [0] * (5 - len(row)) for row in rows]
    mask = torch.tensor(pad) > 0
    ahead, back = models.losses(torch.tensor(pad), mask)
    turned_ahead, turned_back = models.losses(torch.tensor(turned), mask)
    assert torch.equal(back, turned_ahead)
    assert torch.equal(ahead, turned_back)
    assert not torch.allclose(ahead, back)
    alone = [models.losses(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)) for row in rows]
    for together, number in ((ahead, 0), (back, 1)):
        torch.testing.assert_close(together, torch.cat([losses[number] for losses in alone]), rtol=0, atol=1e-12)


def test_perplexity_by_hand() -> None:
    """With a softmax whose parameters are zero, all words are equally likely."""
    models = language_models()
    rows = [[1, 2, 3, 1], [1, 4, 1]]
    losses = [models.losses(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[0] for row in rows]
    mean = torch.cat(losses).detach().mean()
    assert perplexity(models, rows)[0] == pytest.approx(math.exp(float(mean)), rel=1e-12)
    with torch.no_grad():
        for parameter in models.ahead.softmax.parameters():
            parameter.zero_()
    # Adaptive softmax: 4 words, and a cluster of 6 more.
    first, second = 5.0, 5.0 * 6
    expected = math.exp((math.log(first) * 4 + math.log(second)) / 5)  # Targets 2, 3, 1 and 1 are frequent, 4 is not.
    assert perplexity(models, rows)[0] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="text: expected at least one sentence"):
        perplexity(models, [])


def test_cutoffs_by_the_vocabulary() -> None:
    assert default_cutoffs(300_000) == [4000, 40000, 200000]
    assert default_cutoffs(5000) == [4000]
    assert default_cutoffs(100) == [50]


def test_states_are_aligned() -> None:
    """The forward state of word t does not depend on later words, and its backward state not on earlier words."""
    states = ContextStates(len(WORDS), 4, WIDTHS, (2,), boundary=1).double().eval()
    words, mask = (
        torch.tensor([[2, 3, 4, 5, 0], [6, 7, 0, 0, 0]]),
        torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3]),
    )
    ahead_size = states.directions[0].output_size
    unchanged = states(words, mask)
    for position in range(4):
        changed = words.clone()
        changed[0, position] = 9
        differs = (states(changed, mask) != unchanged)[0]
        assert differs[:4, :ahead_size].any(1).tolist() == [t >= position for t in range(4)]
        assert differs[:4, ahead_size:].any(1).tolist() == [t <= position for t in range(4)]
    embeddings: Any = states.embeddings
    # Both states contain the word's own embedding, and equal those of a model that reads marks and words.
    assert torch.equal(unchanged[0, 2, :4], embeddings[0].weight[4])
    assert torch.equal(unchanged[0, 2, ahead_size : ahead_size + 4], embeddings[1].weight[4])
    read = states.directions[1](states.embeddings[1](torch.tensor([[1, 5, 4, 3, 2]])))
    torch.testing.assert_close(unchanged[0, :4, ahead_size:], read[0, 1:].flip(0), rtol=0, atol=1e-14)


def test_padding_does_not_matter() -> None:
    model = tagger()
    together = model.emissions(**batch(model))
    for row, tokens in enumerate(SENTENCES):
        alone = model.emissions(**collate([model.featurise(tokens)]))
        torch.testing.assert_close(together[row, : len(tokens)], alone[0], rtol=0, atol=1e-13)


def test_words_are_cut_and_may_be_marks() -> None:
    model = tagger()
    long = model.featurise(["a" * 500, "<s>"])
    assert len(long["characters"][0]) == LONGEST_WORD + 2
    assert long["lm_words"] == [0, 0]  # "<s>" in a text is an unknown word, not the mark.


def closed(model: Tagger, layers: set[int]) -> Tagger:
    """Close the gates of some layers, numbered from the forward model's first to the backward model's last."""
    with torch.no_grad():
        for layer in layers:
            model.gates[layer // 3][layer % 3] = 0
    return model


SUBSETS = [set(chosen) for count in range(7) for chosen in itertools.combinations(range(6), count)]


@pytest.mark.parametrize("layers", SUBSETS, ids=str)
def test_deleting_closed_layers_changes_no_logit(layers: set[int]) -> None:
    whole = closed(tagger(), layers)
    pruned = delete_closed(whole)
    inputs = batch(whole)
    assert [len(dense.layers) for dense in pruned.context.directions] == [
        3 - len(layers & {0, 1, 2}),
        3 - len(layers & {3, 4, 5}),
    ]
    kept = torch.cat([_kept(whole, direction, layers) for direction in range(2)])
    before, after = (each.context(inputs["lm_words"], inputs["mask"]) for each in (whole, pruned))
    torch.testing.assert_close(after, before[..., kept], rtol=0, atol=1e-12)
    torch.testing.assert_close(pruned.emissions(**inputs), whole.emissions(**inputs), rtol=0, atol=1e-12)
    assert pruned.decode(**inputs) == whole.decode(**inputs)
    assert list(tag(pruned, SENTENCES)) == list(tag(whole, SENTENCES))
    assert pruned.layers_left == 6 - len(layers)
    saved = sum(each.numel() for each in whole.parameters()) - sum(each.numel() for each in pruned.parameters())
    assert (saved > 0) == bool(layers)


def _kept(model: Tagger, direction: int, layers: set[int]) -> Tensor:
    """The columns of one direction's states that are left, numbered over both directions."""
    dense = model.context.directions[direction]
    parts = [torch.ones(dense.input_size)]
    parts += [torch.full((width,), float(3 * direction + n not in layers)) for n, width in enumerate(dense.widths)]
    offset = direction * model.context.directions[0].output_size
    return offset + torch.cat(parts).nonzero().squeeze(1)


def test_a_pruned_tagger_can_be_pruned_again_and_trained_on() -> None:
    whole = tagger()
    once = delete_closed(closed(whole, {1, 3}))
    twice = delete_closed(closed(once, {0}))
    direct = delete_closed(closed(tagger(), set()))
    assert [len(dense.layers) for dense in twice.context.directions] == [1, 2]
    assert {name for name, parameter in twice.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in direct.named_parameters() if parameter.requires_grad
    }
    assert not any(parameter.requires_grad for parameter in twice.context.parameters())


def test_flops_are_those_of_the_products() -> None:
    """A step of an LSTM of width h costs 8 h (input + h) FLOPs, before and after deletion."""
    whole = tagger()
    lm = [sum(8 * h * (4 + sum(widths[:n]) + h) for n, h in enumerate(widths)) for widths in (WIDTHS, (4, 1, 3))]
    rest = 2 * 6 * (14 + 12) + 2 * 8 * 5 * (13 + 5) + 2 * 10 * 4 + 2 * 10 * 3 * 3 * 4 + 2 * 16
    assert flops_per_word(whole) == {"language models": sum(lm), "all": sum(lm) + rest}
    pruned = delete_closed(closed(whole, {0, 2, 3, 4, 5}))
    assert flops_per_word(pruned)["language models"] == 8 * 5 * (4 + 5)


def test_folders_give_the_same_logits(tmp_path: Path) -> None:
    whole = tagger().float()
    for number, saved in enumerate((whole, delete_closed(closed(whole, {0, 5})))):
        save_tagger(saved, tmp_path / str(number))
        loaded = load_tagger(tmp_path / str(number))
        assert torch.equal(loaded.emissions(**batch(whole)), saved.emissions(**batch(whole)))
        assert loaded.settings == saved.settings
    config = LMConfig(4, WIDTHS, (4, 7), projection=16)
    models = config.build(len(WORDS)).eval()
    save_lm(models, config, WORDS, tmp_path / "lm")
    loaded_models, loaded_config, vocabulary = load_lm(tmp_path / "lm")
    assert loaded_config == config
    assert vocabulary.entries == WORDS.entries
    words, mask = torch.tensor([[1, 4, 5, 1]]), torch.ones(1, 4, dtype=torch.bool)
    assert all(torch.equal(a, b) for a, b in zip(loaded_models.losses(words, mask), models.losses(words, mask), strict=True))
    assert {path.name for path in (tmp_path / "lm").iterdir()} == {"config.json", "model.safetensors", "vocabulary.json"}


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    save_tagger(tagger().float(), tmp_path / "t")
    with pytest.raises(InputError, match=r"expected the folder of 'language models', got .* of 'tagger'"):
        load_lm(tmp_path / "t")
    with pytest.raises(InputError, match=r"model: expected a folder with config\.json, "):
        load_tagger(tmp_path)
    with pytest.raises(InputError, match="out: expected a folder that does not exist yet"):
        save_tagger(tagger(), tmp_path / "t")
    (tmp_path / "t" / "vocabulary.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tagger(tmp_path / "t")


def test_penalties_by_hand() -> None:
    z = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    # |z| is 1.75; z (1 - z) is 0, 3/16, 1/4, 0. The derivative of z (1 - z) is 1 - 2z: 1, 1/2, 0, -1.
    second = [1.0, 0.5, 0.0, -1.0]
    first = [1.0, 1.0, 1.0, 1.0]
    both = [a + b for a, b in zip(first, second, strict=True)]
    cases = [
        (r1(z), 1.75, first),
        (r2(z), 2.1875, both),
        (r3(z, 2), 2.1875, both),
        (r3(z, 3), 0.4375, second),
        (r3(z, 4), 0.4375, second),
    ]
    for value, expected, gradient in cases:
        assert float(value.detach()) == expected
        assert torch.autograd.grad(value, z)[0].tolist() == gradient


def test_penalties_outside_the_range() -> None:
    z = torch.tensor([-0.5, 1.5], dtype=torch.float64, requires_grad=True)
    value = r2(z)  # |z|: 2; |z (1 - z)|: 0.75 each.
    assert float(value.detach()) == 3.5
    assert torch.autograd.grad(value, z)[0].tolist() == [-1 - 2.0, 1 + 2.0]


def test_projection() -> None:
    model = tagger()
    with torch.no_grad():
        model.gates[0].copy_(torch.tensor([-0.2, 0.4, 1.3], dtype=torch.float64))
    project_(model)
    assert model.gates[0].tolist() == [0.0, 0.4, 1.0]


@pytest.mark.parametrize("wanted", range(7))
def test_shrinking_stops_at_the_wanted_number(wanted: int) -> None:
    """Each layer harms the loss four times as much as the one before. Projected SGD starts from 1 and runs until no gate moves.

    When a gate has closed, the next one is still above 0.5.
    """
    gates, counts = nn.Parameter(torch.ones(6, dtype=torch.float64)), []
    harm = 0.02 * 4.0 ** torch.arange(-5, 1, dtype=torch.float64)
    penalty = GatePenalty(0.05, wanted, "R3")
    optimizer = torch.optim.SGD([gates], lr=penalty.learning_rate)
    for _ in range(1500):
        optimizer.zero_grad()
        ((harm * gates).sum() + penalty.of(gates)).backward()  # type: ignore[no-untyped-call]
        before = gates.detach().clone()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
        counts.append(int(gates.count_nonzero()))
    assert torch.equal(gates, before)
    assert gates.tolist() == [1.0] * wanted + [0.0] * (6 - wanted)
    assert all(after <= earlier for earlier, after in itertools.pairwise(counts))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    broken = tagger()
    parameter = broken.emission.weight
    with torch.no_grad():
        parameter[0, 0] = value
    save_tagger(broken, tmp_path / "t")
    with pytest.raises(InputError, match=r"^model: expected finite weights in .*, got NaN or inf in emission.weight$"):
        load_tagger(tmp_path / "t")
