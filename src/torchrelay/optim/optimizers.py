"""Step 5: optimizers: settings that, called with a model, make a torch optimizer."""

import fnmatch
import inspect
from abc import abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from torch import nn
from torch.optim import Optimizer

from torchrelay.errors import nearest
from torchrelay.optim.groups import Group, ParameterGroup, parameter_groups
from torchrelay.optim.muon import MuonOptimizer
from torchrelay.settings import Settings

_REFUSED = {
    "LBFGS": "it evaluates the loss several times a step, which a step of ours does once",
    "SparseAdam": "it needs sparse gradients",
    "Muon": "it takes matrices only: write it 'muon' for ours, which also trains the rest",
}
_NAMES = tuple(
    name
    for name in vars(torch.optim)
    if name[0].isupper() and name not in (*_REFUSED, "Optimizer") and issubclass(getattr(torch.optim, name), Optimizer)
)
_OURS = ("sgd", "adamw", "muon")


class _Base(Settings):
    lr: float = Field(default=0.1, ge=0.0)
    """The learning rate; a schedule may change it by step."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Weight decay."""
    decay_norms_and_biases: bool = True
    """Whether parameters of one dimension (norms, biases) decay, too."""
    clip_norm: float | None = Field(default=None, gt=0.0)
    """Largest norm of the whole gradient; unset: as it is."""
    groups: list[Group] = []
    """Parameters with a learning rate or weight decay of their own: [{match = ["fc.*"], lr = 0.01}]."""

    @abstractmethod
    def __call__(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of a model's trainable parameters."""

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        """Return the model's trainable parameters in groups of equal options."""
        return parameter_groups(model, self.lr, self.weight_decay, self.groups, self.decay_norms_and_biases)


class SGD(_Base):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """How much of the last update stays."""
    weight_decay: float = Field(default=5e-4, ge=0.0)
    """Weight decay, added to the gradient."""
    nesterov: bool = False
    """Look ahead along the momentum (Nesterov)."""

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return torch.optim.SGD."""
        return torch.optim.SGD(
            self.parameter_groups(model),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


class AdamW(_Base):
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019)."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, ge=0.0)
    """The learning rate; a schedule may change it by step."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Weight decay, apart from the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return torch.optim.AdamW."""
        return torch.optim.AdamW(
            self.parameter_groups(model), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


class Muon(_Base):
    """Orthogonalised momentum for matrices and convolutions, Nesterov momentum for the rest."""

    name: Literal["muon"] = "muon"
    lr: float = Field(default=0.24, ge=0.0)
    """The learning rate of matrices and convolutions; a schedule changes all rates by the same factor."""
    momentum: float = Field(default=0.6, ge=0.0, lt=1.0)
    """Momentum of matrices and convolutions."""
    iterations: int = Field(default=3, ge=1, le=12)
    """Of the orthogonalisation."""
    normalise: bool = False
    """Keep each convolution's filters at norm sqrt(filters); only where a norm layer follows."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """In which the orthogonalisation computes."""
    other_lr: float = Field(default=0.05, ge=0.0)
    """The learning rate of all other parameters."""
    other_momentum: float = Field(default=0.85, ge=0.0, lt=1.0)
    """Momentum of all other parameters."""
    others: list[str] = ["head.*", "fc.*", "classifier.*", "*embed*"]
    """Patterns of matrices that are trained like all other parameters."""

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return our Muon."""
        orthogonal = [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.others)
        ]
        chosen = {id(parameter) for name, parameter in model.named_parameters() if name in orthogonal}
        groups = []
        for is_matrix, lr, momentum in ((True, self.lr, self.momentum), (False, self.other_lr, self.other_momentum)):
            for group in parameter_groups(model, lr, self.weight_decay, self.groups, self.decay_norms_and_biases):
                members = [p for p in group["params"] if (id(p) in chosen) == is_matrix]
                if members:
                    groups.append({**group, "params": members, "momentum": momentum, "orthogonal": is_matrix})
        return MuonOptimizer(groups, self.iterations, getattr(torch, self.dtype), self.normalise)


class Other(_Base):
    """Any other optimizer of torch.optim, by its name there; its further arguments stand in `options`."""

    name: str
    """The class's name in torch.optim, such as "RMSprop"."""
    lr: float = Field(default=1e-3, ge=0.0)
    """The learning rate; a schedule may change it by step."""
    options: dict[str, Any] = {}
    """Further arguments of the class, such as {alpha = 0.9}."""

    @model_validator(mode="after")
    def _check(self) -> "Other":
        known = {name.lower(): name for name in _NAMES}
        refused = {name.lower(): reason for name, reason in _REFUSED.items()}
        if self.name.lower() in refused:
            raise ValueError(f"optimizer.name '{self.name}' can't be used: {refused[self.name.lower()]}")
        if self.name.lower() not in known:
            raise ValueError(f"optimizer.name '{self.name}' is unknown{nearest(self.name, (*_OURS, *_NAMES))}")
        arguments = self._arguments()
        for option in self.options:
            if option not in arguments:
                raise ValueError(
                    f"optimizer.options.{option} is no argument of torch.optim.{known[self.name.lower()]}"
                    f"{nearest(option, arguments)}"
                )
        return self

    def _class(self) -> type[Optimizer]:
        found: type[Optimizer] = getattr(torch.optim, {name.lower(): name for name in _NAMES}[self.name.lower()])
        return found

    def _arguments(self) -> list[str]:
        ours = ("self", "params", "lr", "weight_decay")
        return [name for name in inspect.signature(self._class().__init__).parameters if name not in ours]

    def __call__(self, model: nn.Module) -> Optimizer:
        """Return the torch optimizer of that name."""
        groups = self.parameter_groups(model)
        if "weight_decay" not in inspect.signature(self._class().__init__).parameters:
            groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
        return self._class()(groups, lr=self.lr, **self.options)  # type: ignore[call-arg]


def _kind(value: Any) -> str:
    """Return which settings class a table, or an instance, is."""
    name = str(value.get("name", "sgd") if isinstance(value, dict) else getattr(value, "name", "")).lower()
    return name if name in _OURS else "other"


def _lower(value: Any) -> Any:
    """Let people write SGD for sgd."""
    if isinstance(value, dict) and _kind(value) != "other":
        return {**value, "name": _kind(value)}
    return value


OptimizerSettings = Annotated[
    Annotated[SGD, Tag("sgd")] | Annotated[AdamW, Tag("adamw")] | Annotated[Muon, Tag("muon")] | Annotated[Other, Tag("other")],
    Discriminator(_kind),
    BeforeValidator(_lower),
]
