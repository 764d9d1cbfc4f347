"""The models and data that are measured."""
