"""Which epochs stand for a whole run where its images grow."""

from torchrelay.data.augment.geometry import ProgressiveResize
from torchrelay.data.augment.pipeline import Pipeline


def stages(pipeline: Pipeline, epochs: int) -> list[tuple[int, float]]:
    """Return the epochs to time, and which share of the run's steps each stands for.

    Where images grow with the epochs, they are the first ones with the smallest and with the largest images: in between
    a step's time grows with the number of pixels.
    """
    growing = next((each for each in pipeline.transforms if isinstance(each, ProgressiveResize)), None)
    pixels = [growing.size(epoch) ** 2 if growing else 1 for epoch in range(epochs)]
    least, most = min(pixels), max(pixels)
    if least == most:
        return [(0, 1.0)]
    large = sum(each - least for each in pixels) / (most - least) / epochs
    return [(pixels.index(least), 1 - large), (pixels.index(most), large)]
