"""Examples from files, and the built-in model and data. This folder uses support only."""
