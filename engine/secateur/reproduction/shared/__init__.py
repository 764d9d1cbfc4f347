"""What the reproductions of papers share: claims, data from a hub, result files."""
