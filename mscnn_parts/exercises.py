"""Exercises: whether the target of one is reached, told in a line, and the finished model that they work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mscnn_parts.data import Dataset
from mscnn_parts.files import notebooks_folder
from mscnn_parts.model_files import load_model
from mscnn_parts.run_folder import parameters_of_model
from mscnn_parts.settings import PRETRAINED
from mscnn_parts.sources import BUILT_IN, load_dataset

if TYPE_CHECKING:
    from mscnn_parts.model import MultiStageCNN
    from mscnn_parts.run_folder import Run


class Target(NamedTuple):
    """A figure that an exercise asks for; it is reached from `least` to `most`, where these are given.

    obstacle: why it may be missed here through no fault of the reader; a sentence.
    """

    what: str
    value: float
    least: float | None = None
    most: float | None = None
    form: str = ".1%"  # of the three numbers
    obstacle: str = ""

    @property
    def reached(self) -> bool:
        """False also where the value is NaN."""
        enough = self.least is None or self.value >= self.least
        return bool(enough and (self.most is None or self.value <= self.most) and self.value == self.value)

    def __str__(self) -> str:
        exact = self.least is not None and self.least == self.most
        bounds = {"exactly": self.least} if exact else {"at least": self.least, "at most": self.most}
        asked = ", ".join(f"{word} {bound:{self.form}}" for word, bound in bounds.items() if bound is not None)
        return f"{self.what} {self.value:{self.form}}" + (f" ({asked})" if asked else "")


def check(number: int, work: Any, targets: Callable[[Any], Sequence[Target]]) -> None:
    """Prints whether an exercise is 'not done yet', 'not yet' right, 'reached', or 'out of reach here'.

    Args:
        work: what the reader has made; None: nothing so far.
        targets: measures it. Out of reach is what misses nothing but targets with an obstacle.
    """
    if work is None:
        print(f"Exercise {number}: not done yet.")
        return
    try:
        found = targets(work)
    except LookupError as error:  # of a KeyError the text is the key
        print(f"Exercise {number}: not yet. What you made lacks what your cell names: {error}")
        return
    except (AttributeError, TypeError, ValueError) as error:
        print(f"Exercise {number}: not yet. What you made has not the form that your cell names: {error}")
        return
    if all(target.reached for target in found):
        print(f"Exercise {number}: reached.", *found, sep="\n  ")
        return
    obstacles = [target.obstacle for target in found if not target.reached]
    verdict = f"out of reach here. {' '.join(dict.fromkeys(obstacles))}" if all(obstacles) else "not yet."
    lines = [f"{target}" if target.reached else f"{target}  <-- missed" for target in found]
    print(f"Exercise {number}: {verdict}", *lines, sep="\n  ")


def finished_model(run: Run) -> tuple[MultiStageCNN | None, Dataset]:
    """The run folder's finished model or else the pretrained one, and the data in the splits that it was trained with.

    None, and the data by the run's own settings, where neither model is of the run's data set. It prints which it is.

    Raises:
        MSCNNError: the data is absent, or a model file cannot be loaded.
    """
    name = run.settings.dataset
    for path in (run.model_path, notebooks_folder() / PRETRAINED):
        if not path.is_file():
            continue
        of = parameters_of_model(path).get("dataset", name)
        if of != name and {of, name} & set(BUILT_IN):
            continue
        model = load_model(path)
        stored = model.get_config()  # not the file's: older ones lack what has a default
        data = load_dataset(name, stored["light_mode"], stored["seed"], stored["image_size"])
        if data.fingerprint == model.data_fingerprint:
            print(f"The finished model: {path}")
            return model, dataclasses.replace(data, flip=model.flip, quarter_turns=model.quarter_turns)
    asked = run.settings
    return None, load_dataset(name, asked.light_mode, asked.seed, 0, asked.mirror, asked.quarter_turns)
