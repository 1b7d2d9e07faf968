"""Places on disk: where a path of a parameter leads, and files that are whole or the old ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from mscnn_parts.settings import MSCNNError

_FIRST = "01_data_and_light_mode.ipynb"


def code_folder() -> Path:
    """The folder of `mscnn_helpers.py`: that of the checkout, or where pip has installed it."""
    return Path(__file__).resolve().parents[1]


def _is_checkout() -> bool:
    return (code_folder() / "notebooks" / _FIRST).is_file()


def project_root() -> Path:
    """Where relative paths in the parameters start: the checkout, or the current folder if pip has installed it."""
    return code_folder() if _is_checkout() else current_folder() or Path.home()


def notebooks_folder() -> Path:
    """The notebooks, their drawings and the pretrained model; pip puts `mscnn_notebooks` beside `mscnn_parts`."""
    return project_root() / "notebooks" if _is_checkout() else code_folder() / "mscnn_notebooks"


def recorded_figures(benchmark: str) -> dict:
    """What a benchmark has recorded, for a notebook to show; {} and a line that says so where its file is missing."""
    path = project_root() / "benchmarks" / f"{benchmark}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    print(f"benchmarks/{benchmark}.json is not there: a checkout of the project has it.")
    return {}


def current_folder() -> Path | None:
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
        starts = (current_folder(),)
        if starts == (None,):
            raise MSCNNError(f"The current folder, where '{text}' begins, has been deleted: give the whole path.")
    return list(dict.fromkeys(path_from(text, start) for start in starts if start))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
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


def make_folder(folder: Path, problem: str, parameter: str) -> None:
    """Makes a folder, if it is not there, and sees that files can be made in it.

    Raises:
        MSCNNError: they cannot; it begins with `problem` and names the parameter to change.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MSCNNError(f"{problem}: {error.strerror}. Choose another {parameter}.") from error
    check_writable(folder, problem, parameter)


def check_writable(folder: Path, problem: str, parameter: str) -> None:
    """Raises MSCNNError, as `make_folder` does, unless files can be made in a folder, or in the one to make it in."""
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise MSCNNError(f"{problem}: {error.strerror}. Choose another {parameter}.") from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps the same user's other runs out of a run folder, where each would overwrite what the other has made.

    The file of the lock lies among the temporary ones; the system releases it when the process ends, however that is.

    Raises:
        MSCNNError: another run is at work there.
    """
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"mscnn_{name}.lock", timeout=0)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock)
        except filelock.Timeout:
            problem = f"Another run is at work in {folder}"
            raise MSCNNError(f"{problem}: wait for its end, or choose another run_dir (--run_dir).") from None
        except (OSError, NotImplementedError):  # there is no place for it, or the file is another user's
            pass
        yield


@contextlib.contextmanager
def without_new_folders(*folders: Path) -> Iterator[None]:
    """Removes these folders and those above them again, if an error ends what follows: those that are new and empty."""
    new = {place for folder in folders for place in (folder, *folder.parents) if not os.path.lexists(place)}
    try:
        yield
    except BaseException:
        for place in sorted(new, reverse=True):  # what is inside comes before what is around it
            with contextlib.suppress(OSError):  # it is not empty, or was not made
                place.rmdir()
        raise


@contextlib.contextmanager
def kept_if_refused(
    folder: Path, names: Sequence[str], refusals: tuple[type[BaseException], ...], before: Callable[[], object]
) -> Iterator[None]:
    """Leaves some files and folders in a folder as they were, if a refusal ends what follows.

    Args:
        refusals: the errors that are one. before: called before the files are put back.

    Raises:
        MSCNNError: they cannot be copied.
    """
    with tempfile.TemporaryDirectory() as place, without_new_folders(folder):
        try:
            _copy(folder, Path(place), names)
        except OSError as error:
            raise MSCNNError(f"Cannot keep a copy of {folder} for the time being: {error}.") from error
        try:
            yield
        except refusals:
            try:
                before()
            finally:  # another Ctrl-C may end the waiting
                for path in [folder / name for name in names]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                _copy(Path(place), folder, names)
            raise


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    for path in [source / name for name in names]:
        if path.is_dir():
            shutil.copytree(path, target / path.name, symlinks=True)
        elif path.is_file():
            shutil.copy2(path, target / path.name)


def with_keras_suffix(path: Path, name: str) -> Path:
    return path if name.endswith(".keras") else path.with_name(path.name + ".keras")


def read_model_config(path: Path) -> dict[str, Any]:
    """What a `.keras` file says of its model, which is not built for that. Raises what a broken file raises."""
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("config.json"))


def jsonable(value: Any) -> Any:
    """NumPy numbers and arrays as plain ones; NaN, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {str(key): jsonable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [jsonable(one) for one in value]
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def in_chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in parts of about 16 MB: it may be on disk, and larger than the memory."""
    length = max(1, 2**24 * len(array) // max(1, array.nbytes))
    return (array[start : start + length] for start in range(0, len(array), length))


def digest_of(names: Sequence[str], *arrays: np.ndarray) -> str:
    """SHA-256 over category names and arrays, in order."""
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    for array in arrays:
        for chunk in in_chunks(array):
            digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()
