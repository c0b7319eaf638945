"""Equal bytes: as a plain loop, after a kill, on any number of processes, before and after a change of the code."""
