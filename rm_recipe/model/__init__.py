"""The reward model: its base, head and adapters, and the rows it reads."""
