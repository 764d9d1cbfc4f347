"""Masks learned in fine-tuning: one encoder that is pruned while it learns several tasks (Xia and Shin 2021)."""
