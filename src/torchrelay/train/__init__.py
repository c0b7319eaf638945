"""Step 7: the loop, and what stands around it."""
