"""Step 5: optimizers: settings that build a torch optimizer when called with a model.

`SGD`, `AdamW` and `Muon` have their own settings; `Other` is any other optimizer of torch.optim. The trainer also takes
any function from a model to a torch optimizer.
"""

import inspect
from abc import abstractmethod
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from torch import nn
from torch.optim import Optimizer

from torchrelay.errors import UsageError, nearest
from torchrelay.optim.groups import Group, Options, OptionsOf, matches, nearest_pattern, parameter_groups
from torchrelay.optim.muon import MuonOptimizer
from torchrelay.settings import Settings

_OURS = ("sgd", "adamw", "muon")
_REFUSED = {
    "sparseadam": "takes sparse gradients only, and a training step here has none: use 'adam'",
}
OTHERS = {  # by their names in lower case
    name.lower(): found
    for name, found in vars(torch.optim).items()
    if inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer
    if name.lower() not in (*_OURS, *_REFUSED)
}


class OptimizerBase(Settings):
    """The settings that all optimizers have."""

    name: str
    """Which optimizer."""
    lr: float = Field(ge=0.0)
    """The learning rate, which a schedule may change by step."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Weight decay."""
    decay_norms_and_biases: bool = True
    """Whether weight decay also applies to parameters of one dimension (norms, biases)."""
    clip_norm: float | None = Field(default=None, gt=0.0)
    """The largest norm of the whole gradient; the trainer scales a larger one down to it. Unset: no clipping."""
    groups: list[Group] = Field(default_factory=list)
    """Parameters with options of their own: [{match = ["fc.*"], lr = 0.01}]; or lr_scale, weight_decay, freeze."""

    @abstractmethod
    def __call__(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of a model's trainable parameters."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the model's trainable parameters in groups of equal options; those that `groups` freeze are frozen."""
        return parameter_groups(model, self._options_in(model), self.groups, self.decay_norms_and_biases)

    def _options_in(self, model: nn.Module) -> OptionsOf:  # noqa: ARG002 - Muon's options depend on the model
        return lambda _name, _parameter: {"lr": self.lr, "weight_decay": self.weight_decay}


class SGD(OptimizerBase):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    """sgd, adamw, muon, or a name of torch.optim."""
    lr: float = Field(default=0.1, ge=0.0)
    """The learning rate, which a schedule may change by step."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """The momentum factor."""
    weight_decay: float = Field(default=5e-4, ge=0.0)
    """Weight decay, added to the gradient."""
    nesterov: bool = False
    """Nesterov momentum."""
    fused: bool = False
    """Use PyTorch's fused kernel: faster, with different last bits; not with an exact fsdp."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum: set momentum, such as 0.9")
        return self

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return torch.optim.SGD."""
        groups, fused = self.parameter_groups(model), self.fused or None  # None: PyTorch chooses by the device
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fused)


class AdamW(OptimizerBase):
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019)."""

    name: Literal["adamw"] = "adamw"
    """sgd, adamw, muon, or a name of torch.optim."""
    lr: float = Field(default=1e-3, ge=0.0)
    """The learning rate, which a schedule may change by step."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Weight decay, decoupled from the gradient."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.999)
    """The decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    fused: bool = False
    """Use PyTorch's fused kernel: faster, with different last bits; not with an exact fsdp."""

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return torch.optim.AdamW."""
        groups, fused = self.parameter_groups(model), self.fused or None  # as in SGD
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


class Muon(OptimizerBase):
    """Orthogonalized momentum for the weights of linear and convolutional layers, AdamW or SGD for the rest.

    "The rest" is everything that isn't a matrix (biases, norms), the embeddings, and the head: the model's last linear
    layer. The variant of the fast CIFAR-10 recipe (Jordan's airbench94_muon) is `normalize_weights` with
    `other = "sgd"`. That program sums the loss over the batch: multiply its learning rates by the batch size.
    """

    name: Literal["muon"] = "muon"
    """sgd, adamw, muon, or a name of torch.optim."""
    lr: float = Field(default=0.02, ge=0.0)
    """The learning rate of the matrices; a schedule scales it and other_lr."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """The momentum factor of the matrices."""
    nesterov: bool = True
    """Nesterov momentum, for the matrices and for "sgd"."""
    iterations: int = Field(default=5, ge=1, le=12)
    """Iterations of the orthogonalization."""
    normalize_weights: bool = False
    """Scale each matrix to a norm of sqrt(rows) before its update, instead of decay; only where norm layers follow."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """The dtype of the orthogonalization; auto: bfloat16 where the device has it in hardware."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of further matrices that are trained like the rest, such as ["conv1.*"]."""
    other: Literal["adamw", "sgd"] = "adamw"
    """The optimizer of the rest."""
    other_lr: float = Field(default=3e-3, ge=0.0)
    """The learning rate of the rest."""
    other_momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """The momentum of the rest; the first beta of "adamw"."""

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return a `MuonOptimizer` whose first groups hold the matrices.

        Raises:
            UsageError: the model has no matrix to train, or a pattern matches no parameter.
        """
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.exclude:
            if not any(matches(name, [pattern]) for name in names):
                raise UsageError(
                    f"optimizer.exclude: '{pattern}' matches no parameter{nearest_pattern(pattern, names)}"
                )
        groups = sorted(self.parameter_groups(model), key=lambda group: group["rule"] != "muon")
        if groups[0]["rule"] != "muon":
            raise UsageError("optimizer 'muon' finds no matrix to train besides the head: use 'sgd' or 'adamw'")
        return MuonOptimizer(groups)

    def _options_in(self, model: nn.Module) -> OptionsOf:
        chosen = _matrices(model)

        def options(name: str, parameter: nn.Parameter) -> Options:
            if name in chosen and not matches(name, self.exclude):
                return self._of_matrices(parameter.device)
            return self._of_the_rest()

        return options

    def _of_matrices(self, device: torch.device) -> Options:
        return {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "rule": "muon",
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "iterations": self.iterations,
            "dtype": _fastest_dtype(device) if self.dtype == "auto" else self.dtype,
            # Checkpoints of earlier versions have the key in this spelling.
            "normalise_weights": self.normalize_weights,
        }

    def _of_the_rest(self) -> Options:
        common: Options = {"lr": self.other_lr, "weight_decay": self.weight_decay, "rule": self.other}
        if self.other == "adamw":
            return {**common, "betas": (self.other_momentum, 0.95), "eps": 1e-8}  # the second is that of both sources
        return {**common, "momentum": self.other_momentum, "nesterov": self.nesterov and self.other_momentum > 0}


def _matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of all layers with a matrix, but embeddings and the last linear layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) and module not in linear[-1:]
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and "weight" in name  # a position table or a class token is a bare parameter
    }


def _fastest_dtype(device: torch.device) -> str:
    if device.type == "cpu":
        return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return "bfloat16" if device.type == "cuda" else "float32"


class Other(OptimizerBase):
    """Any other optimizer of torch.optim, by its class's name, such as RMSprop, NAdam or Adafactor.

    `lr` defaults to that of the class. In a recipe the class's arguments may also stand beside `lr`, without `options`.
    """

    name: str
    """The class's name in torch.optim, in upper or lower case."""
    lr: float = Field(default=1e-3, ge=0.0)
    """The learning rate, which a schedule may change by step."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the class, such as {alpha = 0.9}."""

    @model_validator(mode="before")
    @classmethod
    def _sort(cls, values: Any) -> Any:
        """Find the class, collect its arguments, and fill in its default learning rate."""
        if not isinstance(values, dict) or "name" not in values:
            return values
        found = _class_named(values["name"])
        known = dict(inspect.signature(found).parameters)
        loose = {key: value for key, value in values.items() if key not in cls.model_fields}
        if not isinstance(given := values.get("options", {}), dict):
            return values
        options = {**given, **loose}
        for key in options:
            if key not in known or key in ("params", "lr", "weight_decay"):
                allowed = sorted({*known, *cls.model_fields} - {"params", "options"})
                hint = nearest(key, allowed) or f": there are {', '.join(allowed)}"
                raise ValueError(f"'{key}' is no option of torch.optim.{found.__name__}{hint}")
        kept = {key: value for key, value in values.items() if key not in loose}
        return {"lr": known["lr"].default, **kept, "name": found.__name__, "options": options}

    @model_validator(mode="after")
    def _check(self) -> Self:
        decays = (self.weight_decay, *(group.weight_decay for group in self.groups))
        if any(decays) and "weight_decay" not in inspect.signature(_class_named(self.name)).parameters:
            raise ValueError(f"torch.optim.{self.name} has no weight decay: leave weight_decay out")
        try:
            self._build([{"params": [torch.zeros(1)]}])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"torch.optim.{self.name} refuses its options: {error}") from None
        return self

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return the torch optimizer of that name.

        Raises:
            UsageError: it takes one group of parameters, and `groups` makes several.
        """
        groups = self.parameter_groups(model)
        if self.name == "LBFGS" and len(groups) > 1:
            raise UsageError("torch.optim.LBFGS has one learning rate for all parameters: leave optimizer.groups out")
        return self._build(groups)

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        built: Optimizer = _class_named(self.name)(groups, lr=self.lr, **self.options)
        return built


def _class_named(name: Any) -> Any:
    """Return a class of torch.optim.

    Raises:
        ValueError: there is none, or it isn't supported.
    """
    lower = str(name).lower()
    if lower in _REFUSED:
        raise ValueError(f"'{name}' can't be used: it {_REFUSED[lower]}")
    if lower in _OURS:
        raise ValueError(
            f"'{name}' has settings of its own: use optim.{ {'sgd': 'SGD', 'adamw': 'AdamW'}.get(lower, 'Muon') }"
        )
    if lower not in OTHERS:
        known = (*_OURS, *OTHERS)
        raise ValueError(f"there is no optimizer '{name}'{nearest(lower, known) or ': use ' + ', '.join(known)}")
    return OTHERS[lower]


def _kind(value: Any) -> str:
    """Return which settings class a table, or an instance, is."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if name in _OURS else "torch.optim"


def _named(value: Any) -> Any:
    """Accept SGD for sgd and a missing name, and report a wrong name before the keys are checked."""
    if not isinstance(value, dict):
        return value
    name = str(value.get("name", "sgd"))
    if name.lower() in _OURS:
        return {**value, "name": name.lower()}
    _class_named(name)
    return value


OptimizerSettings = Annotated[
    Annotated[SGD, Tag("sgd")]
    | Annotated[AdamW, Tag("adamw")]
    | Annotated[Muon, Tag("muon")]
    | Annotated[Other, Tag("torch.optim")],
    Discriminator(_kind),
    BeforeValidator(_named),
]
"""The section `[optimizer]` of a recipe; its `name` selects the class."""
