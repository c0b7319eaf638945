"""What grows with the number of devices: formulas, and what is counted."""
