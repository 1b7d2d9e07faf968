"""Pictures of all kinds as uint8 arrays: one file, or folders of them."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

import numpy as np

from mscnn_parts.data import IMAGE_SIZE, RawData
from mscnn_parts.downloads import cache_folder
from mscnn_parts.files import digest_of, path_from
from mscnn_parts.on_disk import file_of, indexed
from mscnn_parts.settings import MSCNNError

if TYPE_CHECKING:
    from PIL import Image

Picture: TypeAlias = Union[str, os.PathLike, np.ndarray, "Image.Image"]
Images: TypeAlias = Picture | Sequence[Picture]


def as_uint8(images: np.ndarray, name: str) -> np.ndarray:
    """Gray or RGB images as uint8 (N, H, W, channels); floats up to a thousandth outside their range are clipped."""
    shape, floats = images.shape, images.dtype.kind == "f"
    rows = len(shape) == 3 and shape[2] == 3 != shape[1]  # (N, pixels, 3)
    images = images[..., None] if images.ndim == 3 and not rows else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.size == 0:
        remedies = {
            f": {name}.reshape undoes the flattening": rows or len(shape) == 2,
            f": {name}[..., :3] leaves out the opacity": len(shape) == 4 and shape[3] == 4,
            f": {name}.transpose(0, 2, 3, 1) puts the channels last": len(shape) == 4 and shape[1] in (1, 3),
        }
        remedy = next((text for text, fits in remedies.items() if fits), "")
        raise MSCNNError(f"{name} has shape {shape}: use (N, H, W), (N, H, W, 1) or (N, H, W, 3){remedy}.")
    if images.dtype.kind not in "buif":
        raise MSCNNError(f"{name} is of dtype {images.dtype}: use 0 to 255, or floats from 0 to 1.")
    if images.dtype == bool:
        return images.astype(np.uint8) * np.uint8(255)
    low, high = float(images.min()), float(images.max())
    top = 1 if floats and high <= 1.001 else 255
    slack = top / 1000 if floats else 0
    black = 1.001 < high <= 2 if floats else high == 1  # so it would be, if 255 were white: another range is meant
    if black or not (low >= -slack and high <= top + slack):
        remedies = {
            f": np.isnan({name}) finds the NaN": np.isnan(low),
            f": ({name} + 1) / 2": floats and -1.001 <= low < -0.3 and high <= 1.001,
            f": {name} * 255, as it is of dtype {images.dtype}": not floats and low == 0 and high == 1,
            f": {name}.clip(0, 1)": floats and low >= -0.3 and high <= 1.3,
            f": {name}.clip(0, 255)": low >= -64 and 2 < high < 320,
            f": {name} // 256, if it has 16 bits": low >= 0 and 320 <= high < 2**16,
        }
        remedy = next((text for text, fits in remedies.items() if fits), "")
        raise MSCNNError(f"{name} goes from {low:.7g} to {high:.7g}: use 0 to 255, or floats from 0 to 1{remedy}.")
    return np.round(images.clip(0, top) * (255 / top)).astype(np.uint8) if floats else images.astype(np.uint8)


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif")
SYSTEM_ENTRIES = re.compile(r"[.@$]|__|(thumbs\.db|desktop\.ini)$", re.IGNORECASE)  # of macOS, NAS, Windows, Jupyter
SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation")}


def read_image_folder(folder: Path, size: int = IMAGE_SIZE) -> RawData:
    """Images in `train/<category>/*`, `val/...` and `test/...`, or without a split in `<category>/*`.

    A validation split with two images or more of each category is held out for calibration and certification. What is
    not read is printed: loose files, folders in a category's folder, other kinds of files, a smaller validation split.
    """
    splits = {split: _split_folder(folder, wanted) for split, wanted in SPLIT_FOLDERS.items()}
    train, test = splits["train"] or folder, splits["test"]
    names = [entry.name for entry in _entries(train) if entry.is_dir()]
    if len(names) < 2:
        raise MSCNNError(f"{train} needs a folder for each of at least two categories; it has {len(names)}.")
    left_out = [entry for entry in _entries(train) if not entry.is_dir()]
    divided = train != folder
    held = splits["val"] if divided and splits["val"] and _holds_enough(splits["val"], names) else None
    if divided:
        left_out += [entry for entry in _entries(folder) if entry not in (train, held, test)]
    parts = {"train": train, "held": held, "test": test if divided else None}
    found = {part: _files_of(place, names) for part, place in parts.items() if place}
    arrays = dict(zip(found, _read_parts(folder, list(found.values()), size), strict=True))
    for part in found.values():
        others = [] if part.folder == train else [one for one in _entries(part.folder) if one.name not in names]
        left_out += part.left_out + others
    if left_out:
        print(f"Not read in {folder}: {_in_kinds(left_out)}.", flush=True)
    raw = RawData(folder.name, str(folder), names, arrays["train"], found["train"].labels)
    if held:
        raw.x_held, raw.y_held = arrays["held"], found["held"].labels
    if "test" in found:
        raw.x_test, raw.y_test = arrays["test"], found["test"].labels
    return raw


def _holds_enough(folder: Path, names: Sequence[str]) -> bool:
    """Whether a validation split can be halved by category; prints why not."""
    counts = {name: len(_image_files(folder / name)[0]) for name in names}
    few = [f"{count} of '{name}'" for name, count in counts.items() if count < 2]
    if few:
        reason = f"it has {', '.join(few[:5])}{' and more' if len(few) > 5 else ''}"
        print(f"{folder} is left out: it takes two images or more of each category, and {reason}.", flush=True)
    return not few


def free_memory(system: Path = Path("/proc/meminfo"), container: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a program can still take without swapping, within its container; None where nothing says.

    Args:
        system: what Linux says. container: the folder with the limits of a control group, version 2.
    """
    free = []
    with contextlib.suppress(OSError):
        free += [int(kilobytes) * 1024 for kilobytes in re.findall(r"^MemAvailable: *(\d+)", system.read_text(), re.M)]
    with contextlib.suppress(OSError, ValueError):  # there is none, or its limit is "max"
        limit, used = (int((container / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = sum(map(int, re.findall(r"^inactive_file (\d+)$", (container / "memory.stat").read_text(), re.M)))
        free.append(max(0, limit - used + cache))
    return min(free, default=None)


class _Part(NamedTuple):
    """The image files of a split, their labels int64 (N,), and what else lies in the categories' folders."""

    folder: Path
    files: list[Path]
    labels: np.ndarray
    left_out: list[Path]


def _files_of(folder: Path, names: Sequence[str]) -> _Part:
    """Looks through a split's folders of categories. Raises MSCNNError if one of them has no images."""
    files, labels, left_out = [], [], []
    for label, name in enumerate(names):
        own, entries = _image_files(folder / name)
        if not own:
            besides = f" (it has {_in_kinds(entries)})" if entries else ""
            raise MSCNNError(
                f"No images of category '{name}' in {folder / name}{besides}: add some, or take the category out."
            )
        files += own
        labels += [label] * len(own)
        left_out += sorted(set(entries) - set(own))
    return _Part(folder, files, np.asarray(labels), left_out)


def _read_parts(folder: Path, parts: Sequence[_Part], size: int) -> list[np.ndarray]:
    """The images of splits, uint8 (N, size, size, 3) each; on disk if they take more than half of the free memory.

    Raises:
        MSCNNError: some images of a split cannot be read; or there is no room for them on the disk.
    """
    counts, free = [len(part.files) for part in parts], free_memory()
    shape, images = (sum(counts), size, size, 3), (image for part in parts for image in _read_files(part, size))
    if free is None or math.prod(shape) <= free / 2:
        stored = np.empty(shape, np.uint8)
        for i, image in enumerate(images):
            stored[i] = image
    else:
        path = _cache_path(folder, parts, size)
        print(
            f"{shape[0]:,} images of {size} px, {math.prod(shape) / 1e6:,.0f} MB, do not fit in half of the free "
            f"memory ({free / 1e6:,.0f} MB): they are kept in {path} and read from there batch by batch.",
            flush=True,
        )
        stored = file_of(path, shape, images)
    return [indexed(stored, indices) for indices in np.split(np.arange(len(stored)), np.cumsum(counts)[:-1])]


def _cache_path(folder: Path, parts: Sequence[_Part], size: int) -> Path:
    """Where images of a folder are kept: a name for folder and size, and a key for its files and Pillow's version."""
    from PIL import __version__

    place = digest_of([os.path.realpath(folder)])[:8]
    stats = [(file.relative_to(folder), file.stat()) for part in parts for file in part.files]
    key = digest_of([__version__, *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)])[:16]
    name = re.sub(r"[^-\w]", "_", folder.name)
    return cache_folder() / f"{name}-{place}-{size}px-{key}.npy"


def _image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a category's folder that can be read as images, and all that a person has put there."""
    from PIL import Image

    readable = set(IMAGE_SUFFIXES) & Image.registered_extensions().keys()
    entries = _entries(folder) if folder.is_dir() else []
    return [entry for entry in entries if entry.suffix.lower() in readable and entry.is_file()], entries


def _entries(folder: Path) -> list[Path]:
    """What a person has put into a folder, in order; no hidden and no system entries."""
    try:
        return sorted(entry for entry in folder.iterdir() if not SYSTEM_ENTRIES.match(entry.name))
    except OSError as error:
        raise MSCNNError(f"{folder} cannot be read: {error.strerror}. See to its rights.") from error


def _split_folder(folder: Path, wanted: Sequence[str]) -> Path | None:
    """The folder of a split by one of its names, in capitals or not; None if there is none."""
    found = [entry for entry in _entries(folder) if entry.is_dir() and entry.name.lower() in wanted]
    if len(found) > 1:
        raise MSCNNError(f"{folder} has {' and '.join(one.name for one in found)}: keep one of them, or merge them.")
    return found[0] if found else None


def _in_kinds(entries: Sequence[Path]) -> str:
    """Number and kinds of files, folders and dead links, in words."""
    kinds = ["folder" if one.is_dir() else one.suffix.lower() or "no suffix" for one in entries]
    kinds = ["dead link" if not one.exists() else kind for one, kind in zip(entries, kinds, strict=True)]
    told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    shown = ", ".join(one.name for one in entries[:3])
    return f"{len(entries)} ({told}), such as {shown}"


def _read_files(part: _Part, size: int) -> Iterator[np.ndarray]:
    """The images of a split one by one, uint8 (size, size, 3). Raises MSCNNError at the end, which names bad files."""
    unreadable = []
    for file in part.files:
        try:
            yield read_image(file, (size, size, 3))
        except MSCNNError as error:
            unreadable.append(str(error))
    if unreadable:
        more = f"\nand {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
        listed = "\n".join(unreadable[:10])
        raise MSCNNError(f"{listed}{more}\n{len(unreadable)} bad in {part.folder}: mend or remove, then start again.")


def read_image(picture: Images, input_shape: Sequence[int] = (IMAGE_SIZE, IMAGE_SIZE, 3)) -> np.ndarray:
    """Reads a picture as uint8 of `input_shape`: the middle square, resized. A list becomes a batch.

    Args:
        picture: a path (`~` is the user's home), a Pillow image, or an array (H, W), (H, W, 1) or (H, W, 3), of 0 to
            255 or of floats from 0 to 1; uint8 also (H, W, 4), whose last channel is opacity. Or a list of these.

    Raises:
        MSCNNError: the file is absent or not a picture, or the array is none.

    Example:
        >>> white = np.full((48, 64, 3), 255, np.uint8)
        >>> read_image(white).shape
        (32, 32, 3)
        >>> read_image([white, white], (28, 28, 1)).shape
        (2, 28, 28, 1)
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(picture, (list, tuple)):
        images = [read_image(element, input_shape) for element in picture]
        return np.stack(images) if images else np.zeros((0, *input_shape), np.uint8)
    if not isinstance(picture, (str, os.PathLike, np.ndarray, Image.Image)):
        raise MSCNNError(f"The image is a {type(picture).__name__}: give a path, a Pillow image or an array.")
    if len(input_shape) != 3 or input_shape[2] not in (1, 3):
        raise MSCNNError(f"input_shape is {tuple(input_shape)}: use (height, width, 1) or (height, width, 3).")
    height, width, channels = input_shape
    if isinstance(picture, np.ndarray):
        picture = _image_of(picture)
    name = "The image" if isinstance(picture, Image.Image) else path_from(str(picture), Path())
    try:
        with contextlib.ExitStack() as stack:
            opened = (
                picture if isinstance(picture, Image.Image) else stack.enter_context(_open(Path(name), width, height))
            )
            flat = _drop_alpha(_upright(opened)).convert("RGB" if channels == 3 else "L")
    except IsADirectoryError as error:
        raise MSCNNError(f"{name} is a folder: give the path of a picture file.") from error
    except FileNotFoundError as error:
        raise MSCNNError(f"There is no image at {name}: give the path of a picture file.") from error
    except UnidentifiedImageError as error:
        raise MSCNNError(f"{name} cannot be read as an image: it is no picture, or damaged.") from error
    except Exception as error:  # a damaged file fails in many ways: each of Pillow's readers has its own
        reason = str(error) or type(error).__name__
        raise MSCNNError(f"{name} cannot be read as an image: {reason}") from error
    fitted = ImageOps.fit(flat, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(fitted, np.uint8).reshape(height, width, channels)


def _open(path: Path, width: int, height: int):
    """A Pillow image of a file. A large JPEG is decoded at a half, a quarter or an eighth, which takes a third as long.

    It stays twice as large as what will be made of it, and at 512 pixels or more.
    """
    from PIL import Image

    opened = Image.open(path)
    opened.draft(None, (max(512, 2 * width), max(512, 2 * height)))
    return opened


def _image_of(array: np.ndarray):
    """A Pillow image of an array, see `read_image`."""
    from PIL import Image

    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 4:
        return Image.fromarray(array)
    return Image.fromarray(as_uint8(array[None], "The image")[0].squeeze(-1 if array.shape[-1:] != (3,) else ()))


def _upright(picture):
    """A Pillow image turned as its camera says. (Pillow's own `exif_transpose` fails on other tags that are broken.)"""
    from PIL import Image

    try:
        orientation = picture.getexif().get(0x0112)
    except Exception:  # metadata that cannot be read turns nothing, and does no harm
        orientation = None
    turns = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    turn = dict(enumerate(turns, start=2)).get(orientation or 1)
    return picture.transpose(Image.Transpose[turn]) if turn else picture


def _drop_alpha(picture):
    """A Pillow image without transparency (on white) and with 8 bits a channel."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):  # gray of 16 or 32 bits, or floats
        return Image.fromarray(_in_8_bits(np.asarray(picture)))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture


def _in_8_bits(values: np.ndarray) -> np.ndarray:
    """Gray values as uint8; white is the least of 1 (of floats), 255 and 65,535 that none exceeds, else the largest."""
    floats, values = values.dtype.kind == "f", np.nan_to_num(values.astype(np.float64), posinf=0).clip(0)
    top = values.max(initial=0)
    ranges = [1, 255, 65535] if floats else [255, 65535]
    white = next((one for one in ranges if top <= one), top)
    return np.round(values * (255 / white)).astype(np.uint8)
