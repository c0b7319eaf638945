"""Step 1: the settings of a run as a whole, which a recipe has under `[run]`."""

from typing import Literal

from pydantic import Field, field_validator

from torchrelay.duration import Interval
from torchrelay.settings import Settings

Views = Literal[1, 2, 6]  # how many views of an image test-time augmentation averages over


class RunSettings(Settings):
    """How long to train, from which seed, and how often to evaluate and log."""

    epochs: int = Field(default=10, ge=1)
    """Number of passes over the training data."""
    steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps of the whole run, which the schedule spans, in place of `epochs`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of all randomness in the run: initial weights, order, augmentation, dropout."""
    exact: bool = True
    """Use deterministic kernels and a power of two of replicas, so that an interrupted run gives the same bits."""
    portable: bool | None = None
    """Compute on the CPU so that the bits are the same on all x86-64 processors with AVX2: slower, on one thread."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps; the schedule still spans all epochs. Unset: train all epochs."""
    evaluate_every: Interval = 1
    """Epochs between two evaluations, or "200 steps", "10 min"; the end of the run is always evaluated."""
    evaluate_batches: int | None = Field(default=None, ge=1)
    """Evaluate on so many batches only, drawn by the seed, the same each time. Unset: on all samples."""
    train_metrics: bool = True
    """Also measure the task's metrics, such as accuracy, on the training batches."""
    test_views: Views = 1
    """Average evaluation over views of each image. 2: it and its mirror image; 6: if unsure, shifted ones as well."""
    log_every: Interval = 50
    """Steps between two lines of metrics within an epoch, or "0.1 epochs", "1 min"."""
    receipt_every: int | None = Field(default=None, ge=1)
    """Steps between two hashes of the weights in the receipt, which then has each step's gradient norm. Unset: none."""
    on_spike: Literal["stop", "rollback"] = "stop"
    """What to do on a loss spike: stop, or roll back to the checkpoint before it, skip its batch and continue."""
    spike_threshold: float | None = Field(default=None, gt=1)
    """A loss above this multiple of the median of the last 50 steps is a spike. Unset: only a non-finite loss is."""
    max_skipped: int = Field(default=20, ge=1)
    """How many batches rollbacks may skip before the run stops anyway."""
    patience: int | None = Field(default=None, ge=1)
    """Stop early when the headline metric has not improved for this many evaluations. Unset: never."""

    notify: str | None = Field(default=None, min_length=1)
    """A shell command that is run when the run is done, fails or is stopped, with TORCHRELAY_STATUS. Unset: none."""

    trackers: tuple[str, ...] | None = None
    """Where metrics are shown: "tensorboard", "wandb", "mlflow", "trackio" or one of your own. Unset: tensorboard."""

    report: bool | None = None
    """Write report.html, the run as one page, when the run is done. Unset: if it trained for a minute."""

    @field_validator("portable")
    @classmethod
    def _unset_if_false(cls, value: bool | None) -> bool | None:
        """Return None for false: recipe.toml has the key in portable runs alone, and those before have no such key."""
        return value or None
