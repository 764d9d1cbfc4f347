"""The schedule of the density, and the number of elements or ranks that a density keeps of each matrix."""

from __future__ import annotations

import math
import re
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from encoders import KINDS, METHODS, NAMES, SETTINGS, TASKS, encoder, trained
from torch import Tensor, nn

from secateur import InputError
from secateur.learned.multitask.budget import Scope, choose, require_reachable
from secateur.learned.multitask.parametrizations import MASKS, Granularity, Mask
from secateur.learned.multitask.pruning import MultitaskPruning, originals
from secateur.learned.multitask.schedule import CubicSchedule

SHAPES = [(6, 4), (4, 6), (9, 5), (3, 3), (12, 2)]
WEIGHTS = sum(rows * columns for rows, columns in SHAPES)


def masks(granularity: Granularity) -> dict[str, Mask]:
    return {f"m{number}": MASKS[granularity](torch.zeros(shape), "movement") for number, shape in enumerate(SHAPES)}


def drawn(of: dict[str, Mask], seed: int, values: int = 7) -> dict[str, Tensor]:
    """Draw whole numbers as importance, so that there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, values, (mask.entries,), generator=generator).float() for name, mask in of.items()}


def stored(of: dict[str, Mask], chosen: dict[str, Tensor]) -> int:
    return sum(mask.stored(int(chosen[name].sum())) for name, mask in of.items())


def ranking(of: dict[str, Mask], importance: dict[str, Tensor]) -> list[tuple[str, int]]:
    """List the entries of all matrices, the most important first. Ties go to the first matrix."""
    entries = [(-float(value), place, name, k) for place, name in enumerate(of) for k, value in enumerate(importance[name])]
    return [(name, k) for _, _, name, k in sorted(entries, key=lambda entry: (entry[0], entry[1], entry[3]))]


@pytest.mark.parametrize(("warmup", "cooldown"), [(0.25, 0.25), (0.0, 0.0), (0.1, 0.6), (0.5, 0.0)])
def test_the_density_falls_by_the_formula(warmup: float, cooldown: float) -> None:
    schedule, steps, final = CubicSchedule(warmup, cooldown), 200, 0.1
    first, last = warmup * steps, cooldown * steps
    values = [schedule.density(step, steps, final) for step in range(steps + 1)]
    for step, value in enumerate(values):
        if step <= first:
            assert value == 1
        elif step >= steps - last:
            assert value == pytest.approx(final, abs=1e-15)
        else:
            exact = final + (1 - final) * (1 - (step - first) / (steps - first - last)) ** 3
            assert value == pytest.approx(exact, abs=1e-12)
    assert values == sorted(values, reverse=True)
    middle = schedule.density(round((first + steps - last) / 2), steps, final)
    assert middle == pytest.approx(final + (1 - final) / 8, abs=1e-12)
    assert schedule.remaining(0, 0) == 0  # A training without steps is at its end.


def test_the_defaults_are_the_papers() -> None:
    """Of eight epochs, the first two keep all weights, and the last two keep the last mask."""
    remaining = [CubicSchedule().remaining(epoch, 8) for epoch in range(9)]
    assert remaining == [1, 1, 1, 27 / 64, 1 / 8, 1 / 64, 0, 0, 0]
    assert CubicSchedule().to_json() == {"warmup": 0.25, "cooldown": 0.25}


@pytest.mark.parametrize(
    ("warmup", "cooldown", "message"),
    [
        (-0.1, 0.2, r"^warmup: expected a share of the steps in \[0, 1\), got -0.1$"),
        (0.2, 1.0, r"^cooldown: expected a share of the steps in \[0, 1\), got 1.0$"),
        (math.nan, 0.2, r"^warmup: expected a share of the steps in \[0, 1\), got nan$"),
        (0.6, 0.4, r"^cooldown: expected less than 1 - warmup = 0.4, got 0.4$"),
    ],
)
def test_bad_shares_of_the_steps(warmup: float, cooldown: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CubicSchedule(warmup, cooldown)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.237, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_elements_are_as_many_as_the_density_says(scope: Scope, density: float) -> None:
    of = masks("element")
    for seed in range(3):
        importance = drawn(of, seed)
        chosen = choose(of, importance, scope, density, 0.0)
        assert stored(of, chosen) == round(density * WEIGHTS)
        if scope == "global":
            first = ranking(of, importance)[: round(density * WEIGHTS)]
            assert {(name, k) for name in of for k in chosen[name].nonzero().flatten().tolist()} == set(first)
        for name, mask in of.items():
            if scope == "local":
                assert abs(int(chosen[name].sum()) - density * mask.entries) < 1
                own = ranking({name: mask}, importance)[: int(chosen[name].sum())]
                assert chosen[name].nonzero().flatten().tolist() == sorted(k for _, k in own)


@pytest.mark.parametrize("density", [0.3, 0.45, 0.6, 0.8, 1.0])
def test_ranks_of_all_matrices_are_the_most_that_fit(density: float) -> None:
    of = masks("rank")
    for seed in range(20):
        importance = drawn(of, seed)
        chosen = choose(of, importance, "global", density, 0.0)
        # Add ranks one by one, as long as the stored weights fit the density.
        naive = {name: torch.zeros(mask.entries, dtype=torch.bool) for name, mask in of.items()}
        for name, k in ranking(of, importance):
            naive[name][k] = True
            if stored(of, naive) > round(density * WEIGHTS):
                naive[name][k] = False
                break
        assert all(torch.equal(chosen[name], naive[name]) for name in of)
        assert 0 < stored(of, chosen) <= round(density * WEIGHTS)


@pytest.mark.parametrize("density", [0.48, 0.55, 0.7, 0.9, 1.0])
def test_each_matrix_keeps_the_same_share_of_its_ranks(density: float) -> None:
    of = masks("rank")
    importance = drawn(of, 0)
    chosen = choose(of, importance, "local", density, 0.0)
    counts = {name: int(kept.sum()) for name, kept in chosen.items()}
    # Try every share of ranks in steps finer than any matrix has; keep the largest that fits.
    best: dict[str, int] = {}
    for thousandth in range(1001):
        tried = {name: max(1, thousandth * mask.entries // 1000) for name, mask in of.items()}
        if sum(mask.stored(tried[name]) for name, mask in of.items()) <= round(density * WEIGHTS):
            best = tried
    assert counts == best
    assert stored(of, chosen) <= round(density * WEIGHTS)
    for name, mask in of.items():
        own = ranking({name: mask}, importance)[: counts[name]]
        assert chosen[name].nonzero().flatten().tolist() == sorted(k for _, k in own)


@pytest.mark.parametrize(("granularity", "scope"), list(product(MASKS, ["global", "local"])))
def test_on_the_way_a_share_of_what_is_to_go_remains(granularity: Granularity, scope: Scope) -> None:
    of = masks(granularity)
    importance = drawn(of, 0, values=1000)
    counts = []
    for remaining in (1.0, 0.7, 0.3, 0.01, 0.0):
        chosen = choose(of, importance, scope, 0.5, remaining)
        counts.append({name: int(kept.sum()) for name, kept in chosen.items()})
        entries = sum(mask.entries for mask in of.values())
        total, final = sum(counts[-1].values()), sum(choose(of, importance, scope, 0.5, 0.0)[n].sum().item() for n in of)
        slack = 0.5 if scope == "global" else len(of) / 2
        assert abs(total - (final + (entries - final) * remaining)) <= slack
    assert counts[0] == {name: mask.entries for name, mask in of.items()}
    assert all(later[name] <= earlier[name] for earlier, later in pairwise(counts) for name in of)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_a_models_density_is_met(kind: str, setting: dict[str, Any]) -> None:
    pruning = trained(encoder(kind), TASKS, density=0.3, **setting)
    sizes = {path: mask.weights for path, mask in pruning.masks.items()}
    total = sum(sizes.values())
    # Only the linear layers in the encoder's blocks have masks.
    dense = {f"{path}.weight" for path, module in encoder(kind).named_modules() if isinstance(module, nn.Linear)}
    assert {f"{path}.weight" for path in sizes} == {name for name in dense if "block." in name or "layer." in name}
    held = {path: mask.stored(mask.kept) for path, mask in pruning.masks.items()}
    assert pruning.stored == sum(held.values())
    assert pruning.reached == pruning.stored / total
    if setting["granularity"] == "element":
        assert pruning.stored == round(0.3 * total)
        for path, mask in pruning.masks.items():
            masked: Any = pruning.encoder.get_submodule(path)
            assert int((masked.weight != 0).sum()) == mask.kept
    else:
        assert pruning.stored <= round(0.3 * total)
        least = max(sum(mask.shape) for mask in pruning.masks.values())
        if setting["scope"] == "global":
            assert pruning.stored > round(0.3 * total) - least
    if setting["scope"] == "local":
        shares = [mask.kept / mask.entries for mask in pruning.masks.values()]
        width = min(mask.entries for mask in pruning.masks.values())
        assert max(shares) - min(shares) <= 2 / width


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_density_1_keeps_everything(setting: dict[str, Any]) -> None:
    pruning = trained(encoder("t5-gated"), TASKS, density=1.0, **setting)
    assert pruning.reached == 1
    assert all(mask.mask is None for mask in pruning.masks.values())


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_the_most_important_at_that_step(method: str) -> None:
    """The masks follow the current weights and scores, so a pruned entry can come back."""
    pruning = trained(encoder("bert-sequence"), TASKS, method=method, density=0.2)
    path = pruning.linears[3]
    gone = ~pruning.masks[path].mask  # type: ignore[operator]
    with torch.no_grad():
        (weight,), scores = originals(pruning.encoder, path), pruning.masks[path].scores
        (weight if scores is None else scores).view(-1)[gone] = 100.0
    pruning.update_masks_(10, 10)
    assert pruning.masks[path].mask[gone].all()  # type: ignore[index]
    pruning.update_masks_(0, 10)  # The schedule has pruned nothing at the start.
    assert pruning.reached == 1


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_a_density_out_of_range(density: float) -> None:
    with pytest.raises(InputError, match=r"^density: expected a share of the encoder's weights in \(0, 1\], got "):
        MultitaskPruning(encoder("t5-relu"), TASKS, density=density)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("setting", "what"), [(each, each["granularity"]) for each in SETTINGS[4:]], ids=NAMES[4:])
def test_a_density_that_cannot_be_reached_names_the_nearest_which_works(kind: str, setting: dict[str, Any], what: str) -> None:
    message = r"^density: expected at least (\S+), the nearest that keeps one .*, got 1e-05$"
    with pytest.raises(InputError, match=message) as refused:
        MultitaskPruning(encoder(kind), TASKS, density=1e-5, **setting)
    parsed = re.match(message, str(refused.value))
    assert parsed is not None
    nearest = float(parsed[1])
    pruning = trained(encoder(kind), TASKS, density=nearest, **setting)
    kept = [mask.kept for mask in pruning.masks.values()]
    if setting["scope"] == "local" and what == "rank":
        assert "one rank of each matrix" in str(refused.value)
        assert kept == [1] * len(kept)
    else:
        assert f"one {what}," in str(refused.value)
        assert sum(kept) >= 1
    with pytest.raises(InputError, match=r"^density: expected at least "):
        MultitaskPruning(encoder(kind), TASKS, density=nearest * 0.98 if what == "rank" else nearest / 2.1, **setting)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_nearest_density_is_rounded_up_to_one_that_works(scope: Scope) -> None:
    """This also holds for large matrices, where the third digit stands for many weights."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        shapes = torch.randint(100, 3000, (6, 2), generator=generator).tolist()
        of: dict[str, Mask] = {str(shape): MASKS["rank"](torch.empty(shape, device="meta"), "magnitude") for shape in shapes}
        with pytest.raises(InputError, match=r"^density: expected at least \S+, the nearest that keeps one rank") as refused:
            require_reachable(of, scope, 1e-9)
        nearest = float(str(refused.value).split()[4].removesuffix(","))
        require_reachable(of, scope, nearest)
        with pytest.raises(InputError, match=r"^density: expected at least "):
            require_reachable(of, scope, nearest * 0.98)


def test_whichever_rank_comes_first_fits_into_the_least_density() -> None:
    """The least density fits a rank of any matrix, not only of the smallest one. So every model keeps a rank."""
    of = masks("rank")
    for density in (thousandth / 1000 for thousandth in range(1, 200)):
        try:
            require_reachable(of, "global", density)
        except InputError:
            continue
        for first in of:
            importance = {name: torch.ones(mask.entries) * (name == first) for name, mask in of.items()}
            assert choose(of, importance, "global", density, 0.0)[first].any(), density
