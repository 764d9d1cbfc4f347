"""Ways to run a pruned folder. Each way is tried in a process of its own; `runs.compatibility` tries them all."""
