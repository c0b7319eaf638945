"""Step 3: a convolution that computes its weight gradient in another way where PyTorch's is slow, or wrong.

On a CPU with AMX, PyTorch's kernel for that gradient accumulates a whole weight tensor per image. For small feature
maps with many channels, as deep in a network, that takes several times as long as the arithmetic: 67 ms for 1,000 maps
of 4x4 with 256 channels, 20 ms as a product. Lowering a convolution to a product is after Chellapilla et al., "High
Performance Convolutional Neural Networks for Document Processing" (IWFHR 2006).

On a CPU with AVX-512, oneDNN's kernel for bf16 reads memory that it didn't write where maps are narrower than the
stride (docs/evidence/kernels.md). Zeros that are part of the maps it does write.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from torchrelay.device.device import has_amx, has_only_avx2

_SMALL = 7 * 7  # pixels of a feature map up to which the product is faster, measured with 256 channels
_MANY = 128  # input channels from which it is faster


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, with a weight gradient that is faster for some feature maps, and right for others.

    It is faster for small maps with many channels, in bf16 autocast on a CPU with AMX, for channels-last inputs (batch,
    channels, height, width), a stride of 1 and no bias. Outputs are the same; gradients differ in their last bits.

    It is right for bf16 maps on a CPU that are narrower than the stride, such as maps of 1x1 with a stride of 2, where
    PyTorch's (2.15) may be anything. Otherwise PyTorch's kernels run.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 - PyTorch's name
        if reads_gaps(self, input.shape[-1]) and _is_bf16(input) and not has_only_avx2():
            above, aside = map(int, self.padding)
            padded = F.pad(input, (aside, aside, above, above))
            return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)
        if bias is not None or not (self._is_plain and _is_faster_for(input)):
            outputs: Tensor = super()._conv_forward(input, weight, bias)
            return outputs
        result: Tensor = _Convolution.apply(input.bfloat16(), weight.bfloat16(), self.padding)
        return result

    @property
    def _is_plain(self) -> bool:
        """Whether it has stride 1, one group and explicit zero padding."""
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1
        return plain and self.padding_mode == "zeros" and not isinstance(self.padding, str)


def reads_gaps(layer: nn.Module, width: int) -> bool:
    """Return whether oneDNN's kernel for bf16 weight gradients on AVX-512 reads memory that it didn't write.

    For each remainder by the stride, it copies the columns that have it, and their padding; it leaves out a remainder
    that no column has, and reads it all the same. A single tap reads one remainder only, dilated ones have another
    kernel, and padding that isn't of zeros is part of the maps.

    Args:
        layer: of any kind.
        width: the columns of its input, or of a transposed convolution's output.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d) or width >= layer.stride[-1]:
        return False
    is_affected = layer.kernel_size[-1] > 1 and layer.dilation[-1] == 1 and layer.groups < layer.in_channels
    return (
        is_affected and layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and layer.padding[-1] > 0
    )


def _is_faster_for(maps: Tensor) -> bool:
    """Return whether the product is faster for such feature maps, by our measurements."""
    if not torch.is_grad_enabled() or maps.shape[-2] * maps.shape[-1] > _SMALL or maps.shape[-3] < _MANY:
        return False
    if not torch.is_autocast_enabled("cpu") or not _is_bf16(maps):
        return False
    return maps.is_contiguous(memory_format=torch.channels_last) and has_amx()


def _is_bf16(maps: Tensor) -> bool:
    """Return whether a convolution of such maps computes in bf16 on the CPU, and is to be differentiated."""
    if maps.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if not torch.is_autocast_enabled("cpu"):
        return maps.dtype is torch.bfloat16
    return torch.get_autocast_dtype("cpu") is torch.bfloat16


def pad_narrow_maps(model: nn.Module) -> nn.Module:
    """Let a library's model compute its strided convolutions by `Conv2d`; return it.

    Args:
        model: it is changed in place; its parameters and their names stay. Only layers whose class is exactly
            `torch.nn.Conv2d` are replaced, and those with a stride of 1 stay: their bits can't change.
    """
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Conv2d and layer.stride[-1] > 1 and layer.kernel_size[-1] > 1:
                setattr(parent, name, _with_own_gradient(layer))
    return model


def _with_own_gradient(layer: nn.Conv2d) -> Conv2d:
    """Return a `Conv2d` that has the same parameters; it draws no random number."""
    new = Conv2d.__new__(Conv2d)
    vars(new).update(vars(layer))
    return new


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        """Map (batch, channels, height, width) as `F.conv2d` does."""
        ctx.save_for_backward(maps, weight)
        ctx.padding = padding
        return F.conv2d(maps, weight, padding=padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the maps, by PyTorch's kernel, and of the weights."""
        maps, weight = ctx.saved_tensors
        (gradient,) = gradients
        of_maps = of_weight = None
        if ctx.needs_input_grad[0]:
            of_maps = conv2d_input(maps.shape, weight, gradient, padding=ctx.padding)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(maps, gradient, weight.shape, ctx.padding)
        return of_maps, of_weight, None


def weight_gradient(maps: Tensor, gradient: Tensor, shape: torch.Size, padding: tuple[int, int]) -> Tensor:
    """Return the gradient of a convolution's weights.

    Args:
        maps: the input, (batch, channels, height, width).
        gradient: of the output, (batch, outputs, rows, columns).
        shape: of the weights, (outputs, channels, kernel height, kernel width).
        padding: zeros above and below, and on both sides.
    """
    outputs, channels, height, width = shape
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
    product = rows.T @ _patches(maps, height, width, padding)
    return product.view(outputs, height, width, channels).permute(0, 3, 1, 2)


def _patches(maps: Tensor, height: int, width: int, padding: tuple[int, int]) -> Tensor:
    """Return the receptive field of each output: (batch · rows · columns, height · width · channels)."""
    above, aside = padding
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, aside, aside, above, above)).contiguous()
    batch, rows, columns, channels = padded.shape
    windows = padded.as_strided(  # a row of a patch is contiguous in memory
        (batch, rows - height + 1, columns - width + 1, height, width * channels),
        (rows * columns * channels, columns * channels, channels, columns * channels, 1),
    )
    return windows.reshape(-1, height * width * channels)
