"""Draws two pictures of the pretrained model on CIFAR-10's test split.

    python notebooks/images/hero.py

hero.png (README): what it accepts and what it rejects. The images are drawn at random, seed 0, the last of the
accepted from the mistakes; the last two of the rejected are synthetic. risk_coverage.png (docs/baselines.md): the two
stages against Stage 1's softmax.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import mscnn_helpers as mscnn
from mscnn_parts.metrics import risk_at_coverage

COLUMNS = 8


def caption(reason: str, name: str, confidence: float, truth: str) -> str:
    if reason == mscnn.ACCEPTED:
        return f"{name} {confidence:.0%}" + f"\n✗ {truth}" * (name != truth)
    guess = "" if reason == mscnn.OUT_OF_DISTRIBUTION else f"\n{name}? {confidence:.0%}"
    return f"{reason}{guess}"


def draw_decisions(model: mscnn.MultiStageCNN, test: mscnn.Split, decisions: mscnn.Decisions) -> None:
    """A row of accepted and a row of rejected images."""
    rng, reasons, names = np.random.default_rng(0), decisions.reasons(), [*model.category_names, mscnn.OTHER]
    accepted, correct = reasons == mscnn.ACCEPTED, decisions.stage1_category == test.labels
    groups = [(accepted, COLUMNS - 1), (accepted & ~correct, 1), (reasons == mscnn.LOW_CONFIDENCE, 4)]
    groups.append((reasons == mscnn.OUT_OF_DISTRIBUTION, 2))
    indices = np.concatenate([rng.choice(np.flatnonzero(group), count, replace=False) for group, count in groups])
    synthetic = mscnn.synthetic_ood_images(test.images[:8])
    images = np.concatenate([test.images[indices], synthetic["uniform noise"][:1], synthetic["stripes"][2:3]])
    truths = [names[label] for label in test.labels[indices]] + [mscnn.OTHER] * 2
    shown = model.decide(images)
    figure, axes = plt.subplots(2, COLUMNS, figsize=(11, 3.6), layout="constrained")
    fields = (axes.ravel(), images, shown.reasons(), shown.stage1_category, shown.confidence, truths)
    for axis, image, reason, c, confidence, truth in zip(*fields, strict=True):
        axis.imshow(image, interpolation="nearest")
        color = "darkgreen" if reason == mscnn.ACCEPTED and names[c] == truth else "firebrick"
        axis.set_title(caption(reason, names[c], confidence, truth), fontsize=9, color=color)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, name, color in zip(axes[:, 0], ("accepted", "OTHER"), ("darkgreen", "firebrick"), strict=True):
        axis.set_ylabel(name, fontsize=13, color=color)
    figure.savefig(HERE / "hero.png", dpi=110, facecolor="white")


def draw_risk_coverage(decisions: mscnn.Decisions, labels: np.ndarray, threshold: float) -> None:
    """Risk against coverage, from half of the images to all of them, in percent."""
    alone = decisions.single_view_logits.argmax(axis=1)
    softmax = mscnn.log_odds(decisions.single_view_logits, alone)
    curves = {
        "Stage 1, its softmax": (softmax, alone == labels, "C7"),
        "two stages": (decisions.confidence, decisions.stage1_category == labels, "C0"),
    }
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for name, (confidence, correct, color) in curves.items():
        coverage, risk = mscnn.risk_coverage(confidence, correct)
        axis.plot(100 * coverage, 100 * risk, color=color, linewidth=2)
        axis.annotate(name, (100, 100 * risk[-1]), (4, 0), textcoords="offset points", color=color, va="center")
    coverage = (decisions.confidence >= threshold).mean()
    risk = risk_at_coverage(decisions.confidence, decisions.stage1_category == labels, coverage)
    axis.plot(100 * coverage, 100 * risk, "o", color="C0")
    axis.annotate(f"threshold {threshold}", (100 * coverage, 100 * risk), (8, -12), textcoords="offset points")
    axis.set(xlim=(50, 100), xlabel="coverage: accepted images, %", ylabel="risk: incorrect among them, %")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "risk_coverage.png", dpi=110, facecolor="white", bbox_inches="tight")


def main() -> None:
    model, test = mscnn.load_model("pretrained"), mscnn.load_dataset("cifar10").test
    decisions = model.decide(test.images)
    draw_decisions(model, test, decisions)
    draw_risk_coverage(decisions, test.labels, model.threshold)


if __name__ == "__main__":
    main()
