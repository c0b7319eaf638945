"""Gradient checkpointing: the same bits with fewer activations in memory."""

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay.errors import UsageError
from torchrelay.run.terminal import Terminal


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.2)) for _ in range(4)))
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.norm(self.blocks(images.flatten(1))))


def trained(patterns: list[str], replicas: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = tr.models.recompute(Net(), patterns) if patterns else Net()
    train, _ = tr.data.digits()
    parallel = tr.ParallelSettings(replicas=replicas)
    tr.Trainer(model, train, epochs=1, batch_size=200, parallel=parallel, terminal=Terminal(quiet=True)).fit()
    return list(model.state_dict().values())


@pytest.mark.parametrize("replicas", [1, 4])
def test_recomputing_does_not_change_the_weights(replicas):
    for one, other in zip(trained([], replicas), trained(["blocks.*"], replicas), strict=True):
        assert torch.equal(one, other)


def test_fewer_activations_are_kept():
    def kept(patterns: list[str]) -> int:
        model, sizes = tr.models.recompute(Net(), patterns), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda t: t
        ):
            model(torch.randn(100, 64))
        return sum(sizes)

    assert kept(["blocks.*"]) < 0.7 * kept([])


def test_modules_that_do_not_exist_or_have_statistics_are_refused():
    with pytest.raises(UsageError, match=r"model.recompute: 'block.\*' matches no module"):
        tr.models.recompute(Net(), ["block.*"])
    with pytest.raises(UsageError, match="'norm' has running statistics, which a second pass would update again"):
        tr.models.recompute(Net(), ["norm"])


def test_a_recipe_may_ask_for_it():
    settings = tr.ModelSettings(name="mlp", recompute=["nothing.*"])
    with pytest.raises(UsageError, match=r"'nothing.\*' matches no module"):
        tr.models.build(settings, classes=3, channels=4, log=print)
