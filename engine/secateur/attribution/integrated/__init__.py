"""Integrated gradients: what of the model runs again, along which path, with which nodes, and how exact the result is."""
