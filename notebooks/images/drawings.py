"""Draws the SVG pictures of the lessons.

    python notebooks/images/drawings.py

Sizes of feature maps, the certificate's curve and the batch of a verifier come from the module, the pretrained model
and CIFAR-10's train split. Every drawing has a light panel of its own, so that it is legible on a dark page, too.
"""

import base64
import io
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.special import softmax
from scipy.stats import binom

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import mscnn_helpers as mscnn
from mscnn_parts.networks import STAGE1_WIDTHS
from mscnn_parts.sources import CIFAR10_NAMES
from mscnn_parts.thresholds import risk_upper_bound

INK, GREY, BLUE, ORANGE, GREEN, RED = "#22303c", "#545f6a", "#24609a", "#a34c0c", "#23683f", "#a32e27"
PALE = {GREY: "#e9ebed", BLUE: "#dce9f6", ORANGE: "#fbe5d2", GREEN: "#dcefe3", RED: "#f7dedb"}
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
STYLE = (  # a dark page gets a panel that is less glaring
    ".panel{fill:#fcfbf8;stroke:#d8d5cc}.photo{image-rendering:pixelated}"
    ".halo{stroke:#fcfbf8;stroke-width:4;stroke-linejoin:round;paint-order:stroke}"
    "@media (prefers-color-scheme: dark){.panel{fill:#efede7;stroke:#efede7}.halo{stroke:#efede7}}"
)


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
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"'
    shape = f'<rect {place} fill="{PALE[color]}" stroke="{color}" stroke-width="1.6"/>'
    lines = text(x + width / 2, top, first, size, bold=True) if first else ""
    return shape + lines + text(x + width / 2, top + size * 1.3, "\n".join(rest), size - 1) * bool(rest)


def corners(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def area(points: Iterable[tuple[float, float]], fill: str, stroke: str = "none") -> str:
    return f'<polygon points="{corners(points)}" fill="{fill}" stroke="{stroke}" stroke-linejoin="round"/>'


def path(points: Iterable[tuple[float, float]], color: str, width: float = 1.8, more: str = "") -> str:
    return f'<polyline points="{corners(points)}" fill="none" stroke="{color}" stroke-width="{width}"{more}/>'


def arrow(*points: tuple[float, float], color: str = INK) -> str:
    return path(points, color, more=' marker-end="url(#head)"')


def line(x1: float, y1: float, x2: float, y2: float, color: str = GREY, dash: str = "") -> str:
    return path([(x1, y1), (x2, y2)], color, 1.4, f' stroke-dasharray="{dash}"')


def bracket(left: float, right: float, y: float, words: str, color: str = GREY) -> str:
    """A brace over what lies between two places, with a label above."""
    brace = path([(left, y + 7), (left, y), (right, y), (right, y + 7)], color, 1.4)
    return brace + text((left + right) / 2, y - 14, words, 14, color, bold=True)


def dot(x: float, y: float, color: str) -> str:
    return f'<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{color}"/>'


def lock(x: float, y: float, color: str, shut: bool = True) -> str:
    """A padlock of 11 x 15 around (x, y)."""
    shackle = f"M{x - 3.2} {y - 1}v-3a3.2 3.2 0 0 1 6.4 0" + ("v3" if shut else "v0.6")
    body = f'<rect x="{x - 5.5}" y="{y - 1}" width="11" height="8" rx="2" fill="{color}"/>'
    return f'<path d="{shackle}" fill="none" stroke="{color}" stroke-width="1.8"/>{body}'


def photo(x: float, y: float, size: float, image: np.ndarray) -> str:
    """A uint8 image (H, W, 3), its pixels as they are."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    place = f'x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}"'
    return f'<image {place} class="photo" href="data:image/png;base64,{data}"/>'


def save(name: str, title: str, description: str, height: int, *parts: str) -> None:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" role="img" '
        f'font-family="{FONT}"><title>{escape(title)}</title><desc>{escape(description)}</desc><style>{STYLE}</style>'
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" '
        f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{INK}"/></marker></defs>'
        f'<rect class="panel" x=".5" y=".5" width="759" height="{height - 1}" rx="12"/>'
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
        ("train", 45_000, BLUE, "the optimizer", "Which weights?"),
        ("calibration", 2_500, ORANGE, "our choices", "Which epoch,\nwhich threshold?"),
        ("certification", 2_500, GREEN, "only the guarantee", "Which error rate\nis guaranteed?"),
        ("test", 10_000, RED, "only the last number", "How good is it,\nin the end?"),
    ]
    scale, bar = 712 / 60_000, 24.0
    edge = bar + 50_000 * scale
    parts = [bracket(bar, edge - 3, 40, "CIFAR-10's 50,000 train images, which we split in three")]
    parts.append(bracket(edge + 3, 736, 40, "its test images"))
    for i, (name, count, color, who, question) in enumerate(cards):
        width, left, middle = count * scale, 24 + 180 * i, 110 + 180 * i
        parts.append(area([(bar, 88), (bar + width, 88), (left + 168, 132), (left + 4, 132)], PALE[color]))
        parts.append(f'<rect x="{bar:.1f}" y="54" width="{width:.1f}" height="34" fill="{color}" stroke="#fcfbf8"/>')
        parts.append(box(left, 130, 172, 172, color))
        parts.append(text(middle, 154, name, 18, color, bold=True) + text(middle, 179, f"{count:,} images", 15))
        parts.append(text(middle, 213, "seen by", 14, GREY) + text(middle, 233, who, 14))
        parts.append(text(middle, 265, question, 15, bold=True))
        bar += width
    save(
        "splits", "Four splits",
        "A bar of 60,000 images to scale, and a card for each split: train, 45,000 images, seen by the optimizer; "
        "calibration, 2,500, seen by our choices; certification, 2,500, seen only by the guarantee; test, 10,000, "
        "seen only by the last number.", 320, *parts,
    )  # fmt: skip


def feature_maps() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of Stage 1's feature maps on CIFAR-10, as Keras builds it."""
    cnn = mscnn.build_cnn("stage1", (32, 32, 3), 10, STAGE1_WIDTHS, [0] * 3, [1] * 3, True, "float32")
    names = ("whitened", "block1", "block2", "block3", "pooled", "logits")
    return [("image", (32, 32, 3)), *((name, tuple(cnn.get_layer(name).output.shape[1:])) for name in names)]


def slab(x: float, y: float, shape: tuple[int, ...], color: str) -> tuple[str, float]:
    """A feature map (H, W, channels) as a block centered on (x, y), and half its width.

    Its thickness grows with the square root of the channels.
    """
    rows, columns, channels = shape
    thick, high, dx, dy = 2.2 * channels**0.5, 2.7 * rows, 1.0 * columns, 0.6 * columns
    left, right = x - (thick + dx) / 2, x + (thick - dx) / 2
    top, bottom = y - (high - dy) / 2, y + (high + dy) / 2
    front = area([(left, top), (right, top), (right, bottom), (left, bottom)], PALE[color], color)
    lid = area([(left, top), (left + dx, top - dy), (right + dx, top - dy), (right, top)], "#ffffff", color)
    side = area([(right, top), (right + dx, top - dy), (right + dx, bottom - dy), (right, bottom)], PALE[color], color)
    return f'<g stroke-width="1.5">{front}{lid}{side}</g>', (thick + dx) / 2


def stage1_network() -> None:
    does = {
        "image": "uint8",
        "whitened": "one 2 × 2\nconvolution",
        "pooled": "over all\npositions",
        "logits": "one dense\nlayer",
    }
    label = {"whitened": "whitening", "block1": "block 1", "block2": "block 2", "block3": "block 3", "pooled": "mean"}
    parts, previous, middle = [], None, 134
    for i, (name, shape) in enumerate(feature_maps()):
        x, color = 66 + 105 * i, GREY if name in ("image", "whitened") else BLUE
        if len(shape) == 3:
            drawn, half = slab(x, middle, shape, color)
        else:  # a column of values; of many only the first and the last
            half, few = 7, shape[0] <= 10
            cells = [k - shape[0] / 2 for k in range(shape[0])] if few else [*range(-6, -1), *range(1, 6)]
            place = [f'x="{x - half}" y="{middle + 9 * k:g}" width="{2 * half}" height="9"' for k in cells]
            drawn = "".join(f'<rect {at} fill="{PALE[color]}" stroke="{color}" stroke-width="1.2"/>' for at in place)
            drawn += "" if few else text(x, middle, "⋮", 20, color, bold=True)
        if previous:
            parts.append(arrow((previous + 6, middle), (x - half - 5, middle)))
        previous = x + half
        parts.append(drawn + text(x, 214, label.get(name, name), 15, bold=True))
        parts.append(text(x, 237, " × ".join(map(str, shape)), 14, BLUE) + text(x, 264, does.get(name, ""), 14))
    parts.append(bracket(126, 216, 48, "fixed", GREY) + lock(140, 34, GREY))
    parts.append(bracket(232, 530, 48, "trained", BLUE) + bracket(666, 726, 48, "trained", BLUE))
    block = "each: convolution 3 × 3, maximum 2 × 2,\nconvolution 3 × 3, with BatchNormalization\nand ReLU after both"
    parts.append(text(381, 264, block, 14))
    parts.append(
        text(
            380,
            326,
            "Height and depth show the positions of a feature map, thickness its channels.",
            14,
            GREY,
        )
    )
    shapes = "; ".join(f"{label.get(name, name)}: {' × '.join(map(str, shape))}" for name, shape in feature_maps())
    save("stage1_network", "Stage 1's network", f"Feature maps from left to right. {shapes}.", 346, *parts)


def stage2_copies() -> None:
    heads = ((104, "trunk"), (322, "ten copies"), (592, "ten verifiers"))
    parts = [text(x, 30, words, 16, bold=True) for x, words in heads]
    parts.append(
        text(592, 52, "fine-tuned, each on its own question", 14, GREY) + text(322, 52, "of the last block", 14, GREY)
    )
    parts.append(
        box(24, 188, 160, 88, BLUE, "blocks 1 and 2\ntrained on all\nten categories")
        + text(104, 52, "of the base network", 14, GREY)
    )
    parts.append(path([(184, 232), (222, 232)], INK) + path([(222, 85), (222, 379)], INK))
    for i, name in enumerate(CIFAR10_NAMES):
        y, article = 70 + 32.7 * i, "an" if name[0] in "aeiou" else "a"
        parts.append(arrow((222, y + 15), (269, y + 15)) + box(270, y, 104, 29, BLUE))
        parts.append(text(322, y + 15, "copy", 14) + arrow((374, y + 15), (447, y + 15)))
        parts.append(box(448, y, 288, 29, ORANGE) + text(462, y + 15, name, 15, anchor="start", bold=True))
        parts.append(text(722, y + 15, f"Is it {article} {name}?", 14, anchor="end"))
    save(
        "stage2_copies", "One trunk, ten branches",
        "A base network is trained once on all ten categories. All verifiers share its first two blocks. Its last "
        "block is copied ten times, and each copy is fine-tuned to verify one category.", 416, *parts,
    )  # fmt: skip


def verifier_batch() -> None:
    """Some of a batch of the verifier of ship, from the train split, with the pretrained Stage 1's probabilities.

    It shows the four negatives with the largest probability and tells the median of all 128: Stage 1 knows its train
    images so well that it takes hardly any for a ship.
    """
    model, train, ship = mscnn.load_model("pretrained"), mscnn.load_dataset("cifar10").train, 8
    probability = softmax(model.stage1_logits(train.images).astype(np.float64), axis=1)[:, ship]
    batch = mscnn.sample_hard_negatives(train.labels, probability, ship, 256, np.random.default_rng(0))
    positives, negatives = batch[0::2], np.unique(batch[1::2])
    negatives = negatives[np.argsort(-probability[negatives])]
    parts = [text(24, 28, "From a batch of 256 train images for the verifier of ship", 16, anchor="start", bold=True)]
    rows = (
        (positives, GREEN, "positives", "'ship' is correct.", "1"),
        (
            negatives,
            RED,
            "hard negatives",
            "'ship' is incorrect.\nShown: the four most\nship-like of 128.",
            "0",
        ),
    )
    for row, (images, color, name, why, label) in enumerate(rows):
        top = 52 + 172 * row
        parts.append(box(24, top, 712, 160, color) + text(40, top + 30, name, 17, color, "start", bold=True))
        parts.append(text(40, top + 58, why, 14, anchor="start"))
        parts.append(text(40, top + 128, f"label {label}", 15, color, "start", bold=True))
        for k, i in enumerate(images[:4]):
            x = 238 + 124 * k
            parts.append(photo(x, top + 12, 100, train.images[i]))
            parts.append(text(x + 50, top + 126, CIFAR10_NAMES[train.labels[i]], 14, bold=True))
            parts.append(text(x + 50, top + 145, f"P(ship) {probability[i]:.0%}", 14))
    typical = np.median(probability[batch[1::2]])
    note = f"P(ship) by Stage 1, which has learned these images: the median of the 128 negatives is {typical:.0%}."
    parts.append(text(380, 406, note, 14, GREY))
    names = ", ".join(CIFAR10_NAMES[train.labels[i]] for i in negatives[:4])
    save(
        "verifier_batch", "A batch of the verifier of ship",
        f"Four ships with label 1, and four hard negatives with label 0: {names}. Each with Stage 1's probability of "
        "ship.", 428, *parts,
    )  # fmt: skip


def frozen_and_free() -> None:
    wide = ("Stage 1", "base network", "OOD statistics", "shared calibration", "ship", "truck")
    parts = [text(192, 28, "before", 17, bold=True), text(568, 28, "after retraining ship and truck", 17, bold=True)]
    rows = [(name,) for name in wide[:4]]
    rows += [CIFAR10_NAMES[i : i + 2] for i in range(0, 8, 2)] + [(name,) for name in wide[4:]]
    for side, left in enumerate((24, 400)):
        parts.append(text(left, 206, "Stage 2: a CNN and its calibration per category", 14, GREY, "start"))
        for r, row in enumerate(rows):
            y, free, width = 52 + 35 * r + 32 * (r > 3), r > 7, (336, 166)[len(row) - 1]
            color = ORANGE if free else GREY
            for i, name in enumerate(row):
                x, shorter = left + 170 * i, len(row) == 2
                state = (("frozen", "free"), ("= same", "≠ new"))[side][free] + " fingerprint" * side * (not shorter)
                parts.append(box(x, y, width, 31, color) + text(x + 10, y + 16, name, 14, anchor="start", bold=free))
                parts.append(text(x + width - 9, y + 16, state, 14, color, "end", bold=free))
                if side == 0:
                    parts.append(lock(x + width - (56 if free else 66), y + 15, color, shut=not free))
    parts.append(arrow((364, 237), (396, 237)))
    save(
        "frozen_and_free", "Frozen and free parts",
        "Before: all parts are frozen but the Stage 2 CNNs and calibrations of ship and truck, which are free. After "
        "retraining: these two have new fingerprints, all frozen parts the same.", 452, *parts,
    )  # fmt: skip


def risk_coverage_eight() -> None:
    confidence = (0.99, 0.97, 0.95, 0.90, 0.84, 0.75, 0.62, 0.51)
    correct = np.array([True, True, True, False, True, True, False, True])
    _, risk = mscnn.risk_coverage(np.array(confidence), correct)
    errors = np.cumsum(~correct)
    place = [(126 + 81 * k, 330 - 540 * risk[k]) for k in range(8)]
    parts = [text(24, 26, "Eight images, the most confident first", 16, anchor="start", bold=True)]
    for tick in (0, 0.1, 0.2, 0.3):
        y = 330 - 540 * tick
        parts.append(
            line(88, y, 736, y, INK if tick == 0 else "#e3e0d8") + text(80, y, f"{tick:.0%}", 14, anchor="end")
        )
    for k, (x, y) in enumerate(place):
        color, mark = (GREEN, "✓") if correct[k] else (RED, "✗")
        parts.append(box(x - 36, 44, 72, 78, color) + text(x, 62, mark, 20, color, bold=True))
        parts.append(text(x, 84, "correct" if correct[k] else "incorrect", 14, color))
        parts.append(text(x, 106, f"{confidence[k]:.2f}", 15, bold=True) + line(x, 124, x, y - 32, "#b9bfc4", "2 4"))
    parts.append(path(place, BLUE, 2.4))
    for k, (x, y) in enumerate(place):
        aside = 12 * (k < 7 and risk[k + 1] > risk[k])  # the curve rises to the right
        parts.append(f'<g class="halo">{text(x - aside, y - 20, f"{errors[k]}/{k + 1}", 15, BLUE, bold=True)}</g>')
        parts.append(dot(x, y, BLUE) + text(x, 352, f"{k + 1}/8", 14))
    parts.append(text(410, 380, "coverage: how many of the eight are accepted", 15))
    parts.append(f'<g transform="rotate(-90 28 220)">{text(28, 220, "selective risk: errors / accepted", 15)}</g>')
    save(
        "risk_coverage_eight", "A risk-coverage curve of eight images",
        "Eight images sorted by confidence, the fourth and the seventh incorrect. The risk after each: "
        f"{', '.join(f'{e}/{k}' for k, e in enumerate(errors, start=1))}.", 404, *parts,
    )  # fmt: skip


def certificate() -> None:
    errors, accepted, delta = 2, 200, 0.05
    bound = risk_upper_bound(errors, accepted, delta)

    def at(rate: float, chance: float) -> tuple[float, float]:
        return 84 + rate * 640 / 0.06, 290 - chance * 220

    right, floor = at(0.06, 0)
    low, high = (
        [at(rate, binom.cdf(errors, accepted, rate)) for rate in np.linspace(*ends, 80)]
        for ends in ((0, bound), (bound, 0.06))
    )
    edge = at(bound, delta)
    title = f"How likely are at most {errors} errors among {accepted} accepted images?"
    parts = [text(24, 26, title, 16, anchor="start", bold=True)]
    for chance in (0.5, 1):
        y = at(0, chance)[1]
        parts.append(line(84, y, right, y, "#e3e0d8") + text(74, y, f"{chance:.0%}", 14, anchor="end"))
    parts.append(area([(edge[0], 64), (right, 64), (right, floor), (edge[0], floor)], PALE[RED]))
    parts.append(line(84, floor, right, floor, INK) + line(84, 64, 84, floor, INK))
    parts += [text(at(rate, 0)[0], floor + 19, f"{rate:.0%}", 14) for rate in np.arange(7) / 100]
    parts.append(line(84, edge[1], *edge, INK, "4 4") + line(edge[0], 64, edge[0], floor, INK, "4 4"))
    seen = at(errors / accepted, binom.cdf(errors, accepted, errors / accepted))
    parts.append(path(low, BLUE, 2.6) + path(high, RED, 2.6) + line(seen[0], seen[1], seen[0], floor, GREY, "2 4"))
    parts.append(
        dot(*seen, BLUE) + text(seen[0] + 14, seen[1] - 6, f"measured: {errors / accepted:.0%}", 15, BLUE, "start")
    )
    parts.append(dot(*edge, INK) + text(74, edge[1], f"{delta:.0%}", 14, anchor="end", bold=True))
    parts.append(text(edge[0] + 16, 90, f"bound {bound:.1%}", 17, RED, "start", bold=True))
    luck = f"With a true risk beyond the\nbound, so few errors have a\nprobability below {delta:.0%}."
    parts.append(text(edge[0] + 16, 119, luck, 15, anchor="start"))
    parts.append(text(404, floor + 44, "true risk among all images that would be accepted", 15))
    save(
        "certificate", "The bound of the certificate",
        f"The probability of at most {errors} errors among {accepted} accepted images falls as the true risk grows; "
        f"where it reaches {delta:.0%} lies the bound, {bound:.1%}. Beyond it the area is shaded.", 356, *parts,
    )  # fmt: skip


def schedule_optimizer_model() -> None:
    """Who moves the weights, and who only says how far."""
    rising = [(52 + 9 * i, 128 - 34 * (i / 4 if i < 4 else (15 - i) / 11)) for i in range(16)]
    save(
        "schedule_optimizer_model", "Schedule, optimizer, model",
        "The schedule reads the number of the step and hands the learning rate to the optimizer. The optimizer reads "
        "the gradient from the model and moves the model's weights. The schedule never touches the model.", 250,
        box(24, 52, 190, 96, ORANGE), text(119, 74, "schedule", 15, bold=True), path(rising, ORANGE, 2.4),
        box(286, 52, 190, 96, BLUE, "optimizer\ngradient → step\nkeeps momentum"),
        box(548, 52, 190, 96, GREEN, "model\nweights → loss\nloss → gradient"),
        arrow((214, 100), (286, 100)), text(250, 84, "rate", 14),
        arrow((476, 80), (548, 80)), text(512, 64, "step", 14),
        arrow((548, 122), (476, 122)), text(512, 138, "gradient", 14),
        arrow((381, 148), (381, 178), (119, 178), (119, 148)), text(250, 194, "number of the step", 14),
        text(380, 226, "The optimizer moves the weights. The schedule only changes how far a step goes.", 14, GREY),
    )  # fmt: skip


def where_to_look() -> None:
    rows = (
        ("loss is not finite", "weights and gradients", "learning rate, input range", RED),
        ("loss stays at log C", "dead units, then the labels", "learning rate, shuffled labels", RED),
        ("good while it trains,\npoor on train images after", "stored statistics", "BatchNormalization", ORANGE),
        ("good on train images,\npoor on others", "labels, number of images", "labels, augmentation", ORANGE),
        ("good on held-out images,\npoor in use", "copies between splits", "leak, easy negatives", BLUE),
    )
    heads = zip((124, 378, 628), ("symptom", "look first at", "usual cause"), strict=True)
    parts = [text(x, 28, words, 16, bold=True) for x, words in heads]
    for r, (symptom, look, cause, color) in enumerate(rows):
        y = 50 + 62 * r
        parts.append(box(20, y, 208, 52, color) + text(124, y + 26 - 9 * symptom.count("\n"), symptom, 14))
        parts.append(arrow((230, y + 26), (266, y + 26)) + box(270, y, 216, 52, GREY) + text(378, y + 26, look, 14))
        parts.append(arrow((488, y + 26), (518, y + 26)) + box(522, y, 218, 52, GREEN) + text(631, y + 26, cause, 14))
    spoken = ". ".join(f"{symptom}: {look}; {cause}".replace("\n", " ") for symptom, look, cause, _ in rows)
    save("where_to_look", "From the symptom to the first place to look", f"{spoken}.", 374, *parts)


def exercise_loop() -> None:
    parts = [
        box(20, 40, 150, 56, GREY, "your work"), arrow((172, 68), (216, 68)),
        box(220, 40, 190, 56, BLUE), text(315, 59, "check, as often as you like:\ncalibration images", 13),
        arrow((412, 68), (526, 68)), text(469, 56, "reached", 13),
        box(530, 40, 210, 56, GREEN), text(635, 59, "your last number:\ntest split, once", 14),
        arrow((315, 98), (315, 154), (172, 154)), text(243, 142, "not yet", 13),
        box(20, 128, 150, 52, ORANGE, "a hint"), arrow((95, 126), (95, 100)),
        arrow((370, 98), (370, 154), (526, 154)), text(449, 142, "out of reach here", 13),
        box(530, 128, 210, 52, RED), text(635, 145, "why: too few images,\nor no weights", 14),
    ]  # fmt: skip
    told = "Work, check on calibration images; not yet: a hint. Reached: the test split, once. Out of reach: why."
    save("exercise_loop", "How an exercise goes", told, 204, *parts)


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
                 risk_coverage_eight, certificate, schedule_optimizer_model, where_to_look, exercise_loop,
                 colab_badge):  # fmt: skip
        draw()
