"""Draws two pictures of the pretrained model on CIFAR-10's test split.

    python notebooks/images/hero.py

hero.png (README): what it accepts and what it rejects. The images are drawn at random, seed 0; the last two of the
rejected are synthetic. risk_coverage.png (docs/baselines.md): the two stages against Stage 1's softmax.
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


def chosen(decisions: mscnn.Decisions, reason: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of images that were decided on for this reason, (count,)."""
    return rng.choice(np.flatnonzero(decisions.reasons() == reason), count, replace=False)


def caption(reason: str, name: str, confidence: float) -> str:
    if reason == mscnn.ACCEPTED:
        return f"{name} {confidence:.0%}"
    guess = "" if reason == mscnn.OUT_OF_DISTRIBUTION else f"\n{name}? {confidence:.0%}"
    return f"{reason}{guess}"


def draw_decisions(model: mscnn.MultiStageCNN, test: np.ndarray, decisions: mscnn.Decisions) -> None:
    """A row of accepted and a row of rejected images."""
    rng, counts = np.random.default_rng(0), {mscnn.ACCEPTED: COLUMNS, mscnn.LOW_CONFIDENCE: 4}
    counts[mscnn.OUT_OF_DISTRIBUTION] = 2
    indices = np.concatenate([chosen(decisions, reason, count, rng) for reason, count in counts.items()])
    synthetic = mscnn.synthetic_ood_images(test[:8])
    images = np.concatenate([test[indices], synthetic["uniform noise"][:1], synthetic["stripes"][2:3]])
    shown = model.decide(images)
    figure, axes = plt.subplots(2, COLUMNS, figsize=(11, 3.6), layout="constrained")
    fields = (axes.ravel(), images, shown.reasons(), shown.stage1_category, shown.confidence)
    for axis, image, reason, c, confidence in zip(*fields, strict=True):
        axis.imshow(image, interpolation="nearest")
        color = "darkgreen" if reason == mscnn.ACCEPTED else "firebrick"
        axis.set_title(caption(reason, model.category_names[c], confidence), fontsize=9, color=color)
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
    draw_decisions(model, test.images, decisions)
    draw_risk_coverage(decisions, test.labels, model.threshold)


if __name__ == "__main__":
    main()
