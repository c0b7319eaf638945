"""Step 1: the run folder: lock, log, metrics, trackers."""
