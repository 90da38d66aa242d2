"""The recipe: its keys, and how it is read."""
