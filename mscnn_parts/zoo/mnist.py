"""Two networks for handwritten digits of 28 x 28 pixels, with and without BatchNormalization."""

from __future__ import annotations

import keras

from mscnn_parts.layers import BatchNormalization


def build(x: keras.KerasTensor, categories: int, policy: str, normalized: bool = False) -> keras.KerasTensor:
    """Scaled images (B, H, W, channels) -> logits (B, categories).

    Args:
        normalized: three padded 3 x 3 convolutions with BatchNormalization, in place of two unpadded 5 x 5 ones.
    """
    layers = keras.layers
    widths = (32, 64, 128) if normalized else (32, 64)
    for block, width in enumerate(widths, start=1):
        name = "features" if width == widths[-1] else f"block{block}"
        if normalized:
            x = layers.Conv2D(width, 3, padding="same", dtype=policy)(x)
            x = BatchNormalization(dtype=policy)(x)
        else:
            x = layers.Conv2D(width, 5, dtype=policy)(x)
        x = layers.ReLU(dtype=policy, name=name)(x)
        x = layers.MaxPooling2D(2, dtype=policy)(x)
    x = layers.Flatten(dtype=policy)(x)
    x = layers.Dense(256 if normalized else 128, dtype=policy)(x)
    x = BatchNormalization(dtype=policy)(x) if normalized else x
    x = layers.ReLU(dtype=policy)(x)
    x = layers.Dropout(0.5, dtype=policy)(x)
    return layers.Dense(categories, dtype="float32", name="logits")(x)
