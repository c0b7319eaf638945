"""Temperature scaling finds the temperature with which logits were distorted, and lowers the calibration error."""

import pytest
import torch

from torchrelay.report.export.calibration import calibration_error, fit_temperature, flat, negative_log_likelihood


def sampled(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `factor` times too large for the labels drawn from them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, dtype=torch.float64, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits * factor, labels


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_the_temperature_that_distorted_logits_is_found(factor):
    logits, labels = sampled(factor)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(factor, rel=0.05)
    best = negative_log_likelihood(logits, labels, temperature)
    assert all(negative_log_likelihood(logits, labels, temperature * f) > best for f in (0.95, 1.05))
    if factor != 1:
        assert calibration_error(logits, labels, temperature) < calibration_error(logits, labels) / 3


def test_labels_are_calibrated_by_their_own_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 2, generator=generator)
    labels = (torch.rand(20_000, 2, generator=generator) < logits.sigmoid()).float()
    logits, labels = flat(logits * 2, labels, "labels")
    assert fit_temperature(logits, labels) == pytest.approx(2, rel=0.06)
    assert calibration_error(logits, labels, 2) < calibration_error(logits, labels) / 3


def test_ignored_tokens_do_not_count():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [0, 4, -100]])
    kept, tokens = flat(logits, targets, "tokens")
    assert tokens.tolist() == [1, 2, 0, 4]
    assert torch.equal(kept[1], logits[0, 2].double())
    assert fit_temperature(*flat(torch.zeros(1, 1, 5), torch.zeros(1, 1).long(), "tokens")) > 0


def test_a_perfect_and_a_wrong_confidence_have_the_errors_0_and_1():
    sure = torch.eye(2, dtype=torch.float64) * 1000
    assert calibration_error(sure, torch.tensor([0, 1])) == pytest.approx(0)
    assert calibration_error(sure, torch.tensor([1, 0])) == pytest.approx(1)
