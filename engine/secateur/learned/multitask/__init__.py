"""Masks learned in fine-tuning: one encoder, pruned while it learns several tasks."""
