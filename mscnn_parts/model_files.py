"""What a model is made of, as its file holds it: parts and their fingerprints, loading, what may be saved."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import numpy as np

from mscnn_parts.downloads import keras_home
from mscnn_parts.files import notebooks_folder, path_from, read_model_config
from mscnn_parts.networks import layers_by_group
from mscnn_parts.settings import PRETRAINED, MSCNNError, check_stage1, did_you_mean
from mscnn_parts.zoo import network_named

if TYPE_CHECKING:
    from mscnn_parts.data import Dataset
    from mscnn_parts.model import MultiStageCNN


FORMAT = 2  # of model files; 0.1 wrote none


def check_keras() -> None:
    """Raises MSCNNError if Keras is set up, by keras.json or otherwise, in a way that no network here works with."""
    wanted = {"backend": (keras.config.backend(), "tensorflow"),
              "image_data_format": (keras.config.image_data_format(), "channels_last")}  # fmt: skip
    for setting, (found, needed) in wanted.items():
        if found != needed:
            raise MSCNNError(
                f"Keras has the {setting} {found}, and this project needs {needed}: set it in "
                f"{keras_home()}/keras.json (KERAS_BACKEND sets the backend, too) and start Python anew."
            )


def _check_model_file(path: Path) -> None:
    """Raises MSCNNError for what is known to keep a file from being loaded, whatever is in it otherwise."""
    check_keras()
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise MSCNNError(f"Cannot read {path}: {error.strerror}. Its rights have to let you read it.") from error
    if start.startswith(b"version https://git-lfs"):
        raise MSCNNError(f"{path} is a Git LFS pointer, not the model itself: run git lfs pull.")
    if path.suffix != ".keras":
        raise MSCNNError(f"{path} has no name that ends in .keras: rename it, if it is a model of this project.")
    if not zipfile.is_zipfile(path):
        what = "it is no zip archive, as a whole .keras file is" if start else "it is empty"
        raise MSCNNError(f"{path} is damaged or not a model of this project: {what}. Get or save it again.")
    _check_format(path)


def _check_format(path: Path) -> None:
    """Raises MSCNNError for a model file of another version; what is damaged is told by Keras."""
    written = FORMAT
    with contextlib.suppress(Exception):  # a broken file fails in many ways: zip, zlib, JSON
        found = read_model_config(path)
        written = found["config"].get("format", 1) if found["class_name"] == "MultiStageCNN" else FORMAT
    if written < FORMAT:
        raise MSCNNError(f"{path} was written by MSCNN 0.1: load it with tag v0.1.0, or train anew.")
    if written > FORMAT:
        raise MSCNNError(f"{path} has format {written}, and this version reads {FORMAT}: update the project.")


def model_path(name: str | Path) -> Path:
    """The path of a model file as a user gives it; "pretrained" is the one that comes with the project."""
    return notebooks_folder() / PRETRAINED if str(name) == "pretrained" else path_from(str(name), Path())


def load_model(path: str | Path) -> MultiStageCNN:
    """Loads a model file; "pretrained" is the one that comes with the project.

    Raises:
        MSCNNError: it is missing, damaged or not of this project.

    Example:
        >>> load_model("pretrained").category_names[8]
        'ship'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise MSCNNError(
            f"The model file is {path!r}: give the path of a .keras file of a finished run, or pretrained."
        )
    path = model_path(path)
    if os.path.isdir(path):
        raise MSCNNError(f"{path} is a folder: give the path of a .keras file of a finished run, or pretrained.")
    if not path.is_file():
        raise MSCNNError(
            f"There is no model file at {path}: give the path of a .keras file of a finished run, or pretrained."
            f"{did_you_mean(path.name, ['pretrained'])}"
        )
    _check_model_file(path)
    expected = keras.saving.get_registered_object("mscnn>MultiStageCNN")
    if expected is None:
        raise MSCNNError("The class of the model is not there yet: import mscnn_helpers first.")
    try:
        model = keras.saving.load_model(path)
    except Exception as error:  # a broken file fails in many ways: zip, JSON, HDF5, Keras
        if "Could not locate class" in str(error):  # of one's own network
            raise MSCNNError(f"{path} has a network of a class that is not there yet: import it first.") from error
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise MSCNNError(f"{path} is damaged or not a model of this project: {reason}") from error
    if not isinstance(model, expected):
        raise MSCNNError(f"{path} holds a {type(model).__name__}, not a MultiStageCNN.")
    return model


def parts_of(model: MultiStageCNN) -> dict[str, list[np.ndarray]]:
    """Every array of a model by part: 'stage1', 'stage2_base', 'stage2/ship', 'calibration/ship', ..."""
    names, coefficients = model.category_names, model.calibration_coefficients.numpy()
    parts = {"stage1": model.stage1.get_weights(), "stage2_base": model.stage2_base.get_weights()}
    if model.stage2_branch > 0:
        parts["stage2_trunk"] = model.trunk.get_weights()  # the first layers of the base network
    parts |= {f"stage2/{name}": model.stage2_cnn(c).get_weights() for c, name in enumerate(names)}
    parts["calibration/shared"] = [model.shared_coefficients.numpy()]
    parts["ood_statistics"] = list(model.ood_statistics)
    return parts | {f"calibration/{name}": [coefficients[c]] for c, name in enumerate(names)}


def sha256_of(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def trainable_text(model: MultiStageCNN) -> str:
    """What is trainable, printable: `✓ ship: True   ✗ cat: False`."""

    def line(name: str, flag: bool) -> str:
        return f"{'✓' if flag else '✗'} {name}: {flag}"

    free = model.trainable_categories()
    stage2 = [line(name, c in free).ljust(20) for c, name in enumerate(model.category_names)]
    rows = ["   ".join(stage2[i : i + 5]).rstrip() for i in range(0, len(stage2), 5)]
    first = f"{line('Stage 1', model.stage1.trainable)}   {line('Stage 2 base network', model.stage2_base.trainable)}"
    return "\n".join([first, *_groups_text(model), "Stage 2", *rows])


def _groups_text(model: MultiStageCNN) -> list[str]:
    """What is trainable of a Stage 1 that is unfrozen by groups, in a line; else no line."""
    entry = network_named(model.network)
    if not entry.groups or not model.stage1.trainable:
        return []
    groups = layers_by_group(model.stage1, entry).items()
    flags = [f"{'✓' if any(one.trainable for one in layers) else '✗'} {name}" for name, layers in groups]
    return [f"Stage 1 by groups, from the images on: {'  '.join(flags)}"]


def network_ids(model: MultiStageCNN) -> dict[str, int]:
    """The networks by their ids, not themselves: Keras would save them under one more name."""
    networks = {"stage1": model.stage1, "stage2_base": model.stage2_base, **model.stage2}
    return {name: id(network) for name, network in networks.items()}


def checked_network(network: str | dict | keras.Model) -> str | keras.Model:
    """The network that Stage 1 is to be: a name, or one's own; as a model file holds it, it is made again.

    Raises:
        MSCNNError: an unknown name, or a layer or class that a model file could not bring back.
    """
    if from_file := isinstance(network, dict):
        network = keras.saving.deserialize_keras_object(network)
    if isinstance(network, str):
        check_stage1(network)
        return network
    if not isinstance(network, keras.Model):
        raise MSCNNError(f"network is a {type(network).__name__}: give a name, such as resnet, or a keras.Model.")
    for kind in _classes_in(network):
        registered = keras.saving.get_registered_object(keras.saving.get_registered_name(kind))
        if not kind.__module__.startswith("keras.") and registered is None:
            raise MSCNNError(
                f"{kind.__name__} is not registered, so that no model file could name it: put "
                "@keras.saving.register_keras_serializable() above the class."
            )
    if not from_file:
        try:
            keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(network))
        except Exception as error:  # a network fails in many ways: a lambda, a constructor without its arguments
            reason = str(error).splitlines()[0][:200]
            raise MSCNNError(f"No model file could bring this network back: {reason}") from error
    return network


def _classes_in(layer: keras.layers.Layer) -> set[type]:
    """The classes of a network and, where Keras writes them into a file, of the layers within."""
    kind = type(layer)  # of a class of one's own, whose constructor makes its layers, the file has that name alone
    within = getattr(layer, "layers", ()) if kind.__module__.startswith("keras.") else ()
    return {kind}.union(*(_classes_in(one) for one in within))


def _not_replaceable(name: str) -> MSCNNError:
    return MSCNNError(
        f"{name} cannot be replaced: the file of a model holds weights for the networks it was built with. "
        "Use set_weights() of that network, or build another MultiStageCNN (stage1_widths, stage2_widths)."
    )


def check_assignable(name: str) -> None:
    """Raises MSCNNError for an attribute that a model, once built, cannot change."""
    if name in ("stage1", "stage2_base", "stage2"):
        raise _not_replaceable(name)
    fixed = {
        "category_names", "image_shape", "image_size", "flip", "quarter_turns", "dataset", "data_fingerprint",
        "policy", "network", "stage2_branch",
    }  # fmt: skip
    if name in fixed:
        raise MSCNNError(f"{name} cannot be changed: the networks were made for it. Build another MultiStageCNN.")


def check_free(model: MultiStageCNN, categories: Iterable[int]) -> None:
    """Raises MSCNNError if one of the categories is frozen."""
    frozen = sorted(set(categories) - set(model.trainable_categories()))
    if frozen:
        names = ", ".join(model.category_names[c] for c in frozen)
        raise MSCNNError(f"The calibration of {names} is frozen: call set_stage2_category_trainable() first.")


def checked_target(model: MultiStageCNN, filepath: str | Path, overwrite: bool) -> Path:
    """Where a model is to be saved, or MSCNNError if it may not be, or a network is not the model's own any more."""
    path = path_from(str(filepath), Path())
    if path.suffix != ".keras" or os.path.isdir(path):
        raise MSCNNError(f"{path} is no name for a model file: give one that ends in .keras.")
    for name, _ in network_ids(model).items() ^ model.network_ids.items():
        raise _not_replaceable(name)
    if not overwrite and os.path.lexists(path):
        raise MSCNNError(f"{path} is there already: give another name, or overwrite=True to replace it.")
    return path


def check_matches(model: MultiStageCNN, data: Dataset) -> None:
    """Raises MSCNNError if the model was made for another data set, or for other splits of it."""
    size = data.image_size or data.input_shape[0]
    if model.dataset == data.name and model.image_size != size:
        raise MSCNNError(
            f"The model was trained with image_size {model.image_size}, and the data has {size}: set image_size as it "
            "was, or train a new model."
        )
    pairs = {
        "data set": (model.dataset, data.name),
        "image shape": (model.image_shape, data.input_shape),
        "list of categories": (", ".join(model.category_names), ", ".join(data.category_names)),
    }
    for what, (mine, given) in pairs.items():
        if mine != given:
            raise MSCNNError(
                f"The model is for another {what}: {mine}; the data has {given}. "
                "Choose the data set that the model was trained on, or train a new model."
            )
    for name, mine, given, options in (
        ("mirror", model.flip, data.flip, "--mirror, --no-mirror"),
        ("quarter_turns", model.quarter_turns, data.quarter_turns, "with or without --quarter_turns"),
    ):
        if mine != given:
            raise MSCNNError(
                f"The model was trained with {name} {mine}, and the data has {given}: set {name} as it was "
                f"({options}), or train a new model."
            )
    if model.data_fingerprint not in ("", data.fingerprint):
        raise MSCNNError(
            f"The model was trained on other splits of {data.name} (seed, light_mode or files differ): its train "
            "images would be used to judge it. Use the seed and light_mode of its training (the pretrained model: "
            "seed 0, no light_mode), or train a new model."
        )
