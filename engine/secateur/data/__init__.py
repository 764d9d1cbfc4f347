"""Examples from files and the built-in data. It uses support."""
