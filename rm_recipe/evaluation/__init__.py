"""How well a reward model agrees with held-out preferences."""
