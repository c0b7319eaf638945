"""Step 3: checkpoints: what they hold, when they are saved, and how they are written and read."""

from torchrelay.checkpoint.checkpointer import Checkpointer, CheckpointSettings
from torchrelay.checkpoint.format import Contents, read, write
from torchrelay.checkpoint.retention import best, complete, find, newest

__all__ = ["CheckpointSettings", "Checkpointer", "Contents", "best", "complete", "find", "newest", "read", "write"]
