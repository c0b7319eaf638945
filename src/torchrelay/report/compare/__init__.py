"""Runs beside each other: a table of them, and whether one recipe is better than another. None of it needs torch."""
