"""Names, errors and parameters that every other room uses; categories chosen by name or index."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mscnn_parts.zoo import NETWORKS

VERSION = "0.2.0"
OTHER = "OTHER"
PRETRAINED = "pretrained/cifar10.keras"  # what load_model="pretrained" stands for, among the notebooks
FALLBACK_NOTICE = "NOT CIFAR-10: scikit-learn's 8x8 digits stand in, since CIFAR-10 could not be had"


class MSCNNError(ValueError):
    """Something the user can mend: the message says what was wrong, what is allowed and what to do."""

    def _render_traceback_(self) -> list[str]:
        """Asked by IPython: in a notebook the message stands alone, not under the frames of this project."""
        return [f"{type(self).__name__}: {self}"]


def categories_from(chosen: str | int | Iterable[str | int], names: Sequence[str]) -> tuple[int, ...]:
    """Turns a user's choice of categories into indices, in the order of `names`.

    A text that is a name as a whole is that name. Any other text is a list with commas, with or without brackets. An
    item in quotes is taken as it stands, so that every name can be chosen: `'["a,b", "01"]'`. A number is the name
    with its digits, else an index. It is refused where it could be one category by index and another by name: papermill
    makes 1 of `-p stage2_categories 01`, and among 01, 02, 03 that index is 02.

    Args:
        chosen: names, indices or both: `"ship,truck"`, `"8,9"`, `"ship,9"`, `"[8, 9]"`, `8`, `["ship", 9]`.
            The empty string means all, an empty list none. Duplicates are folded.
        names: the category names of the data set, (C,).

    Returns:
        Indices, ascending.

    Raises:
        MSCNNError: an unknown or ambiguous name, an index outside 0..C-1, or something that is neither.

    Example:
        >>> categories_from("ship, 0", ["airplane", "bird", "ship"])
        (0, 2)
    """
    if isinstance(chosen, str) and not chosen.strip() and chosen not in names:
        return tuple(range(len(names)))
    items = _items_of(chosen, names) if isinstance(chosen, str) else _listed(chosen)
    return tuple(sorted({_category_index(item, names) for item in items}))


def _listed(chosen: Any) -> list[str | int]:
    """A choice of categories that is no text, such as 8 or ["ship", 9], as a list."""
    chosen = chosen.tolist() if isinstance(chosen, np.ndarray) else chosen
    several = isinstance(chosen, Iterable) and not isinstance(chosen, (str, bytes, bytearray, Mapping))
    try:
        items = list(chosen) if several else [chosen]
    except TypeError:  # a tensor without axes only looks like several
        items = [chosen]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int, np.integer)):
            raise MSCNNError(
                f"{item!r} is no category: give names or indices, such as ship,truck or 8,9. "
                "A name that looks like a number, True or None goes in quotes: '\"01\"'."
            )
    return [item if isinstance(item, str) else int(item) for item in items]  # pyright: ignore[reportArgumentType]


_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]*?)\s*(?:,|\Z)""", re.DOTALL)


def _items_of(text: str, names: Sequence[str]) -> list[str | int]:
    """The names and indices in a text that is not blank, or is a name."""
    for plain in ([text], [part.strip() for part in text.split(",")]):
        if all(part in names for part in plain):
            return list(plain)
    inside = text.strip()
    bracketed = inside[0] + inside[-1] in ("[]", "()", "{}")
    parts = _ITEM.findall(inside[1:-1] if bracketed else inside)
    items = [item for item in (_item(part, names, bracketed) for part in parts) if item != ""]  # a comma too many
    if not items:
        raise MSCNNError(f"No category in '{text}': name some of {', '.join(names)}, or leave it empty for all.")
    return items


def _item(part: str, names: Sequence[str], bracketed: bool) -> str | int:
    if bracketed and re.fullmatch(r"-?(0|[1-9]\d{0,17})", part):
        return int(part)  # as `Settings` keeps a number
    if not re.fullmatch(r"'.*'|\".*\"", part, re.DOTALL):
        return part if part in names else part.strip(" []()'\"")
    inner = decoded = part[1:-1]
    with contextlib.suppress(ValueError):
        decoded = json.loads(part, strict=False) if part[0] == '"' else re.sub(r"\\(['\\])", r"\1", inner)
    return inner if inner in names and decoded not in names else decoded


def _category_index(one: str | int, names: Sequence[str]) -> int:
    names = list(names)
    if one in names:
        return names.index(one)
    number = one if isinstance(one, int) else int(one) if re.fullmatch(r"-?\d{1,18}", one) else None
    if number is not None:
        matching = {category for category, name in enumerate(names) if number in _numbers_from(name)}
        if str(number) not in names and 0 <= number < len(names):
            matching.add(number)
        if not matching:
            raise MSCNNError(f"Category index {number} is out of range: use 0 to {len(names) - 1}.")
    else:
        matching = {category for category, name in enumerate(names) if name.strip().lower() == str(one).strip().lower()}
    if len(matching) == 1:
        return matching.pop()
    if matching:
        could = " or ".join(repr(names[category]) for category in sorted(matching))
        raise MSCNNError(
            f"Category {one} could be {could}: give the name in quotes, as in '[\"{names[min(matching)]}\"]'."
        )
    raise MSCNNError(f"Unknown category '{one}'.{did_you_mean(str(one), names)} Choose among: {', '.join(names)}.")


def _numbers_from(name: str) -> set[int]:
    """The integers that papermill, YAML or Python may make of a name: 1 of 01, 8 or 10 of 010, 16 of 0x10."""
    numbers = set()
    for base in (10, 0, *((8,) if name.startswith("0") else ())):
        with contextlib.suppress(ValueError):
            numbers.add(int(name, base))
    return numbers


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """The question that ends an error message, after a space; empty where no name is near."""
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(text.lower(), folded, n=1)
    return f" Did you mean {folded[close[0]]}?" if close else ""


def check_threshold(threshold: float | Sequence[float] | np.ndarray) -> float | Sequence[float] | np.ndarray:
    """Returns the threshold, or thresholds, or raises MSCNNError if one is not a confidence from 0 to 1."""
    for value in np.ravel(threshold):
        number = np.issubdtype(type(value), np.number)
        if not (number and 0 <= value <= 1):  # so that NaN is refused, too
            shown = f"{value:g}" if number else repr(str(value))
            raise MSCNNError(f"threshold is {shown}: it is a confidence, so use 0 to 1 (default 0.7).")
    return threshold


def check_seed(seed: int) -> None:
    """Raises MSCNNError unless the seed is a whole number from 0 to below 2^31."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise MSCNNError(f"seed is {seed!r}: it has to be of type int.")
    if seed < 0:
        raise MSCNNError(f"seed is {seed}: it has to be 0 or more.")
    if seed >= 2**31:
        raise MSCNNError(f"seed is {seed}: it has to be below {2**31}.")


def check_image_size(size: int) -> None:
    """Raises MSCNNError unless images can be brought to that size: 0, for the network's own, or 16 to 512 pixels."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not (size == 0 or 16 <= size <= 512):
        raise MSCNNError(f"image_size is {size!r}: use 16 to 512 pixels, or 0 for the network's own.")


def check_stage1(name: str) -> None:
    """Raises MSCNNError unless there is a network of that name."""
    if name not in NETWORKS:
        near = did_you_mean(str(name), NETWORKS)
        raise MSCNNError(f"Unknown stage1 '{name}'.{near} Choose among: {', '.join(NETWORKS)}.")


def _parameter(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """The parameters of a run: the same names on the command line, in papermill and in the notebooks.

    Raises:
        MSCNNError: a value of the wrong type or outside its range.
    """

    epochs: int = _parameter(50, "passes over the train split; 0: the default recipe")
    batch_size: int = _parameter(32, "images per training step; 0: the default recipe")
    stage2_only: bool = _parameter(
        False, "train Stage 2 alone and keep Stage 1; needs --load_model or a model in the run folder"
    )
    stage2_categories: str = _parameter(
        "", "categories whose Stage 2 CNN is retrained: ship,truck or 8,9; empty: the two weakest, with stage2_only all"
    )
    threshold: float = _parameter(0.7, "confidence below which an image becomes OTHER, 0 to 1")
    target_risk: float = _parameter(
        0.0, "guarantee at most this error rate of the accepted, such as 0.01; sets the threshold; 0: off"
    )
    target_coverage: float = _parameter(0.0, "accept this share of the images, such as 0.9; sets the threshold; 0: off")
    light_mode: bool = _parameter(False, "use a tenth of the data, but 1,800 images at least: minutes on a laptop")
    load_model: str = _parameter(
        "",
        "model file to start from and train further; pretrained: the project's for CIFAR-10; empty: a new model",
    )
    save_model: str = _parameter(
        "multistage_cnn_model", "name of the model file; a relative path starts at the run folder"
    )
    dataset: str = _parameter(
        "auto", "auto, cifar10, digits, mnist, fashion_mnist, cifar100, stl10, a .npz file or an image folder"
    )
    stage1: str = _parameter(
        "compact", "network of Stage 1: compact, resnet, efficientnet_lite0, ...; see docs/networks.md"
    )
    image_size: int = _parameter(0, "pixels that images are brought to, 16 to 512; 0: the network's own")
    mirror: bool = _parameter(True, "mirror images, in training and decisions, if the data set allows it")
    quarter_turns: bool = _parameter(
        False, "turn images by quarters in training, if they may be mirrored; for those with no up, as from above"
    )
    stage2_branch: int = _parameter(
        -1,
        "blocks that all Stage 2 CNNs share; 0: none; -1: all but the last or, with ImageNet weights, all of Stage 1",
    )
    seed: int = _parameter(0, "seed of the splits and of the training")
    run_dir: str = _parameter("runs/latest", "folder for everything that the run makes")

    def __post_init__(self):
        if not isinstance(self.stage2_categories, str):  # papermill's -p turns 8 into a number
            chosen = json.dumps(_listed(self.stage2_categories), ensure_ascii=False)
            object.__setattr__(self, "stage2_categories", chosen)
        for name in ("threshold", "target_risk", "target_coverage"):
            if type(getattr(self, name)) is int:
                object.__setattr__(self, name, float(getattr(self, name)))
        kinds = {"int": int, "bool": bool, "str": str, "float": float}
        for parameter in dataclasses.fields(self):
            value = getattr(self, parameter.name)
            if type(value) is not kinds[str(parameter.type)]:
                raise MSCNNError(f"{parameter.name} is {value!r}: it has to be of type {parameter.type}.")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 0:
                raise MSCNNError(f"{name} is {getattr(self, name)}: it has to be 0 or more.")
        check_seed(self.seed)
        check_stage1(self.stage1)
        check_image_size(self.image_size)
        least = NETWORKS[self.stage1].least_size
        if 0 < self.image_size < least:
            raise MSCNNError(f"image_size is {self.image_size}: {self.stage1} needs {least} pixels or more.")
        if self.stage2_branch < -1:
            raise MSCNNError(f"stage2_branch is {self.stage2_branch}: give a number of blocks, or -1 for the default.")
        check_threshold(self.threshold)
        for name in ("target_risk", "target_coverage"):
            if not 0 <= getattr(self, name) < 1:
                raise MSCNNError(f"{name} is {getattr(self, name):g}: it is a share from 0 to below 1; 0 turns it off.")
        if self.target_risk and self.target_coverage:
            raise MSCNNError("target_risk and target_coverage would each set the threshold: give one of them.")
        if not self.save_model.strip():
            raise MSCNNError("save_model is empty: give the model file a name, such as multistage_cnn_model.")
        if re.search(r"^~$|(^|[/\\])\.{0,2}$", self.save_model):
            raise MSCNNError(f"save_model is the folder {self.save_model}: add the name of a file, such as mine.")
        if self.save_model.removesuffix(".keras") == "stage1":
            raise MSCNNError("save_model is stage1, where notebook 02 leaves its model: choose another name.")

    def mode(self, names: Sequence[str]) -> str:
        """Says what this run trains, for example 'Stage 1 frozen, categories ship, truck only'."""
        chosen = categories_from(self.stage2_categories, names)
        if not self.stage2_only:
            return "both stages are trainable"
        if len(chosen) == len(names):
            return "Stage 1 frozen"
        return f"Stage 1 frozen, categories {', '.join(names[c] for c in chosen)} only"
