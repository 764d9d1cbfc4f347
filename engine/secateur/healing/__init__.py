"""Healing: train a pruned model against the dense model that it was pruned from."""
