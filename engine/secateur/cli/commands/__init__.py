"""The commands. A command has a file of its own, or shares it with a related one."""
