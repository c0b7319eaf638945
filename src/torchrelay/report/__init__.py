"""A run's plots, drawn from its folder."""
