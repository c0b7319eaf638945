"""Step 2: augmentation of whole batches, on whatever device they are."""

from torchrelay.data.augment.pipeline import *  # noqa: F403
