"""What grows with the number of devices: formulas, and counts that check them."""
