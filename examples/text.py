"""Text instead of images: which package of Python's library is a piece of source from?

A text is uint8 like any image, its bytes [N, 1, 1, L]. With mean 0 and deviation 1 a network gets
these numbers as they are. text.yaml trains a small transformer from scratch on them.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn

PACKAGES = ("asyncio", "email", "multiprocessing", "xml")
LENGTH = 64


def load(split, pieces=400):
    """Return pieces of source [N, 1, 1, LENGTH] and the numbers of their packages; a fifth is test."""
    texts, labels = [], []
    for label, name in enumerate(PACKAGES):
        folders = importlib.util.find_spec(name).submodule_search_locations
        files = sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
        source = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
        whole = source[: len(source) // LENGTH * LENGTH].reshape(-1, 1, 1, LENGTH)
        chosen = np.linspace(0, len(whole) - 1, pieces).astype(int)
        texts.append(whole[chosen])
        labels.append(np.full(pieces, label))
    x, y = np.concatenate(texts), np.concatenate(labels)
    test = np.arange(len(y)) % 5 == 0
    return (x[test], y[test]) if split == "test" else (x[~test], y[~test])


class Classifier(nn.Module):
    def __init__(self, length, num_classes, width):
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        bytes_ = x.flatten(1).long().clamp(0, 255)  # tfkd also tries a network on random numbers
        return self.head(self.encoder(self.tokens(bytes_) + self.places).mean(dim=1))


def classifier(shape, num_classes, width=32):
    return Classifier(shape[2], num_classes, width)


def logits(config, network, images):
    """Return the logits of all test texts; `confirm` calls it once for each run."""
    return torch.cat([network(batch.float()) for batch in images.split(256)])
