"""Plans: which units a model keeps under a budget. This stage uses scores, data about sites, and support."""
