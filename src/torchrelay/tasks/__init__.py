"""Step 6: what a batch means: losses and metrics."""
