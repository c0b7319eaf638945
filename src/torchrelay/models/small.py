"""Step 3: our own networks, each short enough to read: `mlp`, `small-cnn`, `resnet18-small`, `fast-cnn`, `char-lm`.

Each builder takes the facts about the data (`classes`, `channels`, `image_size`) and its options by keyword.
Initial weights come from PyTorch's global generator, which the caller seeds. Add a network to `NETWORKS` below, or
keep it in a file of your own and pass that with `--code`.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrelay.errors import RelayError, UsageError
from torchrelay.models.convolution import Conv2d

# ------------------------------------------------------------------------------------------------ features, digits


def mlp(
    classes: int, channels: int = 1, image_size: int | None = None, widths: tuple[int, ...] = (256, 256)
) -> nn.Module:
    """Build a multi-layer perceptron: (batch, features) or (batch, channels, height, width) to (batch, classes).

    Args:
        classes: outputs.
        channels: of an image, or the number of features.
        image_size: height and width of an image; None for features.
        widths: of the hidden layers.
    """
    sizes = [channels * (image_size or 1) ** 2, *widths]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        layers[f"hidden{number}"] = nn.Linear(inputs, outputs)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
    layers["head"] = nn.Linear(sizes[-1], classes)
    return nn.Sequential(layers)


def small_cnn(
    classes: int, channels: int = 1, image_size: int | None = None, widths: tuple[int, ...] = (32, 64, 64)
) -> nn.Module:
    """Build a small convolutional network for images of 8 to 32 pixels; about 60,000 parameters by default.

    Each block is a 3x3 convolution, BatchNorm and ReLU; blocks are separated by 2x2 max-pools, so the image's side must
    be at least 2 ** (blocks - 1).

    Args:
        classes: outputs.
        channels: of an image.
        image_size: height and width; used only to reject images that are too small.
        widths: the channels of each block.
    """
    _require_size("small-cnn", image_size, 2 ** (len(widths) - 1))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(pairwise([channels, *widths]), 1):
        if number > 1:
            layers[f"pool{number - 1}"] = nn.MaxPool2d(2)
        layers[f"block{number}"] = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(widths[-1], classes)
    return nn.Sequential(layers)


# ------------------------------------------------------------------------------------------------ small photographs


def resnet18_small(classes: int, channels: int = 3) -> nn.Module:
    """Build torchvision's ResNet-18 for small images: a 3x3 stem of stride 1 and no max-pool (He et al., section 4.2).

    Its layer names are ResNet-18's own.
    """
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    model.maxpool = nn.Identity()
    return model


class FastCNN(nn.Module):
    """A whitened three-block convolutional network for 32x32 photographs, made to train in few epochs.

    After Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498): a 2x2 convolution that whitens
    the input's patches, of which only the bias is trained; three groups; a global max-pool; a scaled linear head.

    Args:
        classes: outputs.
        channels: of an image.
        widths: the channels of each group.
        scale: factor of the logits; small, so that the first steps don't overshoot.
    """

    def __init__(self, classes: int, channels: int, widths: tuple[int, ...], scale: float) -> None:
        super().__init__()
        filters = 2 * channels * _PATCH**2  # each direction and its negative, since GELU keeps one side
        self.whiten = nn.Conv2d(channels, filters, _PATCH)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]  # this convolution has one
        self.groups = nn.Sequential(*(_Group(inputs, outputs) for inputs, outputs in pairwise([filters, *widths])))
        self.head = nn.Linear(widths[-1], classes, bias=False)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to (batch, classes)."""
        x = self.groups(F.gelu(self.whiten(images)))
        x = F.max_pool2d(x, x.shape[-2:]).flatten(1)  # an adaptive pool has no deterministic backward on CUDA
        logits: Tensor = self.head(x) * self.scale
        return logits

    @torch.no_grad()
    def init_from(self, images: Tensor) -> None:
        """Set the whitening filters from normalized training images (samples, channels, height, width).

        Some thousand images are enough. The same images give the same filters.
        """
        filters = _whitening(images.cpu())
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


_PATCH = 2  # side of the whitened patches, in pixels
_VARIANCE_FLOOR = 5e-4  # added to each variance, so that directions with almost none don't amplify noise


def _whitening(images: Tensor) -> Tensor:
    """Return (directions, channels, patch, patch): filters whose responses to image patches have covariance one."""
    size = images.shape[1] * _PATCH**2
    total, products = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    count = 0
    for start in range(0, len(images), 256):  # in parts: the patches take eight times the images' memory
        part = images[start : start + 256]
        patches = part.double().unfold(2, _PATCH, 1).unfold(3, _PATCH, 1)  # (n, channels, rows, columns, patch, patch)
        flat = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)  # (patches, directions)
        total, products, count = total + flat.sum(0), products + flat.T @ flat, count + len(flat)
    mean = total / count
    variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    # An eigenvector's sign is arbitrary: make its largest entry positive, so that it is the same everywhere.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    filters: Tensor = (directions / (variances.clamp(min=0) + _VARIANCE_FLOOR).sqrt()).T
    return filters.reshape(-1, images.shape[1], _PATCH, _PATCH).float()


class _Group(nn.Sequential):
    """Convolution, pool, norm, GELU; convolution, norm, GELU: half the height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            OrderedDict(
                conv1=_identity_conv(inputs, outputs),
                pool=nn.MaxPool2d(2),
                norm1=_shift_norm(outputs),
                gelu1=nn.GELU(),
                conv2=_identity_conv(outputs, outputs),
                norm2=_shift_norm(outputs),
                gelu2=nn.GELU(),
            )
        )


def _identity_conv(inputs: int, outputs: int) -> Conv2d:
    """Build a 3x3 convolution whose first filters pass their input channels through."""
    conv = Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:inputs])
    return conv


def _shift_norm(channels: int) -> nn.BatchNorm2d:
    """Build a BatchNorm that learns only a shift and updates its running statistics quickly."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=1 - 0.6)
    norm.weight.requires_grad_(False)
    return norm


def fast_cnn(
    classes: int,
    channels: int = 3,
    image_size: int | None = None,
    widths: tuple[int, ...] = (64, 256, 256),
    scale: float = 1 / 9,
) -> nn.Module:
    """Build a `FastCNN`; call its `init_from` with training images before the first step."""
    _require_size("fast-cnn", image_size, 2 ** len(widths) + _PATCH - 1)
    return FastCNN(classes, channels, widths, scale)


def _require_size(name: str, image_size: int | None, least: int) -> None:
    if image_size is not None and image_size < least:
        raise UsageError(
            f"model '{name}' needs images of at least {least} pixels, not {image_size}: set fewer model.options.widths"
        )


# ------------------------------------------------------------------------------------------------ text


class CharLM(nn.Module):
    """A causal transformer over characters: (batch, length) int64 to logits (batch, length, vocabulary).

    Args:
        vocabulary: how many characters there are.
        width: of the residual stream.
        layers: how many blocks.
        heads: of each block's attention; must divide `width`.
        context: the maximum length.
        dropout: probability of dropout on each block's output.
        window: characters that the first block sees at each position: its own and those just before it, by a table of
            embeddings for each distance (as in Bengio et al., "A Neural Probabilistic Language Model", JMLR 2003).
            Otherwise attention has to learn first which characters are the last ones.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, context: int, dropout: float, window: int
    ) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.before = nn.ModuleList(nn.Embedding(vocabulary, width) for _ in range(window - 1))
        for embedding in (self.token, self.place, *self.before):
            # PyTorch's default of 1.0 would swamp the blocks' outputs.
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, length) to (batch, length, vocabulary); the logits at position i depend on tokens 0 to i."""
        length = tokens.shape[1]
        if length > self.context:
            raise RelayError(
                f"char-lm reads at most {self.context} characters, not {length}: set model.options.context"
            )
        x = self.token(tokens) + self.place(torch.arange(length, device=tokens.device))
        for distance, embedding in enumerate(self.before, 1):
            x = x + F.pad(embedding(tokens), (0, 0, distance, 0))[:, :length]  # the first ones have none before them
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class _Block(nn.Module):
    """Attention, then a two-layer perceptron, each on the normalized stream and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width), and back
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, length, width / heads)
            for part in self.query_key_value(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.drop(self.mix(attended.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.drop(self.perceptron(self.norm2(x)))
        return out


def char_lm(
    classes: int,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    context: int = 256,
    dropout: float = 0.0,
    window: int = 1,
) -> nn.Module:
    """Build a `CharLM`; `classes` is the size of its vocabulary."""
    if window < 1:
        raise UsageError(f"model 'char-lm' can't see {window} characters: set model.options.window to 1 or more")
    if width % heads:
        raise UsageError(f"model 'char-lm' can't divide a width of {width} among {heads} heads: choose a multiple")
    return CharLM(classes, width, layers, heads, context, dropout, window)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "small-cnn": small_cnn,
    "resnet18-small": resnet18_small,
    "fast-cnn": fast_cnn,
    "char-lm": char_lm,
}
