"""Plans under a budget: which units stay. It uses scores, data about sites, and support."""
