"""Draws the SVG pictures of the lesson on networks and transfer learning.

    python notebooks/images/network_drawings.py

All numbers are computed here: what a kernel puts out, what pooling leaves and how many weights a layer has.
"""

import numpy as np
from drawings import BLUE, GREEN, GREY, ORANGE, PALE, RED, area, arrow, box, bracket, line, lock, path, save, text

WHITE, RULE = "#ffffff", "#d8d5cc"
FREE, GROUPS = 3, 9  # the first group that is free in the second phase; all groups without the head


def number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def grid(x: float, y: float, values: np.ndarray, cell: float, fills, color: str = GREY, size: int = 15) -> str:
    """A table (rows, columns) of numbers; fills: a color for all cells or one for each. NaN stays empty."""
    fills = np.broadcast_to(fills, values.shape)
    parts = []
    for (row, column), value in np.ndenumerate(values):
        left, top = x + cell * column, y + cell * row
        place = f'x="{left:g}" y="{top:g}" width="{cell:g}" height="{cell:g}"'
        parts.append(f'<rect {place} fill="{fills[row, column]}" stroke="{color}" stroke-width="1.2"/>')
        if not np.isnan(value):
            parts.append(text(left + cell / 2, top + cell / 2, number(value), size))
    return "".join(parts)


def frame(x: float, y: float, size: float, color: str) -> str:
    """A thick square inside the edge of cells of a grid."""
    place = f'x="{x + 1:g}" y="{y + 1:g}" width="{size - 2:g}" height="{size - 2:g}"'
    return f'<rect {place} fill="none" stroke="{color}" stroke-width="2.4"/>'


def convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """What a kernel puts out at every position where all of it lies on the image."""
    return np.einsum("abij,ij->ab", np.lib.stride_tricks.sliding_window_view(image, kernel.shape), kernel)


def convolution() -> None:
    image = np.array([[1, 1, 2, 7, 8, 8], [1, 2, 1, 8, 8, 7], [2, 1, 1, 8, 7, 8],
                      [1, 1, 8, 7, 8, 8], [2, 8, 8, 8, 7, 8], [1, 7, 8, 8, 8, 7]])  # fmt: skip
    kernel = np.array([[-1, 0, 1]] * 3)
    outputs, (row, column) = convolved(image, kernel), (1, 1)
    products = (image[row : row + 3, column : column + 3] * kernel).ravel()
    cell, top, middle = 29, 62, 149
    fills = np.full(image.shape, WHITE, dtype=object)
    fills[row : row + 3, column : column + 3] = PALE[ORANGE]
    kept = np.full(outputs.shape, WHITE, dtype=object)
    kept[row, column] = PALE[GREEN]
    parts = [text(24, 28, "One 3 × 3 kernel at one place", 16, anchor="start", bold=True)]
    parts.append(grid(24, top, image, cell, fills) + frame(24 + cell * column, top + cell * row, 3 * cell, ORANGE))
    parts.append(text(216, middle, "×", 20, bold=True) + text(339, middle, "=", 20, bold=True))
    parts.append(grid(234, middle - 1.5 * cell, kernel, cell, PALE[ORANGE], ORANGE))
    parts.append(grid(357, middle - 2 * cell, outputs, cell, kept))
    parts.append(frame(357 + cell * column, middle + cell * (row - 2), cell, GREEN))
    for left, values, name in ((24, image, "image"), (234, kernel, "kernel"), (357, outputs, "outputs")):
        x = left + cell * values.shape[1] / 2
        parts.append(text(x, 258, name, 15, bold=True) + text(x, 279, " × ".join(map(str, values.shape)), 14, BLUE))
    terms = number(products[0]) + "".join(f" {'−' if value < 0 else '+'} {abs(value)}" for value in products[1:])
    parts.append(text(24, 312, "the nine products:", 14, GREY, "start") + text(156, 312, terms, 14, anchor="start"))
    parts.append(text(473, 312, f"= {outputs[row, column]}", 15, GREEN, "end", bold=True))
    parts.append(text(24, 337, "An output is large where dark turns to bright.", 14, GREY, "start"))

    seen, y, previous = [1 + 2 * layers for layers in (2, 1, 0)], 62, None  # each layer adds a pixel on each side
    parts.append(line(496, 20, 496, 352, RULE) + text(518, 28, "Two 3 × 3 convolutions", 16, anchor="start", bold=True))
    whose = ((BLUE, "pixels\nof the image"), (ORANGE, "outputs\nof the first"), (GREEN, "output\nof the second"))
    for side, (color, words) in zip(seen, whose, strict=True):
        left, right = 568 - 10 * side, 568 + 10 * side
        if previous:
            ends = zip(previous, (left, right), strict=True)
            parts += [line(above, y - 32, below, y, GREY, "3 3") for above, below in ends]
        parts.append(grid(left, y, np.full((side, side), np.nan), 20, PALE[color], color))
        count = f"{side} × {side}" if side > 1 else "1"
        parts.append(text(626, y + 10 * side - 9, f"{count} {words}", 14, color, "start", bold=True))
        y, previous = y + 20 * side + 32, (left, right)
    parts.append(text(518, 337, f"receptive field: {seen[0]} × {seen[0]} pixels", 14, GREY, "start"))
    save(
        "convolution", "A convolution",
        f"A 3 × 3 kernel lies on a 6 × 6 image; the sum of its nine products is {outputs[row, column]}, one number of "
        f"the 4 × 4 outputs. Beside it: an output of the second of two 3 × 3 convolutions sees {seen[1]} × {seen[1]} "
        f"outputs of the first, and through them {seen[0]} × {seen[0]} pixels of the image.", 360, *parts,
    )  # fmt: skip


def pooling() -> None:
    values = np.array([[1, 3, 0, 2], [5, 7, 4, 2], [6, 2, 9, 3], [0, 4, 1, 8]])
    windows = values.reshape(2, 2, 2, 2).swapaxes(1, 2)  # row, column, then the window's own rows and columns
    colors = np.array([[BLUE, ORANGE], [GREEN, RED]])
    fills = np.vectorize(PALE.get)(colors)
    cell, wide, top = 46, 55, 62
    parts = [text(380, 30, "a map of outputs", 16, bold=True)]
    parts.append(grid(288, top, values, cell, fills.repeat(2, 0).repeat(2, 1), size=17))
    for row, column in np.ndindex(2, 2):
        parts.append(frame(288 + 2 * cell * column, top + 2 * cell * row, 2 * cell, colors[row, column]))
    sides = (
        (130, -1, "maximum 2 × 2", "the strongest output of\neach window is kept", windows.max((2, 3))),
        (630, 1, "average 2 × 2", "each of the four outputs\ncounts a quarter", windows.mean((2, 3))),
    )
    middle = top + 2 * cell
    for x, way, name, does, pooled in sides:
        parts.append(text(x, 30, name, 16, bold=True))
        parts.append(grid(x - wide, middle - wide, pooled, wide, fills, size=17))
        for row, column in np.ndindex(2, 2):
            parts.append(frame(x + wide * (column - 1), middle + wide * (row - 1), wide, colors[row, column]))
        parts.append(arrow((380 + way * 100, middle), (x - way * 63, middle)))
        parts.append(text(x, 272, does, 14))
        parts.append(text(x, middle + 74, "2 × 2", 14, BLUE))
    parts.append(text(380, top + 4 * cell + 19, "4 × 4", 14, BLUE))
    parts.append(text(380, 322, "Pooling halves height and width and has no weights.", 14, GREY))
    told = ["; ".join(" ".join(map(number, row)) for row in pooled) for *_, pooled in sides]
    save(
        "pooling", "Maximum and average pooling",
        f"A 4 × 4 map of numbers in the middle. Left its 2 × 2 maximum pooling: {told[0]}. Right its 2 × 2 average "
        f"pooling: {told[1]}.", 344, *parts,
    )  # fmt: skip


def gradient(x: float, bottom: float, top: float) -> str:
    """A dashed orange arrow upward."""
    tip = area([(x - 5, top + 9), (x, top), (x + 5, top + 9)], ORANGE)
    return path([(x, bottom), (x, top + 8)], ORANGE, 2, ' stroke-dasharray="6 4"') + tip


def residual() -> None:
    parts = [line(372, 20, 372, 440, RULE)]
    for x, name, shortcut in ((180, "plain block", False), (540, "residual block", True)):
        parts.append(text(x, 30, name, 17, bold=True) + text(x, 62, "x", 16, bold=True))
        parts.append(arrow((x, 74), (x, 108)) + arrow((x, 166), (x, 194)))
        parts.append(box(x - 100, 108, 200, 58, BLUE, "convolution 3 × 3\nBatchNormalization, ReLU"))
        parts.append(box(x - 100, 194, 200, 58, BLUE, "convolution 3 × 3\nBatchNormalization"))
        if shortcut:
            parts.append(arrow((x, 252), (x, 289)) + text(x + 10, 269, "F(x)", 15, anchor="start", bold=True))
            circle = f'<circle cx="{x}" cy="304" r="15" fill="{PALE[GREEN]}" stroke="{GREEN}" stroke-width="1.8"/>'
            parts.append(circle + text(x, 304, "+", 20, GREEN, bold=True))
            parts.append(arrow((x, 88), (x + 134, 88), (x + 134, 304), (x + 15, 304)))
            parts.append(text(x + 74, 289, "x", 16, bold=True))
            parts.append(arrow((x, 319), (x, 356)) + text(x + 10, 336, "F(x) + x", 15, anchor="start", bold=True))
            parts.append(gradient(x + 154, 350, 76))
            turned = f"rotate(-90 {x + 174} 196)"
            parts.append(f'<g transform="{turned}">{text(x + 174, 196, "shortcut", 15, bold=True)}</g>')
        else:
            parts.append(arrow((x, 252), (x, 356)) + text(x + 10, 304, "F(x)", 15, anchor="start", bold=True))
        parts.append(gradient(x - 124, 350, 76) + box(x - 50, 356, 100, 34, BLUE, "ReLU"))
    parts.append(text(180, 418, "gradient: only through\nthe convolutions", 14, ORANGE))
    parts.append(text(555, 418, "gradient also flows\nthrough the shortcut", 14, ORANGE, bold=True))
    save(
        "residual", "A plain and a residual block",
        "Left a plain block: two convolutions, one after the other. Right a residual block: a shortcut carries its "
        "input x past the two convolutions and adds it to their output F(x). The gradient also flows through the "
        "shortcut.",
        460, *parts,
    )  # fmt: skip


def channels(x: float, color: str, count: int) -> tuple[str, list[float]]:
    """A column of squares for a map's channels, the first and the last of them, and their y."""
    places = [82, 112, 142, 202, 232] if count < 64 else [67, 97, 127, 157, 217, 247]
    gap = (places[-3] + places[-2]) / 2
    squares = [f'<rect x="{x - 10:g}" y="{y - 10}" width="20" height="20" rx="3" fill="{PALE[color]}" '
               f'stroke="{color}" stroke-width="1.6"/>' for y in places]  # fmt: skip
    name = text(x, 280, str(count), 15, color, bold=True) + text(x, 300, "channels", 14)
    return "".join(squares) + text(x, gap, "⋮", 20, color, bold=True) + name, places


def depthwise() -> None:
    before, after = 32, 64
    normal, depth, point = 3 * 3 * before * after, 3 * 3 * before, before * after
    parts = [line(314, 20, 314, 440, RULE)]
    maps = ((66, GREY, before), (262, BLUE, after), (370, GREY, before), (526, ORANGE, before), (694, BLUE, after))
    drawn = {x: channels(x, color, count) for x, color, count in maps}
    for left, right, every in ((66, 262, True), (370, 526, False), (526, 694, True)):
        pairs = [(a, b) for a in drawn[left][1] for b in drawn[right][1] if every or a == b]
        parts += [path([(left + 12, a), (right - 12, b)], "#8d969e", 1 if every else 2.2) for a, b in pairs]
    parts += [column for column, _ in drawn.values()]
    parts.append(text(164, 28, "normal convolution", 16, bold=True))
    parts.append(text(532, 28, "depthwise, then pointwise", 16, bold=True))
    heads = ((164, 280, "3 × 3"), (448, 280, "depthwise\n3 × 3"), (610, 280, "pointwise\n1 × 1"))
    parts += [text(x, y, words, 14, GREY) for x, y, words in heads]
    parts.append(box(24, 330, 272, 64, GREY, f"{normal:,} weights\n3 × 3 × {before} × {after}"))
    parts.append(box(332, 330, 190, 64, ORANGE, f"{depth:,} weights\n3 × 3 × {before}"))
    parts.append(box(546, 330, 190, 64, BLUE, f"{point:,} weights\n{before} × {after}"))
    parts.append(text(534, 362, "+", 18, bold=True))
    parts.append(text(160, 413, "Every filter sees every channel.", 14, GREY))
    parts.append(text(427, 413, "Each filter sees one channel.", 14, GREY))
    parts.append(text(641, 413, "This mixes the channels.", 14, GREY))
    total = f"{depth + point:,} weights together: {normal / (depth + point):.1f} times fewer"
    parts.append(text(534, 440, total, 14, GREEN, bold=True))
    save(
        "depthwise", "A depthwise separable convolution",
        f"Left a normal 3 × 3 convolution from {before} to {after} channels with {normal:,} weights; every filter sees "
        f"every channel. Right a depthwise 3 × 3 convolution, one filter per channel, with {depth:,} weights and a "
        f"pointwise 1 × 1 convolution with {point:,} weights.", 460, *parts,
    )  # fmt: skip


def unfreezing() -> None:
    left, step = 172, 52
    phases = (
        ("phase 1", "head only", GROUPS),
        ("phase 2", f"head +\ngroups {FREE}–{GROUPS - 1}", FREE),
    )
    tops, end = (66, 158), left + step * GROUPS
    parts = [text(left + 23, 36, "stem", 14, bold=True), text(end - 29, 36, "top", 14, bold=True)]
    parts.append(bracket(left + step, end - step - 6, 46, "EfficientNet's blocks"))
    parts.append(text(end + 54, 36, "new head", 14, bold=True))
    for top, (name, words, first) in zip(tops, phases, strict=True):
        parts.append(text(24, top + 16, name, 16, anchor="start", bold=True))
        parts.append(text(24, top + 38, words, 14, anchor="start"))
        for group in range(GROUPS + 1):
            x, free = left + step * group, group >= first
            wide, color = (46, 84)[group == GROUPS], ORANGE if free else GREY
            shift = 12 * (group == GROUPS)
            parts.append(box(x + shift, top, wide, 70, color))
            label = "head" if group == GROUPS else str(group)
            parts.append(text(x + shift + wide / 2, top + 24, label, 16, bold=free))
            parts.append(lock(x + shift + wide / 2, top + 50, color, shut=not free))
    always = left + step * FREE - 6
    parts.append(path([(left, 236), (left, 243), (always, 243), (always, 236)], GREY, 1.4))
    parts.append(text(left, 260, f"frozen in both phases: groups 0–{FREE - 1}", 14, GREY, "start", bold=True))
    for x, name, color in ((560, "frozen", GREY), (660, "free", ORANGE)):
        parts.append(box(x, 246, 28, 28, color) + lock(x + 14, 259, color, shut=name == "frozen"))
        parts.append(text(x + 36, 260, name, 14, color, "start", bold=name == "free"))
    save(
        "unfreezing", "Two phases of training",
        f"EfficientNet's groups 0, the stem, 1 to {GROUPS - 2}, its blocks, and {GROUPS - 1}, its top, and the new "
        f"head. Phase 1 trains only the head, phase 2 the head and groups {FREE} to {GROUPS - 1}. Groups 0 to "
        f"{FREE - 1} stay frozen.", 292, *parts,
    )  # fmt: skip


if __name__ == "__main__":
    for draw in (convolution, pooling, residual, depthwise, unfreezing):
        draw()
