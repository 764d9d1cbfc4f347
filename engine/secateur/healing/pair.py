"""Check a pruned model and its teacher, before any work."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.model.offloading import require_values
from secateur.model.ordinary import require_ordinary, require_own_forwards
from secateur.pruning.describe import stock_class
from secateur.support.errors import InputError
from secateur.tasks import Task
from secateur.tasks.base import require_fit

_ALIKE = ("model_type", "vocab_size", "d_model", "hidden_size")  # What pruning leaves as it is in a config.


def require_pair(pruned: nn.Module, teacher: nn.Module, task: Task) -> None:
    """Check that a model can learn from a teacher.

    Raises:
        InputError: They are one model, share weights (as the models of `TaskPlans` do with the dense one), are of different
            architectures, vocabularies or outputs; or one of them does not fit the task, or has weights that cannot be trained.
    """
    for name, model in (("pruned", pruned), ("teacher", teacher)):
        require_fit(task, model)
        require_ordinary(model)
        require_values(model, name)
    if pruned is teacher:
        raise InputError("teacher: expected the dense model that the pruned one was made from, got the pruned model itself")
    require_own_forwards(pruned)
    _require_own_weights(pruned, teacher)
    one, two = stock_class(pruned), stock_class(teacher)
    if one.__name__ != two.__name__:
        raise InputError(f"teacher: expected a {one.__name__}, as the pruned model is, got a {two.__name__}")
    for name in _ALIKE:
        ours, theirs = (getattr(model.config, name, None) for model in (pruned, teacher))
        if ours != theirs:
            raise InputError(f"teacher: expected the pruned model's {name} {ours!r}, got {theirs!r}")
    ours, theirs = _outputs(pruned), _outputs(teacher)
    if ours != theirs:
        raise InputError(f"teacher: expected the pruned model's {ours} outputs, got {theirs}")


def _require_own_weights(pruned: nn.Module, teacher: nn.Module) -> None:
    """Raise InputError where the models share the memory of a weight."""
    places = {parameter.data_ptr() for parameter in teacher.parameters() if parameter.numel()}
    for name, parameter in pruned.named_parameters():
        if parameter.numel() and parameter.data_ptr() in places:
            raise InputError(
                f"pruned: expected a model with weights of its own, got one that shares {name!r} with the teacher, as the "
                "models of TaskPlans do: make it by secateur.prune(model, plan)"
            )


def _outputs(model: nn.Module) -> Any:
    """Return the number of a model's outputs at a position, None where it has no output layer."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    weight = getattr(layer, "weight", None)
    return getattr(model, "num_labels", None) if weight is None else weight.shape[0]
