"""The cost model's formulas equal what is sent."""

import sys
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks.scale import check, count, model
from benchmarks.scale.model import leaving, messages, sent
from torchrelay.distributed.replicas import add_neighbors

ROOT = Path(__file__).parents[2]

ELEMENTS = 67  # a multiple of no number of processes here but 1 and 67


def rows(processes):
    generator = torch.Generator().manual_seed(processes)
    return torch.randn(processes, ELEMENTS, generator=generator) * 10.0 ** torch.arange(ELEMENTS).remainder(7)


def check_counts(wire, phases, on_host):
    """Compare what each simulated process sent, and what left the busiest host."""
    for rank in range(wire.size):
        assert sum(wire.messages[rank].values()) == messages(phases)
        assert sum(wire.bytes[rank].values()) == sent(phases)
    assert wire.leaving(on_host) == leaving(phases)


def hosts(processes):
    """Every host size for which the all-reduce uses two levels."""
    return [1 << k for k in range(1, 6) if processes % (1 << k) == 0 and 1 << k < processes]


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize(
    "first", [*range(1, 33, 8), *(pytest.param(first, marks=pytest.mark.slow) for first in range(33, 64, 8))]
)
def test_tree_formulas_equal_the_simulated_counts_and_all_trees_have_the_same_bits(first, backend):
    for processes in range(first, first + 8):
        values = rows(processes)
        expected = add_neighbors(values.clone().unbind())
        wire, totals = count.simulate_tree(values, (processes,), backend)
        for on_host in {1, processes, *hosts(processes)}:
            check_counts(wire, model.tree(ELEMENTS, (processes,), on_host, backend), on_host)
        assert all(torch.equal(total[:ELEMENTS], expected) for total in totals)
        for on_host in hosts(processes):
            levels = (on_host, processes // on_host)
            wire, totals = count.simulate_tree(values, levels, backend)
            check_counts(wire, model.tree(ELEMENTS, levels, on_host, backend), on_host)
            assert all(torch.equal(total[:ELEMENTS], expected) for total in totals)


@pytest.mark.parametrize("levels", [(2, 2, 2), (4, 2, 4), (2, 8, 4), (8, 2, 3)])
def test_three_levels_give_the_bits_of_the_same_tree(levels):
    values = rows(prod(levels))
    wire, totals = count.simulate_tree(values, levels)
    check_counts(wire, model.tree(ELEMENTS, levels, levels[0]), levels[0])
    assert all(torch.equal(total[:ELEMENTS], add_neighbors(values.clone().unbind())) for total in totals)


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 12, 24, pytest.param(64, marks=pytest.mark.slow)])
def test_ring_formulas_equal_the_simulated_counts(processes):
    values = rows(processes)
    for on_host in [*hosts(processes), processes]:
        wire, totals = count.simulate_rings(values, (processes,))
        check_counts(wire, model.ring(ELEMENTS, processes, on_host), on_host)
        torch.testing.assert_close(totals[0][:ELEMENTS], values.sum(0), rtol=1e-4, atol=1.0)
        wire, totals = count.simulate_rings(values, (on_host, processes // on_host))
        check_counts(wire, model.hierarchical(ELEMENTS, on_host, processes // on_host), on_host)
        torch.testing.assert_close(totals[0][:ELEMENTS], values.sum(0), rtol=1e-4, atol=1.0)


def test_another_order_of_addition_gives_other_bits():
    """The comparison of bits above can fail: a ring adds in a different order."""
    values = rows(8)
    _, totals = count.simulate_rings(values, (8,))
    assert not torch.equal(totals[0][:ELEMENTS], add_neighbors(values.clone().unbind()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts what connections carry")
def test_the_kernels_counts_of_real_processes_equal_the_formulas(start, tmp_path):
    """Up to four processes, forked by one without threads of other tests: each byte of an all-reduce, link by link.

    From four processes on, the links in use depend on how sums are passed on.
    """
    script = tmp_path / "script.py"
    script.write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.scale import check, count, measure
found = {{size: count.fork(size, measure.collectives, pathlib.Path({str(tmp_path)!r})) for size in (1, 4)}}
counts = check.Counts()
print(check.links_table(counts, found))
assert counts.compared == 12 + 1 + 8 + 1 and not counts.wrong, counts.wrong
""")
    done = start(script=script).done()
    assert done.returncode == 0, done.stderr
    assert "| 4 | flat | 12 | 6,291,480 | 6,291,480 | 24 | " in done.stdout


def test_a_wrong_formula_is_reported():
    counts = check.Counts()
    wire, _ = count.simulate_tree(rows(4), (4,))
    check.compare(counts, "tree", wire, model.ring(ELEMENTS + 4, 4, 4), 4)
    assert len(counts.wrong) == 4  # the bytes of each process; as many messages as a ring
