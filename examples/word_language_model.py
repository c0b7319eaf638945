"""An LSTM language model over words; by default it reads the text of Python's help.

python examples/word_language_model.py TEXT
"""

import math
import re
import sys
from collections import Counter
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor, nn

import torchrelay as tr


class LanguageModel(nn.Module):
    """Map words (batch, length) to the logits (batch, length, vocabulary) of the next words."""

    def __init__(self, vocabulary: int, width: int = 128) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.memory, self.drop = nn.LSTM(width, width, batch_first=True), nn.Dropout(0.2)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.words.weight  # tied (Press and Wolf, 2017)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.drop(self.memory(self.drop(self.words(tokens)))[0]))  # type: ignore[no-any-return]


def windows(text: str, words: int, length: int) -> tuple[tr.data.ArraySource, tr.data.ArraySource]:
    """Return windows of the most frequent words, and their next words; every tenth window is for testing."""
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    vocabulary = ["?", *(word for word, _ in Counter(found).most_common(words - 1))]
    index = {word: number for number, word in enumerate(vocabulary)}
    tokens = torch.tensor([index.get(word, 0) for word in found])
    count = (len(tokens) - 1) // length
    inputs, targets = (tokens[start : start + count * length].view(count, length) for start in (0, 1))
    is_test = torch.arange(count) % 10 == 9
    parts = [(inputs[chosen], targets[chosen]) for chosen in (~is_test, is_test)]
    train, test = (tr.data.arrays(*part, classes=vocabulary, name="words") for part in parts)
    return train, test


def main(path: str | None = None, run: str = "runs/words", epochs: int = 4, words: int = 2000) -> float:
    text = Path(path).read_text(encoding="utf-8") if path else "\n".join(topics.topics.values())
    train, test = windows(text, words, length=32)
    torch.manual_seed(0)
    trainer = tr.Trainer(
        LanguageModel(len(train.classes)),
        train,
        test,
        task=tr.NextToken(),
        optimizer=tr.optim.AdamW(lr=4e-3, clip_norm=1.0),
        schedule=tr.optim.Cosine(),
        epochs=epochs,
        batch_size=32,
        run=run,
    )
    perplexity = math.exp(trainer.fit()["loss"])
    print(f"test perplexity {perplexity:.1f}")
    return perplexity


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else None)
