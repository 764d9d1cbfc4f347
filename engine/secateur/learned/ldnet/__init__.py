"""LD-Net: recurrent language models for sequence labelling whose layers can be deleted (Liu et al. 2018, arXiv 1804.07827)."""

from __future__ import annotations
