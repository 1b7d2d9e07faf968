"""What the benchmarks share: repeats in turn, the commit and the device, and RESULTS.md, a section a benchmark."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # for the module, which the benchmarks import after this
RESULTS = HERE / "RESULTS.md"


def numbers(text: str) -> tuple[int, ...]:
    """`0,1,2` as given on a command line."""
    return tuple(map(int, text.split(",")))


class Timed(float):
    """Seconds that a task has measured itself, since not all of it counts."""


def interleaved(tasks: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each task, each once a round, so that other work on the machine hits all alike.

    Every round has an order of its own, so that no task always follows the same one. The first `warm_up` rounds are not
    counted: they trace graphs and fill caches. If a task returns `Timed` seconds, these count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(1 - warm_up, repeats + 1):
        for name in random.Random(round_number).sample(list(tasks), len(tasks)):
            start = time.perf_counter()
            own = tasks[name]()
            passed = time.perf_counter() - start
            if round_number > 0:
                seconds[name].append(own if isinstance(own, Timed) else passed)
        print(f"  round {round_number} of {repeats}", flush=True)
    return seconds


def in_fresh_process(function: Callable, *arguments):
    """The result of a function in a process of its own, whose imports and memory are its own, too."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def spread(values: list[float], form: str) -> str:
    """Median (minimum to maximum), or the one value there is."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table, an empty one behind it."""
    return [f"| {' | '.join(one)} |" for one in (header, ["---"] * len(header), *rows)] + [""]


def commit() -> str:
    """The commit that is checked out, with '+' where files differ from it; what the benchmarks write does not count.

    To be asked before a measurement, so that it names the code that ran.
    """
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    written = [":!docs/networks.md", *(f":!benchmarks/{name}" for name in ("*.json", "*.md", "*.png"))]
    changed = subprocess.run([*git, "diff", "--stat", "HEAD", "--", ".", *written], capture_output=True, text=True)
    return head + ("+" if changed.stdout.strip() else "")


def origin(command: str) -> dict:
    """What says where figures come from: to be asked before a measurement, as `commit` is."""
    import mscnn_helpers as mscnn

    return {
        "command": command, "commit": commit(), "device": mscnn.device_name(), "versions": mscnn.versions(),
    }  # fmt: skip


def origin_line(figures: dict) -> str:
    """The line below a table: what `origin` has said of its figures."""
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    return f"`{figures['command']}`, commit {figures['commit']}, {figures['device']}, {versions}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit_of_run(folder: Path) -> str | None:
    """The commit at which quality.py has made a run folder; None: quality.json does not know it."""
    run_dir = f"--run_dir {os.path.relpath(folder, ROOT)}"
    return next((one["commit"] for one in read_json("quality", []) if one["command"].endswith(run_dir)), None)


def models_in_words(figures: dict) -> str:
    """Which models the figures of ood.py are of."""
    if "--pretrained" in figures["command"]:
        return "The model that comes with the project."
    return f"Models trained on CIFAR-10, seeds {', '.join(map(str, figures['seeds']))}; median (minimum to maximum)."


def read_json(name: str, default):
    """Reads benchmarks/NAME.json, or gives the default where it does not exist yet."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def has_whole_cnns(run: dict) -> bool:
    """Whether one of quality.py's runs had Stage 2 CNNs that share no blocks, once the default."""
    return run["parameters"].get("stage2_branch", 0) == 0


def write(name: str, figures, section: str) -> None:
    """Writes benchmarks/NAME.json, and its section of RESULTS.md; the other benchmarks' sections stay.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot hold.
    """
    replace(HERE / f"{name}.json", json.dumps(figures, indent=1, allow_nan=False) + "\n")
    write_section(name, section)


def replace(path: Path, text: str) -> None:
    """Writes a file beside the old one, then moves it there: it is never half-written."""
    partial = path.with_name(f"partial_{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_section(name: str, section: str) -> None:
    """Writes a section of RESULTS.md; the targets come first, the others in the order of the alphabet."""
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", old, re.S))
    sections[name] = section.strip()
    order = sorted(sections, key=lambda one: (one != "targets", one))
    parts = [f"<!-- {one} -->\n{sections[one]}\n<!-- /{one} -->" for one in order]
    replace(RESULTS, "# Results\n\n" + "\n\n".join(parts) + "\n")
