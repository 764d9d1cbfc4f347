"""The models and the data that measurements use."""
