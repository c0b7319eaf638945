"""What is claimed, as programs: each prints a table or draws a picture."""
