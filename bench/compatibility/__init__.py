"""Ways to run a pruned folder, each tried in a process of its own; `compatibility` runs them all."""
