"""The cost model's formulas say what is really sent."""

import sys
from math import prod
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are no part of the package

from benchmarks import scale_count, scale_model
from benchmarks.scale_model import leaving, messages, sent

from torchrelay.parallel import pairwise

ELEMENTS = 67  # a multiple of no number of processes here but 1 and 67


def rows(processes):
    generator = torch.Generator().manual_seed(processes)
    return torch.randn(processes, ELEMENTS, generator=generator) * 10.0 ** torch.arange(ELEMENTS).remainder(7)


def check(wire, phases, on_host):
    """What each simulated process really sent, and what left the busiest host."""
    for rank in range(wire.size):
        assert sum(wire.messages[rank].values()) == messages(phases)
        assert sum(wire.bytes[rank].values()) == sent(phases)
    assert wire.leaving(on_host) == leaving(phases)


def hosts(processes):
    """Every size of a host that the exchange would use two levels for."""
    return [1 << k for k in range(1, 6) if processes % (1 << k) == 0 and 1 << k < processes]


@pytest.mark.parametrize("first", range(1, 65, 8))
def test_formulas_are_what_the_simulation_counts_and_all_forms_of_the_tree_have_the_same_bits(first):
    for processes in range(first, first + 8):
        values = rows(processes)
        expected = pairwise(list(values.unbind()))
        wire, totals = scale_count.simulate_tree(values, (processes,))
        for on_host in {1, processes, *hosts(processes)}:
            check(wire, scale_model.tree(ELEMENTS, (processes,), on_host), on_host)
        assert all(torch.equal(total[:ELEMENTS], expected) for total in totals)
        for on_host in hosts(processes):
            levels = (on_host, processes // on_host)
            wire, totals = scale_count.simulate_tree(values, levels)
            check(wire, scale_model.tree(ELEMENTS, levels, on_host), on_host)
            assert all(torch.equal(total[:ELEMENTS], expected) for total in totals)


@pytest.mark.parametrize("levels", [(2, 2, 2), (4, 2, 4), (2, 8, 4), (8, 2, 3)])
def test_three_levels_are_the_same_tree(levels):
    values = rows(prod(levels))
    wire, totals = scale_count.simulate_tree(values, levels)
    check(wire, scale_model.tree(ELEMENTS, levels, levels[0]), levels[0])
    assert all(torch.equal(total[:ELEMENTS], pairwise(list(values.unbind()))) for total in totals)


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 12, 24, 64])
def test_formulas_of_rings_are_what_the_simulation_counts(processes):
    values = rows(processes)
    for on_host in [*hosts(processes), processes]:
        wire, totals = scale_count.simulate_rings(values, (processes,))
        check(wire, scale_model.ring(ELEMENTS, processes, on_host), on_host)
        torch.testing.assert_close(totals[0][:ELEMENTS], values.sum(0), rtol=1e-4, atol=1.0)
        wire, totals = scale_count.simulate_rings(values, (on_host, processes // on_host))
        check(wire, scale_model.hierarchical(ELEMENTS, on_host, processes // on_host), on_host)
        torch.testing.assert_close(totals[0][:ELEMENTS], values.sum(0), rtol=1e-4, atol=1.0)


def test_another_order_has_other_bits():
    """The comparison of bits above can fail: a ring adds in an order of its own."""
    values = rows(8)
    _, totals = scale_count.simulate_rings(values, (8,))
    assert not torch.equal(totals[0][:ELEMENTS], pairwise(list(values.unbind())))
