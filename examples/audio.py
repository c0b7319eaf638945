"""Audio classification: four waveforms of any pitch, in noise; the model computes their spectrogram."""

import torch
from torch import Tensor, nn

import torchrelay as tr

RATE, LENGTH = 8_000, 4_000
FORMS = ("sine", "square", "sawtooth", "chirp")


class Spectrogram(nn.Module):
    """Map sound (batch, samples) to its log power spectrogram (batch, 1, frequencies, frames)."""

    window: Tensor

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size), persistent=False)

    def forward(self, sound: Tensor) -> Tensor:
        found = torch.stft(sound, self.size, window=self.window, return_complex=True)
        return (found.abs().square() + 1e-4).log()[:, None]


def tones(samples: int, seed: int) -> tr.data.ArraySource:
    """Return sounds of half a second; the class is the waveform."""
    draw = torch.Generator().manual_seed(seed)
    labels, time = torch.arange(samples) % len(FORMS), torch.arange(LENGTH) / RATE
    pitch = 200 + 600 * torch.rand(samples, 1, generator=draw)
    phase = pitch * time + torch.rand(samples, 1, generator=draw)
    turn = 2 * torch.pi * phase
    forms = [turn.sin(), turn.sin().sign(), 2 * phase.frac() - 1, (turn * (1 + 2 * time)).sin()]
    sounds = torch.stack(forms)[labels, torch.arange(samples)]
    return tr.data.arrays(sounds + 0.3 * torch.randn(sounds.shape, generator=draw), labels, FORMS, "tones")


def main(run: str = "runs/audio", epochs: int = 6) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(
        Spectrogram(),
        nn.BatchNorm2d(1),
        nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, len(FORMS)),
    )  # fmt: skip
    trainer = tr.Trainer(
        model,
        tones(400, seed=0),
        tones(100, seed=1),
        optimizer=tr.optim.AdamW(lr=1e-2),
        schedule=tr.optim.Cosine(),
        epochs=epochs,
        batch_size=25,
        run=run,
    )
    return trainer.fit()["accuracy"]


if __name__ == "__main__":
    main()
