"""Backward from a sum with the gradient of its mean."""

import pytest
import torch

from torchrelay.train.step import backward_from_mean, mean_loss


@pytest.mark.parametrize("weight", [3.0, 7.0, torch.tensor(3.0), 1000.0])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_backward_from_the_sum_gives_the_bits_of_the_mean(weight, shape):
    both = []
    for share in (True, False):
        torch.manual_seed(0)
        x = torch.randn(100, requires_grad=True)
        loss = (x * torch.randn(100)).sin().sum().reshape(shape)
        if share:
            backward_from_mean(loss, weight)
            assert torch.equal(mean_loss(loss, weight), loss.detach() / weight)
            assert not mean_loss(loss, weight).requires_grad
        else:
            (loss / weight).backward()
        both.append(x.grad)
    assert torch.equal(*both)


def test_backward_from_a_tensor_without_gradient_is_refused():
    with pytest.raises(RuntimeError, match="does not require grad"):
        backward_from_mean(torch.tensor(1.0), 3.0)


def test_the_gradient_passes_through_the_scale_first():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    backward_from_mean((3 * x).sum(), 2.0, lambda first: 1024 * first)
    assert x.grad is not None
    assert x.grad.tolist() == [1536.0, 1536.0]
