"""Draws hero.png, the picture at the top of the README: what the pretrained model accepts and what it rejects.

    python notebooks/images/hero.py

The images are drawn at random (seed 0) from CIFAR-10's test split; the last two of the rejected are synthetic.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import mscnn_helpers as mscnn

COLUMNS = 8


def chosen(decisions: mscnn.Decisions, reason: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of images that were decided on for this reason, (count,)."""
    return rng.choice(np.flatnonzero(decisions.reasons() == reason), count, replace=False)


def caption(reason: str, name: str, confidence: float) -> str:
    if reason == mscnn.ACCEPTED:
        return f"{name} {confidence:.0%}"
    guess = "" if reason == mscnn.OUT_OF_DISTRIBUTION else f"\n{name}? {confidence:.0%}"
    return f"{reason}{guess}"


def main() -> None:
    """Decides on the test split, and draws a row of accepted and a row of rejected images."""
    import matplotlib.pyplot as plt

    model, rng = mscnn.load_model("pretrained"), np.random.default_rng(0)
    test = mscnn.load_dataset("cifar10").test.images
    decisions = model.decide(test)
    counts = {mscnn.ACCEPTED: COLUMNS, mscnn.LOW_CONFIDENCE: 4, mscnn.OUT_OF_DISTRIBUTION: 2}
    indices = np.concatenate([chosen(decisions, reason, count, rng) for reason, count in counts.items()])
    synthetic = mscnn.synthetic_ood_images(test[:8])
    images = np.concatenate([test[indices], synthetic["uniform noise"][:1], synthetic["stripes"][2:3]])
    shown = model.decide(images)
    figure, axes = plt.subplots(2, COLUMNS, figsize=(11, 3.6), layout="constrained")
    for axis, image, reason, c, confidence in zip(
        axes.ravel(), images, shown.reasons(), shown.stage1_category, shown.confidence, strict=True
    ):
        axis.imshow(image, interpolation="nearest")
        color = "darkgreen" if reason == mscnn.ACCEPTED else "firebrick"
        axis.set_title(caption(reason, model.category_names[c], confidence), fontsize=9, color=color)
        axis.set_xticks([]), axis.set_yticks([])
    for axis, name, color in zip(axes[:, 0], ("accepted", "OTHER"), ("darkgreen", "firebrick"), strict=True):
        axis.set_ylabel(name, fontsize=13, color=color)
    figure.savefig(HERE / "hero.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
