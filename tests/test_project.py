"""The files around the code: Makefile, requirements, badges, Dockerfile, CI. No network, no installing."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import SOURCES
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def clean_environment(**extra: object) -> dict[str, str]:
    """This process's environment without what an outer `make` or container puts into it."""
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "SYSTEM_PYTHON", "PYTHON", "ARGS"}
    kept = {name: value for name, value in os.environ.items() if name not in outer}
    return kept | {name: str(value) for name, value in extra.items()}


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}", "utf-8")
    path.chmod(0o755)
    return path


# ------------------------------------------------------------------------------------------------------------
# Makefile
# ------------------------------------------------------------------------------------------------------------

# Plays the system's Python and, copied there, .venv's: `-m venv` is quick and `-m pip` does what $PIP says.
FAKE_PYTHON = """
echo "$*" >> log
case "$1 $2" in
  "-c "*) [ -z "$UNFIT" ] && echo "$0 ${VERSION:-3.12.0}" ;;
  "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip") touch .venv/half-made; eval "${PIP:-:}" ;;
esac
"""


class Project:
    """A copy of the Makefile in a folder of its own, with a Python that only plays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "requirements.lock").write_text("numpy==1.26.4\n", "utf-8")
        (folder / "pyproject.toml").touch()
        self.python = script(folder / "bin" / "python", FAKE_PYTHON)

    def command(self, *arguments: str) -> list[str]:
        return ["make", f"PYTHON={self.python}", *arguments]

    def make(self, *arguments: str, **environment: object) -> subprocess.CompletedProcess:
        command, env = self.command(*arguments), clean_environment(**environment)
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)

    def installs(self, what: str = "-r requirements.lock") -> int:
        """How often pip has installed something so far."""
        log = self.folder / "log"
        calls = log.read_text("utf-8").splitlines() if log.exists() else []
        return sum(call.startswith("-m pip install") and call.endswith(what) for call in calls)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@needs_make
def test_make_alone_lists_every_target(project):
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)[1].split()
    listed = re.findall(r"^make (\S+) +\S", project.make().stdout, re.M)
    assert listed == phony


@needs_make
def test_environment_is_made_once(project):
    assert project.make("env").returncode == 0
    assert project.installs() == 1
    for target in ("env", "test", "run"):
        assert project.make(target).returncode == 0
    assert project.installs() == 1


@needs_make
def test_environment_has_the_command_of_this_folder(project):
    project.make("env")
    assert project.installs("--no-deps --no-build-isolation --editable .") == 1
    assert (project.folder / ".venv/bin/mscnn").exists()
    os.utime(project.folder / "pyproject.toml", (2**32, 2**32))  # an entry point may have changed
    project.make("env")
    assert project.installs("--editable .") == 2 and project.installs() == 1


@needs_make
def test_environment_is_remade_for_another_lock_or_python(project):
    project.make("env")
    (project.folder / "requirements.lock").write_text("numpy==2.0.0\n", "utf-8")
    project.make("env")
    assert project.installs() == 2
    project.make("env", VERSION="3.13.0")
    assert project.installs() == 3


@needs_make
def test_failed_install_is_said_and_repaired(project):
    failed = project.make("env", PIP="exit 1")
    assert failed.returncode != 0
    assert "Making .venv failed" in failed.stderr
    (project.folder / ".venv" / "left-over").touch()
    assert project.make("env").returncode == 0
    assert project.installs() == 2
    assert not (project.folder / ".venv" / "left-over").exists()


@needs_make
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_install_is_repaired(project, how):
    running = subprocess.Popen(
        project.command("env"),
        cwd=project.folder,
        env=clean_environment(PIP="sleep 30"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the signal reaches make and its children, as Ctrl-C does, not us
    )
    deadline = time.monotonic() + 20
    while not (project.folder / ".venv" / "half-made").exists():
        assert time.monotonic() < deadline, "pip was never reached"
        time.sleep(0.02)
    os.killpg(running.pid, how)
    output, _ = running.communicate(timeout=20)
    assert running.returncode != 0
    if how == signal.SIGTERM:
        assert "Interrupted" in output

    (project.folder / ".venv" / "left-over").touch()
    assert project.make("env").returncode == 0
    assert project.installs() == 2
    assert not (project.folder / ".venv" / "left-over").exists()


@needs_make
def test_unfit_python_is_refused_and_nothing_is_lost(project):
    project.make("env")
    (project.folder / "requirements.lock").write_text("numpy==2.0.0\n", "utf-8")
    refused = project.make("env", UNFIT=1)
    assert refused.returncode != 0
    assert "Python 3.10 to 3.13 with its venv module is needed" in refused.stderr
    assert str(project.python) in refused.stderr
    assert (project.folder / ".venv" / "bin" / "python").exists()


@needs_make
def test_first_fitting_python_is_taken(project):
    script(project.folder / "bin" / "too-old", "exit 1\n")
    made = project.make("env", f"PYTHON=./bin/missing ./bin/too-old {project.python}", VERSION="3.11.9")
    assert made.returncode == 0, made.stderr
    assert "Python 3.11.9" in made.stdout


@needs_make
def test_active_environment_is_not_its_own_base(project):
    """With .venv activated, `python3` is .venv's, which could not rebuild the folder it lives in."""
    pytest.importorskip("ensurepip")
    if sys.prefix == sys.base_prefix:
        pytest.skip("the tests do not run in a virtual environment")
    shown = project.make("-n", "env", f"PYTHON={sys.executable}").stdout
    base = re.search(r"(\S+) -m venv \.venv", shown)[1]
    assert not base.startswith(sys.prefix)
    assert Path(base).exists()


@needs_make
def test_run_passes_arguments_on(project):
    project.make("env")
    for arguments, passed in [
        ([], "mscnn_helpers.py --epochs 5 --light_mode"),
        (["ARGS=--epochs 0 --batch_size 0"], "mscnn_helpers.py --epochs 0 --batch_size 0"),
    ]:
        assert project.make("run", *arguments).returncode == 0
        assert (project.folder / "log").read_text("utf-8").splitlines()[-1] == passed


@needs_make
def test_system_python_installs_nothing(project):
    for environment, arguments in [({"SYSTEM_PYTHON": 1}, []), ({}, ["SYSTEM_PYTHON=1"])]:
        assert project.make("run", "test", *arguments, **environment).returncode == 0
    assert project.installs() == 0
    assert not (project.folder / ".venv").exists()
    log = (project.folder / "log").read_text("utf-8").splitlines()
    tested = "-m pytest -n 2 --dist loadfile -m not slow and not chain"
    assert log == ["mscnn_helpers.py --epochs 5 --light_mode", tested] * 2


# ------------------------------------------------------------------------------------------------------------
# Requirements: one list of ranges, one lock, the same Pythons everywhere
# ------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[str]:
    """The lines of a requirements file, without comments and blanks."""
    text = path.read_text("utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def ranges() -> list[Requirement]:
    return [Requirement(line) for line in lines(ROOT / "requirements.txt")]


def test_lock_holds_nothing_but_exact_versions():
    for line in lines(ROOT / "requirements.lock"):
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line), line


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system, platform", [("Linux", "linux"), ("Darwin", "darwin")])
def test_lock_satisfies_the_ranges(python, system, platform):
    here = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_system": system,
        "os_name": "posix",
    }
    pins: dict[str, str] = {}
    for pin in map(Requirement, lines(ROOT / "requirements.lock")):
        if pin.marker is None or pin.marker.evaluate(here):
            assert pin.name not in pins, f"{pin.name} is locked twice"
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    for wanted in [*ranges(), *map(Requirement, PYPROJECT["dependency-groups"]["dev"])]:
        if wanted.marker is not None and not wanted.marker.evaluate(here):
            continue
        assert pins.get(canonicalize_name(wanted.name), "absent") in wanted.specifier, wanted


def test_same_pythons_everywhere():
    supported = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(5, 30) if f"3.{minor}" in supported] == PYTHONS
    makefile = (ROOT / "Makefile").read_text("utf-8")
    bounds = [".".join(bound) for bound in re.findall(r"\((3), (\d+)\)", makefile)]
    assert bounds == [PYTHONS[0], PYTHONS[-1]]
    assert sorted(re.findall(r"python(3\.\d+)", re.search(r"^PYTHON \?= .+$", makefile, re.M)[0])) == PYTHONS
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + PYTHONS[0].replace(".", "")


def test_conda_and_package_use_the_same_ranges():
    *conda, by_pip = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    assert by_pip == {"pip": ["-r requirements.txt"]}
    assert {name.split("=")[0] for name in conda} == {"python", "make", "pip"}
    assert next(name for name in conda if name.startswith("python=")).removeprefix("python=") in PYTHONS
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}


def test_every_import_is_required():
    """What modules and notebooks import themselves must not come in by luck, as something else's dependency."""
    other_names = {
        "sklearn": "scikit-learn",
        "PIL": "pillow",
        "IPython": "ipykernel",
        "jupyter_client": "jupyter-client",
    }
    only_on_colab = {"google"}
    sources, imported = [path.read_text("utf-8") for path in SOURCES], set()
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    extras = PYPROJECT["project"]["optional-dependencies"]
    with_an_extra = {re.split(r"[<>=~]", line)[0] for lines in extras.values() for line in lines}
    imported -= {*sys.stdlib_module_names, *only_on_colab, *with_an_extra, "mscnn_helpers", "mscnn_parts"}
    assert "numpy" in imported
    required = {requirement.name for requirement in ranges()}
    assert {other_names.get(name, name) for name in imported} <= required


# ------------------------------------------------------------------------------------------------------------
# Badges: the repository's address stands in pyproject.toml, everything else follows
# ------------------------------------------------------------------------------------------------------------

COLAB = "https://colab.research.google.com"
BADGE = f"[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/old/home/blob/v1/notebooks/{{}})"


@pytest.fixture
def badges(tmp_path: Path):
    """`badges(*arguments)` runs the script on two notebooks and a README of an older address."""
    (tmp_path / ".github").mkdir()
    shutil.copy(ROOT / ".github" / "badges.py", tmp_path / ".github")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.mscnn]\nrepository = "https://github.com/new/home"\nref = "v2"\n\n[tool.other]\nref = "no"\n',
        "utf-8",
    )
    (tmp_path / "README.md").write_text(f"# 画像\n{BADGE.format('02_two.ipynb')}\n", "utf-8")
    (tmp_path / "notebooks").mkdir()
    for name in ("01_one.ipynb", "02_two.ipynb"):
        cells = [
            {"cell_type": "markdown", "id": "a1", "metadata": {}, "source": [BADGE.format("02_two.ipynb")]},
            {
                "cell_type": "code",
                "id": "b2",
                "metadata": {},
                "source": ['REPOSITORY, REF = "https://github.com/old/home", "v1"\n', 'print("画像")'],
            },
        ]
        text = json.dumps({"cells": cells}, indent=1, ensure_ascii=False) + "\n"
        (tmp_path / "notebooks" / name).write_text(text, "utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, tmp_path / ".github" / "badges.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


def texts(folder: Path) -> dict[str, str]:
    paths = [folder / "README.md", *folder.glob("notebooks/*")]
    return {path.name: path.read_text("utf-8") for path in paths}


def test_badges_follow_pyproject(badges, tmp_path):
    before = texts(tmp_path)
    assert badges().returncode == 0
    for name, text in texts(tmp_path).items():
        own = name if name.endswith(".ipynb") else "02_two.ipynb"
        expected = before[name].replace("old/home/blob/v1", "new/home/blob/v2")
        expected = expected.replace("notebooks/02_two.ipynb", f"notebooks/{own}")
        expected = expected.replace(r"old/home\", \"v1\"", r"new/home\", \"v2\"")
        assert text == expected  # letter for letter: layout and cell ids included
    assert badges("--check").returncode == 0


def test_badges_check_changes_nothing_and_names_the_files(badges, tmp_path):
    before = texts(tmp_path)
    checked = badges("--check")
    assert checked.returncode == 1
    assert [name for name in before if name in checked.stderr] == list(before)
    assert texts(tmp_path) == before


@pytest.mark.parametrize("lost, complaint", [("Open In Colab", "badge"), ("REPOSITORY", "set-up cell")])
def test_badges_miss_what_is_not_there(badges, tmp_path, lost, complaint):
    badges()
    path = tmp_path / "notebooks" / "01_one.ipynb"
    path.write_text(path.read_text("utf-8").replace(lost, "gone"), "utf-8")
    checked = badges("--check")
    assert checked.returncode == 1
    assert "01_one.ipynb" in checked.stderr
    assert complaint in checked.stderr


def test_readmes_link_the_website_once_it_is_published(badges, tmp_path):
    readmes = [ROOT / "README.md", ROOT / "README.ja.md"]
    for readme in readmes:
        shutil.copy(readme, tmp_path)

    def with_site(site: str) -> list[str]:
        text = (ROOT / "pyproject.toml").read_text("utf-8")
        (tmp_path / "pyproject.toml").write_text(
            re.sub(r'^site = ".*"$', f'site = "{site}"', text, flags=re.M), "utf-8"
        )
        assert badges().returncode == 0
        return [(tmp_path / readme.name).read_text("utf-8") for readme in readmes]

    pages = [*(f"{path.stem}.html" for path in NOTEBOOKS), ""]
    for site in ("https://one.example/site", "https://two.example"):
        for text in with_site(f"{site}/"):
            assert re.findall(r"\((https://\w+\.example[^)]*)\)", text) == [f"{site}/{page}" for page in pages]
    assert not any("example" in text.replace("example_image", "") for text in with_site(""))
    assert with_site(PYPROJECT["tool"]["mscnn"]["site"]) == [readme.read_text("utf-8") for readme in readmes]


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("docs/faq.md", ""),
        ("docs/none.md", "file"),
        ("#start", ""),
        ("docs/faq.md#nowhere", "heading"),
        ("LICENSE", ""),
    ],
)
def test_links_are_checked(link, problem):
    sys.path.insert(0, str(ROOT / ".github"))
    try:
        import links
    finally:
        sys.path.pop(0)
    found = links.problem_of_relative(ROOT / "README.md", link)
    assert found == (f"no such {problem}" if problem else "")


def test_badges_of_this_project_are_right():
    command = [sys.executable, ROOT / ".github" / "badges.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted(ROOT.glob("README*.md"))], ids=lambda p: p.name)
def test_no_other_address_of_the_repository(path):
    """A link to the repository that `make badges` does not know would go stale."""
    owner, name = PYPROJECT["tool"]["mscnn"]["repository"].split("/")[-2:]
    text = path.read_text("utf-8")
    known = re.findall(
        COLAB + r"/github/[^\s()\"\\]+\.ipynb|REPOSITORY, REF = .+|git clone .+|https://\S+/actions/\S+", text
    )
    assert text.count(f"{owner}/{name}") == sum(part.count(f"{owner}/{name}") for part in known)


# ------------------------------------------------------------------------------------------------------------
# CI
# ------------------------------------------------------------------------------------------------------------


def test_workflow_runs_the_makefile():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    runs = [step["run"].removeprefix("make ") for step in steps if "run" in step]
    assert runs == ["env", "lint", "test", "test-notebooks", "run"]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
