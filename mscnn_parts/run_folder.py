"""The run folder, which carries state from notebook to notebook, and what it may not take the place of."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mscnn_parts.figures import make_legible
from mscnn_parts.files import (
    FROM_HERE,
    check_writable,
    current_folder,
    jsonable,
    make_folder,
    notebooks_folder,
    path_from,
    places_of,
    project_root,
    read_model_config,
    with_keras_suffix,
    write_atomically,
)
from mscnn_parts.output import ipython_shell
from mscnn_parts.settings import FALLBACK_NOTICE, PRETRAINED, MSCNNError, Settings, did_you_mean
from mscnn_parts.sources import BUILT_IN, auto_name, find_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        self.fallback: bool | None = None  # of the data set of a notebook that needs no other; else metrics.json has it

    @property
    def model_path(self) -> Path:
        """Where the finished model is saved."""
        return with_keras_suffix(places_of(self.settings.save_model, self.folder)[0], self.settings.save_model)

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
        wanted = str(notebooks_folder() / PRETRAINED) if wanted == "pretrained" else wanted
        if not wanted and not self.settings.stage2_only:
            return None
        if not wanted and not os.path.isfile(self.model_path):
            raise MSCNNError(
                f"stage2_only keeps Stage 1, but there is no model at {self.model_path}: "
                "give load_model, or run once without stage2_only."
            )
        if not wanted:
            return self.model_path
        starts = (project_root(), current_folder(), self.folder)
        places = [with_keras_suffix(path, wanted) for path in places_of(wanted, *starts)]
        existing = next(
            (place for place in places if os.path.isfile(place)), None
        )  # False, too, without the right to look
        if existing is None:
            raise MSCNNError(
                f"No model file '{wanted}': looked for {' and '.join(map(str, places))}. "
                "Give the path of a .keras file of a finished run, or pretrained."
                f"{did_you_mean(wanted, ['pretrained'])}"
            )
        return existing

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
        self.overwrite(name, {**self.read(name), **entries})

    def remove(self, name: str, *entries: str) -> None:
        """Takes entries out of `metrics.json` or `history.json`, because they no longer hold."""
        self.overwrite(name, {key: value for key, value in self.read(name).items() if key not in entries})

    def remove_test_results(self) -> None:
        """Takes out what notebook 05 has measured of a model that has changed since."""
        self.remove("metrics", "stage1", "two_stage", "report", "certificate", "categories", "unnoticed", "model")

    def overwrite(self, name: str, record: dict) -> None:
        """Writes `metrics.json` or `history.json` anew, whole."""
        text = json.dumps(jsonable(record), indent=2, ensure_ascii=False)
        write_atomically(self.folder / f"{name}.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def require(self, name: str, entry: str, notebook: str) -> Any:
        """Reads one entry that an earlier notebook has left.

        Raises:
            MSCNNError: it is not there; the message names the notebook that makes it.
        """
        record = self.read(name)
        if entry not in record:
            raise MSCNNError(f"{self.folder} holds no '{entry}' yet: run notebook {notebook} first.")
        return record[entry]

    def save_figure(self, figure: Figure, name: str) -> Figure:
        """Saves a Matplotlib figure as `figures/NAME.png` and returns it, so that a notebook shows it.

        On the fallback data set the figure says so in its title.
        """
        recorded = self.read("metrics").get("dataset", {}).get("fallback", False)
        if recorded if self.fallback is None else self.fallback:
            figure.text(0.5, 1.0, FALLBACK_NOTICE, ha="center", va="bottom", color="firebrick", weight="bold")
        make_legible(figure)
        path = self.figures / f"{name}.png"
        write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=110, bbox_inches="tight"))
        return figure

    def finish(self) -> None:
        """Records the notebook's seconds, unless it leaves figures only; the last cell of each notebook."""
        seconds = round(time.time() - self.started, 1)
        ends = {"status": "finished", "ended": now_text()} if self.notebook == NOTEBOOKS[-1] else {}
        if self.notebook not in INDEPENDENT_NOTEBOOKS:
            self.write("metrics", seconds={**self.read("metrics").get("seconds", {}), self.notebook: seconds}, **ends)
        print(f"{self.notebook}: {seconds:.0f} s. Everything lies in {self.folder}")


THRESHOLD_PARAMETERS = ("threshold", "target_risk", "target_coverage")


def open_run(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """A notebook's hold on the run folder, by the parameters among its variables: `open_run("...", globals())`.

    Notebook 01 sets all parameters. Each later one takes from the run folder what it does not set itself, or sets to an
    empty text; where notebook 01 has not run, what concerns the data, and the seed, are those of
    the model that `load_model` names. A notebook that needs no other has its own parameters; its run folder is made and
    `auto` resolved here, once for all its data, so that its figures know whether the fallback data set stands in.

    Raises:
        MSCNNError: a parameter is wrong, or there is neither an earlier notebook nor `load_model`.
    """
    given = {field.name: namespace[field.name] for field in dataclasses.fields(Settings) if field.name in namespace}
    if notebook == NOTEBOOKS[0]:
        return Run(notebook, Settings(**given))
    if notebook in INDEPENDENT_NOTEBOOKS:
        run = Run(notebook, Settings(**given))
        make_run_folders(run)
        name, run.fallback = _found_data(run)
        run.settings = dataclasses.replace(run.settings, dataset=name)
        return run
    return Run(notebook, continued_settings({name: value for name, value in given.items() if value != ""}))


def continued_settings(given: Mapping[str, Any], independent: bool = False) -> Settings:
    """The parameters that are given, and for all others those that the run in their run folder was begun with.

    Where none was begun, they are those of the model that `load_model` names. A threshold or target takes the place of
    all three that were set before.

    Args:
        independent: for notebooks that need no other, which start from the defaults where no run was begun.

    Raises:
        MSCNNError: see `open_run`.
    """
    run = Run("total", Settings(**given))
    earlier = run.read("metrics").get("parameters") or ({} if independent else _parameters_of_model(run))
    replaced = THRESHOLD_PARAMETERS if given.keys() & set(THRESHOLD_PARAMETERS) else ()
    known = [field.name for field in dataclasses.fields(Settings) if field.name not in replaced]
    return Settings(**{**{name: earlier[name] for name in known if name in earlier}, **given})


def _found_data(run: Run) -> tuple[str, bool]:
    """The data set of a notebook that needs no other, and whether it is the fallback; `auto` is as the run found it."""
    begun = run.read("metrics")
    if run.settings.dataset != "auto" or begun.get("parameters", {}).get("dataset") != "auto":
        return auto_name(run.settings.dataset)
    if begun["dataset"]["fallback"]:
        print(FALLBACK_NOTICE)
    return begun["dataset"]["name"], begun["dataset"]["fallback"]


def _parameters_of_model(run: Run) -> dict[str, Any]:
    """What the model that `load_model` names was trained on, as parameters of its data."""
    if not run.settings.load_model:
        raise MSCNNError(
            f'{run.folder} holds no run yet: run notebook {NOTEBOOKS[0]} first, or set load_model to "pretrained".'
        )
    path = run.starting_model()
    known = parameters_of_model(path or Path())
    if known and known["dataset"] not in BUILT_IN and run.settings.dataset == "auto":
        name = known["dataset"]
        raise MSCNNError(f"{path} was trained on {name}: add dataset = the path of these images to the parameters.")
    return known


def parameters_of_model(path: Path) -> dict[str, Any]:
    """What a model was trained on, as parameters of its data; {} where the file cannot tell."""
    try:
        config = read_model_config(path)["config"]
        same = ("dataset", "light_mode", "seed", "stage2_branch", "quarter_turns")
        known = {name: config[name] for name in same if name in config}
        known |= {"mirror": config["flip"], "image_size": config.get("image_size", config["image_shape"][0])}
        network = config.get("network", "compact")
        known |= {"stage1": network} if isinstance(network, str) else {}  # one's own has no name
    except Exception:  # a broken file fails in many ways; `load_model` says which
        return {}
    return known


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
    shell = ipython_shell()
    cells = shell.user_ns.get("In", []) if shell else []
    names = [field.name for field in dataclasses.fields(Settings)]
    unknown = [name for name in injected_names(cells) if name not in names]
    if unknown:
        hint = did_you_mean(unknown[0], names)
        raise MSCNNError(f"Unknown parameter '{unknown[0]}'.{hint} The parameters are {', '.join(names)}.")


def now_text() -> str:
    """The time, in ISO 8601 with its zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


NOTEBOOKS = (
    "01_data_and_light_mode",
    "02_stage1_training",
    "03_stage2_training",
    "04_selective_retraining",
    "05_evaluation_and_cam",
)
# They need no other, leave figures only, and take from the run folder what the command line is not given.
INDEPENDENT_NOTEBOOKS = (
    "06_networks_and_transfer",
    "07_craft_of_training",
    "08_when_training_goes_wrong",
    "09_exercises",
)
OPTIONAL_NOTEBOOKS = ("05b_thresholds_and_ood", *INDEPENDENT_NOTEBOOKS)
ALL_NOTEBOOKS = (*NOTEBOOKS, *OPTIONAL_NOTEBOOKS)
RESULTS = ("figures", "notebooks", "metrics.json", "history.json")  # in a run folder, beside the models


def check_places(run: Run) -> None:
    """Raises MSCNNError if the run would write over a project's own notebooks or the model that comes with it."""
    model, pages = run.model_path, run.folder / "notebooks"
    if _touches_source(pages) or any(_is_source(pages / f"{name}.ipynb") for name in ALL_NOTEBOOKS):
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
        pass  # the former is as it should be, the latter is told by `make_folder`
    except OSError as error:
        problem = f"Cannot read the run folder {run.folder}: {error.strerror}"
        raise MSCNNError(f"{problem}. Choose another run_dir.") from error


def _touches_source(path: Path) -> bool:
    """Whether a path is, or lies in, or holds the folder `notebooks` of this project or of another copy of it."""
    path = Path(os.path.realpath(path))
    copies = [folder for folder in path.parents if os.path.isfile(folder / "mscnn_helpers.py")]
    folders = [notebooks_folder(), *(copy / "notebooks" for copy in copies)]
    sources = [Path(os.path.realpath(folder)) for folder in folders]
    return any(path == source or source in path.parents or path in source.parents for source in sources)


def _is_source(notebook: Path) -> bool:
    """Whether a notebook is there that no run has made: papermill signs what it writes."""
    try:
        return "papermill" not in json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    except (OSError, ValueError, KeyError, TypeError):  # absent, or half-written by a run that was killed
        return False


def check_folders(run: Run) -> None:
    """Raises MSCNNError if the run may not, or cannot, write into its folders; makes none."""
    check_places(run)
    for place in _folders_of(run):
        check_writable(*place)


def _folders_of(run: Run) -> list[tuple[Path, str, str]]:
    """The folders that a run writes into; for each what is wrong if it cannot, and the parameter that names it."""
    return [
        (run.figures, f"Cannot write into the run folder {run.folder}", "run_dir"),
        (run.model_path.parent, f"Cannot write the model to {run.model_path}", "save_model"),
        (run.folder / "notebooks/images", f"Cannot write the notebooks to {run.folder / 'notebooks'}", "run_dir"),
    ]


def make_run_folders(run: Run) -> None:
    """Makes the folders that a run writes into, or raises MSCNNError."""
    check_folders(run)
    for place in _folders_of(run):
        make_folder(*place)
    drawings = run.folder / "notebooks/images"  # where the executed notebooks look for them
    for drawing in (notebooks_folder() / "images").glob("*.svg"):
        shutil.copyfile(drawing, drawings / drawing.name)


def remove_results(run: Run) -> None:
    """Removes figures and notebooks of an earlier run, which would pass for those of this one; but not its models."""
    later = [name for name in ALL_NOTEBOOKS if name > run.notebook]
    pages = [run.folder / "notebooks" / f"{name}.{kind}" for name in later for kind in ("ipynb", "html")]
    for path in [*run.figures.glob("*.png"), *pages]:
        path.unlink(missing_ok=True)


def settled(settings: Settings) -> Settings:
    """The settings as they mean the same in every folder: whole paths where `~` or the current folder counted."""
    run, (data, _) = Run("total", settings), find_data(settings.dataset)
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
    if place is None:
        return text
    if text.startswith("~") or FROM_HERE.match(text):
        return str(place)
    fixed = [path_from(text, start) for start in starts]
    return text if place in fixed + [with_keras_suffix(path, text) for path in fixed] else str(place)


def same_data(one: str, other: str) -> bool:
    """Whether two values of `dataset` lead to the same folder or file."""
    places = [find_data(name)[0] for name in (one, other)]
    first, second = (path and os.path.realpath(path) for path in places)
    return first is not None and first == second
