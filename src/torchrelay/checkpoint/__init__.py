"""Step 3: checkpoints: their format, how they are written and when."""
