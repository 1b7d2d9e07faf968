"""Figures: arrays in, a Matplotlib Figure out; none is shown here."""

from __future__ import annotations

import functools
import unicodedata
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mscnn_parts.checks import check_categories_within, checked_labels, checked_pair
from mscnn_parts.data import Dataset
from mscnn_parts.decision import OUT_OF_DISTRIBUTION, Decisions
from mscnn_parts.metrics import aurc, calibration_error, reliability, risk_coverage
from mscnn_parts.settings import OTHER, MSCNNError

if TYPE_CHECKING:
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure

    from mscnn_parts.explanation import DecisionTrace
    from mscnn_parts.training import RetrainingResult


CAM_COLORMAP = "magma"  # perceptually uniform, and readable without color vision


def new_axes(rows: int = 1, columns: int = 1, width: float = 3.0, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    """A figure and its axes in a flat array; closed for pyplot, so that a notebook shows it only once."""
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False, layout="constrained",
        FigureClass=_figure_class(),
    )  # fmt: skip
    plt.close(figure)
    FigureCanvasAgg(figure)  # closing takes its canvas, without which each text is measured on a new, whole picture
    return figure, axes.ravel()


def _legend_below(figure, axis) -> None:
    """The legend of an axis in one row below the figure, where it hides no data."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


@functools.cache
def _figure_class() -> type:
    """Matplotlib's figure, made legible before it is drawn; no import at the top, for it takes a second."""
    from matplotlib.figure import Figure

    class LegibleFigure(Figure):
        def draw(self, renderer: RendererBase) -> None:
            make_legible(self)
            super().draw(renderer)

    return LegibleFigure


def make_legible(figure: Figure) -> None:
    """Draws all texts as they are: what is between two $ is no formula, and other scripts take a font that has them."""
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.text import Text

    texts = {text: set(filter(str.isprintable, text.get_text())) for text in figure.findobj(Text)}
    lacking = set().union(*texts.values()) - _characters_in(findfont(FontProperties()))
    fallback = _font_with("".join(sorted(lacking))) if lacking else None
    for text, characters in texts.items():
        if "$" in text.get_text() and "\\mathdefault" not in text.get_text():  # these are of logarithmic axes
            text.set_parse_math(False)
        if fallback and characters & lacking and fallback not in text.get_fontfamily():
            text.set_fontfamily([*text.get_fontfamily(), fallback])


@functools.cache
def _characters_in(font: str) -> frozenset[str]:
    """The characters that a font file has; none if it cannot be read."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(map(chr, get_font(font).get_charmap()))
    except Exception:  # of FreeType and of the file system: a font for the colors of emoji, one that has been deleted
        return frozenset()


@functools.cache
def _font_with(characters: str) -> str | None:
    """The installed font that has the most of these characters; None if none has any."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    wanted, families = set(characters), dict.fromkeys(font.name for font in fontManager.ttflist)
    lacks = {
        name: wanted - _characters_in(findfont(FontProperties(family=[name])))
        for name in families
        if not name.startswith("Last Resort")  # Matplotlib's, which has a box for every character
    }
    best = min(lacks, key=lambda name: len(lacks[name]))
    for script in sorted({unicodedata.name(character, "UNKNOWN").split()[0] for character in lacks[best]}):
        _warn_of_boxes(script)
    return best if lacks[best] < wanted else None


@functools.cache
def _warn_of_boxes(script: str) -> None:
    """Says, once, that a script cannot be drawn, in place of Matplotlib, which says it of each character and figure."""
    remedy = "Install one that does, such as one of Noto, and start Python anew."
    warnings.warn(f"No installed font has these {script} characters: figures show boxes there. {remedy}", stacklevel=2)
    warnings.filterwarnings("ignore", "Glyph .* missing from")


def _show_image(axis, image: np.ndarray, title: str = "") -> None:
    axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    longest = max(map(len, title.split("\n")))
    axis.set_title(title, fontsize=8 if longest <= 20 else max(5, 160 / longest))
    axis.set_axis_off()


def plot_images(images: np.ndarray, captions: Sequence[str], title: str = "", columns: int = 8) -> Figure:
    """A grid of uint8 images (N, H, W, channels), a caption above each."""
    if len(captions) != len(images):
        raise MSCNNError(f"{len(captions)} captions for {len(images)} images: give one of each image, '' for none.")
    columns = min(columns, max(4, len(images)))
    rows, lines = max(1, -(-len(images) // columns)), max((one.count("\n") + 1 for one in captions if one), default=0)
    figure, axes = new_axes(rows, columns, 1.25, 1.25 + 0.15 * lines)  # so that an image fills its width
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions):  # noqa: B905 - the last row may be short
        _show_image(axis, image, caption)
    figure.suptitle(title)
    return figure


def plot_samples(data: Dataset, columns: int = 8) -> Figure:
    """A row of train images for each category."""
    chosen = [np.flatnonzero(data.train.labels == c)[:columns] for c in range(len(data.category_names))]
    figure, axes = new_axes(len(chosen), columns, 0.9, 0.95)
    for axis in axes:
        axis.set_axis_off()
    for row, (indices, name) in enumerate(zip(chosen, data.category_names, strict=True)):
        for column, i in enumerate(indices):
            _show_image(axes[row * columns + column], data.train.images[i], name if column == 0 else "")
    figure.suptitle(f"{data.name}: {columns} train images of each category")
    return figure


def plot_augmentation(data: Dataset, columns: int = 8, rows: int = 3) -> Figure:
    """Train images (first column) as training sees them in different epochs."""
    import tensorflow as tf

    from mscnn_parts.layers import RandomFlipCrop

    chosen = data.train.images[:rows]
    layer, views = RandomFlipCrop(data.flip, quarter_turns=data.quarter_turns), [chosen]
    for epoch in range(columns - 1):
        layer.epoch.assign(epoch)
        views.append(layer(tf.constant(chosen), training=True).numpy().astype(np.uint8))
    images = np.stack(views, axis=1).reshape(-1, *data.input_shape)
    captions = ["original", *[f"epoch {e + 1}" for e in range(columns - 1)]] * rows
    return plot_images(images, captions, "Every epoch sees a slightly different picture", columns)


def plot_history(history: dict[str, dict]) -> Figure:
    """Loss and accuracy by epoch, train and calibration, a row per stage.

    Args:
        history: `{"stage1": {"loss": [...], "accuracy": [...], "val_loss": [...], "val_accuracy": [...]},
            "stage2": {category name: the same}}`; for Stage 2 the mean over the categories is drawn bold.
    """
    stages = [stage for stage in ("stage1", "stage2_base", "stage2") if history.get(stage)]
    figure, axes = new_axes(max(1, len(stages)), 2, 5, 2.8)
    titles = {
        "stage1": "Stage 1",
        "stage2_base": "Stage 2 base network",
        "stage2": "Stage 2 (thin: a category, thick: their mean)",
    }
    for row, stage in enumerate(stages):
        for column, measure in enumerate(("loss", "accuracy")):
            axis = axes[2 * row + column]
            runs = list(history[stage].values()) if stage == "stage2" else [history[stage]]
            for key, label, color in ((measure, "train", "C0"), (f"val_{measure}", "calibration", "C1")):
                _plot_runs(axis, [run[key] for run in runs if run.get(key)], label, color)
            axis.set(
                title=titles[stage],
                xlabel="epoch" if stage != "stage2" else "fifth of the training",
                ylabel=measure,
            )
            axis.xaxis.get_major_locator().set_params(integer=True)
            if np.ptp(axis.get_xlim()) < 1:  # a single epoch
                axis.set(xlim=(0.5, 1.5), xticks=[1])
            axis.grid(alpha=0.3)
    _legend_below(figure, axes[0])
    return figure


def _plot_runs(axis, runs: list[list[float]], label: str, color: str) -> None:
    for run in runs if len(runs) > 1 else []:
        axis.plot(range(1, len(run) + 1), run, color=color, alpha=0.4, linewidth=1)
    if runs:
        mean = np.mean(runs, axis=0)
        marker = "." if len(mean) > 1 else "o"  # a single epoch has no line
        axis.plot(range(1, len(mean) + 1), mean, color=color, marker=marker, label=label)


def plot_confusion(matrix: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """A confusion matrix (C+1, C+1) as a heat map; the color is the share of the row.

    Of many categories only the colors are shown, and not every name.
    """
    import seaborn

    matrix = np.asarray(matrix)
    labels = [*names, OTHER] if len(names) < len(matrix) else list(names)
    if matrix.shape != (len(labels), len(labels)) or matrix.dtype.kind not in "iu":
        raise MSCNNError(f"The matrix is {matrix.dtype} {matrix.shape}: use counts, integers, for {len(labels)} names.")
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    few, size = len(labels) <= 31, min(2 + 0.42 * len(labels), 20)  # inches; of eleven it fits a screen
    figure, (axis,) = new_axes(1, 1, size + 0.8, size)
    seaborn.heatmap(
        share, annot=matrix if few else None, fmt="d", cmap="Blues", vmin=0, vmax=1, ax=axis,
        linewidths=0.5 if few else 0, annot_kws={"fontsize": 8}, xticklabels=False, yticklabels=False,
        cbar_kws={"label": "share of the true category"},
    )  # fmt: skip
    named = np.arange(0, len(labels), -(-len(labels) // 80))
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(named + 0.5, [labels[i] for i in named])
    axis.set(title=title, xlabel="decided", ylabel="true")
    for label in axis.get_xticklabels():  # each ends at its column
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    axis.tick_params(axis="y", rotation=0)
    return figure


def plot_risk_coverage(
    curves: dict[str, tuple[np.ndarray, np.ndarray]], accepted: dict[str, np.ndarray] | None = None
) -> Figure:
    """Risk-coverage curves.

    Args:
        curves: label -> (confidence (N,), correct bool (N,)).
        accepted: label -> which images a decision accepts, bool (N,): a dot in its color. It lies on the curve if one
            threshold decides, and beside it if images are also rejected for another reason.
    """
    figure, (axis,) = new_axes(1, 1, 6, 4)
    for label, (confidence, correct) in curves.items():
        coverage, risk = risk_coverage(confidence, correct)
        (line,) = axis.plot(coverage, risk, label=f"{label} (AURC {aurc(confidence, correct):.4f})")
        chosen = np.asarray((accepted or {}).get(label, False))
        if chosen.any():
            axis.plot(chosen.mean(), 1 - np.asarray(correct)[chosen].mean(), "o", color=line.get_color())
    if accepted:
        axis.plot([], [], "o", color="grey", label="what decide() accepts")
    axis.set(xlabel="coverage: share of images accepted", ylabel="selective risk: errors among them", xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.set_title("Lower is better: fewer errors among the accepted images", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def plot_reliability(curves: dict[str, tuple[np.ndarray, np.ndarray]], bins: int = 10, few: int = 10) -> Figure:
    """Reliability diagram: accuracy against confidence; on the diagonal a confidence means what it says.

    Args:
        curves: label -> (confidence (N,) in 0..1, correct bool (N,)).
        few: a bin of fewer images is a small dot, which no line joins: its height is mostly chance.
    """
    figure, (axis, counts) = new_axes(1, 2, 4.5, 4)
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for label, (confidence, correct) in curves.items():
        mean, accuracy, count = reliability(confidence, correct, bins)
        error = calibration_error(confidence, correct, bins)
        many, rest = count >= few, (count > 0) & (count < few)
        (line,) = axis.plot(mean[many], accuracy[many], marker="o", label=f"{label} (ECE {error:.3f})")
        axis.plot(mean[rest], accuracy[rest], ".", color=line.get_color(), alpha=0.6)
        counts.stairs(count, np.linspace(0, 1, bins + 1), label=label, linewidth=1.5)
    axis.set(xlabel="confidence", ylabel="share of correct images", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axis.set_title(f"Reliability; small dots: fewer than {few} images")
    counts.set(xlabel="confidence", ylabel="images", yscale="log", title="How often each confidence occurs")
    counts.set_ylim(bottom=0.8)  # so that a bin of a few images does not look empty
    _legend_below(figure, axis)
    return figure


def plot_gallery(
    images: np.ndarray, decisions: Decisions, labels: np.ndarray, names: Sequence[str], title: str
) -> Figure:
    """Images with what was decided, how confidently, and what is true."""
    full, captions = [*names, OTHER], []
    labels = checked_labels(decisions.category, labels)
    check_categories_within(labels, len(full))
    fields = (decisions.category, decisions.stage1_category, decisions.confidence, decisions.reasons(), labels)
    for d, c, p, reason, t in zip(*fields, strict=True):
        verdict = full[d] if d == c else f"{full[d]} ({full[c]}?)"
        why = reason if reason == OUT_OF_DISTRIBUTION else f"confidence {_rounded_down(p)}"
        captions.append(f"{verdict}\n{why}\ntrue: {full[t]}")
    return plot_images(images, captions, title)


def _rounded_down(confidence: float) -> str:
    """In percent: neither above a threshold that it misses nor, short of certainty, 100 %."""
    return f"{np.floor(1000 * confidence) / 1000:.1%}"


def plot_thresholds(
    confidence: np.ndarray,
    correct: np.ndarray,
    thresholds: Sequence[float],
    marked: float | np.ndarray,
    split: str,
    rejected: np.ndarray | None = None,
) -> Figure:
    """What a threshold buys on the images of a split: coverage and selective accuracy.

    Args:
        marked: a threshold to mark, or several. rejected: images that are OTHER at any threshold, bool (N,).
    """
    confidence, correct = checked_pair(confidence, correct)
    figure, (axis,) = new_axes(1, 1, 6, 3.6)
    grid, marked = np.asarray(thresholds), np.unique(marked)
    accepted = confidence[None, :] >= grid[:, None]  # (thresholds, N)
    accepted &= True if rejected is None else ~rejected
    dotted = f"the threshold {marked[0]:.2f}" if len(marked) == 1 else "the thresholds of the categories"
    with np.errstate(invalid="ignore"):
        accuracy = (accepted & correct).sum(axis=1) / accepted.sum(axis=1)
    axis.plot(grid, accepted.mean(axis=1), label="coverage: accepted of all")
    axis.plot(grid, accuracy, label="selective accuracy: correct of the accepted")
    for threshold in marked:
        axis.axvline(threshold, color="grey", linestyle=":")
    axis.set(xlabel="threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title(f"What a threshold buys, {split} split; dotted: {dotted}", fontsize=10)
    axis.grid(alpha=0.3)
    _legend_below(figure, axis)
    return figure


def plot_retraining(results: Sequence[RetrainingResult]) -> Figure:
    """Log loss on the calibration split before and after retraining, side by side; hatched: rolled back."""
    figure, (axis,) = new_axes(1, 1, 2.5 + 1.2 * len(results), 3.4)
    place = np.arange(len(results))
    before = axis.bar(place - 0.2, [r.loss_before for r in results], 0.4, label="before", color="C7")
    after = axis.bar(place + 0.2, [r.loss_after for r in results], 0.4, label="retrained", color="C0")
    for bars in (before, after):
        axis.bar_label(bars, fmt="%.4f")
    axis.margins(y=0.12)  # room for the numbers
    labels = [f"{r.category}\n{'kept' if r.kept else 'rolled back'}" for r in results]
    axis.set_xticks(place, labels)
    axis.set(ylabel="log loss of the confidence (nats)", title="Calibration split: lower is better")
    _legend_below(figure, axis)
    for bar, result in zip(after, results, strict=True):  # after the legend, which takes the first bar as its sign
        bar.set(hatch="" if result.kept else "///", edgecolor="white")
    return figure


def plot_decision_traces(traces: Sequence[DecisionTrace]) -> Figure:
    """One row per image: picture, Stage 1's map, Stage 2's map, the top three and the verdict."""
    figure, axes = new_axes(max(1, len(traces)), 4, 2.3, 2.0)
    for axis in axes:
        axis.set_axis_off()
    for row, trace in enumerate(traces):
        picture, first, second, text = axes[4 * row : 4 * row + 4]
        _show_image(picture, trace.image, f"true: {trace.truth}" if trace.truth else "your image")
        for axis, heat, title in (
            (first, trace.stage1_map, "why this category"),
            (second, trace.stage2_map, "why correct"),
        ):
            _show_map(axis, trace.image, heat, f"Stage {1 + (axis is second)}\n{title}")
        top = "\n".join(f"{name} {p:.1%}" for name, p in trace.top3)
        text.text(0, 0.98, f"Stage 1\n{top}\nStage 2 alone: {trace.stage2_confidence:.0%}", va="top", fontsize=9)
        incorrect = trace.verdict not in (OTHER, trace.truth) and trace.truth
        color = "dimgrey" if trace.verdict == OTHER else "firebrick" if incorrect else "darkgreen"
        text.text(0, 0.02, _verdict(trace, bool(incorrect)), fontsize=11, weight="bold", color=color)
    return figure


def _verdict(trace: DecisionTrace, incorrect: bool) -> str:
    """In two lines; a confidence means nothing for what is out of distribution."""
    if trace.reason == OUT_OF_DISTRIBUTION:
        return f"{trace.verdict}\n{OUT_OF_DISTRIBUTION}"
    if trace.verdict == OTHER:
        return f"{trace.verdict}, {trace.reason}\n{trace.top3[0][0]}? {_rounded_down(trace.confidence)}"
    return f"{trace.verdict}{' ✗' if incorrect else ''}\n{_rounded_down(trace.confidence)}"


def _show_map(axis, image: np.ndarray, heat: np.ndarray, title: str) -> None:
    """A map (h, w) over its image, from nothing (transparent) to its largest value."""
    _show_image(axis, image, title)
    height, width = image.shape[:2]
    axis.imshow(
        heat / max(float(heat.max()), 1e-9), cmap=CAM_COLORMAP, alpha=0.6, vmin=0, vmax=1, interpolation="bilinear",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip
