"""Integrated gradients: paths of gates, nodes on a path, replay of the layers above a site, and the error of the result."""
