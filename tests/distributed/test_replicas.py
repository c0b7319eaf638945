"""Replicas: how a batch is split, and the one tree that adds their gradients."""

import pytest
import torch

from torchrelay.distributed.replicas import GradientTree, ParallelSettings, count_replicas
from torchrelay.errors import UsageError


def tree_of(leaves: list[torch.Tensor | None]) -> torch.Tensor | None:
    tree = GradientTree()
    for leaf in leaves:
        tree.add([leaf])
    return tree.total()[0]


def pairwise(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The tree by its definition: halves, added."""
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return pairwise(leaves[:half]) + pairwise(leaves[half:])


@pytest.mark.parametrize("replicas", [1, 2, 4, 8, 16])
def test_the_sum_has_the_bits_of_the_balanced_tree(replicas):
    leaves = list(torch.randn(replicas, 1000))
    assert torch.equal(tree_of(leaves), pairwise(leaves))
    if replicas > 2:
        assert not torch.equal(pairwise(leaves), torch.stack(leaves).flip(0).cumsum(0)[-1])  # the order does matter


def test_the_leaves_may_arrive_in_reverse_order():
    leaves = list(torch.randn(8, 1000))
    assert torch.equal(tree_of(leaves), tree_of(leaves[::-1]))


def test_the_parts_of_two_devices_are_nodes_of_the_tree():
    leaves = list(torch.randn(8, 1000))
    assert torch.equal(tree_of(leaves), tree_of(leaves[:4]) + tree_of(leaves[4:]))


def test_a_missing_gradient_counts_as_exact_zeros():
    leaf = torch.tensor([1.0, -0.0])
    for leaves in ([leaf, None], [None, leaf]):
        total = tree_of(leaves)
        assert total.tolist() == [1.0, 0.0]
        assert not torch.signbit(total[1]), "a sum with zero has no negative zero"


def test_a_parameter_that_no_replica_used_has_no_gradient():
    assert tree_of([None, None, None, None]) is None


def test_any_number_of_leaves_is_added():
    leaves = [torch.tensor([float(2**i)]) for i in range(7)]
    assert tree_of(leaves).item() == 127.0


def test_an_exact_run_needs_a_power_of_two():
    assert count_replicas(ParallelSettings(replicas=8), 1, exact=True) == 8
    assert count_replicas(ParallelSettings(replicas=6), 1, exact=False) == 6
    with pytest.raises(UsageError, match=r"parallel\.replicas is 6: .* such as 4 or 8; or --set run\.exact=false"):
        count_replicas(ParallelSettings(replicas=6), 1, exact=True)


def test_an_impossible_number_of_devices_lists_the_possible_ones():
    assert count_replicas(ParallelSettings(replicas=8), 4, exact=True) == 8
    with pytest.raises(
        UsageError,
        match=r"3 devices can't share a run of 8 replicas: resume it with 1, 2, 4 or 8, start one with "
        r"--set parallel\.replicas=4, or give up exactness by --set run\.exact=false",
    ):
        count_replicas(ParallelSettings(replicas=8), 3, exact=True)
    with pytest.raises(UsageError, match="2 devices can't share a run of 1 replica: resume it with 1, start"):
        count_replicas(ParallelSettings(replicas=1), 2, exact=True)


def test_the_number_of_replicas_defaults_to_the_number_of_devices():
    assert [count_replicas(ParallelSettings(), devices, exact=True) for devices in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert count_replicas(ParallelSettings(), 3, exact=False) == 3
    with pytest.raises(UsageError, match=r"over 3 devices: use 2 or 4, or --set run\.exact=false$"):
        count_replicas(ParallelSettings(), 3, exact=True)
    assert count_replicas(ParallelSettings(replicas=8), 4, exact=True) == 8
    assert count_replicas(ParallelSettings(replicas=8), 3, exact=False) == 3
