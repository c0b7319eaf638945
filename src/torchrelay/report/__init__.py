"""Plots and tables of a run, read from its folder."""
