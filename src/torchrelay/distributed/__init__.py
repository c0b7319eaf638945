"""Step 4: several processes: their group, their launch, and the strategies by which they share a step."""
