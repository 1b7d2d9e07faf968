"""A threshold to drag: images by confidence, as a figure that needs neither a kernel nor a widget library."""

from __future__ import annotations

import json
import zlib

import numpy as np

from mscnn_parts.checks import checked_pair

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 230, 50, 28  # of the drawing, in pixels; the plot begins at LEFT and ends at BOTTOM


class ThresholdExplorer:
    """A slider over images by confidence: what a threshold accepts, and how much of that is correct.

    Shown by a notebook as HTML; where scripts do not run, its drawing alone.

    Args:
        confidence: float (N,) in 0..1. correct: bool (N,).
        threshold: where the slider starts; of thresholds by category, their mean.
        rejected: images that are OTHER at any threshold, bool (N,).
    """

    def __init__(
        self,
        confidence: np.ndarray,
        correct: np.ndarray,
        threshold: float | np.ndarray,
        rejected: np.ndarray | None = None,
    ):
        confidence, correct = checked_pair(confidence, correct, share=True)
        remaining = slice(None) if rejected is None else ~np.asarray(rejected)
        self.images, self.confidence, self.correct = len(confidence), confidence[remaining], correct[remaining]
        self.threshold = float(np.mean(threshold))

    def __repr__(self) -> str:
        accepted = self.confidence >= self.threshold
        correct = f"{self.correct[accepted].mean():.1%} of them correct" if accepted.any() else "nothing to measure"
        return f"threshold {self.threshold:.4f}: {accepted.sum() / max(1, self.images):.1%} accepted, {correct}"

    def _repr_html_(self) -> str:
        values = {"right": self.confidence[self.correct], "wrong": self.confidence[~self.correct]}
        data = {name: np.sort(part).round(4).tolist() for name, part in values.items()}
        data["all"] = self.images
        name = f"explorer{zlib.crc32(json.dumps([data, self.threshold]).encode())}"
        script = _SCRIPT.replace("DATA", json.dumps(data)).replace("NAME", name)
        return (
            f'<div id="{name}" style="width:{WIDTH}px;background:#fff;color:#222;padding:8px;font:14px sans-serif">'
            f"<div>{self!r}</div>{self._drawing()}"
            f'<input type="range" min="0" max="1" step="0.0001" value="{self.threshold:.4f}" hidden '
            f'style="width:{WIDTH - LEFT}px;margin-left:{LEFT}px"></div><script>{script}</script>'
        )

    def _drawing(self) -> str:
        """Histograms of correct and incorrect images as SVG, the images on a logarithmic axis; gray is OTHER."""
        edges = np.linspace(0, 1, 21)
        top = np.log10(1 + max(10, len(self.correct)))
        scale = (HEIGHT - BOTTOM - 10) / top
        parts = [_text(LEFT + x * (WIDTH - LEFT), HEIGHT - 8, f"{x:g}", "middle") for x in (0.25, 0.5, 0.75)]
        parts += [
            _text(LEFT - 6, _up(np.log10(1 + n) * scale) + 4, n, "end") for n in (0, 1, 10, 100, 1000) if n < 10**top
        ]
        x = LEFT + edges * (WIDTH - LEFT)
        for flag, color in ((True, "#1f77b4"), (False, "#d62728")):
            counts, _ = np.histogram(self.confidence[self.correct == flag], edges)
            height = _up(np.log10(1 + counts) * scale)
            corners = [f"{x[i + j]:.1f},{y:.1f}" for i, y in enumerate(height) for j in (0, 1)]
            parts.append(f'<polyline points="{" ".join(corners)}" fill="none" stroke="{color}" stroke-width="2"/>')
        gray = self.threshold * (WIDTH - LEFT)
        parts.append(
            f'<rect x="{LEFT}" y="10" width="{gray:.1f}" height="{HEIGHT - BOTTOM - 10}" fill="#888" opacity=".25"/>'
        )
        parts.append(_text(LEFT + 8, 26, "Stage 1 is correct", fill="#1f77b4"))
        parts.append(_text(LEFT + 8, 44, "Stage 1 is incorrect", fill="#d62728"))
        parts.append(_text(WIDTH, HEIGHT - 8, "confidence", "end"))
        return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{self!r}">{"".join(parts)}</svg>'


def _up(height):
    """The y of what stands so many pixels above the axis."""
    return HEIGHT - BOTTOM - height


def _text(x: float, y: float, text: object, anchor: str = "start", fill: str = "#222") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{fill}" font-size="13">{text}</text>'


_SCRIPT = """
(() => {
  const box = document.getElementById("NAME"), data = DATA;
  const [text, slider, gray] = [box.querySelector("div"), box.querySelector("input"), box.querySelector("rect")];
  const percent = x => (100 * x).toFixed(1) + "%";
  slider.hidden = false;
  slider.oninput = () => {
    const t = Number(slider.value), count = part => part.filter(x => x >= t).length;
    const right = count(data.right), taken = right + count(data.wrong);
    const accuracy = taken ? percent(right / taken) + " of them correct" : "nothing to measure";
    text.textContent = `threshold ${t.toFixed(4)}: ${percent(taken / data.all)} accepted, ${accuracy}`;
    gray.setAttribute("width", t * WIDTH);
  };
})();
""".replace("WIDTH", str(WIDTH - LEFT))
