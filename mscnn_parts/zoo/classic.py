"""The first design of the two-stage program: blocks of two convolutions, dropout, a wide dense layer."""

from __future__ import annotations

import keras


def build(x: keras.KerasTensor, categories: int, policy: str) -> keras.KerasTensor:
    """Scaled images (B, H, W, channels) -> logits (B, categories)."""
    layers = keras.layers
    for block, width in enumerate((32, 64, 128), start=1):
        for half in (1, 2):
            name = "features" if (block, half) == (3, 2) else f"block{block}" if half == 2 else None
            x = layers.Conv2D(width, 3, padding="same", activation="relu", dtype=policy, name=name)(x)
        x = layers.MaxPooling2D(2, dtype=policy)(x)
        x = layers.Dropout(0.25, dtype=policy)(x)
    x = layers.Flatten(dtype=policy)(x)
    x = layers.Dense(512, activation="relu", dtype=policy)(x)
    x = layers.Dropout(0.5, dtype=policy)(x)
    return layers.Dense(categories, dtype="float32", name="logits")(x)
