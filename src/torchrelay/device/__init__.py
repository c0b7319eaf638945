"""Step 4: the device: precision, memory format, threads, and what the processor is."""
