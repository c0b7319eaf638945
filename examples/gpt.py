"""A small GPT over characters, and a sample of what it generates; by default it reads the text of Python's help.

python examples/gpt.py TEXT
"""

import sys
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrelay as tr


class Block(nn.Module):
    """Causal attention, then a two-layer perceptron, both with pre-normalization and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        layers = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.perceptron = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width) -> the same
        parts = self.query_key_value(self.norm(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(found.transpose(1, 2).flatten(2))
        return x + self.perceptron(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Map characters (batch, length) to the logits (batch, length, vocabulary) of the next ones."""

    def __init__(self, vocabulary: int, length: int, width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.length, self.token, self.place = length, nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.place(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.blocks(self.token(tokens) + places))  # type: ignore[no-any-return]

    @torch.no_grad()
    def write(self, tokens: Tensor, count: int) -> Tensor:
        for _ in range(count):
            probabilities = self(tokens[:, -self.length :])[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
        return tokens


def main(path: str | None = None, run: str = "runs/gpt", epochs: int = 1, length: int = 64) -> float:
    if path is None:
        path = "help.txt"
        Path(path).write_text("\n".join(topics.topics.values()), encoding="utf-8")
    train, test = tr.data.text(path, length)
    torch.manual_seed(0)
    model = GPT(len(train.classes), length)
    optimizer, schedule = tr.optim.AdamW(lr=3e-3), tr.optim.Cosine(warmup="5%")
    trainer = tr.Trainer(
        model, train, test, task=tr.NextToken(), optimizer=optimizer, schedule=schedule, epochs=epochs, batch_size=64,
        run=run,
    )  # fmt: skip
    loss = trainer.fit()["loss"]
    written = model.eval().write(test.inputs[:1, :8].to(trainer.device.device), 200)[0]
    print("".join(train.classes[token] for token in written))
    return loss


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else None)
