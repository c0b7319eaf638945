"""Step 3: the model: built by name, its weights loaded, its frozen parameters set."""

from torchrelay.errors import renamed
from torchrelay.models.ema import EMA
from torchrelay.models.factory import InitFromData, ModelSettings, build, freeze, names
from torchrelay.models.recompute import recompute
from torchrelay.models.summary import Summary, summarize
from torchrelay.models.weights import load_weights

__all__ = [
    "EMA",
    "InitFromData",
    "ModelSettings",
    "Summary",
    "build",
    "freeze",
    "load_weights",
    "names",
    "recompute",
    "summarize",
]

__getattr__ = renamed(__name__, {"summarise": "summarize"})
