"""The website of `make site`: its pages, and that no link of theirs leads nowhere."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import ROOT

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def build(*arguments: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / ".github/pages.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The website of a run that has executed notebook 05, and has shown one picture."""
    run, folder = (tmp_path_factory.mktemp(name) for name in ("run", "site"))
    notebook = nbformat.read(ROOT / "notebooks/05_evaluation_and_cam.ipynb", 4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": PIXEL})]
    (run / "notebooks").mkdir()
    nbformat.write(notebook, run / "notebooks/05_evaluation_and_cam.ipynb")
    built = build(run, folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, BeautifulSoup]:
    return {path.name: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in site.glob("*.html")}


def test_every_document_and_executed_notebook_has_a_page(pages):
    documents = {f"{path.stem}.html" for path in ROOT.glob("docs/*.md")}
    assert documents | {"index.html", "index.ja.html", "05_evaluation_and_cam.html"} <= set(pages)
    assert "04_selective_retraining.html" not in pages
    for page in pages.values():
        assert page.h1
        linked = {link["href"] for link in page.select("nav a")}
        assert linked == set(pages) - {"index.ja.html"}
    assert PIXEL in str(pages["05_evaluation_and_cam.html"])


def test_links_lead_somewhere(pages, site):
    for name, page in pages.items():
        for element in page.select("[href], [src]"):
            address = element.get("href") or element["src"]
            if address.startswith(("data:", "https:")):
                continue
            place, _, fragment = address.partition("#")
            assert (site / (place or name)).is_file(), f"{name}: {address}"
            assert not fragment or pages[place or name].find(id=fragment), f"{name}: {address}"


def test_pages_are_read_offline(pages):
    for name, page in pages.items():
        loaded = [str(tag) for tag in page.select("script[src], link[href], img[src]") if "https:" in str(tag)]
        assert loaded == [], name


def test_a_run_without_notebooks_is_refused(tmp_path):
    refused = build(tmp_path, tmp_path / "site")
    assert refused.returncode == 1
    assert "holds no executed notebooks" in refused.stderr
    assert not (tmp_path / "site").exists()


def test_the_workflow_publishes_what_the_makefile_builds():
    workflow = yaml.safe_load((ROOT / ".github/workflows/pages.yml").read_text("utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["make site"]
    assert next(step["with"] for step in steps if "upload-pages" in step.get("uses", "")) == {"path": "site"}
