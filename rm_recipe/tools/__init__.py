"""Verbs around the recipe: run, check, benchmark, prepare."""
