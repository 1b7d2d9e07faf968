"""The wheel: it carries what the commands need, and works in an empty folder."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns(".*", "runs", "site", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unneeded, dirs_exist_ok=True)  # pip leaves its own files where it builds
    command = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "-q", "-w", folder]
    subprocess.run(command, check=True, timeout=300)
    return next(folder.glob("mscnn-*.whl"))


@pytest.mark.slow
def test_the_wheel_carries_notebooks_drawings_and_the_pretrained_model(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        scripts = file.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    wanted = [path for kind in ("*.ipynb", "images/*.svg", "pretrained/*") for path in ROOT.glob(f"notebooks/{kind}")]
    assert {f"mscnn_{path.relative_to(ROOT).as_posix()}" for path in wanted} <= names
    assert {f"mscnn_parts/{path.name}" for path in ROOT.glob("mscnn_parts/*.py")} | {"mscnn_helpers.py"} <= names
    assert "mscnn = mscnn_parts.cli:main" in scripts


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, but for bytecode."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_an_installed_wheel_works_in_an_empty_folder(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", wheel, "--no-deps", "-q", "--target", installed]
    subprocess.run(install, check=True, timeout=300)
    before = contents(installed)
    run = {"cwd": empty, "env": {**os.environ, "PYTHONPATH": str(installed)}, "check": True, "timeout": 900}
    command = [installed / "bin/mscnn", "--light_mode", "--dataset", "digits", "--epochs", "1"]
    subprocess.run([sys.executable, *command], **run)
    assert (empty / "runs/latest/metrics.json").is_file() and (empty / "runs/latest/notebooks/images").is_dir()
    code = "import mscnn_helpers as m; print(m.__file__, m.load_model('pretrained').category_names[8])"
    told = subprocess.run([sys.executable, "-c", code], **run, capture_output=True, text=True).stdout
    assert str(installed) in told and "ship" in told
    assert contents(installed) == before, "nothing is written where the project is installed"
