"""Exporting: the folder of a pruned model as the file or folder that another engine loads."""
