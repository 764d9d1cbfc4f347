"""Masks that are learned in fine-tuning."""

from __future__ import annotations
