"""LD-Net: recurrent language models whose layers can be taken out, for sequence labelling (Liu et al. 2018)."""

from __future__ import annotations
