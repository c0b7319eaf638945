"""Step 4: the device: precision, memory format, processor."""
