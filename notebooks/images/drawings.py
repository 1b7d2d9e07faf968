"""Draws the SVG pictures of the lessons.

    python notebooks/images/drawings.py

Sizes of feature maps, the certificate's curve and the batch of a verifier come from the module, the pretrained model
and CIFAR-10's train split. Every drawing has a light panel of its own, so that it is legible on a dark page, too.
"""

import base64
import io
import sys
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import binom

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import mscnn_helpers as mscnn

INK, GREY, BLUE, ORANGE, GREEN, RED = "#22303c", "#6b7680", "#2f6fab", "#c8641b", "#2e7d4f", "#b3372f"
PALE = {GREY: "#e9ebed", BLUE: "#dce9f6", ORANGE: "#fbe5d2", GREEN: "#dcefe3", RED: "#f7dedb"}
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def text(
    x: float, y: float, words: object, size: int = 15, color: str = INK, anchor: str = "middle", bold=False
) -> str:
    """Lines of text; y is the middle of the first."""
    weight = ' font-weight="600"' if bold else ""
    lines = [
        f'<text x="{x:.1f}" y="{y + i * size * 1.3:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'dominant-baseline="central"{weight}>{escape(line)}</text>'
        for i, line in enumerate(str(words).split("\n"))
    ]
    return "".join(lines)


def box(x: float, y: float, width: float, height: float, color: str = BLUE, words: str = "", size: int = 15) -> str:
    """A rounded box with centered lines of text, the first in bold."""
    first, *rest = words.split("\n")
    top = y + height / 2 - len(rest) * size * 0.62
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="8"'
    shape = f'<rect {place} fill="{PALE[color]}" stroke="{color}" stroke-width="1.6"/>'
    lines = text(x + width / 2, top, first, size, bold=True) if first else ""
    return shape + lines + text(x + width / 2, top + size * 1.3, "\n".join(rest), size - 2) * bool(rest)


def arrow(*points: tuple[float, float], color: str = INK) -> str:
    corners = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{corners}" fill="none" stroke="{color}" stroke-width="1.8" marker-end="url(#head)"/>'


def line(x1: float, y1: float, x2: float, y2: float, color: str = GREY, dash: str = "") -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="1.4" stroke-dasharray="{dash}"/>'
    )


def photo(x: float, y: float, size: float, image: np.ndarray) -> str:
    """A uint8 image (H, W, 3), its pixels as they are."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    place = f'x="{x}" y="{y}" width="{size}" height="{size}" style="image-rendering:pixelated"'
    return f'<image {place} href="data:image/png;base64,{data}"/>'


def save(name: str, title: str, description: str, height: int, *parts: str) -> None:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" role="img" '
        f'font-family="{FONT}"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{INK}"/></marker></defs>'
        f'<rect width="760" height="{height}" rx="12" fill="#fcfbf8"/>'
    )
    (HERE / f"{name}.svg").write_text("\n".join([head, *parts, "</svg>\n"]), encoding="utf-8")


def two_stages() -> None:
    stack = "".join(box(190 + 6 * i, 152 - 6 * i, 150, 62) for i in (2, 1))
    save(
        "two_stages", "The two-stage classifier", "Stage 1 predicts, Stage 2 verifies, a threshold decides.", 270,
        box(24, 92, 96, 62, GREY, "image\nuint8"), arrow((120, 112), (155, 112), (155, 66), (190, 66)),
        arrow((120, 134), (155, 134), (155, 184), (190, 184)),
        box(190, 34, 150, 62, BLUE, "Stage 1 CNN\nwhich category?", 14), stack,
        box(190, 152, 150, 62, BLUE, "Stage 2 CNN of c\nis c correct?", 14),
        arrow((250, 96), (250, 138)), text(262, 118, "category c", 14, anchor="start"),
        box(410, 90, 150, 66, BLUE, "confidence\nP(c is correct)\ncalibrated"),
        arrow((340, 64), (485, 64), (485, 90)), text(412, 48, "margin", 14),
        arrow((352, 184), (485, 184), (485, 156)), text(412, 202, "log-odds", 14),
        box(640, 46, 96, 48, GREEN, "c"), box(640, 152, 96, 48, RED, "OTHER"),
        arrow((560, 110), (600, 110), (600, 70), (640, 70)), text(582, 52, "≥ threshold", 14),
        arrow((560, 136), (600, 136), (600, 176), (640, 176)), text(598, 194, "below", 14),
        text(380, 244, "An image that is out of distribution is OTHER at any threshold.", 14, GREY),
    )  # fmt: skip


def splits() -> None:
    cards = [
        ("train", 45_000, BLUE, "seen by the optimizer", "Which weights?"),
        ("calibration", 2_500, ORANGE, "seen by our choices", "Which epoch,\nwhich threshold?"),
        ("certification", 2_500, GREEN, "seen by nothing else", "What can be\nguaranteed?"),
        ("test", 10_000, RED, "seen once, at the end", "How good is it?"),
    ]
    parts, start = [text(24, 26, "CIFAR-10's 60,000 images, to scale", 14, GREY, "start")], 24.0
    for i, (name, count, color, who, question) in enumerate(cards):
        width, left = 712 * count / 60_000, 24 + 181 * i
        parts.append(f'<rect x="{start:.1f}" y="42" width="{width:.1f}" height="34" fill="{color}"/>')
        parts.append(line(round(start + width / 2, 1), 76, left + 84, 112, color))
        parts.append(box(left, 112, 169, 150, color))
        parts.append(text(left + 84, 134, name, 17, color, bold=True) + text(left + 84, 158, f"{count:,} images", 14))
        parts.append(text(left + 84, 184, who, 14) + text(left + 84, 216, question, 15, bold=True))
        start += width
    save("splits", "Four splits", "The four splits, their sizes, who sees each, and what each answers.", 280, *parts)


def feature_maps() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of Stage 1's feature maps on CIFAR-10, as Keras builds it."""
    cnn = mscnn.build_cnn("stage1", (32, 32, 3), 10, mscnn.STAGE1_WIDTHS, [0] * 3, [1] * 3, True, "float32")
    names = ("whitened", "block1", "block2", "block3", "pooled", "logits")
    return [("image", (32, 32, 3)), *((name, tuple(cnn.get_layer(name).output.shape[1:])) for name in names)]


def stage1_network() -> None:
    does = {
        "image": "uint8", "whitened": "2×2 kernel,\nfixed", "block1": "2 × conv 3×3,\nmaximum", "block2": "the same",
        "block3": "the same", "pooled": "mean over\npositions", "logits": "one dense\nlayer",
    }  # fmt: skip
    parts, previous = [], None
    for i, (name, shape) in enumerate(feature_maps()):
        x, side = 62 + 106 * i, 2.6 * shape[0] if len(shape) == 3 else 0
        depth = 3 + 9 * np.log2(shape[-1] / 3) / 6.4
        color = GREY if name in ("image", "whitened") else BLUE
        left, right, top = x - (side or 14) / 2, x + (side or 14) / 2, 92 - (side or 70 * (shape[-1] / 256) ** 0.4) / 2
        height = 2 * (92 - top)
        for k in range(3 if len(shape) == 3 else 1, 0, -1):  # a stack of channels, deeper where there are more
            shift = (k - 1) * depth / 2
            parts.append(
                f'<rect x="{left + shift:.1f}" y="{top - shift:.1f}" width="{right - left:.1f}" height="{height:.1f}" '
                f'rx="3" fill="{PALE[color]}" stroke="{color}" stroke-width="1.5"/>'
            )
        if previous:
            parts.append(arrow((round(previous + 14, 1), 92), (round(left - 4, 1), 92)))
        previous = right
        label = {"whitened": "whitening", "pooled": "mean"}.get(name, name.replace("block", "block "))
        parts.append(text(x, 158, label, 15, bold=True) + text(x, 180, " × ".join(map(str, shape)), 14, BLUE))
        parts.append(text(x, 204, does[name], 13, GREY))
    save("stage1_network", "Stage 1's network", "Feature maps of Stage 1 with their sizes.", 240, *parts)


def stage2_copies() -> None:
    parts = [box(20, 100, 186, 80, BLUE, "base network\nlearns all ten\ncategories once")]
    for i, name in enumerate(mscnn.CIFAR10_NAMES):
        x, y = (342, 550)[i // 5], 26 + 48 * (i % 5)
        parts.append(box(x, y, 190, 38, ORANGE) + text(x + 12, y + 19, name, 15, anchor="start", bold=True))
        parts.append(text(x + 178, y + 19, "correct?", 14, GREY, "end"))
    parts.append(arrow((206, 140), (334, 140)) + text(272, 118, "10 copies", 15, bold=True))
    parts.append(text(272, 160, "each learns\nits own question", 13, GREY))
    save("stage2_copies", "One base network, ten copies", "Every verifier starts as a copy.", 290, *parts)


def verifier_batch() -> None:
    """Some of a batch of the verifier of cat: what the pretrained Stage 1 nearly takes for cats.

    From the calibration split: it knows its train images too well to show the point.
    """
    model, data, cat = mscnn.load_model("pretrained"), mscnn.load_dataset("cifar10"), 3
    some = data.calibration
    z = model.stage1_logits(some.images).astype(np.float64)  # (N, C)
    probability = 1 / (1 + np.exp(-mscnn.log_odds(z, np.full(len(z), cat))))
    drawn = mscnn.sample_hard_negatives(some.labels, probability, cat, 12, np.random.default_rng(0))
    parts = []
    for row, (label, color) in enumerate((("positives\nlabel 1", GREEN), ("hard negatives\nlabel 0", RED))):
        parts.append(text(80, 66 + 126 * row, label, 15, color, bold=True))
        for k, i in enumerate(drawn[row::2][:6]):
            x, y = 160 + 98 * k, 24 + 126 * row
            parts.append(
                photo(x, y, 78, some.images[i]) + text(x + 39, y + 92, data.category_names[some.labels[i]], 14)
            )
            parts.append(text(x + 39, y + 109, f"'cat' {probability[i]:.0%}", 13, GREY) * row)
    save("verifier_batch", "A batch of the verifier of cat", "Six cats and six images taken for cats.", 274, *parts)


def frozen_and_free() -> None:
    parts = [text(182, 24, "before", 16, bold=True), text(578, 24, "after retraining ship and truck", 16, bold=True)]
    common = ("Stage 1", "base network", "OOD score", "shared fit")
    names = [*common, *mscnn.CIFAR10_NAMES]
    for side, left in enumerate((20, 416)):
        for i, name in enumerate(names):
            free = name in ("ship", "truck")
            x, y = left + 164 * (i % 2), 44 + 36 * (i // 2)
            color = ORANGE if free else GREY
            state = ("free" if free else "frozen") if side == 0 else ("new" if free else "same")
            parts.append(box(x, y, 160, 31, color) + text(x + 10, y + 16, name, 14, anchor="start", bold=free))
            parts.append(text(x + 151, y + 16, state, 13, color, "end", bold=free))
    parts.append(arrow((352, 165), (408, 165)))
    parts.append(
        text(
            380,
            312,
            "A name stands for the Stage 2 CNN and its calibration coefficients; 'same' is the same SHA-256.",
            13,
            GREY,
        )
    )
    save("frozen_and_free", "Frozen and free parts", "Two verifiers move, all else keeps its fingerprint.", 332, *parts)


def risk_coverage_eight() -> None:
    confidence = (0.99, 0.97, 0.95, 0.90, 0.84, 0.75, 0.62, 0.51)
    correct = np.array([True, True, True, False, True, True, False, True])
    _, risk = mscnn.risk_coverage(np.array(confidence), correct)
    errors = np.cumsum(~correct)
    parts = [text(24, 24, "sorted by confidence: accept the first k", 14, GREY, "start")]
    place = [(92 + 84 * k, 300 - 460 * risk[k]) for k in range(8)]
    for k, (x, y) in enumerate(place):
        color = GREEN if correct[k] else RED
        parts.append(box(x - 36, 40, 72, 52, color, f"{'✓' if correct[k] else '✗'}\n{confidence[k]:.2f}"))
        parts.append(line(x, 96, x, round(y - 8, 1), PALE[GREY]))
        parts.append(f'<circle cx="{x}" cy="{y:.1f}" r="5" fill="{BLUE}"/>')
        parts.append(text(x, y - 18, f"{errors[k]}/{k + 1}" if errors[k] else "0", 14, BLUE, bold=True))
        parts.append(text(x, 320, f"{k + 1}/8", 14))
    curve = " ".join(f"{x},{y:.1f}" for x, y in place)
    parts.append(f'<polyline points="{curve}" fill="none" stroke="{BLUE}" stroke-width="2"/>')
    parts += [line(56, 300, 716, 300, INK), text(386, 344, "coverage: share accepted", 14)]
    parts.append(f'<g transform="rotate(-90 34 220)">{text(34, 220, "selective risk", 14)}</g>')
    save("risk_coverage_eight", "A risk-coverage curve of eight images", "Risk after each accepted image.", 364, *parts)


def certificate() -> None:
    errors, accepted, delta = 2, 200, 0.05
    bound = mscnn.risk_upper_bound(errors, accepted, delta)
    rates = np.linspace(0, 0.06, 121)
    chance = binom.cdf(errors, accepted, rates)
    x, y = 80 + rates * 640 / 0.06, 250 - chance * 200
    at = 80 + bound * 640 / 0.06
    inside, beyond = rates <= bound, rates >= bound
    parts = [line(80, 250, 720, 250, INK), line(80, 50, 80, 250, INK)]
    area = [(at, 250), (at, 250 - delta * 200), *zip(x[beyond], y[beyond], strict=True), (720, 250)]
    parts.append(
        f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in area)}" fill="{PALE[RED]}" stroke="none"/>'
    )
    for chosen, color in ((inside, BLUE), (beyond, RED)):
        corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[chosen], y[chosen], strict=True))
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{color}" stroke-width="2.4"/>')
    parts += [
        line(80, 250 - delta * 200, round(at, 1), 250 - delta * 200, GREY, "4 4"),
        line(round(at, 1), 90, round(at, 1), 250, INK, "4 4"),
    ]
    parts += [text(70, 250 - 200 * p, f"{p:.0%}", 13, anchor="end") for p in (0.05, 0.5, 1)]
    parts += [text(80 + r * 640 / 0.06, 268, f"{r:.0%}", 13) for r in (0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06)]
    parts += [
        text(400, 294, "true risk of what is accepted", 14),
        text(at + 8, 84, f"bound {bound:.1%}", 15, bold=True, anchor="start"),
    ]
    luck = f"Were the true risk higher, at most {errors} errors\nin {accepted} would be a rarer luck than {delta:.0%}."
    parts.append(text(at + 22, 120, luck, 14, RED, "start"))
    parts.append(
        text(24, 24, f"probability of at most {errors} errors among {accepted} accepted images", 14, GREY, "start")
    )
    save(
        "certificate",
        "The bound of the certificate",
        "Where the binomial probability falls to delta lies the bound.",
        314,
        *parts,
    )


def colab_badge() -> None:
    """A badge that is there offline, too."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="118" height="22" role="img"><title>Open in Colab</title>'
    shapes = f'<desc>A badge</desc><rect width="118" height="22" rx="4" fill="{ORANGE}"/>'
    words = (
        f'<text x="59" y="15" font-size="12" fill="#fff" text-anchor="middle" font-family="{FONT}">Open in Colab</text>'
    )
    (HERE / "colab-badge.svg").write_text(f"{head}{shapes}{words}</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    for draw in (two_stages, splits, stage1_network, stage2_copies, verifier_batch, frozen_and_free,
                 risk_coverage_eight, certificate, colab_badge):  # fmt: skip
        draw()
