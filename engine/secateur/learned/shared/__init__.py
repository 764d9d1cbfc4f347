"""The trainer and the gate regularisers that all trained pruning methods share."""
