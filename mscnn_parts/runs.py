"""Begins a run, goes on with it, and opens its model."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import tensorflow as tf

from mscnn_parts.data import Dataset
from mscnn_parts.files import code_folder, read_model_config
from mscnn_parts.model_files import check_matches, load_model
from mscnn_parts.networks import stage2_design, unnamed_branch
from mscnn_parts.on_disk import is_on_disk
from mscnn_parts.run_folder import (
    NOTEBOOKS,
    THRESHOLD_PARAMETERS,
    Run,
    check_folders,
    check_places,
    make_run_folders,
    now_text,
    remove_results,
    same_data,
    settled,
)
from mscnn_parts.settings import FALLBACK_NOTICE, MSCNNError, Settings
from mscnn_parts.sources import load_dataset
from mscnn_parts.thresholds import check_certification_size, threshold_for_coverage, threshold_text
from mscnn_parts.zoo import NETWORKS

if TYPE_CHECKING:
    from mscnn_parts.model import MultiStageCNN


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
    installed = {name: version(name) for name in names if name != "tensorflow"}
    return {"python": platform.python_version(), "tensorflow": tf.__version__, **installed}


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` behind it where files have changed; None where there is none."""
    root = code_folder()
    if not (root / ".git").exists():  # else it would be that of a repository around it
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _load_data(settings: Settings, name: str) -> Dataset:
    """A data set as the parameters ask for it."""
    size = settings.image_size or NETWORKS[settings.stage1].image_size
    return load_dataset(name, settings.light_mode, settings.seed, size, settings.mirror, settings.quarter_turns)


TOLD_FROM = 50e6  # bytes of images


def _tell_memory(data: Dataset) -> None:
    """Prints what a large data set takes of the memory, such as '2,091 images of 160 px: 161 MB of memory'."""
    images = [split.images for split in (data.train, data.calibration, data.certification, data.test)]
    taken = sum(array.nbytes for array in images)
    if taken > TOLD_FROM and not is_on_disk(data.train.images):
        count, size = sum(map(len, images)), data.input_shape[0]
        print(f"{count:,} images of {size} px: {taken / 1e6:,.0f} MB of memory", flush=True)


def validate_run(run: Run) -> Dataset:
    """Loads the data set, and refuses now what a later notebook would refuse, perhaps after an hour of training.

    Raises:
        MSCNNError: an unknown data set or category, too few images for the target risk, a model to start from that is
            missing or of other data, ImageNet weights that are not there and cannot be downloaded, a model of other
            data in the run folder, or a folder that cannot be written.
    """
    check_folders(run)
    _check_network(run)
    data = _load_data(run.settings, run.settings.dataset)
    _tell_memory(data)
    _check_parameters(run.settings, data)
    start = run.starting_model()
    if start is not None:
        check_matches(load_model(start), data)
    _check_not_among_images(run, data)
    check_replaces_no_other(run, data)
    if start is None:
        NETWORKS[run.settings.stage1].check_weights()  # last, for it may download them
    return data


def _check_parameters(settings: Settings, data: Dataset) -> None:
    """Raises MSCNNError for an unknown category, and for a risk that so few images cannot guarantee."""
    settings.mode(data.category_names)
    if settings.target_risk:
        check_certification_size(len(data.certification), settings.target_risk)


def _check_network(run: Run) -> None:
    """Raises MSCNNError unless `stage1` and `stage2_branch` go together, and the model to start from has the same."""
    start, asked = run.starting_model(), run.settings
    if start is None:
        stage2_design(asked.stage1, asked.image_size or NETWORKS[asked.stage1].image_size, (), asked.stage2_branch)
        return
    try:
        config = read_model_config(start)["config"]
        network, size = config.get("network", "compact"), config.get("image_size") or config["image_shape"][0]
        named = network if isinstance(network, str) else "compact"  # one's own has the same Stage 2
        named_branch = config.get("stage2_branch", unnamed_branch(network))
        _, branch = stage2_design(named, size, config.get("stage2_widths", ()), named_branch)
    except Exception:  # a broken file fails in many ways; `load_model` says which
        return
    if isinstance(network, str) and network != asked.stage1:
        raise MSCNNError(
            f"{start} has the network {network}, and stage1 is {asked.stage1}: "
            f"give stage1 {network} (--stage1 {network}), or another model."
        )
    if asked.stage2_branch not in (-1, branch):
        has = f"stage2_branch {branch}" if branch >= 0 else "heads as Stage 2, which share no blocks"
        raise MSCNNError(
            f"{start} has {has}, and stage2_branch {asked.stage2_branch} is asked for: leave it out, or give "
            "another model."
        )


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
        config = read_model_config(run.model_path)["config"]
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


def begin_run_data(run: Run) -> Dataset:
    """Notebook 01: loads the data set and writes down which it is; the run folder's metrics begin anew."""
    settings, data, start = run.settings, validate_run(run), run.starting_model()
    goes_on = settings.stage2_only and start is not None and run.folder.resolve() in start.resolve().parents
    make_run_folders(run)
    remove_results(run)
    for name in ("metrics",) if goes_on else ("metrics", "history"):
        run.overwrite(name, {})
    run.write(
        "metrics", dataset=data.describe(), parameters=dataclasses.asdict(settled(settings)), versions=versions(),
        device=device_name(), status="running", started=now_text(), commit=commit(),
    )  # fmt: skip
    return data


def begins_here(run: Run) -> bool:
    """Whether a later notebook begins the run: with a model given by `load_model`, in an empty run folder."""
    return bool(run.settings.load_model) and "dataset" not in run.read("metrics")


def continue_run_data(run: Run) -> Dataset:
    """Notebooks 02 to 05: the data set that notebook 01 has found, without looking for another; see `begins_here`.

    Raises:
        MSCNNError: see `validate_continued`.
    """
    if begins_here(run):
        return begin_run_data(run)
    data, asked = validate_continued(run), run.read("metrics")["parameters"]
    run.write("metrics", parameters=asked | {name: getattr(run.settings, name) for name in THRESHOLD_PARAMETERS})
    if data.fallback:
        print(FALLBACK_NOTICE)
    return data


def validate_continued(run: Run) -> Dataset:
    """The data set of a run that has begun; nothing is changed.

    Raises:
        MSCNNError: notebook 01 has not run here, or with other parameters, or a parameter does not go with the data.
    """
    check_places(run)
    settings, known = run.settings, run.require("metrics", "dataset", NOTEBOOKS[0])
    asked = run.read("metrics")["parameters"]
    for name in ("dataset", "light_mode", "stage1", "image_size", "mirror", "quarter_turns", "stage2_branch", "seed"):
        begun, given = asked.get(name, getattr(Settings, name)), getattr(settings, name)  # older folders lack some
        if begun != given and not (name == "dataset" and same_data(begun, given)):
            raise MSCNNError(
                f"{run.folder} was begun with {name}={begun!r}, this notebook has {given!r}: "
                f"run {NOTEBOOKS[0]} with the same parameters first, or use another run_dir."
            )
    name = known["name"] if settings.dataset == "auto" else settings.dataset
    data = dataclasses.replace(_load_data(settings, name), fallback=known["fallback"])
    if data.fingerprint != known["fingerprint"]:
        raise MSCNNError(f"The images of {data.name} are not those that {NOTEBOOKS[0]} has read: run it again.")
    _check_parameters(settings, data)
    check_replaces_no_other(run, data)
    return data


def load_run_model(run: Run, data: Dataset, path: Path, notebook: str) -> MultiStageCNN:
    """Loads a model that `notebook` has left, and checks that it fits the data.

    Its threshold becomes the run's; with a target it stays the one that was found for it, see `set_threshold`.

    Raises:
        MSCNNError: there is none, or it is for other data.
    """
    if not path.is_file():
        raise MSCNNError(f"There is no model at {path} yet: run notebook {notebook} first.")
    if run.settings.load_model and path == run.model_path:
        print(f"Going on with this run's own model, {path}, not with {run.settings.load_model}.")
    model = load_model(path)
    check_matches(model, data)
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
        in_distribution, count = decisions.confidence[decisions.in_distribution], len(decisions.confidence)
        model.threshold = threshold_for_coverage(
            in_distribution, min(1.0, settings.target_coverage * count / len(in_distribution))
        )
        accepted = (in_distribution >= model.threshold).sum() / count
        model.threshold_source = f"accepts {accepted:.0%} of the calibration split"
    else:
        model.threshold = settings.threshold
    return threshold_text(model)
