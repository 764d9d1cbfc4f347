"""Model families, one short file each: the only place that knows the module paths of Hugging Face's models."""

from secateur.model.families.base import Contribution, Family
from secateur.model.families.registry import (
    branches,
    family_of,
    register_family,
    split_token_rows,
    supported,
    takes_label_tree,
)

register = register_family  # The earlier name.

__all__ = [
    "Contribution",
    "Family",
    "branches",
    "family_of",
    "register",
    "register_family",
    "split_token_rows",
    "supported",
    "takes_label_tree",
]
