"""Accuracy, time and size of models, dense and pruned. It uses pruning and the stages below it."""
