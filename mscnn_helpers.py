"""MSCNN: a two-stage image classifier that says OTHER when it should.

    uint8 images ──► Stage 1 CNN ──► category c ─┐
         │                                       ├──► confidence P(c is right) ──► ≥ threshold ?  c : OTHER
         └────► Stage 2 CNN of category c ───────┘          (calibrated)

Stage 1 sorts an image into one of C categories. Stage 2 has one small CNN a category; the one of the
predicted category judges whether Stage 1 is right. Both opinions are combined into one calibrated
confidence, and an image whose confidence is below the threshold is OTHER. The field calls this selective
classification, misclassification detection, or classification with a reject option. OTHER is also what looks like
nothing that the model knows (out-of-distribution detection).

The sections follow the data: 1 Settings, 2 Data, 3 Networks, 4 Decision, 5 The model, 6 Training,
7 Evaluation, 8 Explanation, 9 Figures, 10 Running. A section uses only itself and those above.

In comments beside tensors: B images in a batch, N in a split, H × W pixels, C categories.

References
    Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.
    Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019 (AURC).
    Platt, "Probabilistic Outputs for Support Vector Machines", 1999 (logistic calibration).
    Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024 (the shape of the CNNs; airbench).
    Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024 (the steps of their kernels).
    Tan & Le, "EfficientNetV2: Smaller Models and Faster Training", ICML 2021 (small images first).
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    Hendrycks & Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017.
    Jaeger et al., "A Call to Reflect on Evaluation Practices for Failure Detection", ICLR 2023.
    Traub et al., "Overcoming Common Flaws in the Evaluation of Selective Classification", NeurIPS 2024 (AUGRC).
    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples", NeurIPS 2018.
    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.
    Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016 (CAM).
    Selvaraju et al., "Grad-CAM", ICCV 2017.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import gzip
import hashlib
import itertools
import json
import logging
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


@contextlib.contextmanager
def _without_native_logs():
    """Hides what TensorFlow's C++ side prints to stderr while it is imported (no log level does)."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed: nothing is printed
        yield
        return
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":  # before Keras looks for it, in its own words
    raise ImportError(f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']}: this project needs tensorflow. Unset it.")

with _without_native_logs():
    import keras
    import tensorflow as tf

OTHER = "OTHER"
ACCEPTED, UNSURE, STRANGE = "accepted", "unsure", "like nothing I know"  # the latter two: the reasons for OTHER
GIVEN = "as given"  # how a threshold was chosen, if nothing else is told of it
PRETRAINED = "notebooks/pretrained/cifar10.keras"  # what load_model="pretrained" stands for
FALLBACK_NOTICE = "NOT CIFAR-10: scikit-learn's 8x8 digits stand in, since CIFAR-10 could not be had"


# ======================================================================================================
# 1 Settings: names, parameters, the run folder
# ======================================================================================================


class MSCNNError(ValueError):
    """Something the user can mend: the message says what was wrong, what is allowed and what to do."""


def project_root() -> Path:
    """The folder of this module; relative paths in the parameters start here."""
    return Path(__file__).resolve().parent


def _here() -> Path | None:
    """The current folder; None where it has been deleted."""
    try:
        return Path.cwd()
    except OSError:
        return None


def path_from(text: str, start: Path) -> Path:
    """A path that a user gives: `~` is the user's home, an absolute one is itself, another one begins at `start`.

    Raises:
        MSCNNError: no home directory is known.
    """
    try:
        path = start / Path(text).expanduser()
    except RuntimeError as error:
        raise MSCNNError(f"No home directory is known for '{text}': give the whole path, without ~.") from error
    return Path(os.path.realpath(path)) if ".." in path.parts else path


FROM_HERE = re.compile(r"\.\.?([/\\]|$)")  # ., .. and what begins with them; a hidden folder, such as .data, does not


def places_of(text: str, *starts: Path | None) -> list[Path]:
    """Where the path of a parameter may lead, the likeliest first: see `path_from`.

    `.` and `..` are the folder that the user is in, and the one above it; another relative path may begin at each of
    `starts` (None is left out).

    Raises:
        MSCNNError: no home directory is known, or the current folder has been deleted.
    """
    if FROM_HERE.match(text):
        starts = (_here(),)
        if starts == (None,):
            raise MSCNNError(f"The current folder, where '{text}' begins, has been deleted: give the whole path.")
    return list(dict.fromkeys(path_from(text, start) for start in starts if start))


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
    """
    if isinstance(chosen, str) and not chosen.strip() and chosen not in names:
        return tuple(range(len(names)))
    items = _items_of(chosen, names) if isinstance(chosen, str) else _listed(chosen)
    return tuple(sorted({_category_index(one, names) for one in items}))


def _listed(chosen: Any) -> list[str | int]:
    """A choice of categories that is no text, such as 8 or ["ship", 9], as a list."""
    chosen = chosen.tolist() if isinstance(chosen, np.ndarray) else chosen
    several = isinstance(chosen, Iterable) and not isinstance(chosen, (str, bytes, bytearray, Mapping))
    try:
        items = list(chosen) if several else [chosen]
    except TypeError:  # a tensor without axes only looks like several
        items = [chosen]
    for one in items:
        if isinstance(one, bool) or not isinstance(one, (str, int, np.integer)):
            raise MSCNNError(
                f"{one!r} is no category: give names or indices, such as ship,truck or 8,9. "
                "A name that looks like a number, True or None goes in quotes: '\"01\"'."
            )
    return [one if isinstance(one, str) else int(one) for one in items]


_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]*?)\s*(?:,|\Z)""", re.DOTALL)


def _items_of(text: str, names: Sequence[str]) -> list[str | int]:
    """The names and indices in a text that is not blank, or is a name."""
    for plain in ([text], [part.strip() for part in text.split(",")]):
        if all(part in names for part in plain):
            return plain
    inside = text.strip()
    bracketed = inside[0] + inside[-1] in ("[]", "()", "{}")
    parts = _ITEM.findall(inside[1:-1] if bracketed else inside)
    items = [one for one in (_item(part, names, bracketed) for part in parts) if one != ""]  # a comma too many: no harm
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
        found = {category for category, name in enumerate(names) if number in _numbers_from(name)}
        if str(number) not in names and 0 <= number < len(names):
            found.add(number)
        if not found:
            raise MSCNNError(f"Category index {number} is out of range: use 0 to {len(names) - 1}.")
    else:
        found = {category for category, name in enumerate(names) if name.strip().lower() == one.strip().lower()}
    if len(found) == 1:
        return found.pop()
    if found:
        could = " or ".join(repr(names[category]) for category in sorted(found))
        raise MSCNNError(
            f"Category {one} could be {could}: give the name in quotes, as in '[\"{names[min(found)]}\"]'."
        )
    raise MSCNNError(f"Unknown category '{one}'.{_did_you_mean(one, names)} Choose among: {', '.join(names)}.")


def _numbers_from(name: str) -> set[int]:
    """The integers that papermill, YAML or Python may make of a name: 1 of 01, 8 or 10 of 010, 16 of 0x10."""
    numbers = set()
    for base in (10, 0, *((8,) if name.startswith("0") else ())):
        with contextlib.suppress(ValueError):
            numbers.add(int(name, base))
    return numbers


def _did_you_mean(text: str, names: Iterable[str]) -> str:
    """The question that ends an error message, after a space; empty where no name is near."""
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(text.lower(), folded, n=1)
    return f" Did you mean {folded[close[0]]}?" if close else ""


def check_threshold(threshold: float | np.ndarray) -> float | np.ndarray:
    """Returns the threshold, or thresholds, or raises MSCNNError if one is not a confidence from 0 to 1."""
    for one in np.ravel(threshold):
        number = np.issubdtype(type(one), np.number)
        if not (number and 0 <= one <= 1):  # so that NaN is refused, too
            shown = f"{one:g}" if number else repr(str(one))
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


def _parameter(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """The parameters of a run: the same names on the command line, in papermill and in the notebooks.

    Raises:
        MSCNNError: a value of the wrong type or outside its range.
    """

    epochs: int = _parameter(50, "passes over the train split; 0: the recipe's own choice")
    batch_size: int = _parameter(32, "images a training step; 0: the recipe's own choice")
    stage2_only: bool = _parameter(False, "keep Stage 1 as it is; needs --load_model or a model in the run folder")
    stage2_categories: str = _parameter(
        "", "Stage 2 categories to retrain: ship,truck or 8,9; empty: weakest two; stage2_only: all"
    )
    threshold: float = _parameter(0.7, "confidence below which an image becomes OTHER, 0 to 1")
    target_risk: float = _parameter(
        0.0, "guarantee at most this error rate of the accepted, such as 0.01; sets the threshold; 0: off"
    )
    target_coverage: float = _parameter(0.0, "accept this share of the images, such as 0.9; sets the threshold; 0: off")
    light_mode: bool = _parameter(False, "use a tenth of the data: minutes on a laptop")
    load_model: str = _parameter("", "model file to start from; pretrained: the one that comes with the project")
    save_model: str = _parameter(
        "multistage_cnn_model", "name of the model file; a relative path starts at the run folder"
    )
    dataset: str = _parameter("auto", "auto, cifar10, digits, mnist, fashion_mnist, a .npz file or an image folder")
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
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if type(value) is not kinds[one.type]:
                raise MSCNNError(f"{one.name} is {value!r}: it has to be of type {one.type}.")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 0:
                raise MSCNNError(f"{name} is {getattr(self, name)}: it has to be 0 or more.")
        check_seed(self.seed)
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


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path`, then moves it there: `path` is never half-written."""
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise MSCNNError(f"Cannot write {path}: {error.strerror or error}. Choose another place.") from error
    finally:
        with contextlib.suppress(OSError):  # mostly it is not there any more
            partial.unlink()


def _make_folder(folder: Path, problem: str, parameter: str) -> None:
    """Makes a folder, if it is not there, and sees that files can be made in it.

    Raises:
        MSCNNError: they cannot; it begins with `problem` and names the parameter to change.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MSCNNError(f"{problem}: {error.strerror}. Choose another {parameter}.") from error


class Run:
    """One notebook's hold on the run folder, the only thing that carries state between notebooks.

    Args:
        notebook: name of the notebook without `.ipynb`; its seconds are recorded under it.
        settings: the parameters of the run.
    """

    def __init__(self, notebook: str, settings: Settings):
        _check_injected_parameters()
        self.notebook, self.settings, self.started = notebook, settings, time.time()
        self.folder = places_of(settings.run_dir, project_root())[0]
        self.figures = self.folder / "figures"

    @property
    def model_path(self) -> Path:
        """Where the finished model is saved."""
        return _with_suffix(places_of(self.settings.save_model, self.folder)[0], self.settings.save_model)

    @property
    def stage1_path(self) -> Path:
        """Where notebook 02 leaves the model for 03, so that a finished model survives until a new one is."""
        return self.folder / "stage1.keras"

    def starting_model(self) -> Path | None:
        """The model file to start from: `load_model`, or with `stage2_only` the run folder's; else None.

        Raises:
            MSCNNError: the file is not there.
        """
        wanted = self.settings.load_model
        wanted = PRETRAINED if wanted == "pretrained" else wanted
        if not wanted and not self.settings.stage2_only:
            return None
        if not wanted and not os.path.isfile(self.model_path):
            raise MSCNNError(
                f"stage2_only keeps Stage 1, but there is no model at {self.model_path}: "
                "give load_model, or run once without stage2_only."
            )
        if not wanted:
            return self.model_path
        places = [_with_suffix(path, wanted) for path in places_of(wanted, project_root(), _here(), self.folder)]
        found = next(
            (place for place in places if os.path.isfile(place)), None
        )  # False, too, without the right to look
        if found is None:
            raise MSCNNError(
                f"No model file '{wanted}': looked for {' and '.join(map(str, places))}. "
                "Give the path of a .keras file of a finished run, or pretrained."
            )
        return found

    def latest_model(self) -> Path:
        """The finished model of this run; where there is none yet, the one that `load_model` names.

        Raises:
            MSCNNError: `load_model` names a file that is not there.
        """
        start = None if os.path.isfile(self.model_path) else self.settings.load_model and self.starting_model()
        return start or self.model_path

    def read(self, name: str) -> dict:
        """Reads `metrics.json` or `history.json` (by its stem); an absent file reads as {}."""
        path = self.folder / f"{name}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except OSError as error:
            raise MSCNNError(f"{path} cannot be read ({error.strerror}): see to its rights, or delete it.") from error
        except ValueError as error:  # not JSON, or not UTF-8
            raise MSCNNError(f"{path} is damaged ({error}): delete it and run from notebook 01.") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise MSCNNError(f"{path} is damaged (a {kind}, not an object): delete it and run from notebook 01.")
        return record

    def write(self, name: str, **entries: Any) -> None:
        """Sets entries of `metrics.json` or `history.json` and keeps the rest."""
        self.replace(name, {**self.read(name), **entries})

    def forget(self, name: str, *entries: str) -> None:
        """Takes entries out of `metrics.json` or `history.json`, because they no longer hold."""
        self.replace(name, {key: value for key, value in self.read(name).items() if key not in entries})

    def replace(self, name: str, record: dict) -> None:
        """Writes `metrics.json` or `history.json` anew, whole."""
        text = json.dumps(_jsonable(record), indent=2, ensure_ascii=False)
        _write_whole(self.folder / f"{name}.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def require(self, name: str, entry: str, notebook: str) -> Any:
        """Reads one entry that an earlier notebook has left.

        Raises:
            MSCNNError: it is not there; the message names the notebook that makes it.
        """
        record = self.read(name)
        if entry not in record:
            raise MSCNNError(f"{self.folder} holds no '{entry}' yet: run notebook {notebook} first.")
        return record[entry]

    def save_figure(self, figure, name: str):
        """Saves a Matplotlib figure as `figures/NAME.png` and returns it, so that a notebook shows it.

        On the fallback data set the figure says so in its title.
        """
        if self.read("metrics").get("dataset", {}).get("fallback"):
            figure.text(0.5, 1.0, FALLBACK_NOTICE, ha="center", va="bottom", color="firebrick", weight="bold")
        make_legible(figure)
        path = self.figures / f"{name}.png"
        _write_whole(path, lambda p: figure.savefig(p, format="png", dpi=110, bbox_inches="tight"))
        return figure

    def finish(self) -> None:
        """Records the notebook's seconds; the last cell of each notebook."""
        seconds = dict(self.read("metrics").get("seconds", {}))
        seconds[self.notebook] = round(time.time() - self.started, 1)
        ends = {"status": "finished", "ended": _now()} if self.notebook == NOTEBOOKS[-1] else {}
        self.write("metrics", seconds=seconds, **ends)
        print(f"{self.notebook}: {seconds[self.notebook]:.0f} s. Everything lies in {self.folder}")


def injected_names(cells: Sequence[str]) -> list[str]:
    """The names that papermill has set, in the cell that it puts behind the parameters, by the sources of all cells."""
    pairs = itertools.pairwise(cells)
    injected = [cell for before, cell in pairs if cell.startswith("# Parameters\n") and "run_dir" in _assigned(before)]
    return [name for cell in injected for name in _assigned(cell)]


def _assigned(cell: str) -> list[str]:
    """The names that a cell sets; none where it is not plain Python."""
    try:
        lines = ast.parse(cell).body
    except SyntaxError:
        return []
    targets = [getattr(line, "targets", [getattr(line, "target", None)]) for line in lines]
    return [target.id for several in targets for target in several if isinstance(target, ast.Name)]


def _check_injected_parameters() -> None:
    """Raises MSCNNError if papermill has set what is no parameter, of which papermill itself only warns."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cells = shell.user_ns.get("In", []) if shell else []
    names = [one.name for one in dataclasses.fields(Settings)]
    unknown = [name for name in injected_names(cells) if name not in names]
    if unknown:
        hint = _did_you_mean(unknown[0], names)
        raise MSCNNError(f"Unknown parameter '{unknown[0]}'.{hint} The parameters are {', '.join(names)}.")


def _now() -> str:
    """The time, in ISO 8601 with its zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _with_suffix(path: Path, name: str) -> Path:
    return path if name.endswith(".keras") else path.with_name(path.name + ".keras")


def _jsonable(value: Any) -> Any:
    """NumPy numbers and arrays as plain ones; NaN, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_jsonable(one) for one in value]
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


# ======================================================================================================
# 2 Data: find, check, load, light mode, splits, batches
# ======================================================================================================

IMAGE_SIZE = 32  # pixels; other sizes are resized when they are loaded
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_MD5 = {  # of the files in the archive, as torchvision's reader checks them
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
KERAS_DATA_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
FASHION_MD5 = {  # zalandoresearch/fashion-mnist, README
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
BUILT_IN = ("cifar10", "digits", "mnist", "fashion_mnist")  # names of data sets; `./digits` is a folder
DOWNLOAD_PATIENCE = 10  # seconds to wait for a server's first answer


class Split(NamedTuple):
    """Images uint8 (N, H, W, channels) and labels int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:  # of images, where a tuple would count its two fields
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Split:
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A data set in four splits.

    train: what training sees. calibration: choices (epochs, thresholds, roll-back). certification: only
    for a certificate. test: only for the last number.
    """

    name: str
    source: str
    category_names: tuple[str, ...]
    train: Split
    calibration: Split
    certification: Split
    test: Split
    flip: bool = True  # whether a mirrored image keeps its category (a digit does not)
    fallback: bool = False
    light_mode: bool = False
    source_fingerprint: str = ""  # of the data as it was found, whatever the seed and light_mode

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.train.images.shape[1:]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every image and label of every split, in order."""
        splits = (self.train, self.calibration, self.certification, self.test)
        return _digest(self.category_names, *(array for split in splits for array in split))

    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the train split, (channels,) each, of pixels in 0..255."""
        counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(self.train.images, -1, 0)])
        levels, share = np.arange(256), counts / counts.sum(axis=1, keepdims=True)  # (channels, 256)
        mean = share @ levels
        return mean, np.sqrt(np.maximum(share @ levels**2 - mean**2, 1.0))

    def describe(self) -> dict:
        """What `metrics.json` says of the data."""
        sizes = {name: len(getattr(self, name)) for name in ("train", "calibration", "certification", "test")}
        return {
            "name": self.name, "source": self.source, "fallback": self.fallback, "fingerprint": self.fingerprint,
            "source_fingerprint": self.source_fingerprint,
            "light_mode": self.light_mode, "category_names": list(self.category_names), "sizes": sizes,
        }  # fmt: skip


def _digest(names: Sequence[str], *arrays: np.ndarray) -> str:
    """SHA-256 over category names and arrays, in order."""
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


@dataclass
class _Raw:
    """A data set as it was found: uint8 images, integer labels, and no test split if there is none."""

    name: str
    source: str
    names: Sequence[str]
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    x_held: np.ndarray | None = None  # of a validation split: for calibration and certification
    y_held: np.ndarray | None = None
    flip: bool = True
    published: str = ""  # hashes that were checked and stand for the images, where there are such

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the published hashes, or over every image and label."""
        if self.published:
            return _digest([*self.names, self.published])
        labels = [y.astype(np.int64) for y in (self.y_train, self.y_test, self.y_held) if y is not None]
        return _digest(self.names, *labels, *(x for x in (self.x_train, self.x_test, self.x_held) if x is not None))


def data_folder() -> Path:
    """Where data sets are looked for and downloaded to: `MSCNN_DATA_DIR`, or Keras' own cache.

    Raises:
        MSCNNError: the variable begins with `~`, and no home directory is known.
    """
    return _folder_named_by("MSCNN_DATA_DIR") or (_folder_named_by("KERAS_HOME") or _keras_home()) / "datasets"


def _folder_named_by(variable: str) -> Path | None:
    """The folder in an environment variable; None if it is not set.

    A relative path begins at the folder the user was in when it was set. That is the current folder, but for a kernel,
    which runs where its notebook lies; it inherits PWD from the shell.
    """
    given = os.environ.get(variable)
    if not given:
        return None
    starts = (_here(), Path(os.environ.get("PWD") or project_root()), project_root())
    places = [path_from(given, start) for start in starts if start]
    return next((place for place in places if place.is_dir()), places[0])


def _keras_home() -> Path:
    """As Keras finds it: `~/.keras`, or one in the folder for temporary files where there is no home to write into."""
    home = Path(os.path.expanduser("~"))  # stays ~ where none is known
    usable = home.is_absolute() and (os.path.isdir(home / ".keras") or os.access(home, os.W_OK))
    return (home if usable else Path(tempfile.gettempdir())) / ".keras"


def load_dataset(name: str | Path = "auto", light_mode: bool = False, seed: int = 0) -> Dataset:
    """Loads a data set and splits it; see `Settings.dataset` for the names.

    `auto` is CIFAR-10 if it is on disk or can be downloaded, else scikit-learn's digits with
    `fallback=True`. A named data set never falls back.

    Raises:
        MSCNNError: the data is absent, damaged or not of the form described in the README, or the seed is no seed.
    """
    check_seed(seed)
    if not isinstance(name, (str, os.PathLike)):
        raise MSCNNError(f"dataset is {name!r}: give its name, or the path of a .npz file or an image folder.")
    if not isinstance(light_mode, (bool, np.bool_)):
        raise MSCNNError(f"light_mode is {light_mode!r}: it has to be True or False.")
    name = str(name)
    if name != "auto":
        return _split(_read_dataset(name), light_mode, seed)
    try:
        return _split(_cifar10(), light_mode, seed)
    except FileNotFoundError as reason:
        print(f"{'!' * 88}\n{FALLBACK_NOTICE}.\n{reason}\n{'!' * 88}")
        return dataclasses.replace(_split(_digits(), light_mode, seed), fallback=True)


def _read_dataset(name: str) -> _Raw:
    builtin = dict(zip(BUILT_IN, (_cifar10, _digits, _mnist, _fashion_mnist), strict=True))
    if name in builtin:
        try:
            return builtin[name]()
        except FileNotFoundError as error:
            raise MSCNNError(str(error)) from error
    path, places = _find_data(name)
    if path is not None and path.is_dir():
        return _image_folder(path)
    if path is not None and path.suffix.lower() == ".npz":
        return _npz(path)
    if path is not None or len(Path(name).parts) > 1 or name.endswith(".npz"):
        raise MSCNNError(
            f"No image folder or .npz file '{name}': looked in {' and '.join(str(place.parent) for place in places)}. "
            "Check the path."
        )
    known = f"auto, {', '.join(builtin)}, a .npz file or an image folder"
    raise MSCNNError(f"Unknown dataset '{name}': use {known}.{_did_you_mean(name, builtin)}")


def _find_data(name: str) -> tuple[Path | None, list[Path]]:
    """The folder or file that `dataset` names, if it is there, and the places where it was looked for."""
    if name in ("", "auto", *BUILT_IN):
        return None, []
    places = places_of(name, project_root(), _here())
    return next((place for place in places if os.path.exists(place)), None), places


def _download(url: str, known_hash: str, name: str) -> Path:
    """Downloads one file into the data folder by pooch, or finds it there; its hash is checked.

    Raises:
        FileNotFoundError: it cannot be had; the message has the reason. (Not MSCNNError: `auto` falls back.)
    """
    import pooch
    import requests

    folder = data_folder()
    path, host, (kind, value) = folder / name, url.split("/")[2], known_hash.split(":")
    state = f"{name} is not in {folder}" if _may_read(folder) else f"{folder} cannot be read: Permission denied,"
    try:
        if os.path.isfile(path):  # not Path's, which fails in a folder that may not be read
            if pooch.file_hash(str(path), alg=kind) == value:
                return path
            state = f"{path} is incomplete or damaged ({path.stat().st_size:,} bytes)"
    except OSError as error:
        raise FileNotFoundError(
            f"{path} cannot be read: {error.strerror}. Mend that, or set MSCNN_DATA_DIR."
        ) from error
    problem = _ask(url)
    if problem:
        raise FileNotFoundError(
            f"{state} and cannot be downloaded now ({_download_problem(problem, host, folder)}). "
            "Put the data there, or set MSCNN_DATA_DIR to the folder that has it."
        )
    print(f"Fetching {name} from {url}", flush=True)
    try:
        fetch = pooch.HTTPDownloader(timeout=DOWNLOAD_PATIENCE, progressbar=sys.stderr.isatty())
        return Path(pooch.retrieve(url, known_hash, fname=name, path=folder, downloader=fetch))
    except (requests.RequestException, OSError, ValueError) as error:  # ValueError: the hash is wrong
        reason = _download_problem(error, host, folder).rstrip(".")
        raise FileNotFoundError(f"The download of {name} failed: {reason}.") from error


def _may_read(folder: Path) -> bool:
    return not os.path.isdir(folder) or os.access(folder, os.R_OK | os.X_OK)


def _ask(url: str) -> Exception | None:
    """What keeps a server from offering a file: None, or the error."""
    import requests

    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            requests.head(url, timeout=DOWNLOAD_PATIENCE / 2, allow_redirects=True).raise_for_status()
            answers.append(None)
        except Exception as error:  # not all are requests' own: a missing file of certificates is an OSError
            answers.append(error)

    # In a thread, since a name server that is silent is not bound by a time limit of requests.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(DOWNLOAD_PATIENCE)
    return answers[0] if answers else requests.Timeout()


def _download_problem(error: Exception, host: str, folder: Path) -> str:
    """The true reason of a download that failed and, where there is one, the remedy."""
    from requests import exceptions

    cause = error  # the innermost one: requests wraps errors of urllib3, which wraps Python's
    while inner := next((e for e in (*cause.args, getattr(cause, "reason", 0)) if isinstance(e, Exception)), None):
        cause = inner
    told = re.sub("^<.*?>: ", "", str(cause)) or type(cause).__name__  # without the address of an object
    answer = getattr(error, "response", None)
    if isinstance(error, exceptions.ProxyError) or (answer is not None and answer.status_code == 407):
        return f"the proxy does not let it through: {told}; check HTTPS_PROXY and NO_PROXY"
    if answer is not None:
        later = "; try again later" if answer.status_code in (429, 503) else ""
        return f"{host} answers {answer.status_code} {answer.reason}{later}"
    if isinstance(error, exceptions.SSLError):
        return f"the certificate of {host} is not trusted: {told}; REQUESTS_CA_BUNDLE names the file of other ones"
    if isinstance(error, (exceptions.ConnectionError, exceptions.Timeout)):
        return f"no answer from {host}"
    if isinstance(error, PermissionError) or getattr(error, "errno", None):
        reason = getattr(error, "strerror", None) or os.strerror(errno.EACCES)  # pooch leaves it out
        return f"cannot write to {folder}: {reason}; mend that, or set MSCNN_DATA_DIR to another folder"
    return told


def _cifar10() -> _Raw:
    """CIFAR-10 in the publishers' layout: 50,000 train and 10,000 test images, uint8 (N, 32, 32, 3)."""
    folder = _find_cifar10() or _download_cifar10()
    parts = []
    for name, expected in CIFAR10_MD5.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise FileNotFoundError(f"{folder / name} cannot be read: {error.strerror}. Mend that.") from error
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != expected:  # before it is unpickled: a pickle can run code
            raise MSCNNError(
                f"{folder / name} is damaged or incomplete ({len(content):,} bytes): its MD5 is {found}, "
                f"published is {expected}. Delete it and start again."
            )
        batch = pickle.loads(content, encoding="bytes")
        images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (10000, 32, 32, 3)
        parts.append((images, np.asarray(batch[b"labels"])))
    x_train, y_train = (np.ascontiguousarray(np.concatenate(one)) for one in zip(*parts[:5], strict=True))
    raw = _Raw("cifar10", str(folder), CIFAR10_NAMES, x_train, y_train, *map(np.ascontiguousarray, parts[5]))
    return dataclasses.replace(raw, published=json.dumps(CIFAR10_MD5))


def _cifar10_folders() -> dict[Path, list[str]]:
    """Where CIFAR-10 may lie, and which of its files are not there."""
    base = data_folder()
    # The second and third are where Keras itself unpacks it.
    places = [base, base / "cifar-10-batches-py-target", base / "cifar-10-python"]
    folders = [place / "cifar-10-batches-py" for place in places] + [base]
    return {f: [name for name in CIFAR10_MD5 if not os.path.isfile(f / name)] for f in folders}


def _find_cifar10() -> Path | None:
    return next((folder for folder, lacking in _cifar10_folders().items() if not lacking), None)


def _download_cifar10() -> Path:
    try:
        archive = _download(CIFAR10_URL, f"md5:{CIFAR10_ARCHIVE_MD5}", "cifar-10-python.tar.gz")
        target = data_folder() / "cifar-10-batches-py"
        with tarfile.open(archive) as tar:
            for name in CIFAR10_MD5:
                content = tar.extractfile(f"cifar-10-batches-py/{name}").read()
                _write_whole(target / name, lambda path, content=content: path.write_bytes(content))
        return target
    except (FileNotFoundError, MSCNNError) as error:
        folders = _cifar10_folders()
        told = [f"{folder} cannot be read: Permission denied." for folder in folders if not _may_read(folder)]
        told += [
            f"{folder} is incomplete: it lacks {', '.join(lacking)}."
            for folder, lacking in folders.items()
            if len(lacking) < len(CIFAR10_MD5)
        ]
        raise FileNotFoundError(" ".join([*told, str(error)])) from error


def _digits() -> _Raw:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 grey."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    return _Raw("digits", "scikit-learn", [str(d) for d in range(10)], images, digits.target, flip=False)


def _mnist() -> _Raw:
    path = data_folder() / "mnist.npz"  # as it is, if it is there: nothing in it is executed
    if not os.path.isfile(path):
        path = _download(KERAS_DATA_URL + "mnist.npz", f"sha256:{MNIST_SHA256}", "mnist.npz")
    return dataclasses.replace(_npz(path), name="mnist", flip=False)


def _fashion_mnist() -> _Raw:
    paths = [
        _download(KERAS_DATA_URL + name, f"md5:{md5}", f"fashion-mnist/{name}") for name, md5 in FASHION_MD5.items()
    ]
    content = [np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths]
    x_train, x_test = (one[16:].reshape(-1, 28, 28, 1) for one in content[::2])  # 16 bytes of header
    return _Raw("fashion_mnist", str(paths[0].parent), FASHION_NAMES, x_train, content[1][8:], x_test, content[3][8:])


def _npz(path: Path) -> _Raw:
    """A `.npz` with x_train, y_train, x_test, y_test and optionally class_names; no pickles are opened."""
    arrays = _read_arrays(path, ("x_train", "y_train", "x_test", "y_test", "class_names"))
    x_train, x_test = _as_uint8(arrays["x_train"], "x_train"), _as_uint8(arrays["x_test"], "x_test")
    y_train = _as_labels(arrays["y_train"], "y_train", len(x_train))
    y_test = _as_labels(arrays["y_test"], "y_test", len(x_test))
    highest = int(max(y_train.max(), y_test.max()))
    given = _as_names(arrays["class_names"]) if "class_names" in arrays else None
    count = highest + 1 if given is None else len(given)
    if highest >= count:
        raise MSCNNError(f"{path} has labels up to {highest} but {count} class_names: number the labels from 0.")
    present = set(y_train.tolist())
    absent = next((label for label in range(count) if label not in present), None)
    if absent is not None:
        name = given[absent] if given else absent
        raise MSCNNError(f"{path} has no train images of category '{name}': number the labels without gaps, from 0.")
    if x_train.shape[-1] != x_test.shape[-1]:
        raise MSCNNError(f"{path}: x_train has {x_train.shape[-1]} channels, x_test has {x_test.shape[-1]}.")
    names = given or [str(label) for label in range(count)]
    return _Raw(path.stem, str(path), names, x_train, y_train, x_test, y_test)


def _read_arrays(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` that are wanted and there, each read to its end, which checks its sum.

    Raises:
        MSCNNError: the file is damaged or none, or lacks one of the wanted arrays but the last.
    """
    arrays, place = {}, ""
    try:
        with zipfile.ZipFile(path) as file:
            there = {name.removesuffix(".npy"): name for name in file.namelist()}
            for name in wanted:
                place = f"{name}: "
                if name in there:
                    with file.open(there[name]) as member:
                        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                        if member.read():
                            raise ValueError("it is longer than it says")
    except Exception as error:  # zlib, struct, zipfile, lzma and NumPy each have their own
        raise MSCNNError(
            f"{path} cannot be read as a .npz file of plain arrays: {place}{str(error) or type(error).__name__}. If it "
            f"is damaged or incomplete ({path.stat().st_size:,} bytes), get it anew; objects go in as text or numbers."
        ) from error
    missing = set(wanted[:-1]) - arrays.keys()
    if missing:
        raise MSCNNError(
            f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(there)) or 'no arrays'}."
        )
    return arrays


def _as_uint8(images: np.ndarray, name: str) -> np.ndarray:
    """Grey or RGB images as uint8 (N, H, W, channels); floats up to a thousandth outside their range are clipped."""
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


def _as_labels(labels: np.ndarray, name: str, count: int) -> np.ndarray:
    """Labels as int64 (count,): of any integers, truth values or whole floats, also in a column."""

    def refuse(what: str):
        raise MSCNNError(f"Labels have to be {count} integers from 0: got {what}.")

    if labels.ndim > 1 and min(labels.shape) > 1:
        refuse(f"{name} of shape {labels.shape}; of rows with one 1 each, use {name}.argmax(axis=1)")
    if labels.dtype.kind not in "buif":
        refuse(f"{labels.dtype} in {name}; of names, use class_names, {name} = np.unique(names, return_inverse=True)")
    labels = labels.reshape(-1)
    if len(labels) != count:
        refuse(f"{len(labels)} in {name}, for {count} images in x{name[1:]}")
    numbers = labels.astype(np.float64)
    wrong = labels[~((numbers >= 0) & (numbers < 2**31) & (numbers == np.floor(numbers)))]  # NaN, too
    if len(wrong):
        refuse(f"{len(labels)} of {labels.dtype} in {name}, among them {wrong[0]}")
    return labels.astype(np.int64)


def _as_names(names: np.ndarray) -> list[str]:
    """Names of categories from text, bytes in UTF-8 or numbers, also in a column."""
    if names.dtype.kind not in "SUuifb" or (names.ndim > 1 and min(names.shape) > 1):
        raise MSCNNError(f"class_names has shape {names.shape} and dtype {names.dtype}: use (C,) names as text.")
    try:
        names = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names
    except UnicodeDecodeError as error:
        raise MSCNNError(f"class_names holds bytes that are not UTF-8 ({error}): use text.") from error
    return names.reshape(-1).astype(str).tolist()


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif")
SYSTEM_ENTRIES = re.compile(r"[.@$]|__|(thumbs\.db|desktop\.ini)$", re.IGNORECASE)  # of macOS, NAS, Windows, Jupyter
SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation")}


def _image_folder(folder: Path) -> _Raw:
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
    x_train, y_train, unread = _read_categories(train, names)
    raw, left_out = _Raw(folder.name, str(folder), names, x_train, y_train), left_out + unread
    if train != folder:
        held = splits["val"] if splits["val"] and _holds_enough(splits["val"], names) else None
        left_out += [entry for entry in _entries(folder) if entry not in (train, held, test)]
        if held:
            raw.x_held, raw.y_held, unread = _read_categories(held, names)
            left_out += unread + [entry for entry in _entries(held) if entry.name not in names]
        if test:
            raw.x_test, raw.y_test, unread = _read_categories(test, names)
            left_out += unread + [entry for entry in _entries(test) if entry.name not in names]
    if left_out:
        print(f"Not read in {folder}: {_in_kinds(left_out)}.", flush=True)
    return raw


def _holds_enough(folder: Path, names: Sequence[str]) -> bool:
    """Whether a validation split can be halved by category; prints why not."""
    counts = {name: len(_image_files(folder / name)[0]) for name in names}
    few = [f"{count} of '{name}'" for name, count in counts.items() if count < 2]
    if few:
        reason = f"it has {', '.join(few[:5])}{' and more' if len(few) > 5 else ''}"
        print(f"{folder} is left out: it takes two images or more of each category, and {reason}.", flush=True)
    return not few


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


def _read_categories(folder: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[Path]]:
    """Images uint8 (N, 32, 32, 3), labels (N,), and what else lies in the categories' folders.

    Raises:
        MSCNNError: a category has no images, or some cannot be read; all of these are named.
    """
    images, labels, left_out, unreadable = [], [], [], []
    for label, name in enumerate(names):
        files, entries = _image_files(folder / name)
        left_out += [entry for entry in entries if entry not in files]
        if not files:
            besides = f" (it has {_in_kinds(entries)})" if entries else ""
            raise MSCNNError(
                f"No images of category '{name}' in {folder / name}{besides}: add some, or take the category out."
            )
        for file in files:
            try:
                images.append(read_image(file))
                labels.append(label)
            except MSCNNError as error:
                unreadable.append(str(error))
    if unreadable:
        more = f"\nand {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
        told = "\n".join(unreadable[:10])
        raise MSCNNError(f"{told}{more}\n{len(unreadable)} bad in {folder}: mend or remove, then start again.")
    return np.stack(images), np.asarray(labels), left_out


def read_image(picture, input_shape: Sequence[int] = (IMAGE_SIZE, IMAGE_SIZE, 3)) -> np.ndarray:
    """Reads a picture as uint8 of `input_shape`: the middle square, resized.

    Args:
        picture: a path (`~` is the user's home), a Pillow image, or an array (H, W), (H, W, 1) or (H, W, 3), of 0 to
            255 or of floats from 0 to 1; uint8 also (H, W, 4), whose last channel is opacity.

    Raises:
        MSCNNError: the file is absent or not a picture, or the array is none.
    """
    from PIL import Image, ImageOps

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
            opened = picture if isinstance(picture, Image.Image) else stack.enter_context(Image.open(name))
            flat = _flattened(_upright(opened)).convert("RGB" if channels == 3 else "L")
    except FileNotFoundError as error:
        raise MSCNNError(f"There is no image at {name}: give the path of a picture file.") from error
    except Exception as error:  # a damaged file fails in many ways: each of Pillow's readers has its own
        reason = str(error) or type(error).__name__
        raise MSCNNError(f"{name} cannot be read as an image: {reason}") from error
    fitted = ImageOps.fit(flat, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(fitted, np.uint8).reshape(height, width, channels)


def _image_of(array: np.ndarray):
    """A Pillow image of an array, see `read_image`."""
    from PIL import Image

    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 4:
        return Image.fromarray(array)
    return Image.fromarray(_as_uint8(array[None], "The image")[0].squeeze(-1 if array.shape[-1:] != (3,) else ()))


def _upright(picture):
    """A Pillow image turned as its camera says. (Pillow's own `exif_transpose` fails on other tags that are broken.)"""
    from PIL import Image

    try:
        orientation = picture.getexif().get(0x0112)
    except Exception:  # metadata that cannot be read turns nothing, and does no harm
        orientation = None
    turns = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    turn = dict(enumerate(turns, start=2)).get(orientation)
    return picture.transpose(Image.Transpose[turn]) if turn else picture


def _flattened(picture):
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


def _resized(images: np.ndarray) -> np.ndarray:
    """uint8 (N, h, w, channels) -> (N, 32, 32, channels), a thousand images at a time."""
    if images.shape[1:3] == (IMAGE_SIZE, IMAGE_SIZE):
        return images
    chunks = [images[i : i + 1000] for i in range(0, len(images), 1000)]
    resize = functools.partial(tf.image.resize, size=(IMAGE_SIZE, IMAGE_SIZE), antialias=True)
    return np.concatenate([np.clip(np.round(resize(chunk)), 0, 255).astype(np.uint8) for chunk in chunks])


LIGHT_FLOOR = (1500, 300, 500)  # light mode keeps at least so many train, test and validation images
LEAST = 4  # images of a category: two to train on, one each for calibration and certification


def _split(raw: _Raw, light_mode: bool, seed: int) -> Dataset:
    """Stratified, seeded splits: 90 % train, 5 % calibration, 5 % certification, and the test images.

    A small data set gives up to 15 % (at most 250 images) to each of calibration and certification, since
    a calibration on a handful of images is worth nothing. Without test images a fifth is set aside. A validation split
    of the data's own is halved for calibration and certification, and train stays whole.
    """
    least = LEAST if raw.x_held is None else 2
    _check_categories(raw, least + (raw.x_test is None))
    found = raw.fingerprint
    train = Split(raw.x_train, raw.y_train.astype(np.int64))
    if raw.x_test is None:
        train, test = _parted(train, round(0.2 * len(train)), seed, (least, 1))
    else:
        test = Split(raw.x_test, raw.y_test.astype(np.int64))
    rest = None if raw.x_held is None else Split(raw.x_held, raw.y_held.astype(np.int64))
    if light_mode:
        train, test, rest = (
            _parted(one, max(len(one) // 10, floor), seed, (0, few))[1]
            if one is not None and len(one) >= floor + len(raw.names)
            else one
            for one, floor, few in zip((train, test, rest), LIGHT_FLOOR, (least, 1, 2), strict=True)
        )
    if rest is None:
        held = max(round(0.05 * len(train)), min(250, round(0.15 * len(train))))
        train, rest = _parted(train, 2 * held, seed, (2, 2))
    else:
        held = len(rest) // 2
    calibration, certification = _parted(rest, held, seed)
    splits = [Split(_resized(s.images), s.labels) for s in (train, calibration, certification, test)]
    return Dataset(
        raw.name, raw.source, tuple(raw.names), *splits, flip=raw.flip, light_mode=light_mode, source_fingerprint=found
    )


def _check_categories(raw: _Raw, least: int) -> None:
    """Raises MSCNNError unless the categories have names that can be told apart, and `least` images or more."""
    names = list(raw.names)
    unfit = [name for name in names if names.count(name) > 1 or name == OTHER or not name.strip()]
    if len(names) < 2 or unfit:
        raise MSCNNError(
            f"Categories are {', '.join(names)}{f' (here {unfit[0]!r})' if unfit else ''}: "
            f"use two or more different names, none of them {OTHER} or blank."
        )
    counts = np.bincount(raw.y_train, minlength=len(names))
    few = [f"{names[category]} ({counts[category]})" for category in np.flatnonzero(counts < least)]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        raise MSCNNError(
            f"Too few images: the splits take {least} or more of each category, and the smallest of these has "
            f"{counts.min()}: {', '.join(few[:5])}{more}. Add images, or take the category out."
        )


def _parted(split: Split, count: int, seed: int, least: tuple[int, int] = (1, 1)) -> tuple[Split, Split]:
    """Sets `count` images aside, every category in proportion, but `least` of each are kept and set aside.

    Where scikit-learn does not leave so many, each category is divided by itself, and somewhat more or fewer than
    `count` are set aside.
    """
    from sklearn.model_selection import train_test_split

    present, sizes = np.unique(split.labels, return_counts=True)
    if sizes.min() < sum(least):
        raise MSCNNError(
            f"Too few images: {count} of {len(split)} are to be set aside, some of each of the {len(present)} "
            f"categories, and the smallest of these has {sizes.min()}: give more images, or no light_mode."
        )
    everything, aside = np.arange(len(split)), np.empty(0, int)
    with contextlib.suppress(ValueError):  # it refuses a category of one image
        _, aside = train_test_split(everything, test_size=count, stratify=split.labels, random_state=seed)
    apart = np.array([(split.labels[aside] == category).sum() for category in present])
    if (apart < least[1]).any() or (sizes - apart < least[0]).any():
        order = np.random.default_rng(seed).permutation(len(split))
        apart = np.clip(np.round(sizes * count / len(split)).astype(int), least[1], sizes - least[0])
        own = zip(present, apart, strict=True)
        aside = np.concatenate([order[split.labels[order] == category][:number] for category, number in own])
    return split.take(np.setdiff1d(everything, aside)), split.take(np.sort(aside))


def batches(
    labels: np.ndarray, batch_size: int, order: np.ndarray | None = None, shuffle_seed: int | None = None
) -> tf.data.Dataset:
    """Batches for `fit` of a `Trainer`: indices int64 (B,) and labels (B, ...).

    tf.data's autotuning is off: nothing is left for it to tune, and ending its thread was seen to take 16 s at the end
    of a 24 s epoch (TensorFlow 2.21, on CPU).

    Args:
        labels: of all images, (N, ...), of any dtype.
        order: indices int64 in the order wanted, with repetitions if need be; None: each image once.
        shuffle_seed: shuffles the indices anew in every epoch; None: as they are.
    """
    with tf.device("CPU"):  # where tf.data works
        labels = tf.convert_to_tensor(labels)
    indices = tf.data.Dataset.from_tensor_slices(np.arange(len(labels)) if order is None else order)
    if shuffle_seed is not None:
        indices = indices.shuffle(len(indices), seed=shuffle_seed)

    @tf.autograph.experimental.do_not_convert
    def look_up(index):
        return index, tf.gather(labels, index)

    options = tf.data.Options()
    options.autotune.enabled = False
    return indices.batch(batch_size).map(look_up).prefetch(2).with_options(options)


# ======================================================================================================
# 3 Networks: layers, and the one builder of Stage 1 and Stage 2 CNNs
# ======================================================================================================

STAGE1_WIDTHS = (64, 256, 256)  # 118 million multiply-adds an image of 32 x 32 x 3
STAGE2_WIDTHS = (32, 64, 64)  # 17 million
WEAKEST_DETAIL = 1e-3  # of a whitening filter, whose usual strength is about 1: what is below is the same, flat
RANDOM_FLIP = -1  # in place of an epoch
SMALL_CROP = 0.75  # of height and width: little more than half of the work
_serializable = keras.saving.register_keras_serializable(package="mscnn")


@_serializable
class RandomFlipCrop(keras.layers.Layer):
    """Mirrors half of the images and shifts each by up to `shift` pixels, in training only.

    From uint8 (B, H, W, channels) to float32. The border is filled by reflection. Two gathers do it, which costs far
    less than Keras' general affine layers. They and the arithmetic on the places of pixels use floats: on a GPU
    TensorFlow gathers no uint8 from a tensor, and computes with int32 on the host.

    Which images are mirrored is random, or alternates: while `epoch` is 0 or more, each image is mirrored in every
    second epoch, so that two epochs show both of its views. Which comes first, the parity of its sum decides.
    Source: alternating flip (Jordan 2024, section 3.6).

    While `share` is below 1, training sees a random part of each image, that share of its height and its width.
    """

    def __init__(self, flip: bool = True, shift: int = 2, seed: int = 0, **kwargs):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.flip, self.shift, self.seed = flip, shift, seed
        self.random = keras.random.SeedGenerator(seed)
        self.epoch = tf.Variable(RANDOM_FLIP, trainable=False)  # not weights: no model file needs them
        with tf.device("CPU"):  # the bounds of a draw are needed there
            self.share = tf.Variable(1.0, trainable=False)

    def reset(self) -> None:
        """Back to whole images, mirrored at random: as it is outside of a training by epochs."""
        self.epoch.assign(RANDOM_FLIP)
        self.share.assign(1.0)

    def reseed(self, seed: int) -> None:
        """Starts the random numbers anew, also for a graph that has been traced already."""
        self.random.state.assign([seed, 0])

    def call(self, images, training=False):
        images = tf.cast(images, tf.float32)
        if not training:
            return images
        batch, (height, width) = tf.shape(images)[0], images.shape[1:3]
        rows, columns = self._places(batch, height), self._places(batch, width)
        if self.flip:
            columns = tf.where(self._mirrored(images)[:, None], width - 1 - columns, columns)
        images = tf.gather(images, tf.cast(rows, tf.int64), axis=1, batch_dims=1)  # (B, share H, W, channels)
        return tf.gather(images, tf.cast(columns, tf.int64), axis=2, batch_dims=1)  # (B, share H, share W, channels)

    def _mirrored(self, images):
        """Which images are mirrored: bool (B,)."""
        at_random = keras.random.uniform((tf.shape(images)[0],), dtype="float32", seed=self.random) < 0.5
        total = tf.reduce_sum(images, axis=(1, 2, 3))  # exact: whole numbers below 2^24
        in_turn = (total + tf.cast(self.epoch, tf.float32)) % 2 == 1
        return tf.where(self.epoch == RANDOM_FLIP, at_random, in_turn)

    def _places(self, batch, size: int):
        """Which row (or column) each row of the result is taken from, reflected at the border: (B, share size)."""
        kept = tf.round(self.share * size)
        end = self.shift + size - tf.cast(kept, tf.int32) + 1
        start = keras.random.randint((batch, 1), -self.shift, end, dtype="int32", seed=self.random)
        return (size - 1) - tf.abs((size - 1) - tf.abs(tf.cast(start, tf.float32) + tf.range(kept)))

    def get_config(self):
        return {**super().get_config(), "flip": self.flip, "shift": self.shift, "seed": self.seed}


@_serializable
class WhiteningConv(keras.layers.Layer):
    """2 x 2 convolution whose fixed kernel decorrelates neighbouring pixels; nothing in it is trained.

    The kernel comes from `whitening_kernel`. Filters are the eigenvectors of the patches and their
    negatives, so 8 a channel. Source: airbench (Jordan 2024, section 3.2), which also trains a bias for a while. Here
    nothing is trained, so that no gradient has to be taken back through the first 3x3 convolution, and the bias is 0:
    TensorFlow makes one operation of convolution, bias and activation, at two fifths of the time on CPU.
    """

    def build(self, input_shape):
        channels = input_shape[-1]
        self.kernel = self.add_weight(shape=(2, 2, channels, 8 * channels), trainable=False, name="kernel")
        # A variable, for a constant 0 would be optimised away before the three are joined; no weight of the layer.
        self.bias = tf.Variable(tf.zeros(8 * channels, self.compute_dtype), trainable=False)

    def call(self, images):
        return tf.nn.bias_add(keras.ops.conv(images, self.kernel, padding="valid"), self.bias)  # (B, H-1, W-1, 8 ch.)


@_serializable
class FusedBatchNormalization(keras.layers.Layer):
    """BatchNormalization in one fused operation, without scale and with a fast offset.

    Keras' own layer is several operations on CPU. The scale is left out and the offset is stored divided by
    `OFFSET_GAIN`, which multiplies its learning rate by the square of that (both Jordan 2024, section 3.4). The
    statistics forget within some ten batches, so that they are true after a short training.
    """

    OFFSET_GAIN = 8.0  # learning rate x 64

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-3, **kwargs):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape):
        # Statistics stay float32 under mixed precision: a running mean in bfloat16 would stop moving.
        state = {"shape": (input_shape[-1],), "dtype": "float32", "autocast": False}
        self.offset = self.add_weight(initializer="zeros", name="offset", **state)
        self.moving_mean = self.add_weight(initializer="zeros", name="moving_mean", trainable=False, **state)
        self.moving_variance = self.add_weight(initializer="ones", name="moving_variance", trainable=False, **state)

    def call(self, inputs, training=False):
        offset = tf.convert_to_tensor(self.offset.value) * self.OFFSET_GAIN  # (channels,)
        normalize = functools.partial(
            tf.raw_ops.FusedBatchNormV3,
            x=inputs,
            scale=tf.ones_like(offset),
            offset=offset,
            epsilon=self.epsilon,
        )
        if not (training and self.trainable):  # frozen means that the statistics stand still, too
            mean, variance = (tf.convert_to_tensor(v.value) for v in (self.moving_mean, self.moving_variance))
            return normalize(mean=mean, variance=variance, is_training=False).y
        result = normalize(mean=[], variance=[], is_training=True)
        for moving, now in (
            (self.moving_mean, result.batch_mean),
            (self.moving_variance, result.batch_variance),
        ):
            moving.assign(moving.value * self.momentum + now * (1 - self.momentum))
        return result.y

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


@_serializable
class Conv2D(keras.layers.Conv2D):
    """Keras' `Conv2D`, faster in training: on CPU, in bfloat16, where rows are short, by `gradient_of_kernel`."""

    def build(self, input_shape):
        super().build(input_shape)
        plain = self.kernel_size == (3, 3) and self.strides == self.dilation_rate == (1, 1) and self.padding == "same"
        on_cpu = self.compute_dtype == "bfloat16" and not tf.config.list_physical_devices("GPU")
        self.short_rows = plain and on_cpu and images_in_a_row(input_shape[2]) > 2

    def convolution_op(self, inputs, kernel):
        convolve = short_rows_convolution if self.short_rows else super().convolution_op
        return convolve(inputs, tf.convert_to_tensor(kernel))  # (B, H, W, filters)


@tf.custom_gradient
def short_rows_convolution(images, kernel):
    """3 x 3 convolution: (B, H, W, in), (3, 3, in, out) -> (B, H, W, out)."""

    def backward(output_gradient):  # (B, H, W, out)
        of_images = tf.nn.conv2d_transpose(output_gradient, kernel, tf.shape(images), 1, "SAME")
        return of_images, gradient_of_kernel(images, output_gradient)

    return tf.nn.conv2d(images, kernel, 1, "SAME"), backward


def gradient_of_kernel(images, output_gradient):
    """Gradient of a 3 x 3 convolution's kernel, from images laid side by side.

    oneDNN, TensorFlow's library on CPU, sums along a row of places, in tiles that hold 32 bfloat16: rows of 7 or 3
    leave them nearly empty. So images are joined to rows about as long as a tile, with a column of zeros between
    them, which adds nothing to the sum.

    Args:
        images: input of the convolution, (B, H, W, in).
        output_gradient: gradient of its output, (B, H, W, out).

    Returns:
        (3, 3, in, out).
    """
    count = images_in_a_row(tf.shape(images)[2])
    return tf.raw_ops.Conv2DBackpropFilter(
        input=side_by_side(images, count), filter_sizes=(3, 3, images.shape[-1], output_gradient.shape[-1]),
        out_backprop=side_by_side(output_gradient, count), strides=[1] * 4, padding="SAME",
    )  # fmt: skip


def images_in_a_row(width):
    """How many images, with a column of zeros after each, fill a row of 32 places."""
    return 32 // (width + 1)


def side_by_side(images, count):
    """(B, H, W, C) -> (B / count, H, count (W + 1), C): a column of zeros after each image, zeros for those missing."""
    batch, height, width, channels = (*tf.unstack(tf.shape(images)[:3]), images.shape[-1])
    padded = tf.pad(images, [[0, -batch % count], [0, 0], [0, 1], [0, 0]])
    rows = tf.reshape(padded, (-1, count, height, (width + 1) * channels))
    return tf.reshape(tf.transpose(rows, (0, 2, 1, 3)), (-1, height, count * (width + 1), channels))


def build_cnn(
    name: str,
    input_shape: Sequence[int],
    categories: int,
    widths: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool,
    policy: str,
    logit_scale: float = 0.25,
    activation: str = "relu",
) -> keras.Model:
    """A small CNN from uint8 images (B, H, W, channels) to float32 logits (B, categories).

    Whitening, then a block a width: 3x3 convolution, pooling, 3x3 convolution. The outputs of the blocks
    are named `block1`, `block2`, ...; the last is averaged over its area and goes through ONE dense layer,
    so that a Class Activation Map can be read off its kernel.

    Args:
        mean, std: of each channel of the train split, in pixel values 0..255.
        flip: whether training mirrors images.
        policy: Keras dtype policy of the convolutions: "float32" or "mixed_bfloat16".
        logit_scale: factor of the dense layer's inputs. Below 1 its steps are smaller: at a high learning
            rate this layer is the first to diverge.
        activation: Keras' name of it.
    """
    layers = keras.layers
    inputs = x = keras.Input(tuple(input_shape), dtype="uint8")
    x = RandomFlipCrop(flip, name="augmentation")(x)
    scale, shift = [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    x = layers.Rescaling(scale, shift, dtype="float32", name="normalization")(x)
    x = WhiteningConv(name="whitening", dtype=policy)(x)  # (B, H-1, W-1, 8 channels)
    x = layers.Activation(activation, dtype=policy, name="whitened")(x)
    for block, width in enumerate(widths, start=1):
        for half in (1, 2):
            x = Conv2D(width, 3, padding="same", use_bias=False, dtype=policy)(x)
            if half == 1:
                x = layers.MaxPooling2D(2, dtype=policy)(x)
            x = FusedBatchNormalization(dtype=policy)(x)
            x = layers.Activation(activation, dtype=policy, name=f"block{block}" if half == 2 else None)(x)
    x = layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(x)  # (B, widths[-1])
    x = layers.Rescaling(logit_scale, dtype="float32", name="scaled")(x)
    return keras.Model(inputs, layers.Dense(categories, dtype="float32", name="logits")(x), name=name)


def feature_extractor(stage1: keras.Model) -> keras.Model:
    """From uint8 images (B, H, W, channels) to Stage 1's view of them, float32 (B, C + T + 2 D).

    Side by side: C logits; the texture, the means of the T channels of the first block; the means of the 2 D whitened
    channels, D filters and their negatives.
    """
    layers = keras.layers
    texture, whitened = (
        layers.GlobalAveragePooling2D(dtype="float32")(stage1.get_layer(name).output) for name in ("block1", "whitened")
    )
    return keras.Model(stage1.inputs[0], layers.Concatenate(dtype="float32")([stage1.outputs[0], texture, whitened]))


def whitening_kernel(images: np.ndarray, mean: np.ndarray, std: np.ndarray, epsilon: float = 5e-4) -> np.ndarray:
    """The kernel of `WhiteningConv`, float32 (2, 2, channels, 8 channels), from uint8 images (N, H, W, channels)."""
    x = (images.astype(np.float32) - mean) / std
    corners = [x[:, i : i - 1 or None, j : j - 1 or None] for i in (0, 1) for j in (0, 1)]
    patches = np.stack(corners, axis=3).reshape(-1, 4 * x.shape[-1])  # (patches, 4 channels)
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    kernel = (vectors / np.sqrt(values + epsilon)).reshape(2, 2, x.shape[-1], -1)
    return np.concatenate([kernel, -kernel], axis=-1).astype(np.float32)


def fastest_policy(repeats: int = 10) -> str:
    """Probes whether convolutions forward and backward are faster in bfloat16 here; takes under a second.

    Only a CPU is timed. Of a GPU it is known: from compute capability 8.0 on there are bfloat16 units, and a probe this
    short would time Python.

    Returns:
        "mixed_bfloat16" where it is at least 1.2 times as fast, else "float32".
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "mixed_bfloat16" if capability >= (8, 0) else "float32"

    def seconds(dtype) -> float:
        images, kernel = tf.ones((64, 16, 16, 64), dtype), tf.ones((3, 3, 64, 64), dtype)
        start = time.perf_counter()
        with tf.GradientTape() as tape:
            tape.watch((images, kernel))
            out = tf.nn.conv2d(images, kernel, 1, "SAME")
        gradients = tape.gradient(out, (images, kernel))
        float(tf.cast(gradients[0][0, 0, 0, 0] + gradients[1][0, 0, 0, 0], tf.float32))  # waits for the result
        return time.perf_counter() - start

    try:  # in turn, so that other work on the machine slows both; the fastest of each is the undisturbed one
        times = np.array([(seconds(tf.float32), seconds(tf.bfloat16)) for _ in range(repeats)]).min(axis=0)
    except tf.errors.OpError:  # no bfloat16 kernel on this device
        return "float32"
    return "mixed_bfloat16" if times[1] * 1.2 < times[0] else "float32"


# ======================================================================================================
# 4 Decision: log-odds, calibrated confidence, threshold (NumPy in, NumPy out)
# ======================================================================================================

# Coefficients of a calibration row: intercept, weight of Stage 1's margin, weight of Stage 2's log-odds.
COMMON_PRIOR = np.array([0.0, 0.5, 0.5])
COMMON_STRENGTH = np.array([0.1, 1.0, 1.0])  # of the common row towards COMMON_PRIOR: 1 / variance
ROW_STRENGTH = np.array([4.0, 32.0, 32.0])  # of a category's row towards the common row: 1 / variance
NOVEL_SHARE = 0.01  # of the calibration images is called like nothing known: the price of noticing what is
OWN_SHARE = 0.0025  # of them, by the texture alone, and by the detail alone
FEW_IMAGES = 1000  # below this number a quantile of a hundredth is a matter of chance
FEW_SHARE = 0.0005  # then, of the sum, whose tail is the heaviest; what is grossly strange shows in the other two


def log_odds(logits: np.ndarray, category: np.ndarray) -> np.ndarray:
    """log p(c) - log sum of the others' p, in float64, where a softmax in float32 would round to 1.

    Args:
        logits: (B, C).
        category: the category c of each row, (B,).

    Returns:
        float64 (B,).
    """
    chosen, others = _chosen_and_others(logits, category)
    return chosen - np.logaddexp.reduce(others, axis=1)  # SciPy's logsumexp takes 0.1 ms for a single image


def margin(logits: np.ndarray, category: np.ndarray) -> np.ndarray:
    """log p(c) - log p(the likeliest other): how far ahead of its nearest rival a category is.

    After label smoothing the softmax ranks right answers above wrong ones less well (Xia et al. 2024,
    arXiv:2403.14715). The margin, which leaves out all but the nearest rival, is hurt less.

    Args:
        logits: (B, C).
        category: the category c of each row, (B,).

    Returns:
        float64 (B,).
    """
    chosen, others = _chosen_and_others(logits, category)
    return chosen - others.max(axis=1)


def _chosen_and_others(logits: np.ndarray, category: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logits of the categories, float64 (B,), and a copy of all, (B, C), in which they are -inf."""
    others, rows = np.array(logits, np.float64), np.arange(len(logits))
    chosen = others[rows, category]
    others[rows, category] = -np.inf
    return chosen, others


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    from scipy.special import expit

    return expit(x)


def fit_calibration_row(
    stage1: np.ndarray, stage2: np.ndarray, right: np.ndarray, towards: np.ndarray, strength: np.ndarray
) -> np.ndarray:
    """Logistic regression of 'Stage 1 is right' on what both stages say, shrunk towards given coefficients.

    The weights are kept from falling below 0: more evidence never lowers the confidence. Without images the row is
    `towards` itself. (Platt 1999, with a Gaussian prior.)

    Args:
        stage1: Stage 1's margin, (N,). stage2: Stage 2's log-odds, (N,). right: bool (N,).
        towards, strength: mean and 1 / variance of the prior of (intercept, weight 1, weight 2), (3,).

    Returns:
        float64 (3,).
    """
    from scipy.optimize import minimize

    features = np.column_stack([np.ones(len(stage1)), stage1, stage2]).astype(np.float64)  # (N, 3)
    sign = np.where(right, 1.0, -1.0)  # (N,)

    def loss(row):
        margin, pull = sign * (features @ row), row - towards
        gradient = -features.T @ (sign * sigmoid(-margin)) + strength * pull
        return np.logaddexp(0, -margin).sum() + 0.5 * (strength * pull**2).sum(), gradient

    return minimize(loss, towards, jac=True, method="L-BFGS-B", bounds=[(None, None), (0, None), (0, None)]).x


def fit_common_row(stage1: np.ndarray, stage2: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The calibration row of all categories, float64 (3,); see `fit_calibration_row`."""
    return fit_calibration_row(stage1, stage2, right, COMMON_PRIOR, COMMON_STRENGTH)


def fit_category_rows(
    category: np.ndarray,
    stage1: np.ndarray,
    stage2: np.ndarray,
    right: np.ndarray,
    common: np.ndarray,
    chosen: Iterable[int],
) -> np.ndarray:
    """The calibration rows of the chosen categories, float64 (len(chosen), 3), each shrunk towards the common one.

    Args:
        category: Stage 1's answer, (N,). stage1, stage2, right: see `fit_calibration_row`, (N,). common: (3,).
    """
    groups = [category == c for c in chosen]
    return np.array([fit_calibration_row(stage1[g], stage2[g], right[g], common, ROW_STRENGTH) for g in groups])


def combined_log_odds(rows: np.ndarray, category: np.ndarray, stage1: np.ndarray, stage2: np.ndarray) -> np.ndarray:
    """Log-odds that Stage 1 is right, float64 (B,), by calibration rows (C, 3): their sigmoid is the confidence.

    Args:
        stage1: Stage 1's margin, (B,). stage2: Stage 2's log-odds, (B,).
    """
    intercept, weight1, weight2 = rows[category].T  # (B,) each
    return intercept + weight1 * stage1 + weight2 * stage2


def accept(category: np.ndarray, confidence: np.ndarray, threshold: float | np.ndarray, other: int) -> np.ndarray:
    """The decision by confidence: the category where it reaches the threshold, else `other`; (B,).

    Args:
        threshold: one for all, or one a category, (C,). other: C.
    """
    return np.where(confidence >= np.broadcast_to(threshold, other)[category], category, other)


class Certificate(NamedTuple):
    """A threshold and what is guaranteed of it: with probability 1 - delta the true error rate is at most `risk`."""

    threshold: float
    risk: float  # the error rate that was asked for, among the images that are accepted
    delta: float  # probability that the guarantee fails, over the draw of the split it was computed on
    bound: float  # upper bound of the error rate at the threshold, at most `risk`
    errors: int  # wrong among the accepted images of that split
    accepted: int
    images: int  # size of the split

    def text(self) -> str:
        """What it promises, in one line."""
        return (
            f"Guaranteed with probability {1 - self.delta:.0%}: at threshold {self.threshold:.4f} at most "
            f"{self.risk:.2%} of the accepted are wrong. "
            f"On the certification split {self.errors} of {self.accepted:,} were."
        )


def error_bound(errors: int, accepted: int, delta: float) -> float:
    """Exact upper bound of an error rate, by the binomial distribution (Clopper & Pearson 1934).

    With an error rate above it, so few errors have a probability of less than `delta`. 1 where nothing is accepted.
    """
    from scipy.stats import beta

    return 1.0 if errors >= accepted else float(beta.ppf(1 - delta, errors + 1, accepted - errors))


def _one_an_image(**given: Any) -> list[np.ndarray]:
    """What is given by name as arrays, or raises MSCNNError if they are not (N,) with the same N."""
    arrays = {name: np.asarray(value) for name, value in given.items()}
    if len({array.shape for array in arrays.values()}) > 1 or any(array.ndim != 1 for array in arrays.values()):
        shapes = " and ".join(f"{name} {array.shape}" for name, array in arrays.items()).replace(" ", " is ", 1)
        raise MSCNNError(f"{shapes}: give one of each an image, (N,).")
    return list(arrays.values())


def _checked_labels(category: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels as an array, or raises MSCNNError if they are not integers, one for each image that was decided on."""
    _, labels = _one_an_image(decisions=category, labels=labels)
    if labels.dtype.kind not in "iu" and len(labels):
        raise MSCNNError(f"labels are {labels.dtype}: give the true categories as integers from 0.")
    return labels


def _check_share(name: str, value: float, zero: bool = True, one: bool = True) -> None:
    """Raises MSCNNError unless a value is a number from 0 to 1; without 0, or without both, if it may not be these."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (number and 0 <= value <= 1 and (zero or value > 0) and (one or value < 1)):
        shown = f"{value:g}" if number else repr(value)
        limits = "from 0 to 1" if zero else "above 0 and up to 1" if one else "between 0 and 1"
        raise MSCNNError(f"{name} is {shown}: it is a share, a number {limits}, such as 0.01 for 1 %.")


def _check_numbers(confidence: np.ndarray) -> None:
    """Raises MSCNNError unless confidences are numbers, none of them NaN."""
    if confidence.dtype.kind not in "biuf":
        raise MSCNNError(f"confidence is {confidence.dtype}: it has to be numbers.")
    unknown = int(np.isnan(confidence).sum())
    if unknown:
        raise MSCNNError(f"{unknown:,} of {len(confidence):,} confidences are NaN: leave out these images.")


def _check_categories_within(category: np.ndarray, count: int) -> None:
    """Raises MSCNNError unless categories are integers from 0 to below `count`."""
    if category.dtype.kind not in "iu" or (len(category) and not 0 <= category.min() <= category.max() < count):
        found = (
            f"{category.min()} to {category.max()}" if category.dtype.kind in "iuf" and len(category) else "no numbers"
        )
        raise MSCNNError(f"Categories are {category.dtype}, {found}: use integers from 0 to {count - 1}.")


def _checked_pair(
    confidence: np.ndarray, right: np.ndarray, share: bool = False, empty: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, numbers (N,), and whether each prediction is right, bool (N,), as arrays.

    Args:
        share: whether a confidence has to lie between 0 and 1. empty: whether there may be none.

    Raises:
        MSCNNError: they are not that.
    """
    confidence, right = _one_an_image(confidence=confidence, right=right)
    if not len(right):
        if not empty:
            raise MSCNNError("confidence and right are empty: there is nothing to measure without an image.")
        return confidence.astype(np.float64), right.astype(bool)
    if right.dtype != bool:  # 0 and 1, too: they may be labels, and any other label would count as right
        raise MSCNNError(
            f"right is {right.dtype}, not bool: it says of each prediction whether it is right, "
            "such as labels == predicted."
        )
    _check_numbers(confidence)
    if share and (confidence.min() < -1e-6 or confidence.max() > 1 + 1e-6):  # a float32 softmax may exceed 1
        least, most = confidence.min(), confidence.max()
        raise MSCNNError(f"Confidences lie between {least:g} and {most:g}: use 0 to 1, such as sigmoid() of log-odds.")
    return confidence + 0.0 if confidence.dtype == bool else confidence, right


def check_enough_to_certify(images: int, risk: float, delta: float = 0.05) -> tuple[int, int]:
    """Whether so many images could guarantee the risk at all, if the model made no error on them.

    Returns:
        How many thresholds the search of `threshold_for_risk` may try; the least number of accepted images it needs.

    Raises:
        MSCNNError: they could not, or a value is outside its range.
    """
    for name, value in (("risk", risk), ("delta", delta)):
        _check_share(name, value, zero=False, one=False)
    steps = max(1, int(np.ceil(np.log2(max(images, 1)))))
    needed = int(np.ceil(np.log(delta / steps) / np.log1p(-risk)))  # without an error, the bound is `risk` here
    if images < needed:
        raise MSCNNError(
            f"A guarantee of {risk:.2%} errors at the most needs {needed:,} images without a single error, and the "
            f"certification split has {images:,} to count: ask for a larger risk, or use more images (no light mode)."
        )
    return steps, needed


def threshold_for_risk(confidence: np.ndarray, right: np.ndarray, risk: float, delta: float = 0.05) -> Certificate:
    """A threshold of large coverage whose true error rate is at most `risk`, guaranteed.

    Source: selection with guaranteed risk (Geifman & El-Yaniv 2017, algorithm 1). A binary search asks for the bound of
    the error rate at no more than ceil(log2 N) thresholds, which share `delta` (Bonferroni); it finds the largest
    coverage where the bound grows with the coverage. The guarantee holds for images of the same distribution, if
    neither the model nor its calibration has seen the ones given here, and if accepting more does not lower the true
    error rate: then all thresholds on the way to a wrong one are fixed beforehand, and the sharing is exact.

    Args:
        confidence: (N,). right: bool (N,), whether the prediction is right.
        risk: error rate among the accepted, 0 to 1. delta: probability of failure, 0 to 1.

    Raises:
        MSCNNError: a value outside its range; too few images for any such guarantee; or no threshold reaches it.
    """
    confidence, right = _checked_pair(confidence, right)
    steps, needed = check_enough_to_certify(len(right), risk, delta)
    descending = np.sort(confidence)[::-1]
    low, high, best = needed - 1, len(right) - 1, None  # fewer than that cannot reach it
    for _ in range(steps):
        middle = (low + high + 1) // 2
        accepted = confidence >= descending[middle]  # with all images of the same confidence
        errors, count = int((accepted & ~right).sum()), int(accepted.sum())
        bound = error_bound(errors, count, delta / steps)
        if bound <= risk:
            low = middle
            if best is None or count > best.accepted:
                best = Certificate(float(descending[middle]), risk, delta, bound, errors, count, len(right))
        else:
            high = max(middle - 1, low)
    if best is None:
        errors = np.cumsum(~right[np.argsort(-confidence, kind="stable")])  # among the most confident 1, 2, 3, ...
        least = min(
            error_bound(int(errors[i]), i + 1, delta / steps) for i in np.flatnonzero(np.diff(errors, append=-1))
        )
        raise MSCNNError(
            f"No threshold guarantees {risk:.2%} errors at the most with probability {1 - delta:.0%} on these "
            f"{len(right):,} images: ask for a larger risk, from about {least:.2%} on."
        )
    return best


def threshold_for_coverage(confidence: np.ndarray, coverage: float) -> float:
    """The highest threshold that accepts at least this share of the given images, 0 to 1.

    Raises:
        MSCNNError: coverage is not a share, or there are no images.
    """
    _check_share("coverage", coverage, zero=False)
    (confidence,) = _one_an_image(confidence=confidence)
    _check_numbers(confidence)
    if not len(confidence):
        raise MSCNNError("A threshold for a coverage needs images to count: there are none.")
    wanted = int(np.ceil(coverage * len(confidence) - 1e-9))  # 0.7 of 10 images are 7, whatever 0.7 is in binary
    return float(np.sort(confidence)[::-1][wanted - 1])


def thresholds_by_category(category: np.ndarray, confidence: np.ndarray, coverage: float, count: int) -> np.ndarray:
    """A threshold for each predicted category that accepts this share of the images sent to it: (count,).

    One threshold for all accepts fewer images of a hard category than of an easy one; these accept the same share of
    each, and so more errors of the hard ones. A category without images gets the threshold of all.
    """
    category, confidence = _one_an_image(category=category, confidence=confidence)
    _check_categories_within(category, count)
    groups = [confidence[category == c] for c in range(count)]
    return np.array([threshold_for_coverage(one if len(one) else confidence, coverage) for one in groups])


def threshold_for_costs(wrong: float, other: float) -> float:
    """The threshold of least expected cost, where a wrong answer and an OTHER cost so much and a right answer nothing.

    An answer of confidence p costs `wrong` (1 - p) on the average: so it pays from p = 1 - other / wrong on (Chow 1970,
    "On optimum recognition error and reject tradeoff"). Holds as far as the confidence is calibrated.

    Raises:
        MSCNNError: a cost is not positive.
    """
    numbers = all(isinstance(cost, (int, float, np.number)) for cost in (wrong, other))
    if not (numbers and wrong > 0 and other > 0):
        raise MSCNNError(f"The costs are {wrong!r} (wrong answer) and {other!r} (OTHER): use numbers above 0.")
    return max(0.0, 1 - other / wrong)


class Views(NamedTuple):
    """What Stage 1 makes of B images: its logits on each view, and the means over the views of what it sees first."""

    logits: np.ndarray  # float32 (views, B, C)
    texture: np.ndarray  # float32 (B, T), the mean of each channel of its first block
    detail: np.ndarray  # float32 (B, D), the log of the mean strength of each whitening filter


class Known(NamedTuple):
    """What images of the categories look like, to notice what looks like none of them; all float64."""

    texture_mean: np.ndarray  # (T,), of the train images
    texture_precision: np.ndarray  # (T, T), the inverse of the texture's covariance
    detail_mean: np.ndarray  # (D,), and
    detail_precision: np.ndarray  # (D, D), the same of the detail
    scale: np.ndarray  # (2, 4): mean and standard deviation of each sign on the calibration split
    limits: np.ndarray  # (3,): above which an image is like nothing known: of the sum, the texture, the detail


def signs_of_novelty(
    logits: np.ndarray, odds: np.ndarray, texture: np.ndarray, detail: np.ndarray, known: Known
) -> np.ndarray:
    """Four signs that an image belongs to no category at all, float64 (B, 4); each grows with its strangeness.

    That no category speaks up: the energy of Stage 1's logits (Liu et al. 2020). That both stages doubt: the log-odds
    of a wrong answer. That Stage 1's first block, which sees edges and colours, sees others than usual: log squared
    Mahalanobis distance to the mean of the train images (Lee et al. 2018 use it for every layer and category). That
    the image has more or less detail than usual: the same distance of the whitening filters' log strengths, which
    fall without end where an image is flat.

    Args:
        logits: Stage 1's mean over the views, (B, C). odds: of the confidence, (B,). texture, detail: see `Views`.
    """
    energy = -np.logaddexp.reduce(logits.astype(np.float64), axis=1)  # (B,)
    unusual = _log_distance(texture, known.texture_mean, known.texture_precision)
    return np.stack([energy, -odds, unusual, _log_distance(detail, known.detail_mean, known.detail_precision)], axis=1)


def _log_distance(features: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Log squared Mahalanobis distance of features (B, K), float64 (B,)."""
    shifted = features - mean  # (B, K)
    # By einsum, without BLAS, whose threads would compete with TensorFlow's: a matrix product here took 20 ms, not 1.
    return np.log(np.maximum((np.einsum("bk,kl->bl", shifted, precision) * shifted).sum(axis=1), 1e-12))


def novelty(signs: np.ndarray, known: Known) -> np.ndarray:
    """How strange images are, float64 (B,): a score for out-of-distribution detection, above 0 too strange.

    The sum of the first three standardised signs less its limit. The texture counts only where it is stranger than the
    mean: a usual one is no sign of a known category, since nearly all photographs have it. Texture and detail have
    limits of their own, too: on noise the stages may be as confident as never before, and would outvote them. Only
    beyond such a limit does its excess replace the sum, if it is larger; so the order of all other images is the sum's.
    NaN where nothing is known.

    Args:
        signs: (B, 4), see `signs_of_novelty`.
    """
    above = _parts_of_novelty(signs, known) - known.limits  # (B, 3)
    own = above[:, 1:].max(axis=1)
    return np.where(own > 0, np.maximum(above[:, 0], own), above[:, 0])


def _parts_of_novelty(signs: np.ndarray, known: Known) -> np.ndarray:
    """What the limits are held against, float64 (B, 3): the sum, the texture and the detail, standardised."""
    mean, deviation = known.scale
    energy, doubt, texture, detail = ((signs - mean) / deviation).T  # (B,) each
    return np.stack([energy + doubt + np.maximum(0, texture), texture, detail], axis=1)


def known_features(texture: np.ndarray, detail: np.ndarray) -> Known:
    """What is known of train images from texture (N, T) and detail (N, D): not yet scale and limits, see `known_scale`.

    Covariances are shrunk (Ledoit and Wolf 2004), for few images.
    """
    from sklearn.covariance import LedoitWolf

    found = []
    for features in (texture, detail):
        covariance = LedoitWolf(store_precision=False).fit(features).covariance_
        some = 1e-6 * max(np.trace(covariance), 1e-6) * np.eye(len(covariance))  # for channels that are always 0
        found += [features.mean(axis=0, dtype=float), np.linalg.inv(covariance + some)]
    return Known(*found, scale=np.full((2, 4), np.nan), limits=np.full(3, np.nan))


def known_scale(known: Known, signs: np.ndarray) -> Known:
    """Returns `known` with scale and limits fitted on the signs (N, 4) of calibration images.

    NOVEL_SHARE of the images lie beyond a limit: OWN_SHARE beyond that of the texture, as many beyond that of the
    detail, and so many beyond that of the sum that all make up the share. Fewer than FEW_IMAGES tell little of their
    own tails: then one image at most lies beyond a limit, that of the sum, and no limit is below the bound that the
    next image of a normal distribution exceeds with a probability of OWN_SHARE, or FEW_SHARE for the sum (its
    prediction interval, Student's t).
    """
    known = known._replace(scale=np.stack([signs.mean(axis=0), np.maximum(signs.std(axis=0), 1e-6)]))
    parts, count = _parts_of_novelty(signs, known), len(signs)  # (N, 3)
    few = count < FEW_IMAGES
    beyond, own = (1, 0) if few else (int(NOVEL_SHARE * count), int(OWN_SHARE * count))
    texture, detail = (_exceeded_by(own, values) for values in parts[:, 1:].T)
    usual = ~((parts[:, 1] > texture) | (parts[:, 2] > detail))  # all, where the features are not known yet: NaN
    limits = np.array([_exceeded_by(beyond - (~usual).sum(), parts[usual, 0]), texture, detail])
    if few and count > 1:
        shares = np.array([FEW_SHARE, OWN_SHARE, OWN_SHARE])
        limits = np.maximum(limits, _next_image_bound(parts, shares))
    return known._replace(limits=limits)


def _exceeded_by(count: int, values: np.ndarray) -> float:
    """The limit that `count` of the values exceed."""
    return float(np.sort(values)[::-1][min(count, len(values) - 1)])


def _next_image_bound(values: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The bound (K,) that the next row of normally distributed values (N, K) exceeds with a probability of `share`."""
    from scipy.stats import t

    factor = t.ppf(1 - share, len(values) - 1) * np.sqrt(1 + 1 / len(values))
    return values.mean(axis=0) + factor * values.std(axis=0, ddof=1)


def log_loss_by_category(category: np.ndarray, confidence: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """How badly the confidences fit, by predicted category: mean negative log likelihood in nats, (count,).

    A proper score: it falls when the confidences rank better and when they are better calibrated. NaN where
    Stage 1 predicts a category for no image.
    """
    confidence, right = _checked_pair(confidence, right, share=True)
    category, _ = _one_an_image(category=category, confidence=confidence)
    _check_categories_within(category, count)
    given = np.clip(np.where(right, confidence, 1 - confidence), 1e-12, 1)  # what was given to the truth
    images = np.bincount(category, minlength=count)
    total = np.bincount(category, weights=-np.log(given), minlength=count)
    return np.divide(total, images, out=np.full(count, np.nan), where=images > 0)


class Opinions(NamedTuple):
    """What both stages say of B images; every field has B rows."""

    category: np.ndarray  # int 0..C-1: Stage 1's answer, by its mean logits
    stage1: np.ndarray  # float64, Stage 1's margin for it
    stage2: np.ndarray  # float64, the log-odds of it by its Stage 2 CNN
    logits: np.ndarray  # float32 (views, B, C), Stage 1's on each view
    texture: np.ndarray  # float32 (B, T), what its first block sees
    detail: np.ndarray  # float32 (B, D), what its whitening sees

    @property
    def mean_logits(self) -> np.ndarray:
        """Stage 1's over the views, float32 (B, C)."""
        return self.logits.mean(axis=0)


class Decisions(NamedTuple):
    """What `MultiStageCNN.decide` says of B images; every field has B rows."""

    category: np.ndarray  # int 0..C, C meaning OTHER
    stage1_category: np.ndarray  # int 0..C-1, by Stage 1's mean logits over both views
    stage1_confidence: np.ndarray  # softmax probability of stage1_category, by the same
    stage2_confidence: np.ndarray  # Stage 2's own probability that Stage 1 is right
    confidence: np.ndarray  # both combined and calibrated: what the threshold is held against
    stage1_log_odds: np.ndarray  # float64, the same as stage1_confidence before the sigmoid
    stage1_margin: np.ndarray  # float64, its lead over the next category, by the same: goes into the confidence
    stage2_log_odds: np.ndarray  # float64, the same as stage2_confidence before the sigmoid
    stage1_logits: np.ndarray  # (B, C), the mean over both views
    one_view_logits: np.ndarray  # (B, C), of the image alone: what Stage 1 would say without a look in the mirror
    novelty: np.ndarray  # float64, above 0: OTHER at any threshold; NaN in a model that never learnt it

    @property
    def familiar(self) -> np.ndarray:
        """Where the threshold decides, bool (B,); all other images are OTHER at any threshold."""
        return ~(self.novelty > 0)  # True where it is NaN

    def reasons(self) -> np.ndarray:
        """Why each image was decided as it was: ACCEPTED, UNSURE or STRANGE; str (B,)."""
        accepted = self.category < self.stage1_logits.shape[1]
        return np.where(accepted, ACCEPTED, np.where(self.familiar, UNSURE, STRANGE))


# ======================================================================================================
# 5 The model: both stages, freezing, fingerprints, decide, save and load
# ======================================================================================================


@_serializable
class MultiStageCNN(keras.Model):
    """Stage 1, the ten Stage 2 CNNs, their companion and the calibration: all that a decision needs.

    Args:
        category_names: (C,).
        image_shape: (H, W, channels) of the uint8 images.
        mean, std: of each channel of the train split, in pixel values 0..255.
        flip: whether a mirrored image keeps its category. If so, training mirrors images, and a decision looks at
            the image and its mirror image.
        dataset, data_fingerprint: name and fingerprint of the data set the model is trained on.
        threshold: confidence below which an image is OTHER. threshold_reason: how it was chosen, in words.
        policy: Keras dtype policy of the convolutions.
        certificate: the fields of a `Certificate`, if one was given; see `certify`.
        source_fingerprint: that of the data set before light mode and splitting.

    The companion is a CNN of Stage 2's shape trained on all categories: every Stage 2 CNN starts as a copy
    of it. It is kept so that a category can be started again.
    """

    def __init__(
        self,
        category_names: Sequence[str],
        image_shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool = True,
        dataset: str = "",
        data_fingerprint: str = "",
        threshold: float = 0.7,
        threshold_reason: str = GIVEN,
        policy: str = "float32",
        stage1_widths: Sequence[int] = STAGE1_WIDTHS,
        stage2_widths: Sequence[int] = STAGE2_WIDTHS,
        logit_scale: float = 0.25,
        activation: str = "relu",
        certificate: Sequence[float] | None = None,
        source_fingerprint: str = "",
        **kwargs,
    ):
        _check_keras()
        super().__init__(**kwargs)
        self._settings = {
            "category_names": list(category_names), "image_shape": list(image_shape),
            "mean": [float(m) for m in mean], "std": [float(s) for s in std], "flip": flip, "dataset": dataset,
            "data_fingerprint": data_fingerprint, "source_fingerprint": source_fingerprint, "policy": policy,
            "stage1_widths": list(stage1_widths), "stage2_widths": list(stage2_widths),
            "logit_scale": logit_scale, "activation": activation,
        }  # fmt: skip
        self.category_names = tuple(category_names)
        self.image_shape, self.flip, self.dataset, self.policy = tuple(image_shape), flip, dataset, policy
        self.threshold, self.data_fingerprint = threshold, data_fingerprint
        self.threshold_reason = threshold_reason
        self.certificate = Certificate(*certificate) if certificate else None
        count = len(self.category_names)
        build = functools.partial(
            build_cnn, input_shape=image_shape, categories=count, mean=mean, std=std, flip=flip, policy=policy,
            logit_scale=logit_scale, activation=activation,
        )  # fmt: skip
        self.stage1 = build("stage1", widths=stage1_widths)
        self.new_stage2 = functools.partial(build, name="stage2", widths=stage2_widths)
        self.companion = self.new_stage2(name="companion")
        self.stage2 = {name: self.new_stage2(name=name) for name in map(_category_key, range(count))}
        # Not a number until `calibrate` has run, so that an uncalibrated model is noticed.
        not_yet = {"initializer": keras.initializers.Constant(np.nan), "trainable": False, "dtype": "float64"}
        self.common_row = self.add_weight(shape=(3,), name="common_row", autocast=False, **not_yet)
        self.rows = self.add_weight(shape=(count, 3), name="rows", autocast=False, **not_yet)
        texture, detail = stage1_widths[0], 4 * image_shape[-1]  # channels, whitening filters
        shapes = [(texture,), (texture, texture), (detail,), (detail, detail), (2, 4), (3,)]
        shapes = zip(Known._fields, shapes, strict=True)
        self._known = [self.add_weight(shape=shape, name=name, autocast=False, **not_yet) for name, shape in shapes]
        self._network_ids = self._ids_of_networks()
        self.built = True

    def __setattr__(self, name, value):
        if "_network_ids" in self.__dict__:  # all is built
            if name in ("stage1", "companion", "stage2"):
                raise MSCNNError(self._not_replaced(name))
            if name in ("category_names", "image_shape", "flip", "dataset", "data_fingerprint", "policy"):
                raise MSCNNError(
                    f"{name} cannot be changed: the networks were made for it. Build another MultiStageCNN."
                )
        super().__setattr__(name, value)

    def _ids_of_networks(self) -> dict[str, int]:
        # Not the networks themselves: Keras would save them under this name
        networks = {"stage1": self.stage1, "companion": self.companion, **self.stage2}
        return {name: id(network) for name, network in networks.items()}

    @staticmethod
    def _not_replaced(name: str) -> str:
        return (
            f"{name} cannot be replaced: the file of a model holds weights for the networks it was built with. "
            "Use set_weights() of that network, or build another MultiStageCNN (stage1_widths, stage2_widths)."
        )

    @classmethod
    def for_dataset(cls, data: Dataset, policy: str | None = None, seed: int = 0, **settings) -> MultiStageCNN:
        """A new model for a data set: its input statistics and whitening from the train split, weights random."""
        keras.utils.set_random_seed(seed)
        mean, std = data.channel_statistics()
        model = cls(
            data.category_names, data.input_shape, mean, std, data.flip, data.name, data.fingerprint,
            policy=policy or fastest_policy(), source_fingerprint=data.source_fingerprint, **settings,
        )  # fmt: skip
        some = data.train.images[:: -(-len(data.train) // 5000)]  # from all over: images may be sorted by category
        kernel = whitening_kernel(some, mean, std)
        for network in (model.stage1, model.companion, *model.stage2.values()):
            network.get_layer("whitening").kernel.assign(kernel)
        return model

    def get_config(self):
        certificate = None if self.certificate is None else list(self.certificate)
        chosen = {"threshold": np.asarray(self.threshold).tolist(), "threshold_reason": self.threshold_reason}
        return {**self._settings, **chosen, "certificate": certificate}

    def load_own_variables(self, store):
        """As Keras does it; but of a file from before `Known` as it is now, all but what is known is read."""
        variables = self._trainable_variables + self._non_trainable_variables
        if len(store.keys()) == len(variables):
            return super().load_own_variables(store)
        for i, variable in enumerate(variables[: -len(self._known)]):
            variable.assign(store[str(i)])
        self.certificate = None  # it was given for what the other rule accepts

    @classmethod
    def from_config(cls, config):
        return cls(**{"activation": "silu", **config})  # which files from before ReLU do not name

    # ---- parts

    def stage2_of(self, category: int) -> keras.Model:
        """The Stage 2 CNN of a category: uint8 (B, H, W, channels) -> logits (B, C)."""
        return self.stage2[_category_key(category)]

    @property
    def is_calibrated(self) -> bool:
        return bool(np.isfinite(self.rows.numpy()).all())

    def parts(self) -> dict[str, list[np.ndarray]]:
        """Every array of the model by part: 'stage1', 'companion', 'stage2/ship', 'calibration/ship', ..."""
        parts = {"stage1": self.stage1.get_weights(), "companion": self.companion.get_weights()}
        parts |= {f"stage2/{n}": self.stage2_of(c).get_weights() for c, n in enumerate(self.category_names)}
        parts["calibration/common"] = [self.common_row.numpy()]
        parts["known"] = [one.numpy() for one in self._known]
        rows = self.rows.numpy()
        return parts | {f"calibration/{n}": [rows[c]] for c, n in enumerate(self.category_names)}

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each part, so that anyone can check what a training has left untouched."""
        return {
            name: hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()
            for name, arrays in self.parts().items()
        }

    # ---- freezing

    def set_stage1_trainable(self, flag: bool = True) -> None:
        """Frozen (False): training moves no weight and no BatchNormalization statistic of Stage 1."""
        self.stage1.trainable = bool(flag)

    def set_stage2_category_trainable(self, categories: str | int | Iterable = "", flag: bool = True) -> None:
        """Freezes or frees the Stage 2 CNNs (and calibration rows) of the given categories; '' means all."""
        for category in categories_from(categories, self.category_names):
            self.stage2_of(category).trainable = bool(flag)

    def train_only(self, categories: str | int | Iterable) -> None:
        """Freezes everything but the Stage 2 CNNs of the given categories."""
        self.set_stage1_trainable(False)
        self.companion.trainable = False
        self.set_stage2_category_trainable("", False)
        self.set_stage2_category_trainable(categories, True)

    def trainable_categories(self) -> tuple[int, ...]:
        return tuple(c for c in range(len(self.category_names)) if self.stage2_of(c).trainable)

    def trainable_summary(self) -> str:
        """What is trainable, printable: `✓ ship: True   ✗ cat: False`."""

        def line(name: str, flag: bool) -> str:
            return f"{'✓' if flag else '✗'} {name}: {flag}"

        free = self.trainable_categories()
        stage2 = [line(name, c in free).ljust(20) for c, name in enumerate(self.category_names)]
        rows = ["   ".join(stage2[i : i + 5]).rstrip() for i in range(0, len(stage2), 5)]
        first = f"{line('Stage 1', self.stage1.trainable)}   {line('Companion', self.companion.trainable)}"
        return "\n".join([first, "Stage 2", *rows])

    # ---- forward

    def call(self, images, training=False):
        """uint8 (B, H, W, channels) -> {"stage1": logits (B, C), "stage2": log-odds of each category (B, C)}.

        One view of each image; `decide` lets both stages judge the mirror image, too.
        """
        stage2 = [
            log_odds_tensor(self.stage2_of(c)(images, training=training), c) for c in range(len(self.category_names))
        ]
        return {"stage1": self.stage1(images, training=training), "stage2": tf.stack(stage2, axis=1)}

    @property
    def _views(self) -> int:
        """How many views of an image are judged: itself, and its mirror image if that keeps the category."""
        return 2 if self.flip else 1

    def _on_views(self, network, images):
        """What a network says of the views of each image, side by side: (B, views times its outputs)."""
        views = tf.concat([images, tf.reverse(images, [2])][: self._views], axis=0)  # (views B, H, W, channels)
        return tf.concat(tf.split(network(views, training=False), self._views), axis=1)

    def _stage1_logits(self, images):
        return self.stage1(images, training=False)

    def _stage2_logits(self, handles, images):
        """Stage 2's logits (B, views C): all Stage 2 CNNs are one graph, traced once.

        Args:
            handles: of the variables of the CNN in question. Their values would have to be read one by one before the
                call: half a millisecond.
            images: uint8 (B, H, W, channels).
        """
        mapping = [(w, _read(h, w)) for w, h in zip(self.companion.weights, handles, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            return self._on_views(self.companion, images)

    def _traced(self, function: Callable, *before):
        """A function of any number of images, preceded by arguments like `before`, as a graph.

        Called as its one trace, without the checks that would choose among several; and without AutoGraph, since there
        is no Python control flow to translate.
        """
        signature = [*before, tf.TensorSpec((None, *self.image_shape), tf.uint8)]
        return tf.function(function, input_signature=signature, autograph=False).get_concrete_function()

    @functools.cached_property
    def _stage1_graph(self):
        return self._traced(self._stage1_logits)

    @functools.cached_property
    def _stage1_views_graph(self):
        return self._traced(functools.partial(self._on_views, feature_extractor(self.stage1)))

    @functools.cached_property
    def _stage2_graph(self):
        return self._traced(self._stage2_logits, [tf.TensorSpec((), tf.resource)] * len(self.companion.weights))

    def stage1_logits(self, images: np.ndarray, batch_size: int = 512) -> np.ndarray:
        """Stage 1's logits, float32 (B, C), of uint8 images (B, H, W, channels), without a look in the mirror."""
        return _in_batches(self._stage1_graph, self._checked(images), batch_size, len(self.category_names))

    def stage2_log_odds(self, images: np.ndarray, category: int, batch_size: int = 512) -> np.ndarray:
        """Log-odds that the images show `category`, by its Stage 2 CNN: float64 (B,).

        The mean over each image and, if mirroring keeps its category, its mirror image.

        Args:
            images: uint8 (B, H, W, channels).
            batch_size: images at a time; the CNN sees both views of them at once.
        """
        handles = [w.value.handle for w in self.stage2_of(category).weights]
        graph = functools.partial(self._stage2_graph, handles)
        logits = _in_batches(graph, images, batch_size, self._views * len(self.category_names))  # (B, views C)
        where = np.full(len(images), category)
        return np.mean([log_odds(one, where) for one in np.split(logits, self._views, axis=1)], axis=0)

    def stage1_views(self, images: np.ndarray, batch_size: int = 512) -> Views:
        """What Stage 1 makes of uint8 images (B, H, W, channels) and, if that keeps their category, mirrored ones."""
        sizes = np.cumsum([len(self.category_names), *(self._known[i].shape[0] for i in (0, 2, 2))])  # C, T, D, D
        both = _in_batches(self._stage1_views_graph, self._checked(images), batch_size, self._views * sizes[-1])
        views = np.stack(np.split(both, self._views, axis=1))  # (views, B, C + T + 2 D)
        logits, texture, *halves = np.split(views, sizes[:-1], axis=2)
        strength = sum(halves).mean(axis=0)  # a filter answers by itself or by its negative
        return Views(logits, texture.mean(axis=0), np.log(strength + WEAKEST_DETAIL))

    def opinions(self, images: np.ndarray, batch_size: int = 512) -> Opinions:
        """Both stages' opinion of uint8 images (B, H, W, channels), not yet combined.

        Stage 1 answers by its mean logits over the image and, if mirroring keeps the category, its mirror image: two
        looks err less than one, and an answer that changes in the mirror has a small margin. Only the Stage 2 CNN of
        the predicted category is run: the images are sorted by category first.
        """
        views = self.stage1_views(images, batch_size)
        logits = views.logits.mean(axis=0)  # (B, C)
        category = logits.argmax(axis=1)  # (B,)
        stage2 = np.zeros(len(images))
        for c in np.unique(category):
            here = np.flatnonzero(category == c)
            stage2[here] = self.stage2_log_odds(images[here], c, batch_size)
        return Opinions(category, margin(logits, category), stage2, *views)

    def decide(
        self, images: np.ndarray, threshold: float | np.ndarray | None = None, batch_size: int = 512
    ) -> Decisions:
        """Decides on uint8 images (B, H, W, channels): one of the categories 0..C-1, or C for OTHER.

        OTHER is what the confidence does not reach the threshold for, and what is like nothing known: there a
        confidence may be high and mean little, since it was learnt on images of the categories.

        Args:
            threshold: in place of the model's own; one for all, or one a category, (C,).

        Raises:
            MSCNNError: images or thresholds of another shape, or a model that is not calibrated yet.
        """
        if not self.is_calibrated:
            raise MSCNNError("Stage 2 is not trained and calibrated yet: run notebook 03_stage2_training first.")
        count = len(self.category_names)
        threshold = self.threshold if threshold is None else self._checked_threshold(threshold)
        opinions, known = self.opinions(images, batch_size), self.known
        combined = self._combined(opinions)
        confidence, strange = sigmoid(combined), novelty(self._signs(opinions, combined, known), known)
        final = np.where(strange > 0, count, accept(opinions.category, confidence, threshold, count))
        odds = log_odds(opinions.mean_logits, opinions.category)
        return Decisions(
            category=final,
            stage1_category=opinions.category,
            stage1_confidence=sigmoid(odds),
            stage2_confidence=sigmoid(opinions.stage2),
            confidence=confidence,
            stage1_log_odds=odds,
            stage1_margin=opinions.stage1,
            stage2_log_odds=opinions.stage2,
            stage1_logits=opinions.mean_logits,
            one_view_logits=opinions.logits[0],
            novelty=strange,
        )

    def _combined(self, opinions: Opinions) -> np.ndarray:
        """Log-odds of the confidence, float64 (B,)."""
        return combined_log_odds(self.rows.numpy(), opinions.category, opinions.stage1, opinions.stage2)

    @staticmethod
    def _signs(opinions: Opinions, combined: np.ndarray, known: Known) -> np.ndarray:
        return signs_of_novelty(opinions.mean_logits, combined, opinions.texture, opinions.detail, known)  # (B, 4)

    def _checked(self, images: np.ndarray) -> np.ndarray:
        if not isinstance(images, np.ndarray) or images.shape[1:] != self.image_shape or images.dtype != np.uint8:
            raise MSCNNError(
                f"Images are {getattr(images, 'dtype', type(images).__name__)} {np.shape(images)}: this model takes "
                f"uint8 (B, {', '.join(map(str, self.image_shape))}). load_dataset() gives that, and read_image() one "
                "of them: image[None] makes a batch of it."
            )
        return images

    # ---- calibration

    @property
    def known(self) -> Known:
        """What images of the categories look like; NaN until `learn_known`, its scale and limits until `calibrate`."""
        return Known(*(one.numpy() for one in self._known))

    def _keep_known(self, known: Known) -> None:
        for variable, value in zip(self._known, known, strict=True):
            variable.assign(value)

    def learn_known(self, data: Dataset, images: int = 5000) -> None:
        """Learns what the images of the categories look like to Stage 1, as it is; see `novelty`.

        That changes which images are accepted, so it voids a guarantee.

        Args:
            images: about how many of the train split are looked at. The calibration split is looked at whole, if the
                model is calibrated; else `calibrate` does so.
        """
        self.certificate = None
        some = data.train.images[:: -(-len(data.train) // images)]  # from all over: they may be sorted by category
        views = self.stage1_views(some)
        self._keep_known(known_features(views.texture, views.detail))
        if self.is_calibrated:
            self._scale_known(self.opinions(data.calibration.images))

    def _scale_known(self, opinions: Opinions) -> None:
        """Sets scale and limits of what is known, from both stages' opinions of the calibration split."""
        known = self.known
        self._keep_known(known_scale(known, self._signs(opinions, self._combined(opinions), known)))

    def calibrate(self, split: Split, categories: Iterable[int] | None = None) -> None:
        """Fits calibration rows on the calibration split.

        Args:
            categories: fit only these rows, shrunk towards the common row as it is. None: fit the rows of all
                trainable categories and, if no category is frozen, the common row before them and the limits of what
                is known behind them.

        Raises:
            MSCNNError: a category is frozen.
        """
        free = self.trainable_categories()
        chosen = free if categories is None else tuple(categories)
        frozen = sorted(set(chosen) - set(free))
        if frozen:
            names = ", ".join(self.category_names[c] for c in frozen)
            raise MSCNNError(f"The calibration of {names} is frozen: call set_stage2_category_trainable() first.")
        opinions, rows = self.opinions(split.images), self.rows.numpy()
        labels = _checked_labels(opinions.category, split.labels)
        self.certificate = None
        pair, right = (opinions.stage1, opinions.stage2), opinions.category == labels
        everything = categories is None and len(free) == len(self.category_names)
        if everything:
            self.common_row.assign(fit_common_row(*pair, right))
        if chosen:
            rows[list(chosen)] = fit_category_rows(opinions.category, *pair, right, self.common_row.numpy(), chosen)
        self.rows.assign(rows)
        if everything:
            self._scale_known(opinions)

    def void_calibration(self, categories: Iterable[int] | None = None) -> None:
        """Marks rows as not calibrated, since what they were fitted to has been trained; None: all of them."""
        self.certificate = None
        rows = self.rows.numpy()
        rows[slice(None) if categories is None else list(categories)] = np.nan
        self.rows.assign(rows)
        if categories is None:
            self.common_row.assign(np.full(3, np.nan))

    def certify(self, split: Split, risk: float, delta: float = 0.05) -> Certificate:
        """Sets a low threshold with a guaranteed error rate (see `threshold_for_risk`), and keeps the guarantee.

        It is one for the images that are not like nothing known; the others are OTHER anyway. Any training or
        calibration voids the guarantee.

        Args:
            split: the certification split, which nothing else has seen.

        Raises:
            MSCNNError: too few images, or the risk cannot be guaranteed; threshold and certificate stay as they were.
        """
        decisions = self.decide(split.images)
        labels, familiar = _checked_labels(decisions.category, split.labels), decisions.familiar
        right = decisions.stage1_category == labels
        found = threshold_for_risk(decisions.confidence[familiar], right[familiar], risk, delta)
        self.certificate = found._replace(images=len(split))
        self.threshold = self.certificate.threshold
        self.threshold_reason = f"for at most {risk:.2%} errors"
        return self.certificate

    @property
    def threshold(self) -> float | np.ndarray:
        """Confidence below which an image is OTHER: one for all, or one a category, (C,).

        Setting it makes it one that was given.
        """
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | Sequence[float]) -> None:
        self._threshold, self.threshold_reason = self._checked_threshold(value), GIVEN

    def _checked_threshold(self, value: float | Sequence[float]) -> float | np.ndarray:
        """A float or a new float64 array (C,), whatever numbers were given."""
        count = len(self.category_names)
        if np.shape(check_threshold(value)) not in ((), (count,)):
            raise MSCNNError(f"Thresholds are {np.shape(value)}: give one for all, or one a category, ({count},).")
        return float(value) if np.ndim(value) == 0 else np.array(value, np.float64)

    @property
    def valid_certificate(self) -> Certificate | None:
        """The certificate, if it is for the model's threshold."""
        certified = self.certificate is not None and np.all(self.certificate.threshold == self.threshold)
        return self.certificate if certified else None

    def threshold_text(self) -> str:
        """What the threshold is, how it was chosen, and what is guaranteed of it; printable."""
        several = np.ndim(self.threshold) > 0
        name = (
            f"Thresholds {_span(self.threshold, '.4f')} by category" if several else f"Threshold {self.threshold:.4f}"
        )
        return f"{name}, {self.threshold_reason}. {self.guarantee()}"

    def guarantee(self) -> str:
        """What is guaranteed of the model's decisions, printable in one line."""
        if self.certificate is None:
            return "No error rate is guaranteed: the model was not certified after its last training and calibration."
        if self.valid_certificate is None:
            return (
                f"No error rate is guaranteed at threshold {_span(self.threshold, 'g')}: the certificate is for "
                f"{self.certificate.threshold:g} (model.threshold = model.certificate.threshold takes that one)."
            )
        return self.certificate.text()

    # ---- save, load

    def save(self, filepath: str | Path, overwrite: bool = True, **kwargs) -> None:
        """Saves the whole model as one `.keras` file, beside the old one first: a file is whole or the old one.

        Args:
            overwrite: whether a file that is there may be replaced; nobody is asked.

        Raises:
            MSCNNError: it may not, it cannot be written, or a network is not the model's own any more.
        """
        path = path_from(str(filepath), Path())
        if path.suffix != ".keras" or os.path.isdir(path):
            raise MSCNNError(f"{path} is no name for a model file: give one that ends in .keras.")
        for name, _ in self._ids_of_networks().items() ^ self._network_ids.items():
            raise MSCNNError(self._not_replaced(name))
        if not overwrite and os.path.lexists(path):
            raise MSCNNError(f"{path} is there already: give another name, or overwrite=True to replace it.")
        _write_whole(path, lambda partial: super(MultiStageCNN, self).save(partial, **kwargs))

    def check_matches(self, data: Dataset) -> None:
        """Raises MSCNNError if the model was made for another data set, or for other splits of it."""
        pairs = {
            "data set": (self.dataset, data.name),
            "image shape": (self.image_shape, data.input_shape),
            "list of categories": (", ".join(self.category_names), ", ".join(data.category_names)),
        }
        for what, (mine, given) in pairs.items():
            if mine != given:
                raise MSCNNError(
                    f"The model is for another {what}: {mine}; the data has {given}. "
                    "Choose the data set that the model was trained on, or train a new model."
                )
        if self.data_fingerprint not in ("", data.fingerprint):
            raise MSCNNError(
                f"The model was trained on other splits of {data.name} (seed, light_mode or files differ): its train "
                "images would be used to judge it. Use the seed and light_mode of its training (the pretrained model: "
                "seed 0, no light_mode), or train a new model."
            )


def _span(threshold: float | np.ndarray, form: str) -> str:
    """A threshold, or the least and the largest of several."""
    return " to ".join(f"{one:{form}}" for one in sorted({np.min(threshold), np.max(threshold)}))


def _category_key(category: int) -> str:
    return f"category_{category}"


def _read(handle, like):
    """The value of the variable with a handle, which does not tell its type and shape: those of the variable `like`."""
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=like.dtype)
    value.set_shape(like.shape)
    return value


def log_odds_tensor(logits, category):
    """As `log_odds`, for tensors and one category: float32 (B, C) -> (B,)."""
    others = tf.one_hot(category, tf.shape(logits)[1], on_value=-np.inf, off_value=0.0)  # (C,)
    return tf.gather(logits, category, axis=1) - tf.reduce_logsumexp(logits + others, axis=1)


def _in_batches(graph: Callable, images: np.ndarray, batch_size: int, width: int) -> np.ndarray:
    """Runs a graph over images, `batch_size` (1 or more) at a time: (N, ...) -> float32 (N, width).

    A batch of more than 8 is filled up to a multiple of 8, so that few shapes occur: each new one
    costs the libraries below TensorFlow some milliseconds of preparation.
    """
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise MSCNNError(f"batch_size is {batch_size}: it is a number of images, a whole number from 1 on.")
    results = [np.zeros((0, width), np.float32)]
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = -len(batch) % 8 if len(batch) > 8 else 0
        filled = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch
        results.append(graph(tf.constant(filled)).numpy()[: len(batch)])
    return np.concatenate(results)


def _check_keras() -> None:
    """Raises MSCNNError if Keras is set up, by keras.json or otherwise, in a way that no network here works with."""
    wanted = {"backend": (keras.config.backend(), "tensorflow"),
              "image_data_format": (keras.config.image_data_format(), "channels_last")}  # fmt: skip
    for setting, (found, needed) in wanted.items():
        if found != needed:
            raise MSCNNError(
                f"Keras has the {setting} {found}, and this project needs {needed}: set it in "
                f"{_keras_home()}/keras.json (KERAS_BACKEND sets the backend, too) and start Python anew."
            )


def _check_model_file(path: Path) -> None:
    """Raises MSCNNError for what is known to keep a file from being loaded, whatever is in it otherwise."""
    _check_keras()
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise MSCNNError(f"Cannot read {path}: {error.strerror}. Its rights have to let you read it.") from error
    if not start:
        raise MSCNNError(f"{path} is damaged or not a model of this project: it is empty. Get or save it again.")
    if start.startswith(b"version https://git-lfs"):
        raise MSCNNError(f"{path} is a Git LFS pointer, not the model itself: run git lfs pull.")
    if path.suffix != ".keras":
        raise MSCNNError(f"{path} has no name that ends in .keras: rename it, if it is a model of this project.")


def load_model(path: str | Path) -> MultiStageCNN:
    """Loads a model file; "pretrained" is the one that comes with the project.

    Raises:
        MSCNNError: it is missing, damaged or not of this project.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise MSCNNError(
            f"The model file is {path!r}: give the path of a .keras file of a finished run, or pretrained."
        )
    path = project_root() / PRETRAINED if str(path) == "pretrained" else path_from(str(path), Path())
    if os.path.isdir(path):
        raise MSCNNError(f"{path} is a folder: give the path of a .keras file of a finished run, or pretrained.")
    if not Path(path).is_file():
        raise MSCNNError(
            f"There is no model file at {path}: give the path of a .keras file of a finished run, or pretrained."
        )
    _check_model_file(Path(path))
    try:
        model = keras.saving.load_model(path)
    except Exception as error:  # a broken file fails in many ways: zip, JSON, HDF5, Keras
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise MSCNNError(f"{path} is damaged or not a model of this project: {reason}") from error
    if not isinstance(model, MultiStageCNN):
        raise MSCNNError(f"{path} holds a {type(model).__name__}, not a MultiStageCNN.")
    return model


def load_model_for(data: Dataset, path: str | Path) -> MultiStageCNN:
    """Loads a model file to use it on the data set it was trained on; an older one learns what is known as it is now.

    Raises:
        MSCNNError: as `load_model`, or the model is for other data.
    """
    model = load_model(path)
    model.check_matches(data)
    known = model.known
    if np.isnan(known.texture_mean).any() or (model.is_calibrated and np.isnan(known.limits).any()):
        older = f"{Path(path).name} is from before the second reason for OTHER as it is now"
        print(f"{older}: what is known is learnt anew.", flush=True)
        model.learn_known(data)
    return model


# ======================================================================================================
# 6 Training: Stage 1, companion, Stage 2, selective retraining
# ======================================================================================================


@dataclass(frozen=True)
class Recipe:
    """How the CNNs are trained; `recipe_for` chooses epochs and batch size for the data at hand."""

    epochs: int
    batch_size: int
    companion_epochs: int = 0  # 0: as many as Stage 1
    learning_rate: float = 0.5  # peak, at batches of 512; proportional to the batch size
    kernel_learning_rate: float = 0.06  # the same of convolution kernels, at any batch size; see Muon
    momentum: float = 0.85
    weight_decay: float = 0.009  # a step takes away learning rate x weight decay of each weight but the kernels
    label_smoothing: float = 0.2
    warm_up: float = 0.23  # share of the steps in which the learning rate rises
    small_crops: float = 0.5  # share of the epochs, the first ones, that see a part of each image; see SmallCropsFirst
    stage2_learning_rate: float = 0.02  # at first, at batches of 256; proportional to the batch size
    stage2_kernel_learning_rate: float = 0.01  # at first, at any batch size
    stage2_share: float = 0.07  # images drawn for a category in an epoch, as a share of the train split

    @property
    def peak(self) -> float:
        """The highest learning rate of Stage 1 and the companion, kernels aside."""
        return self.learning_rate * self.batch_size / 512


def recipe_for(images: int, epochs: int = 0, batch_size: int = 0) -> Recipe:
    """The recipe for a number of train images; epochs or batch size 0 leave the choice to it.

    With few images an epoch is few steps. So the steps are larger there, all epochs see whole images, and the companion
    and Stage 2, whose CNNs are cheap, see more of them. With many, a companion of some points more did not make better
    judges, so it has fewer epochs than Stage 1.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 0:
            raise MSCNNError(f"{name} is {value}: it has to be 0 or more.")
    epochs = epochs or 20
    if images < 20_000:
        return Recipe(
            epochs, batch_size or 64, companion_epochs=2 * epochs, learning_rate=0.75, small_crops=0.0, stage2_share=0.3
        )
    return Recipe(epochs, batch_size or 512, companion_epochs=max(1, round(0.8 * epochs)))


class Triangle(keras.optimizers.schedules.LearningRateSchedule):
    """Rises in a straight line from a fifth to the peak, then falls in another to a hundredth (airbench: to 7 %)."""

    def __init__(self, peak: float, rising: int, steps: int):
        self.peak, self.rising, self.steps = peak, rising, steps

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        rise = 0.2 + 0.8 * step / max(self.rising, 1)
        fall = 0.01 + 0.99 * (self.steps - step) / max(self.steps - self.rising, 1)
        return self.peak * tf.maximum(tf.minimum(rise, fall), 0.01)

    def get_config(self):  # TensorBoard asks for it
        return {"peak": self.peak, "rising": self.rising, "steps": self.steps}


def learning_rate_schedule(recipe: Recipe, steps: int) -> Triangle:
    """Of Stage 1 and the companion, for a training of so many steps."""
    return Triangle(recipe.peak, int(recipe.warm_up * steps), steps)


class Muon(keras.optimizers.SGD):
    """SGD with Nesterov momentum that orthogonalises the steps of convolution kernels.

    A kernel is seen as a matrix with a column for each output channel, and so is its step. A plain step is ruled by the
    few directions with the largest gradients; here all its singular values are made nearly equal, so that it moves as
    far in the others. Kernels are kept at one length, since BatchNormalization makes their scale idle: so their
    learning rate is a share of it, and they need no weight decay. Every other weight takes a plain step.
    Source: Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; airbench94_muon.

    Args:
        schedule: learning rate of the other weights.
        kernel_gain: the kernels' learning rate is so many times that of the others.
        recipe: its momentum and weight decay are used.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, kernel_gain: float, recipe: Recipe):
        super().__init__(schedule, recipe.momentum, nesterov=True, weight_decay=recipe.weight_decay)
        self.kernel_gain = kernel_gain

    def build(self, variables):
        self.exclude_from_weight_decay([one for one in variables if len(one.shape) == 4])
        super().build(variables)

    def update_step(self, gradient, variable, learning_rate):
        if len(variable.shape) != 4:
            return super().update_step(gradient, variable, learning_rate)
        momentum = self.momentums[self._get_variable_index(variable)]
        self.assign(momentum, self.momentum * momentum + gradient)
        step = orthogonalised(as_matrix(gradient + self.momentum * momentum))  # (9 in, out)
        kernel = variable * (variable.shape[-1] ** 0.5 / tf.norm(variable))
        rate = tf.cast(learning_rate, kernel.dtype) * self.kernel_gain
        self.assign(variable, kernel - rate * tf.reshape(step, variable.shape))


def as_matrix(kernel):
    """A convolution kernel (height, width, in, out) as a matrix (height width in, out)."""
    return tf.reshape(kernel, (-1, kernel.shape[-1]))


def orthogonalised(matrix, rounds: int = 3):
    """About the nearest matrix whose singular values are all 1: float32 (m, n) -> (m, n).

    By Newton-Schulz iteration with coefficients chosen for speed: in three rounds, singular values of more than a
    fiftieth of the matrix' length end between 0.7 and 1.2 or so, which is near enough for a step. All rounds are done
    on the matrix of inner products, which is smaller, and applied at once. Source: Jordan 2024.
    """
    x = matrix / (tf.norm(matrix) + 1e-7)
    inner = tf.matmul(x, x, transpose_a=True)  # (n, n)
    transform = identity = tf.eye(inner.shape[0])
    for _ in range(rounds):
        polynomial = 3.4445 * identity - 4.7750 * inner + 2.0315 * inner @ inner
        transform = transform @ polynomial
        inner = polynomial @ inner @ polynomial
    return x @ transform


def muon_for(recipe: Recipe, steps: int) -> Muon:
    """The optimizer of Stage 1 and the companion, for a training of so many steps."""
    return Muon(learning_rate_schedule(recipe, steps), recipe.kernel_learning_rate / recipe.peak, recipe)


def stage2_muon_for(recipe: Recipe, batch_size: int, steps: int) -> Muon:
    """The optimizer of a Stage 2 CNN, whose learning rate falls from the first step on."""
    rate = recipe.stage2_learning_rate * batch_size / 256
    falling = keras.optimizers.schedules.CosineDecay(rate, steps, alpha=0.01)
    return Muon(falling, recipe.stage2_kernel_learning_rate / rate, recipe)


class EpochSeconds(keras.callbacks.Callback):
    """Records how long each epoch takes, its validation included, in seconds."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.begun)


class AlternatingFlip(keras.callbacks.Callback):
    """Tells the augmentation which epoch it is, so that it mirrors each image in every second one."""

    def __init__(self, augmentation: RandomFlipCrop):
        super().__init__()
        self.augmentation = augmentation

    def on_epoch_begin(self, epoch, logs=None):
        self.augmentation.epoch.assign(epoch)


class SmallCropsFirst(keras.callbacks.Callback):
    """Lets the first epochs see a random three quarters of each image's height and width, the others all of it.

    A network that ends in a mean over its area takes images of any size, and what it learns of their parts first,
    at half of the work, serves it in the whole. Source: progressive learning (Tan & Le 2021, section 4.2), which
    shrinks the images instead.
    """

    def __init__(self, augmentation: RandomFlipCrop, epochs: int):
        super().__init__()
        self.augmentation, self.epochs = augmentation, epochs

    def on_epoch_begin(self, epoch, logs=None):
        self.augmentation.share.assign(SMALL_CROP if epoch < self.epochs else 1.0)


class KeepBestWeights(keras.callbacks.Callback):
    """Puts back the weights of the epoch with the best accuracy on the calibration split (the later of equals)."""

    def on_train_begin(self, logs=None):
        self.best, self.weights, self.epoch = -1.0, None, 0

    def on_epoch_end(self, epoch, logs=None):
        if logs["val_accuracy"] >= self.best:
            self.best, self.weights, self.epoch = logs["val_accuracy"], self.model.get_weights(), epoch + 1

    def on_train_end(self, logs=None):
        if self.weights is not None:
            self.model.set_weights(self.weights)
            print(f"Best on the calibration split: {self.best:.1%} after epoch {self.epoch}; its weights are kept.")


def _seed(network: keras.Model, seed: int) -> None:
    """Seeds all that is random in a training: Python, NumPy, TensorFlow (shuffling), and the augmentation."""
    keras.utils.set_random_seed(seed)
    network.get_layer("augmentation").reseed(seed)


def steps_per_call(epoch: int) -> int:
    """How many training steps `fit` takes in one call of a graph: on a GPU all those of an epoch, on CPU one.

    A GPU takes a step in milliseconds, so that Python between two steps would cost as much. On CPU it costs little,
    and single steps can be interrupted. The trained weights are the same but for rounding.
    """
    return epoch if tf.config.list_physical_devices("GPU") else 1


def both_splits(data: Dataset) -> Split:
    """Train and calibration split as one, in this order: all that a training looks at."""
    return Split(*(np.concatenate(parts) for parts in zip(data.train, data.calibration, strict=True)))


class Trainer(keras.Model):
    """A network with the images of its training, which lie on the device that computes: for `fit` on their indices.

    Optimizer and metrics end here, not in the network's model file. A callback's `self.model` is a Trainer: `predict`
    also takes images, and `save` saves the network.

    Args:
        network: its layers are trained.
        images: uint8 (N, H, W, channels). A variable holds them, for on a GPU TensorFlow gathers uint8 from nothing
            else; it is no weight.
        head: a layer for what the network says; None: nothing is done with it.
    """

    def __init__(self, network: keras.Model, images: np.ndarray, head: keras.layers.Layer | None = None):
        super().__init__()
        self.network, self.head = network, head or keras.layers.Identity()
        self.images = tf.Variable(images, trainable=False)
        self.built = True  # the network is

    def call(self, inputs, training=False):
        """Indices int64 (B,), or images uint8 (B, H, W, channels) -> what the head makes of the network's output."""
        images = tf.gather(self.images, inputs) if len(inputs.shape) == 1 else inputs
        return self.head(self.network(images, training=training))

    def save(self, filepath: str | Path, **kwargs) -> None:
        self.network.save(filepath, **kwargs)

    def save_weights(self, filepath: str | Path, **kwargs) -> None:
        self.network.save_weights(filepath, **kwargs)


def compile_classifier(model: keras.Model, recipe: Recipe, steps: int) -> keras.Model:
    """Compiles a model for training by the recipe, and returns it.

    Args:
        steps: of the whole training, over which the learning rate rises and falls.
    """
    model.compile(
        muon_for(recipe, steps),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        jit_compile=False,  # XLA was slower on CPU wherever it was measured; on GPU it has not been tried
        steps_per_execution=steps_per_call(steps // recipe.epochs),
    )
    return model


def train_classifier(
    network: keras.Model,
    data: Dataset,
    recipe: Recipe,
    seed: int = 0,
    log_dir: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> dict[str, list[float]]:
    """Trains a CNN on all categories of the train split, by `fit`; Stage 1 and the companion.

    Args:
        log_dir: folder for TensorBoard logs; None: none are written.
        callbacks: more of Keras' callbacks; their `model` is a `Trainer`.

    Returns:
        The history: lists of loss, accuracy, val_loss, val_accuracy (val: calibration split) and seconds, one
        value an epoch.

    Raises:
        MSCNNError: the network is frozen.
    """
    if not network.trainable:
        raise MSCNNError(f"{network.name} is frozen: set its trainable to True, or leave stage2_only off.")
    _seed(network, seed)
    both = both_splits(data)
    one_hot = keras.utils.to_categorical(both.labels, len(data.category_names))
    train, calibration = np.split(np.arange(len(both)), [len(data.train)])
    steps = -(-len(train) // recipe.batch_size) * recipe.epochs
    trainer = compile_classifier(Trainer(network, both.images), recipe, steps)
    del both  # the trainer has its own copy
    augmentation, timer = network.get_layer("augmentation"), EpochSeconds()
    by_epoch = [AlternatingFlip(augmentation), SmallCropsFirst(augmentation, int(recipe.small_crops * recipe.epochs))]
    logs = [keras.callbacks.TensorBoard(log_dir)] if log_dir else []
    try:
        history = trainer.fit(
            batches(one_hot, recipe.batch_size, train, seed), epochs=recipe.epochs, shuffle=False, verbose=2,
            validation_data=batches(one_hot, 500, calibration),
            callbacks=[timer, *by_epoch, *callbacks, KeepBestWeights(), *logs],
        )  # fmt: skip
    finally:  # also of a training that was interrupted
        augmentation.reset()
    return {**history.history, "seconds": timer.seconds}


def train_stage1(
    model: MultiStageCNN,
    data: Dataset,
    recipe: Recipe,
    seed: int = 0,
    log_dir: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> dict[str, list[float]]:
    """Trains Stage 1 where it stands, see `train_classifier`, and learns the texture that it knows.

    What was calibrated to it is void.
    """
    history = train_classifier(model.stage1, data, recipe, seed, log_dir, callbacks)
    model.void_calibration()
    model.learn_known(data)
    return history


def train_companion(
    model: MultiStageCNN, data: Dataset, recipe: Recipe, seed: int = 0, log_dir: str | Path | None = None
) -> dict[str, list[float]]:
    """Trains the companion, then makes every trainable Stage 2 CNN a copy of it."""
    own = dataclasses.replace(recipe, epochs=recipe.companion_epochs or recipe.epochs)
    history = train_classifier(model.companion, data, own, seed + 1, log_dir)
    for category in model.trainable_categories():
        model.stage2_of(category).set_weights(model.companion.get_weights())
    model.void_calibration(model.trainable_categories())
    return history


class LogOdds(keras.layers.Layer):
    """Logits (B, C) -> log-odds of one category (B,); the category can be changed without a new graph."""

    def __init__(self):
        super().__init__()
        self.category = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def call(self, logits):
        return log_odds_tensor(logits, tf.convert_to_tensor(self.category.value))


def draw_stage2_images(
    labels: np.ndarray, probability: np.ndarray, category: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Chooses what a Stage 2 CNN is trained on: in turn an image of its category and a hard one of another.

    Images of other categories are drawn in proportion to the square of `probability`, plus 0.00001: what Stage 1 would
    mistake for the category is what its judge has to know. On its own train images Stage 1 is rarely mistaken. Without
    the square, the many images to which it gives a few hundredths would be nearly all of the draw.

    Args:
        labels: (N,). probability: Stage 1's probability of `category` for each image, (N,).
        count: how many indices to draw, with replacement; even positions hold the category.

    Returns:
        int64 (count,).
    """
    own = np.flatnonzero(labels == category)
    weight = np.where(labels == category, 0.0, probability**2 + 0.00001)
    indices = np.empty(count, np.int64)
    indices[0::2] = rng.choice(own, len(indices[0::2]))
    indices[1::2] = rng.choice(len(labels), len(indices[1::2]), p=weight / weight.sum())
    return indices


class Stage2Trainer:
    """Trains Stage 2 CNNs one after the other with one graph: weights are copied in and out.

    Args:
        model: only the Stage 2 CNNs that are trained change.
        data: train and calibration splits are used.
        recipe: its epochs scale the number of steps.
    """

    ROUNDS = 5  # points of the history of each category

    def __init__(self, model: MultiStageCNN, data: Dataset, recipe: Recipe):
        self.model, self.data = model, data
        self.batch_size = min(256, recipe.batch_size)
        images = recipe.stage2_share * recipe.epochs * len(data.train)
        self.steps = max(1, round(images / self.batch_size / self.ROUNDS))  # a round
        self.probability = np.asarray(tf.nn.softmax(model.stage1_logits(data.train.images)))  # (N, C)
        self.predicted = model.stage1_views(data.calibration.images).logits.mean(axis=0).argmax(axis=1)
        images, self.labels = both_splits(data)
        self.network = model.new_stage2()  # not a clone, which would be frozen where the companion is
        self.head = LogOdds()
        self.trainer = Trainer(self.network, images, self.head)

        def accuracy(right, log_odds):
            return tf.cast((log_odds > 0) == (right > 0.5), tf.float32)

        self.trainer.compile(
            stage2_muon_for(recipe, self.batch_size, self.steps * self.ROUNDS),
            keras.losses.BinaryCrossentropy(from_logits=True),
            metrics=[accuracy],
            jit_compile=False,
            steps_per_execution=steps_per_call(self.steps),
        )

    def train(self, category: int, start: keras.Model, seed: int) -> dict[str, list[float]]:
        """Trains one Stage 2 CNN from the weights of `start`; returns its history, a value a round."""
        timer = EpochSeconds()
        _seed(self.network, seed)
        self.network.set_weights(start.get_weights())
        self.head.category.assign(category)
        for variable in self.trainer.optimizer.variables:  # momentum and step count of the category before
            variable.assign(tf.zeros_like(variable))
        right = np.float32(self.labels == category)  # (N,), 1 where it is right to say `category`
        # In the calibration split the question is only asked where Stage 1 says `category`.
        asked = len(self.data.train) + np.flatnonzero(self.predicted == category)
        history = self.trainer.fit(
            batches(right, self.batch_size, self._order(category, np.random.default_rng(seed))),
            epochs=self.ROUNDS, steps_per_epoch=self.steps, shuffle=False, verbose=0, callbacks=[timer],
            validation_data=batches(right, 500, asked) if len(asked) else None,
        ).history  # fmt: skip
        self.model.stage2_of(category).set_weights(self.network.get_weights())
        self.model.void_calibration([category])
        return {**history, "seconds": timer.seconds}

    def _order(self, category: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of the train images of one whole training."""
        count = self.ROUNDS * self.steps * self.batch_size
        return draw_stage2_images(self.data.train.labels, self.probability[:, category], category, count, rng)


def train_stage2(
    model: MultiStageCNN, data: Dataset, recipe: Recipe, seed: int = 0, start: str = "companion"
) -> dict[str, dict[str, list[float]]]:
    """Trains the trainable Stage 2 CNNs: 'Stage 1 says c: is it right?'

    Each CNN is fine-tuned by binary cross-entropy on its log-odds of c, on batches that are half images of c
    and half images that Stage 1 takes, or nearly takes, for c.

    Args:
        start: "companion": begin with a copy of the companion; "current": go on from the CNN as it is.

    Returns:
        A history for each category's name: loss, accuracy, val_loss, val_accuracy and seconds.
    """
    trainer, histories = Stage2Trainer(model, data, recipe), {}
    for category in model.trainable_categories():
        begun, name = time.time(), model.category_names[category]
        network = model.companion if start == "companion" else model.stage2_of(category)
        histories[name] = history = trainer.train(category, network, seed + 100 + category)
        accuracy = f"accuracy {history['accuracy'][-1]:.3f}, loss {history['loss'][-1]:.3f}"
        print(f"Stage 2 {name}: {accuracy}, {time.time() - begun:.0f} s", flush=True)
    return histories


def stage2_is_kept(model: MultiStageCNN, settings: Settings) -> bool:
    """Whether notebook 03 leaves Stage 2 as it is: only some categories of a finished model are to be retrained."""
    some = len(categories_from(settings.stage2_categories, model.category_names)) < len(model.category_names)
    return settings.stage2_only and some and model.is_calibrated


class Retraining(NamedTuple):
    """What became of one category; losses are mean log losses on the calibration split, in nats."""

    category: str
    loss_before: float
    loss_after: float
    kept: bool


def calibration_losses(model: MultiStageCNN, data: Dataset) -> np.ndarray:
    """Log loss of the confidences on the calibration split, by predicted category, (C,)."""
    decisions = model.decide(data.calibration.images)
    right = decisions.stage1_category == data.calibration.labels
    return log_loss_by_category(decisions.stage1_category, decisions.confidence, right, len(model.category_names))


def weakest_categories(model: MultiStageCNN, data: Dataset, count: int = 2) -> tuple[int, ...]:
    """The categories whose confidences fit worst on the calibration split."""
    losses = np.nan_to_num(calibration_losses(model, data), nan=-1.0)
    return tuple(sorted(np.argsort(-losses, kind="stable")[:count].tolist()))


def retrain_stage2(
    model: MultiStageCNN,
    data: Dataset,
    categories: str | int | Iterable,
    recipe: Recipe,
    seed: int = 0,
    start: str = "current",
    keep_worse: bool = False,
) -> tuple[list[Retraining], dict[str, dict[str, list[float]]]]:
    """Retrains the Stage 2 CNNs and calibration rows of some categories; all else stays bit for bit.

    So do the limits of what is like nothing known: with other confidences in the chosen categories, somewhat more or
    less than one in a hundred of their images may now be beyond them.

    A category whose log loss on the calibration split did not fall is put back as it was, unless
    `keep_worse`. Everything but the chosen categories is left frozen.

    Returns:
        One `Retraining` a chosen category, and the histories.
    """
    chosen = categories_from(categories, model.category_names)
    before = {c: (model.stage2_of(c).get_weights(), model.rows.numpy()[c]) for c in chosen}
    losses = calibration_losses(model, data)
    model.train_only(chosen)
    histories = train_stage2(model, data, recipe, seed, start)
    model.calibrate(data.calibration, chosen)
    new_losses, rows, results = calibration_losses(model, data), model.rows.numpy(), []
    for c in chosen:
        kept = keep_worse or bool(new_losses[c] < losses[c])
        if not kept:
            weights, rows[c] = before[c]
            model.stage2_of(c).set_weights(weights)
        results.append(Retraining(model.category_names[c], losses[c], new_losses[c], kept))
    model.rows.assign(rows)
    return results, histories


# ======================================================================================================
# 7 Evaluation: reports and selective metrics (NumPy in, NumPy out)
# ======================================================================================================


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The risk-coverage curve: the error rate among the k most confident images, for k = 1..N.

    Images of equal confidence cannot be told apart, so each counts with the group's mean error, what a random order
    of them gives in the mean: the curve does not depend on the order of the images. Source: Geifman & El-Yaniv 2017,
    section 2.

    Args:
        confidence: float (N,), any scale. right: bool (N,).

    Returns:
        coverage float64 (N,), ascending to 1, and selective risk float64 (N,).
    """
    confidence, right = _checked_pair(confidence, right)
    wrong = 1.0 - right
    _, group = np.unique(-confidence, return_inverse=True)  # 0: the most confident
    mean_wrong = np.bincount(group, weights=wrong) / np.bincount(group)
    accepted = np.arange(1, len(wrong) + 1)
    return accepted / len(wrong), np.cumsum(mean_wrong[np.sort(group)]) / accepted


def aurc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean selective risk over all coverages (Geifman et al. 2019)."""
    return float(risk_coverage(confidence, right)[1].mean())


def e_aurc(confidence: np.ndarray, right: np.ndarray) -> float:
    """How far the AURC lies above the least that this accuracy allows, every right image before every wrong one.

    Source: excess AURC (Geifman et al. 2019).
    """
    _, right = _checked_pair(confidence, right)
    return aurc(confidence, right) - aurc(right.astype(np.float64), right)


def augrc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Area under the generalized risk-coverage curve: mean share of all images that are accepted and wrong.

    Unlike in the AURC an error counts the same at every coverage. By the trapezoidal rule it is exactly
    (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 with accuracy a. Source: Traub et al. 2024.
    """
    coverage, risk = risk_coverage(*_checked_pair(confidence, right, empty=False))
    undetected = coverage * risk  # (N,)
    return float((undetected.sum() - undetected[-1] / 2) / len(undetected))


def brier_score(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean square of what the confidence lacks to 1 where right, and to 0 where wrong (Brier 1950)."""
    confidence, right = _checked_pair(confidence, right, share=True, empty=False)
    return float(np.mean((confidence - right.astype(np.float64)) ** 2))


def error_at_coverage(confidence: np.ndarray, right: np.ndarray, coverage: float) -> float:
    """Error rate among the most confident images, at least this share of all; ties as in `risk_coverage`."""
    _check_share("coverage", coverage)
    covered, risk = risk_coverage(*_checked_pair(confidence, right, empty=False))
    return float(risk[np.searchsorted(covered, coverage - 1e-9)])


def coverage_at_error(confidence: np.ndarray, right: np.ndarray, error: float) -> float:
    """The largest share of images that can be accepted with at most this error rate among them; 0: none.

    Among images of equal confidence some can be accepted by lot: ties as in `risk_coverage`.
    """
    _check_share("error", error)
    covered, risk = risk_coverage(confidence, right)
    return float(covered[risk <= error].max(initial=0.0))


def failure_metrics(confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """How well a confidence tells right from wrong predictions: misclassification detection, or failure prediction.

    Sources: Hendrycks & Gimpel 2017 (AUROC), Jaeger et al. 2023 (why the AURC belongs beside it).

    Args:
        confidence: float (N,), any scale. right: bool (N,).

    Returns:
        aurc; auroc_failure: probability that a right image has the higher confidence; fpr95: share of the
        wrong images accepted at the highest threshold that accepts 95 % of the right ones. The last two are
        NaN where all predictions are right, or all wrong.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    confidence, right = _checked_pair(confidence, right)
    if right.all() or not right.any():
        return {"aurc": aurc(confidence, right), "auroc_failure": np.nan, "fpr95": np.nan}
    false_positives, true_positives, _ = roc_curve(right, confidence, drop_intermediate=False)
    return {
        "aurc": aurc(confidence, right),
        "auroc_failure": float(roc_auc_score(right, confidence)),
        "fpr95": float(false_positives[np.searchsorted(true_positives, 0.95)]),
    }


def selective_metrics(decisions: Decisions, labels: np.ndarray) -> dict[str, float]:
    """What the final decisions are worth, at the threshold they were made with.

    Returns:
        coverage: share of images not sent to OTHER. selective_accuracy: accuracy among those.
        accuracy_other_wrong: accuracy where OTHER counts as an error. stage_report_accuracy: share of
        images accepted where Stage 1 is right or rejected where it is wrong.
    """
    labels = _checked_labels(decisions.category, labels)
    accepted, right = decisions.category == decisions.stage1_category, decisions.stage1_category == labels
    return {
        "coverage": accepted.mean(),
        "selective_accuracy": right[accepted].mean() if accepted.any() else np.nan,
        "accuracy_other_wrong": (accepted & right).mean(),
        "stage_report_accuracy": (accepted == right).mean(),
    }


def category_metrics(decisions: Decisions, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """What the final decisions are worth for each category: the entry `categories` of `metrics.json`.

    Args:
        labels: true categories, (B,). names: (C,).

    Returns:
        By name, of the images that show the category: their number (images), accuracy, coverage and
        selective_accuracy as in `selective_metrics`; and precision: of those decided to show it, the share that does.
    """
    labels = _checked_labels(decisions.category, labels)
    accepted, right = decisions.category == decisions.stage1_category, decisions.stage1_category == labels

    def share(hits: np.ndarray) -> float:
        return hits.mean() if len(hits) else np.nan

    return {
        name: {
            "images": int((labels == c).sum()),
            "accuracy": share(right[labels == c]),
            "coverage": share(accepted[labels == c]),
            "selective_accuracy": share(right[(labels == c) & accepted]),
            "precision": share(right[decisions.category == c]),
        }
        for c, name in enumerate(names)
    }


def evaluate(decisions: Decisions, labels: np.ndarray, threshold: float) -> dict[str, dict[str, float]]:
    """The entries `stage1` and `two_stage` of `metrics.json`; all rates are fractions of 1.

    `stage1` is Stage 1 alone: its answers on one view, and its softmax as their confidence.
    """
    labels = _checked_labels(decisions.category, labels)
    right, alone = decisions.stage1_category == labels, decisions.one_view_logits.argmax(axis=1)
    odds = log_odds(decisions.one_view_logits, alone)
    return {
        "stage1": {"accuracy": (alone == labels).mean(), **failure_metrics(odds, alone == labels)},
        "two_stage": {
            "threshold": threshold,
            "accuracy": right.mean(),
            **selective_metrics(decisions, labels),
            "like_nothing_known": np.where(np.isnan(decisions.novelty), np.nan, decisions.novelty > 0).mean(),
            **failure_metrics(decisions.confidence, right),
        },
    }


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """How much more often `second` holds than `first`, on the same images, and its 95 % interval.

    Only images where the two differ say anything of the difference. With half an image added to each of the four
    counts, the interval holds also where these are few (Agresti & Min 2005, Statistics in Medicine 24).

    Args:
        first, second: bool (N,).

    Returns:
        Difference of the two shares, lower and upper end.
    """
    first, second = _one_an_image(first=first, second=second)
    if not first.dtype == second.dtype == bool:
        raise MSCNNError(f"first is {first.dtype} and second {second.dtype}: give whether something holds, as bool.")
    gained, lost, count = (second & ~first).sum() + 0.5, (first & ~second).sum() + 0.5, len(first) + 2
    middle = (gained - lost) / count
    half = 1.96 * np.sqrt((gained + lost) / count - middle**2) / np.sqrt(count)
    return (gained - lost) / max(1, len(first)), max(-1.0, middle - half), min(1.0, middle + half)


def with_interval(difference: tuple[float, float, float]) -> str:
    """A difference of rates and its interval, see `paired_difference`, in percentage points: for a table."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * one for one in difference))


class Comparison(NamedTuple):
    """Two models' decisions on the same images of one true category, the second against the first."""

    category: str
    images: int
    changed: int  # images that are decided differently
    coverage: tuple[float, float, float]  # difference of the accepted share, and its interval
    errors: tuple[float, float, float]  # the same of the share that is accepted and wrong


def compare_decisions(
    first: Decisions, second: Decisions, labels: np.ndarray, names: Sequence[str]
) -> list[Comparison]:
    """Compares two models, or one before and after a retraining, image by image; a row each true category, then all.

    Args:
        labels: true categories, (B,). names: C.
    """
    _one_an_image(first=first.category, second=second.category)
    labels = _checked_labels(first.category, labels)
    accepted = [one.category < len(names) for one in (first, second)]
    wrong = [taken & (one.category != labels) for taken, one in zip(accepted, (first, second), strict=True)]
    groups = [(name, labels == c) for c, name in enumerate(names)] + [("all", np.ones(len(labels), bool))]
    return [
        Comparison(
            name,
            int(here.sum()),
            int((first.category != second.category)[here].sum()),
            paired_difference(*(one[here] for one in accepted)),
            paired_difference(*(one[here] for one in wrong)),
        )
        for name, here in groups
    ]


def made_up_images(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Images that belong to no category, as many of each kind as are given: uint8 (B, H, W, channels).

    Args:
        images: some of the data set; what is scrambled are 16 patches of each. The first single colours are white,
            black and gray.
    """
    rng, (height, width) = np.random.default_rng(seed), images.shape[1:3]
    scrambled = images.copy()
    cut = scrambled[:, : height // 4 * 4, : width // 4 * 4]  # what four patches do not fill stays
    patches = cut.reshape(len(cut), 4, height // 4, 4, width // 4, -1).swapaxes(2, 3)  # (B, 4, 4, H/4, W/4, channels)
    flat = patches.reshape(len(cut), 16, *patches.shape[3:])
    colours = rng.integers(0, 256, (len(images), 1, 1, images.shape[-1]), dtype=np.uint8)
    colours[:3] = np.uint8([255, 0, 128])[: len(images), None, None, None]
    mixed = rng.permuted(np.broadcast_to(np.arange(16), (len(cut), 16)), axis=1)  # (B, 16)
    shuffled = np.take_along_axis(flat, mixed[:, :, None, None, None], axis=1).reshape(patches.shape)
    cut[...] = shuffled.swapaxes(2, 3).reshape(cut.shape)
    return {
        "uniform noise": rng.integers(0, 256, images.shape, dtype=np.uint8),
        "Gaussian noise": rng.normal(128, 64, images.shape).clip(0, 255).astype(np.uint8),
        "one colour": np.broadcast_to(colours, images.shape).copy(),
        "stripes": _stripes(images.shape, rng),
        "scrambled": scrambled,
    }


def _stripes(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Upright, level and slanting stripes of 1 to 8 pixels in two colours, uint8 of a shape (B, H, W, channels)."""
    count, height, width, channels = shape
    rows, columns = np.indices((height, width))
    across = np.stack([columns, rows, rows + columns])[np.arange(count) % 3]  # (B, H, W)
    odd = (across // rng.integers(1, 9, (count, 1, 1)) % 2).astype(bool)
    colours = rng.integers(0, 256, (2, count, 1, 1, channels), dtype=np.uint8)
    return np.where(odd[..., None], *colours)


def foreign_photographs(input_shape: Sequence[int]) -> np.ndarray:
    """The two photographs that come with scikit-learn, a temple and a flower, shrunk whole as `read_image` does it.

    Returns:
        uint8 (2, H, W, channels).
    """
    from importlib.resources import as_file, files

    found = []
    for name in ("china.jpg", "flower.jpg"):
        with as_file(files("sklearn.datasets.images") / name) as path:
            found.append(read_image(path, input_shape))
    return np.stack(found)


def unnoticed(verdicts: dict[str, Decisions], share: float = 0.05) -> dict[str, float]:
    """The kinds of images of no category of which more than `share` is accepted, and how many are: 0 to 1."""
    accepted = {kind: float((found.reasons() == ACCEPTED).mean()) for kind, found in verdicts.items()}
    return {kind: one for kind, one in accepted.items() if one > share}


def stage_truth(decisions: Decisions, labels: np.ndarray, other: int) -> np.ndarray:
    """The truth of the stage report: the category where Stage 1 is right, OTHER where it is wrong; (B,)."""
    labels = _checked_labels(decisions.category, labels)
    return np.where(decisions.stage1_category == labels, labels, other)


def classification_report(truth: np.ndarray, decided: np.ndarray, names: Sequence[str]) -> str:
    """scikit-learn's report over the C categories and OTHER."""
    from sklearn.metrics import classification_report as report

    truth, decided = _one_an_image(truth=truth, decided=decided)
    return report(truth, decided, labels=range(len(names) + 1), target_names=[*names, OTHER], digits=3, zero_division=0)


def confusion(truth: np.ndarray, decided: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Confusion matrix with OTHER last, int (C+1, C+1): rows are the truth, columns the decision."""
    from sklearn.metrics import confusion_matrix

    truth, decided = _one_an_image(truth=truth, decided=decided)
    return confusion_matrix(truth, decided, labels=range(len(names) + 1))


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and number of images in equally wide bins, each (bins,); NaN where empty."""
    confidence, right = _checked_pair(confidence, right, share=True)
    if not isinstance(bins, (int, np.integer)) or bins < 1:
        raise MSCNNError(f"bins is {bins!r}: it is a number of bins, a whole number from 1 on.")
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(where, minlength=bins)
    sums = [np.bincount(where, weights=values, minlength=bins) for values in (confidence, right)]
    mean, accuracy = (np.divide(s, count, out=np.full(bins, np.nan), where=count > 0) for s in sums)
    return mean, accuracy, count


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10, equal_mass: bool = False) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over the bins (Guo et al. 2017).

    Args:
        equal_mass: bins that hold equally many images (Nixon et al. 2019, "Measuring calibration in deep learning"),
            else equally wide ones, of which most may be empty. Images of equal confidence that fall into two bins
            count in both with their mean accuracy, so that their order does not matter.
    """
    confidence, right = _checked_pair(confidence, right, share=True)
    if equal_mass:
        _, group = np.unique(confidence, return_inverse=True)
        right = (np.bincount(group, weights=right) / np.bincount(group))[group]
        parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
        gaps = [abs(confidence[part].mean() - right[part].mean()) * len(part) for part in parts if len(part)]
        return float(sum(gaps) / len(confidence))
    mean, accuracy, count = reliability(confidence, right, bins)
    return float(np.nansum(np.abs(mean - accuracy) * count) / count.sum())


# ======================================================================================================
# 8 Explanation: Class Activation Maps, decision trace
# ======================================================================================================


def class_activation_map(network: keras.Model, images: np.ndarray, category: int) -> np.ndarray:
    """The original CAM: what each place of the last feature map adds to the category's logit.

    For networks that end in global average pooling and one dense layer. Source: Zhou et al. 2016.

    Args:
        images: uint8 (B, H, W, channels).

    Returns:
        float32 (B, h, w); its mean plus the dense layer's bias is the logit.
    """
    _check_explained(network, images)
    _check_categories_within(np.atleast_1d(category), network.output_shape[-1])
    features = keras.Model(network.inputs[0], network.get_layer("pooled").input)(images, training=False)  # (B, h, w, K)
    weights = network.get_layer("scaled").scale * network.get_layer("logits").kernel.numpy()[:, category]  # (K,)
    return np.asarray(tf.cast(features, tf.float32)) @ weights


def grad_cam(network: keras.Model, images: np.ndarray, target: Callable, layer: str = "block2") -> np.ndarray:
    """Grad-CAM: where a layer's features raise a target. Source: Selvaraju et al. 2017, section 3.

    Args:
        images: uint8 (B, H, W, channels).
        target: from logits (B, C) to the value to explain (B,), such as `lambda z: z[:, 3]`.
        layer: a layer with a feature map; its size is the map's.

    Returns:
        float32 (B, h, w), at least 0.
    """
    _check_explained(network, images, layer)
    features = network.get_layer(layer).output
    maps = keras.Model(network.inputs[0], features)(images, training=False)  # (B, h, w, K)
    head = keras.Model(features, network.outputs[0])
    with tf.GradientTape() as tape:
        tape.watch(maps)
        value = target(head(maps, training=False))
    gradient = tf.cast(tape.gradient(value, maps), tf.float32)  # (B, h, w, K)
    weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)  # (B, 1, 1, K)
    return np.asarray(tf.nn.relu(tf.reduce_sum(weights * tf.cast(maps, tf.float32), axis=-1)))


def _check_explained(network: keras.Model, images: np.ndarray, layer: str = "pooled") -> None:
    """Raises MSCNNError for images of another dtype or shape, or a layer that is not there."""
    shape, dtype = np.shape(images), getattr(images, "dtype", type(images).__name__)
    if dtype != np.uint8 or shape[1:] != network.input_shape[1:]:
        wanted = ", ".join(map(str, network.input_shape[1:]))
        raise MSCNNError(f"Images are {dtype} {shape}: {network.name} takes uint8 (B, {wanted}).")
    names = [one.name for one in network.layers]
    if layer not in names:
        raise MSCNNError(
            f"{network.name} has no layer '{layer}'.{_did_you_mean(layer, names)} Choose among: {', '.join(names)}."
        )


class DecisionTrace(NamedTuple):
    """How one image was decided."""

    image: np.ndarray  # uint8 (H, W, channels)
    truth: str  # "" where it is not known
    stage1_map: np.ndarray  # (h, w): why this category
    stage2_map: np.ndarray  # (h, w): why right; where it is empty, nothing speaks for 'right'
    top3: list[tuple[str, float]]  # Stage 1's most probable categories
    stage2_confidence: float
    confidence: float
    verdict: str
    reason: str  # see `Decisions.reasons`


def trace_decisions(
    model: MultiStageCNN, images: np.ndarray, labels: np.ndarray | None = None, threshold: float | None = None
) -> list[DecisionTrace]:
    """Explains the decisions on uint8 images (B, H, W, channels), one trace an image."""
    decisions, names = model.decide(images, threshold), [*model.category_names, OTHER]
    labels = None if labels is None else _checked_labels(decisions.category, labels)
    probability, reasons = np.asarray(tf.nn.softmax(decisions.stage1_logits)), decisions.reasons()  # (B, C), (B,)
    traces = []
    for i, c in enumerate(decisions.stage1_category):
        one = images[i : i + 1]
        traces.append(
            DecisionTrace(
                image=images[i],
                truth="" if labels is None else names[labels[i]],
                stage1_map=grad_cam(model.stage1, one, lambda z, c=c: z[:, c])[0],
                stage2_map=grad_cam(model.stage2_of(c), one, lambda z, c=c: log_odds_tensor(z, c))[0],
                top3=[(names[k], float(probability[i, k])) for k in np.argsort(-probability[i])[:3]],
                stage2_confidence=float(decisions.stage2_confidence[i]),
                confidence=float(decisions.confidence[i]),
                verdict=names[decisions.category[i]],
                reason=str(reasons[i]),
            )
        )
    return traces


# ======================================================================================================
# 9 Figures: arrays in, a Matplotlib Figure out; none is shown here
# ======================================================================================================

MAP_COLOURS = "magma"  # perceptually uniform, and readable without colour vision


def _axes(rows: int = 1, columns: int = 1, width: float = 3.0, height: float = 3.0):
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
        def draw(self, renderer):
            make_legible(self)
            super().draw(renderer)

    return LegibleFigure


def make_legible(figure) -> None:
    """Draws all texts as they are: what is between two $ is no formula, and other scripts take a font that has them."""
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.text import Text

    texts = {text: set(filter(str.isprintable, text.get_text())) for text in figure.findobj(Text)}
    lacking = set().union(*texts.values()) - _characters_in(findfont(FontProperties()))
    fallback = _font_with("".join(sorted(lacking))) if lacking else None
    for text, characters in texts.items():
        text.set_parse_math("\\mathdefault" in text.get_text())  # which are Matplotlib's own, of a logarithmic axis
        if fallback and characters & lacking and fallback not in text.get_fontfamily():
            text.set_fontfamily([*text.get_fontfamily(), fallback])


@functools.cache
def _characters_in(font: str) -> frozenset[str]:
    """The characters that a font file has; none if it cannot be read."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(map(chr, get_font(font).get_charmap()))
    except Exception:  # of FreeType and of the file system: a font for the colours of emoji, one that has been deleted
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
    for script in sorted({unicodedata.name(one, "UNKNOWN").split()[0] for one in lacks[best]}):
        _warn_of_boxes(script)
    return best if lacks[best] < wanted else None


@functools.cache
def _warn_of_boxes(script: str) -> None:
    """Says, once, that a script cannot be drawn, in place of Matplotlib, which says it of each character and figure."""
    remedy = "Install one that does, such as one of Noto, and start Python anew."
    warnings.warn(f"No installed font has these {script} characters: figures show boxes there. {remedy}", stacklevel=2)
    warnings.filterwarnings("ignore", "Glyph .* missing from")


def _show_image(axis, image: np.ndarray, title: str = "", colour: str = "black") -> None:
    axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    axis.set_title(title, fontsize=8, color=colour)
    axis.set_axis_off()


def plot_images(images: np.ndarray, captions: Sequence[str], title: str = "", columns: int = 8):
    """A grid of uint8 images (N, H, W, channels), a caption above each."""
    if len(captions) != len(images):
        raise MSCNNError(f"{len(captions)} captions for {len(images)} images: give one of each image, '' for none.")
    rows = max(1, -(-len(images) // columns))
    figure, axes = _axes(rows, columns, 1.25, 1.5)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions):  # noqa: B905 - the last row may be short
        _show_image(axis, image, caption)
    figure.suptitle(title)
    return figure


def plot_samples(data: Dataset, columns: int = 8):
    """A row of train images for each category."""
    chosen = [np.flatnonzero(data.train.labels == c)[:columns] for c in range(len(data.category_names))]
    figure, axes = _axes(len(chosen), columns, 0.9, 0.95)
    for axis in axes:
        axis.set_axis_off()
    for row, (indices, name) in enumerate(zip(chosen, data.category_names, strict=True)):
        for column, i in enumerate(indices):
            _show_image(axes[row * columns + column], data.train.images[i], name if column == 0 else "")
    figure.suptitle(f"{data.name}: {columns} train images of each category")
    return figure


def plot_augmentation(data: Dataset, columns: int = 8, rows: int = 3):
    """Train images (first column) as training sees them in different epochs."""
    chosen = data.train.images[:rows]
    layer, views = RandomFlipCrop(data.flip), [chosen]
    for epoch in range(columns - 1):
        layer.epoch.assign(epoch)
        views.append(layer(tf.constant(chosen), training=True).numpy().astype(np.uint8))
    images = np.stack(views, axis=1).reshape(-1, *data.input_shape)
    captions = ["original", *[f"epoch {e + 1}" for e in range(columns - 1)]] * rows
    return plot_images(images, captions, "Every epoch sees a slightly different picture", columns)


def plot_history(history: dict[str, dict]):
    """Loss and accuracy by epoch, train and calibration, a row a stage.

    Args:
        history: `{"stage1": {"loss": [...], "accuracy": [...], "val_loss": [...], "val_accuracy": [...]},
            "stage2": {category name: the same}}`; for Stage 2 the mean over the categories is drawn bold.
    """
    stages = [stage for stage in ("stage1", "companion", "stage2") if history.get(stage)]
    figure, axes = _axes(max(1, len(stages)), 2, 5, 2.8)
    titles = {
        "stage1": "Stage 1",
        "companion": "Companion",
        "stage2": "Stage 2 (thin: a category, thick: their mean)",
    }
    for row, stage in enumerate(stages):
        for column, measure in enumerate(("loss", "accuracy")):
            axis = axes[2 * row + column]
            runs = list(history[stage].values()) if stage == "stage2" else [history[stage]]
            for key, label, colour in ((measure, "train", "C0"), (f"val_{measure}", "calibration", "C1")):
                _plot_runs(axis, [run[key] for run in runs if run.get(key)], label, colour)
            axis.set(
                title=titles[stage],
                xlabel="epoch" if stage != "stage2" else "fifth of the training",
                ylabel=measure,
            )
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(frameon=False)
            axis.grid(alpha=0.3)
    return figure


def _plot_runs(axis, runs: list[list[float]], label: str, colour: str) -> None:
    for run in runs if len(runs) > 1 else []:
        axis.plot(range(1, len(run) + 1), run, color=colour, alpha=0.25, linewidth=0.8)
    if runs:
        mean = np.mean(runs, axis=0)
        axis.plot(range(1, len(mean) + 1), mean, color=colour, marker=".", label=label)


def plot_confusion(matrix: np.ndarray, names: Sequence[str], title: str):
    """A confusion matrix (C+1, C+1) as a heat map; the colour is the share of the row.

    Of many categories only the colours are shown, and not every name.
    """
    import seaborn

    matrix = np.asarray(matrix)
    labels = [*names, OTHER] if len(names) < len(matrix) else list(names)
    if matrix.shape != (len(labels), len(labels)) or matrix.dtype.kind not in "iu":
        raise MSCNNError(f"The matrix is {matrix.dtype} {matrix.shape}: use counts, integers, for {len(labels)} names.")
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    few, size = len(labels) <= 31, min(2.5 + 0.55 * len(labels), 20)  # inches
    figure, (axis,) = _axes(1, 1, size + 0.8, size)
    seaborn.heatmap(
        share, annot=matrix if few else None, fmt="d", cmap="Blues", vmin=0, vmax=1, ax=axis,
        linewidths=0.5 if few else 0, annot_kws={"fontsize": 8}, xticklabels=False, yticklabels=False,
        cbar_kws={"label": "share of the true category"},
    )  # fmt: skip
    named = np.arange(0, len(labels), -(-len(labels) // 80))
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(named + 0.5, [labels[i] for i in named])
    axis.set(title=title, xlabel="decided", ylabel="true")
    axis.tick_params(axis="x", rotation=45)
    axis.tick_params(axis="y", rotation=0)
    return figure


def plot_risk_coverage(curves: dict[str, tuple[np.ndarray, np.ndarray]], at: dict[str, float] | None = None):
    """Risk-coverage curves.

    Args:
        curves: label -> (confidence (N,), right bool (N,)).
        at: label -> threshold to mark on its curve.
    """
    figure, (axis,) = _axes(1, 1, 6, 4)
    for label, (confidence, right) in curves.items():
        coverage, risk = risk_coverage(confidence, right)
        (line,) = axis.plot(coverage, risk, label=f"{label} (AURC {aurc(confidence, right):.4f})")
        accepted = int((np.asarray(confidence) >= (at or {}).get(label, np.inf)).sum())
        if accepted:
            axis.plot(coverage[accepted - 1], risk[accepted - 1], "o", color=line.get_color())
    axis.set(xlabel="coverage: share of images accepted", ylabel="selective risk: errors among them", xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.set_title("Lower is better: fewer errors among the accepted images", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def plot_reliability(curves: dict[str, tuple[np.ndarray, np.ndarray]], bins: int = 10):
    """Reliability diagram: accuracy against confidence; on the diagonal a confidence means what it says.

    Args:
        curves: label -> (confidence (N,) in 0..1, right bool (N,)).
    """
    figure, (axis, counts) = _axes(1, 2, 4.5, 4)
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for label, (confidence, right) in curves.items():
        mean, accuracy, count = reliability(confidence, right, bins)
        error = calibration_error(confidence, right, bins)
        axis.plot(mean[count > 0], accuracy[count > 0], marker="o", label=f"{label} (ECE {error:.3f})")
        counts.stairs(count, np.linspace(0, 1, bins + 1), label=label, linewidth=1.5)
    axis.set(xlabel="confidence", ylabel="share of right images", xlim=(0, 1), ylim=(0, 1.02), title="Reliability")
    counts.set(xlabel="confidence", ylabel="images", yscale="log", title="How often each confidence occurs")
    counts.set_ylim(bottom=0.8)  # so that a bin of a few images does not look empty
    _legend_below(figure, axis)
    return figure


def plot_gallery(images: np.ndarray, decisions: Decisions, labels: np.ndarray, names: Sequence[str], title: str):
    """Images with what was decided, how confidently, and what is true."""
    full, captions = [*names, OTHER], []
    labels = _checked_labels(decisions.category, labels)
    _check_categories_within(labels, len(full))
    fields = (decisions.category, decisions.stage1_category, decisions.confidence, decisions.reasons(), labels)
    for d, c, p, reason, t in zip(*fields, strict=True):
        said = f"{full[d]} {_rounded_down(p)}" if d == c else f"{full[d]}\n{full[c]}? {_rounded_down(p)}"
        said = f"{full[d]}\n{reason}" if reason == STRANGE else said
        captions.append(f"{said}\ntrue: {full[t]}")
    return plot_images(images, captions, title)


def _rounded_down(confidence: float) -> str:
    """In percent: neither above a threshold that it misses nor, short of certainty, 100 %."""
    return f"{np.floor(1000 * confidence) / 1000:.1%}"


def select(decisions: Decisions, indices: np.ndarray) -> Decisions:
    """The decisions on some of the images."""
    return Decisions(*(values[indices] for values in decisions))


def plot_thresholds(confidence: np.ndarray, right: np.ndarray, thresholds: Sequence[float], marked: float, split: str):
    """What a threshold buys on the images of a split: coverage and selective accuracy, with one threshold marked."""
    confidence, right = _checked_pair(confidence, right)
    figure, (axis,) = _axes(1, 1, 6, 3.6)
    grid = np.asarray(thresholds)
    accepted = confidence[None, :] >= grid[:, None]  # (thresholds, N)
    with np.errstate(invalid="ignore"):
        accuracy = (accepted & right).sum(axis=1) / accepted.sum(axis=1)
    axis.plot(grid, accepted.mean(axis=1), label="coverage")
    axis.plot(grid, accuracy, label="accuracy of what is accepted")
    axis.axvline(marked, color="grey", linestyle=":")
    axis.set(xlabel="threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title(f"{split} split, dotted: threshold {marked:.2f}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower left")
    return figure


def plot_retraining(results: Sequence[Retraining]):
    """Log loss on the calibration split before and after retraining, side by side."""
    figure, (axis,) = _axes(1, 1, 2.5 + 1.2 * len(results), 3.4)
    place = np.arange(len(results))
    axis.bar(place - 0.2, [r.loss_before for r in results], 0.4, label="before", color="C7")
    axis.bar(place + 0.2, [r.loss_after for r in results], 0.4, label="after", color="C0")
    labels = [f"{r.category}\n{'kept' if r.kept else 'put back'}" for r in results]
    axis.set_xticks(place, labels)
    axis.set(ylabel="log loss of the confidence (nats)", title="Calibration split: lower is better")
    _legend_below(figure, axis)
    return figure


def plot_decision_traces(traces: Sequence[DecisionTrace]):
    """One row an image: picture, Stage 1's map, Stage 2's map, the top three and the verdict."""
    figure, axes = _axes(max(1, len(traces)), 4, 2.3, 2.0)
    for axis in axes:
        axis.set_axis_off()
    for row, trace in enumerate(traces):
        picture, first, second, text = axes[4 * row : 4 * row + 4]
        _show_image(picture, trace.image, f"true: {trace.truth}" if trace.truth else "your image")
        for axis, heat, title in (
            (first, trace.stage1_map, "why this category"),
            (second, trace.stage2_map, "why right"),
        ):
            _show_map(axis, trace.image, heat, f"Stage {1 + (axis is second)}: {title}")
        top = "\n".join(f"{name} {p:.1%}" for name, p in trace.top3)
        text.text(0, 0.98, f"Stage 1\n{top}\nStage 2: right {trace.stage2_confidence:.0%}", va="top", fontsize=9)
        wrong = trace.verdict not in (OTHER, trace.truth) and trace.truth
        colour = "dimgrey" if trace.verdict == OTHER else "firebrick" if wrong else "darkgreen"
        text.text(0, 0.02, _verdict(trace, bool(wrong)), fontsize=11, weight="bold", color=colour)
    return figure


def _verdict(trace: DecisionTrace, wrong: bool) -> str:
    """In two lines; a confidence means nothing for what is like nothing known."""
    if trace.reason == STRANGE:
        return f"{trace.verdict}\n{STRANGE}"
    if trace.verdict == OTHER:
        return f"{trace.verdict}, {trace.reason}\n{trace.top3[0][0]}? {_rounded_down(trace.confidence)}"
    return f"{trace.verdict}{' ✗' if wrong else ''}\n{_rounded_down(trace.confidence)}"


def _show_map(axis, image: np.ndarray, heat: np.ndarray, title: str) -> None:
    """A map (h, w) over its image, from nothing (transparent) to its largest value."""
    _show_image(axis, image, title)
    height, width = image.shape[:2]
    axis.imshow(
        heat / max(float(heat.max()), 1e-9), cmap=MAP_COLOURS, alpha=0.6, vmin=0, vmax=1, interpolation="bilinear",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip


# ======================================================================================================
# 10 Running: what a notebook starts and ends with, the notebook runner, the command line
# ======================================================================================================

NOTEBOOKS = (
    "01_data_and_light_mode",
    "02_stage1_training",
    "03_stage2_training",
    "04_selective_retraining",
    "05_evaluation_and_cam",
)


def device_name() -> str:
    """The device that trains: the GPU's name, or the processor's."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the figures."""
    from importlib.metadata import version

    names = ("tensorflow", "keras", "numpy", "scikit-learn")
    found = {name: version(name) for name in names if name != "tensorflow"}
    return {"python": platform.python_version(), "tensorflow": tf.__version__, **found}


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` behind it where files have changed; None where there is none."""
    root = project_root()
    if not (root / ".git").exists():  # else it would be that of a repository around it
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def checked_data(run: Run) -> Dataset:
    """Loads the data set, and refuses now what a later notebook would refuse, perhaps after an hour of training.

    Raises:
        MSCNNError: an unknown data set or category, too few images for the target risk, a model to start from that is
            missing or of other data, a model of other data in the run folder, or a folder that cannot be written.
    """
    check_places(run)
    data = load_dataset(run.settings.dataset, run.settings.light_mode, run.settings.seed)
    run.settings.mode(data.category_names)
    if run.settings.target_risk:
        check_enough_to_certify(len(data.certification), run.settings.target_risk)
    start = run.starting_model()
    if start is not None:
        load_model(start).check_matches(data)
    _check_not_among_images(run, data)
    check_replaces_no_other(run, data)
    _make_folders(run)
    return data


def check_places(run: Run) -> None:
    """Raises MSCNNError if the run would write over a project's own notebooks or the model that comes with it."""
    model, pages = run.model_path, run.folder / "notebooks"
    if _touches_source(pages) or any(_is_source(pages / f"{name}.ipynb") for name in NOTEBOOKS):
        raise MSCNNError(
            f"run_dir is {run.folder}: the run would write over the project's own notebooks, or copies of them, "
            f"in {pages}. Choose another run_dir, such as runs/mine."
        )
    if _touches_source(model):
        raise MSCNNError(f"save_model is {model}, among the project's own files: choose another name, such as mine.")
    if os.path.isdir(model):
        raise MSCNNError(f"save_model is the folder {model}: choose another name.")
    if os.path.realpath(model) == os.path.realpath(run.stage1_path):
        raise MSCNNError(f"save_model is {model}, where notebook 02 leaves its model: choose another name.")
    try:
        os.stat(run.folder / "metrics.json")
    except (FileNotFoundError, NotADirectoryError):
        pass  # the former is as it should be, the latter is told by `_make_folder`
    except OSError as error:
        problem = f"Cannot read the run folder {run.folder}: {error.strerror}"
        raise MSCNNError(f"{problem}. Choose another run_dir.") from error


def _touches_source(path: Path) -> bool:
    """Whether a path is, or lies in, or holds the folder `notebooks` beside this module or another copy of it."""
    path = Path(os.path.realpath(path))
    copies = [folder for folder in path.parents if os.path.isfile(folder / Path(__file__).name)]
    sources = [Path(os.path.realpath(folder / "notebooks")) for folder in (project_root(), *copies)]
    return any(path == source or source in path.parents or path in source.parents for source in sources)


def _is_source(notebook: Path) -> bool:
    """Whether a notebook is there that no run has made: papermill signs what it writes."""
    try:
        return "papermill" not in json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    except (OSError, ValueError, KeyError, TypeError):  # absent, or half-written by a run that was killed
        return False


def _check_not_among_images(run: Run, data: Dataset) -> None:
    """Raises MSCNNError if the run's figures would become a category of an image folder."""
    if not all(os.path.isdir(os.path.join(data.source, name)) for name in data.category_names):
        return
    source, folder = (Path(os.path.realpath(path)) for path in (data.source, run.folder))
    if source in (folder, *folder.parents):
        raise MSCNNError(f"run_dir {run.folder} lies among the images of {data.name}: choose one elsewhere.")


def check_replaces_no_other(run: Run, data: Dataset) -> None:
    """Raises MSCNNError if the model file to write is there and of other images, or of nobody knows which."""
    if not os.path.isfile(run.model_path):
        return
    remedy = f"give another run_dir, such as runs/mine, or another save_model, or delete {run.model_path}."
    records = {run.folder: lambda: run.read("metrics").get("dataset", {}), run.model_path: lambda: model_data(run)}
    for place, read in records.items():
        record = read()
        if not _is_of(record, data):
            name = record.get("name", data.name)
            name = f"other images named {name}" if name == data.name else name
            raise MSCNNError(f"{place} holds a model of {name}, which this run of {data.name} would replace: {remedy}")


def model_data(run: Run) -> dict:
    """What a finished model says of its data, under the names of `Dataset.describe`; it is not built for that.

    Raises:
        MSCNNError: the file is no model of this project, damaged, or not to be read.
    """
    try:
        with zipfile.ZipFile(run.model_path) as file:
            found = json.loads(file.read("config.json"))
        config = found["config"]
        record = {"name": config["dataset"], "category_names": config["category_names"]}
    except Exception as error:  # a broken file fails in many ways: zip, zlib, JSON
        raise MSCNNError(
            f"{run.model_path} cannot be read as a model of this project, and this run would replace it: "
            "choose another save_model, or delete the file."
        ) from error
    return record | {"source_fingerprint": config.get("source_fingerprint", "")}


def _is_of(record: dict, data: Dataset) -> bool:
    """Whether a record is of these images, whatever their splits; one without fingerprint goes by the names."""
    if record.get("source_fingerprint") and data.source_fingerprint:
        return record["source_fingerprint"] == data.source_fingerprint
    names = list(record.get("category_names", data.category_names))
    return record.get("name", data.name) == data.name and names == list(data.category_names)


def _make_folders(run: Run) -> None:
    """Makes the folders that a run writes into, or raises MSCNNError."""
    check_places(run)
    _make_folder(run.figures, f"Cannot write into the run folder {run.folder}", "run_dir")
    _make_folder(run.model_path.parent, f"Cannot write the model to {run.model_path}", "save_model")


def start_data(run: Run) -> Dataset:
    """Notebook 01: loads the data set and writes down which it is; the run folder's metrics begin anew."""
    settings, data, start = run.settings, checked_data(run), run.starting_model()
    goes_on = settings.stage2_only and start is not None and run.folder.resolve() in start.resolve().parents
    _remove_results(run)
    for name in ("metrics",) if goes_on else ("metrics", "history"):
        run.replace(name, {})
    run.write(
        "metrics", dataset=data.describe(), parameters=dataclasses.asdict(settled(settings)), versions=versions(),
        device=device_name(), status="running", started=_now(), commit=commit(),
    )  # fmt: skip
    return data


def _remove_results(run: Run) -> None:
    """Removes figures and notebooks of an earlier run, which would pass for those of this one; but not its models."""
    later = [name for name in NOTEBOOKS if name > run.notebook]
    pages = [run.folder / "notebooks" / f"{name}.{kind}" for name in later for kind in ("ipynb", "html")]
    for path in [*run.figures.glob("*.png"), *pages]:
        path.unlink(missing_ok=True)


def settled(settings: Settings) -> Settings:
    """The settings as they mean the same in every folder: whole paths where `~` or the current folder counted."""
    run, (data, _) = Run("total", settings), _find_data(settings.dataset)
    start = run.starting_model() if settings.load_model not in ("", "pretrained") else None
    return dataclasses.replace(
        settings,
        dataset=_settled(settings.dataset, data, project_root()),
        load_model=_settled(settings.load_model, start, project_root(), run.folder),
        save_model=_settled(settings.save_model, run.model_path, run.folder),
        run_dir=_settled(settings.run_dir, run.folder, project_root()),
    )


def _settled(text: str, place: Path | None, *starts: Path) -> str:
    """A path as it is given, if it was not found or begins at one of `starts`; else the whole one, `place`."""
    fixed = [path_from(text, start) for start in starts] if place else []
    stays = not place or place in fixed or place in [_with_suffix(path, text) for path in fixed]
    return text if stays and not (place and (text.startswith("~") or FROM_HERE.match(text))) else str(place)


def _same_data(one: str, other: str) -> bool:
    """Whether two values of `dataset` lead to the same folder or file."""
    found = [_find_data(name)[0] for name in (one, other)]
    return None not in found and os.path.realpath(found[0]) == os.path.realpath(found[1])


def continue_data(run: Run) -> Dataset:
    """Notebooks 02 to 05: the data set that notebook 01 has found, without looking for another.

    A model given by `load_model` needs no earlier notebook: in an empty run folder the run begins here.

    Raises:
        MSCNNError: notebook 01 has not run here, or with other parameters.
    """
    if run.settings.load_model and not run.read("metrics"):
        return start_data(run)
    check_places(run)
    settings, known = run.settings, run.require("metrics", "dataset", NOTEBOOKS[0])
    asked = run.read("metrics")["parameters"]
    for name in ("dataset", "light_mode", "seed"):
        given = getattr(settings, name)
        if asked[name] != given and not (name == "dataset" and _same_data(asked[name], given)):
            raise MSCNNError(
                f"{run.folder} was begun with {name}={asked[name]!r}, this notebook has {getattr(settings, name)!r}: "
                f"run {NOTEBOOKS[0]} with the same parameters first, or use another run_dir."
            )
    name = known["name"] if settings.dataset == "auto" else settings.dataset
    data = dataclasses.replace(load_dataset(name, settings.light_mode, settings.seed), fallback=known["fallback"])
    if data.fingerprint != known["fingerprint"]:
        raise MSCNNError(f"The images of {data.name} are not those that {NOTEBOOKS[0]} has read: run it again.")
    check_replaces_no_other(run, data)
    if data.fallback:
        print(FALLBACK_NOTICE)
    return data


def open_model(run: Run, data: Dataset, path: Path, notebook: str) -> MultiStageCNN:
    """Loads a model that `notebook` has left, and checks that it fits the data.

    Its threshold becomes the run's; with a target it stays the one that was found for it, see `set_threshold`.

    Raises:
        MSCNNError: there is none, or it is for other data.
    """
    if not path.is_file():
        raise MSCNNError(f"There is no model at {path} yet: run notebook {notebook} first.")
    model = load_model_for(data, path)
    if not (run.settings.target_risk or run.settings.target_coverage):
        model.threshold = run.settings.threshold
    return model


def set_threshold(model: MultiStageCNN, data: Dataset, settings: Settings) -> str:
    """Sets the model's threshold as the parameters ask; the last thing that is done to a model before it is saved.

    A `target_risk` is certified on the certification split, a `target_coverage` counted on the calibration split;
    without either it is the parameter `threshold`.

    Returns:
        What the threshold is, why, and what is guaranteed of it; printable.

    Raises:
        MSCNNError: the risk cannot be guaranteed; the model is as it was.
    """
    if settings.target_risk:
        model.certify(data.certification, settings.target_risk)
    elif settings.target_coverage:
        decisions = model.decide(data.calibration.images)
        familiar, count = decisions.confidence[decisions.familiar], len(decisions.confidence)
        model.threshold = threshold_for_coverage(familiar, min(1.0, settings.target_coverage * count / len(familiar)))
        accepted = (familiar >= model.threshold).sum() / count
        model.threshold_reason = f"accepts {accepted:.0%} of the calibration split"
    else:
        model.threshold = settings.threshold
    return model.threshold_text()


def in_notebook_of_a_person() -> bool:
    """Whether a notebook is run by a person who can move a slider, not by papermill or nbconvert."""
    return "ipykernel" in sys.modules and not os.environ.get("MSCNN_HEADLESS")


def _print_anyway(text: str, error: bool = False) -> None:
    """Prints what a run says of itself: what the output's encoding lacks as escapes, and to nobody if it is closed."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with _closed_output_ignored():
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


@contextlib.contextmanager
def _closed_output_ignored():
    """From the moment when nobody reads the output any more, all that is printed goes nowhere."""
    with contextlib.suppress(BrokenPipeError):
        yield
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _let_output_fail() -> None:
    """A run outlives whoever reads its output: no encoding and no closed pipe stops it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Progress(logging.Handler):
    """Turns papermill's log into one line a code cell, and passes on what the cells print.

    Args:
        title: the notebook's name.
        code_cells: numbers, from 1, of the code cells of the notebook that is executed.
    """

    def __init__(self, title: str, code_cells: list[int]):
        super().__init__()
        self.title, self.code_cells = title, code_cells

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Executing Cell"):
            number = int(message.removeprefix("Executing Cell").strip(" -"))
            if number in self.code_cells:
                step = self.code_cells.index(number) + 1
                _print_anyway(f"[{self.title}] cell {step} of {len(self.code_cells)}")
        elif not message.startswith(("Ending Cell", "Input Notebook", "Output Notebook", "Executing notebook", "<")):
            _print_anyway("    " + message.rstrip().replace("\n", "\n    "))


def _code_cells(notebook: Path) -> list[int]:
    """Numbers of the code cells, counting the one that papermill puts behind the parameters."""
    import nbformat

    cells = nbformat.read(notebook, 4).cells
    kinds = [("code",) * (1 + ("parameters" in cell.metadata.get("tags", []))) for cell in cells]
    kinds = [k if cell.cell_type == "code" else ("text",) for k, cell in zip(kinds, cells, strict=True)]
    return [number for number, kind in enumerate(sum(kinds, ()), start=1) if kind == "code"]


def run_notebook(name: str, settings: Settings, pages: concurrent.futures.Executor) -> Path:
    """Runs one notebook by papermill into the run folder; its HTML page is left to `pages`.

    Raises:
        MSCNNError: a cell failed; the message holds its error and names the partial notebook.
    """
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError

    source = project_root() / "notebooks" / f"{name}.ipynb"
    target = Run(name, settings).folder / "notebooks" / f"{name}.ipynb"
    _make_folder(target.parent, f"Cannot write the notebooks to {target.parent}", "run_dir")
    logger, progress = logging.getLogger("papermill"), _Progress(name, _code_cells(source))
    logger.addHandler(progress)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        papermill.execute_notebook(
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (source, target)),  # papermill formats them
            dataclasses.asdict(settings),
            kernel_name="python3",
            progress_bar=False,
            log_output=True,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's, of the notebook's own prints nothing is lost
        )
    except papermill.PapermillExecutionError as error:
        told = error.evalue if error.ename == MSCNNError.__name__ else f"{error.ename}: {error.evalue}"
        raise MSCNNError(f"{told}\n({name}, cell {error.exec_count}; the notebook so far: {target})") from error
    except NoSuchKernel as error:
        remedy = f"{sys.executable} -m pip install ipykernel"
        raise MSCNNError(f"{name}: Jupyter knows no kernel named {error.name} here. Install it: {remedy}") from error
    except DeadKernelError as error:
        raise MSCNNError(
            f"{name}: its Python process died, most often because the memory is used up. "
            f"Close other programs, or use light_mode.\nThe notebook so far: {target}"
        ) from error
    finally:
        logger.removeHandler(progress)
        pages.submit(_write_html, target)
    return target


def _write_html(notebook: Path) -> None:
    """Writes the notebook's page beside it; a page that cannot be made is no reason to lose a run."""
    try:
        from nbconvert import HTMLExporter

        html, _ = HTMLExporter(template_name="lab").from_filename(str(notebook))
        html = re.sub(rf'href="({"|".join(NOTEBOOKS)})\.ipynb', r'href="\1.html', html)  # from page to page
        _write_whole(notebook.with_suffix(".html"), lambda path: path.write_text(html, encoding="utf-8"))
    except Exception as error:  # nbconvert, Jinja and the file system each have their own
        _print_anyway(f"No page could be made of {notebook}: {error}", error=True)


@contextlib.contextmanager
def _surroundings():
    """What kernels inherit: whose notebooks they run, where data lies, and a home."""
    if _here() is None:  # papermill asks for it
        os.chdir(project_root())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        wanted = {"MSCNN_PROJECT": str(project_root())}  # read by the set-up cell
        with contextlib.suppress(MSCNNError):
            wanted["MSCNN_DATA_DIR"] = str(data_folder())
        if not os.path.isabs(os.path.expanduser("~")):  # no home is known, and Jupyter needs one
            wanted["HOME"] = folder
        earlier = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in earlier.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value


@contextlib.contextmanager
def _ending_written_down(run: Run):
    """Writes into `metrics.json` how a run that has begun ended, if not well."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        ending = {"status": "interrupted"} if interrupted else {"status": "failed", "reason": str(error) or repr(error)}
        with contextlib.suppress(MSCNNError):  # the reason is in `error`
            if run.read("metrics").get("status") == "running":
                run.write("metrics", ended=_now(), **ending)
        raise


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is to end a run as Ctrl-C does."""


def _terminate(*_) -> None:
    raise _Terminated


def run_all(settings: Settings, notebooks: Sequence[str] = NOTEBOOKS) -> dict:
    """Runs the notebooks in order: they are the program. Returns the content of `metrics.json`."""
    started, run = time.time(), Run("total", settings)
    os.environ["MSCNN_HEADLESS"] = "1"  # for the kernels, which inherit it
    run.starting_model()  # a missing model is refused before anything runs
    _make_folders(run)  # and so is a folder that cannot be written
    settings = settled(settings)
    # A page is made while the next notebook runs.
    with _ending_written_down(run), _surroundings(), concurrent.futures.ThreadPoolExecutor(1) as pages:
        for name in notebooks:
            run_notebook(name, settings, pages)
    seconds = {**run.read("metrics").get("seconds", {}), "total": round(time.time() - started, 1)}
    run.write("metrics", seconds=seconds)
    return run.read("metrics")


def print_result(run: Run) -> None:
    """The end of a run: the report of the 11 categories, the figures that matter, and where to look."""
    metrics = run.read("metrics")
    one, two = metrics["stage1"], metrics["two_stage"]
    data = metrics["dataset"]
    print(f"\n{run.require('metrics', 'report', NOTEBOOKS[4])}")
    print(f"No image is {OTHER} in truth: here {OTHER} is a rejection, see the two readings in notebook 05.\n")
    print(f"Data: {data['name']}{' (light mode)' if data['light_mode'] else ''}, {data['sizes']['test']} test images")
    if data["fallback"]:
        print(FALLBACK_NOTICE)
    print(f"Accuracy of Stage 1 {one['accuracy']:.1%}, of all answers {two['accuracy']:.1%}. ", end="")
    print(f"At threshold {two['threshold']:.4g}: ", end="")
    accepted = "nothing is accepted" if two["selective_accuracy"] is None else f"{two['selective_accuracy']:.1%} right"
    print(f"{two['coverage']:.1%} of the images accepted, of these {accepted}.")
    if metrics.get("certificate"):
        print(Certificate(**metrics["certificate"]).text())
    alone = f"of Stage 1 alone, by one look and its softmax, {one['aurc']:.4f}"
    print(f"Area under the risk-coverage curve: {two['aurc']:.4f}; {alone}.")
    if metrics.get("unnoticed"):
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in metrics["unnoticed"].items())
        print(f"{OTHER} does not notice everything. Accepted, though they show no category: {kinds}.")
    if two.get("like_nothing_known"):
        print(f"Called {STRANGE!r}, though they show a category: {two['like_nothing_known']:.1%} of the test images.")
    if data["sizes"]["calibration"] < 20 * len(data["category_names"]):
        print(f"Confidences are rough: only {data['sizes']['calibration']} images were there to calibrate them.")
    print(f"{metrics['seconds']['total']:.0f} s. Where to look: {run.folder}")
    print("  notebooks/05_evaluation_and_cam.html   the whole evaluation\n  figures/ · metrics.json · history.json")


def command_line() -> argparse.ArgumentParser:
    """The parser, made from `Settings`, so that names, types and defaults are the same everywhere."""
    parser = argparse.ArgumentParser(
        prog="python mscnn_helpers.py",
        description="Trains and evaluates a two-stage image classifier that says OTHER when it should,\n"
        "by running the notebooks 01 to 05 into a run folder.",
        epilog="examples:\n"
        "  a first look, minutes       python mscnn_helpers.py --epochs 5 --light_mode\n"
        "  then retrain two of it      python mscnn_helpers.py --epochs 5 --light_mode --stage2_only "
        "--stage2_categories ship,truck\n"
        "  all data, the best recipe   python mscnn_helpers.py --epochs 0 --batch_size 0\n"
        "  your own images             python mscnn_helpers.py --dataset path/to/folder --epochs 0 --batch_size 0 "
        "--run_dir runs/mine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for one in dataclasses.fields(Settings):
        says_nothing = one.default is False or one.default == ""  # but 0 does
        text = one.metadata["help"] + ("" if says_nothing else f" (default: {one.default})")
        if one.type == "bool":
            parser.add_argument(f"--{one.name}", action="store_true", help=text)
        else:
            kind = {"int": int, "float": float, "str": str}[one.type]
            parser.add_argument(f"--{one.name}", type=kind, default=one.default, metavar=one.type.upper(), help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 1 after an error that is printed."""
    _let_output_fail()
    parsed = command_line().parse_args(arguments)
    in_main_thread = threading.current_thread() is threading.main_thread()  # no other may set a signal's handler
    usual = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        settings = Settings(**vars(parsed))
        run = Run("total", settings)
        if settings.dataset != "auto" or os.path.isdir(run.folder) or _find_cifar10():
            checked_data(run)  # refused before a notebook takes the place of an older one
        # Else there is none, and a download that fails would be tried twice.
        run_all(settings)
        with _closed_output_ignored():
            print_result(Run("total", settings))
    except MSCNNError as error:
        _print_anyway(f"\nerror: {error}", error=True)
        return 1
    except KeyboardInterrupt as error:
        kept = "What is finished lies in the run folder; a finished model is still whole."
        _print_anyway(f"\ninterrupted. {kept}", error=True)
        return 143 if isinstance(error, _Terminated) else 130
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, usual)
    return 0


if __name__ == "__main__":
    sys.exit(main())
