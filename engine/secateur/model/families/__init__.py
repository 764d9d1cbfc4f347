"""Model families: the only place that knows the module paths of Hugging Face's models. One short file each."""

from secateur.model.families.base import Contribution, Family
from secateur.model.families.registry import branches, family_of, in_rows, register, supported

__all__ = ["Contribution", "Family", "branches", "family_of", "in_rows", "register", "supported"]
