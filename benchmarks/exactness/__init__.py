"""Bit-equal results: with a plain loop, after a kill, on any number of processes, and across a change of the code."""
