"""What people look at after a run: plots and tables, read from its folder."""
