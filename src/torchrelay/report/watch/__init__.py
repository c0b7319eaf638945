"""Runs in a terminal, from their files alone, while they go on."""
