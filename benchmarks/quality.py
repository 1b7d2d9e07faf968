"""Measures the quality, the time and the memory of whole runs, and writes quality.json and RESULTS.md.

    python benchmarks/quality.py                    full data, the default recipe, seeds 0, 1 and 2
    python benchmarks/quality.py --long             full data, 40 epochs, seed 0: over an hour on two cores
    python benchmarks/quality.py --documented       full data, 50 epochs in batches of 32 (the defaults), seed 0
    python benchmarks/quality.py --quick            light mode, 5 epochs, seed 0: some three minutes on two cores
    python benchmarks/quality.py --whole            any of these with Stage 2 CNNs that share no blocks

Each run is the command line that a user types, in a process of its own. Memory is the proportional set size
summed over the run's processes (pages they share count once), read every two seconds.
"""

import argparse
import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import psutil
import targets
from common import ROOT, commit, has_whole_cnns, markdown, numbers, read_json, spread, write

KINDS = {  # name: (what the table says of it, arguments)
    "full": ("full data, the default recipe", "--epochs 0 --batch_size 0"),
    "long": ("full data, 40 epochs", "--epochs 40 --batch_size 0"),
    "documented": ("full data, 50 epochs, batches of 32", "--epochs 50 --batch_size 32"),
    "light": ("light mode, 5 epochs, batches of 32", "--epochs 5 --light_mode"),
}


def watch_memory(process: psutil.Process, peak: list[int]) -> None:
    """Keeps in `peak[0]` the largest sum of the proportional set sizes of a process and its children, in bytes."""
    while process.is_running():
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += one.memory_full_info().pss
        peak[0] = max(peak[0], total)
        time.sleep(2)


def training_seconds(history: dict) -> dict[str, float]:
    """Seconds of the epochs of each part, their validation included, from a run's history.json."""
    retrained = history.get("retraining", {}).get("histories", {})
    parts = {
        "stage1": [history["stage1"]], "stage2_base": [history["stage2_base"]], "stage2": history["stage2"].values(),
        "retraining": retrained.values(),
    }  # fmt: skip
    return {name: sum(sum(record["seconds"]) for record in records) for name, records in parts.items()}


def measure(kind: str, seed: int, dataset: str, whole: bool) -> dict:
    """Runs the command line once; returns its metrics.json with minutes and memory.

    Raises:
        SystemExit: the run failed.
    """
    run_dir = f"runs/quality/{kind}_{seed}" + f"_{Path(dataset).stem}" * (dataset != "cifar10") + "_whole" * whole
    stage2 = " --stage2_branch 0" * whole
    arguments = f"{KINDS[kind][1]}{stage2} --seed {seed} --dataset {dataset} --run_dir {run_dir}"
    print(f"python mscnn_helpers.py {arguments}", flush=True)
    started, peak, measured = time.time(), [0], commit()
    process = psutil.Popen([sys.executable, str(ROOT / "mscnn_helpers.py"), *arguments.split()], cwd=ROOT)
    watching = threading.Thread(target=watch_memory, args=(process, peak), daemon=True)
    watching.start()
    if process.wait():
        raise SystemExit(f"The run of seed {seed} failed, see above.")
    metrics, history = (
        json.loads((ROOT / run_dir / f"{name}.json").read_text(encoding="utf-8")) for name in ("metrics", "history")
    )
    del metrics["dataset"]["source"]  # a folder of this machine
    kept = ("dataset", "stage1", "two_stage", "seconds", "versions", "device", "parameters", "policy")
    return {
        "kind": kind,
        "seed": seed,
        "command": f"python mscnn_helpers.py {arguments}",
        "minutes": (time.time() - started) / 60,
        "peak_memory_gb": peak[0] / 1e9,
        "commit": measured,
        "epochs": len(history["stage1"]["seconds"]),
        "stage1_saved_after": (ROOT / run_dir / "stage1.keras").stat().st_mtime - started,
        "training_seconds": training_seconds(history),
        **{name: metrics[name] for name in kept},
    }


def identity(run: dict) -> tuple:
    """What a run measures, in the order of the tables; a new run replaces the old one of the same identity."""
    return run["dataset"]["name"], list(KINDS).index(run["kind"]), has_whole_cnns(run), run["seed"]


def title(run: dict) -> str:
    return f"{run['dataset']['name']}, {KINDS[run['kind']][0]}" + ", whole CNNs as Stage 2" * has_whole_cnns(run)


def summary(runs: list[dict]) -> list[str]:
    """A row of the first table: the runs of one kind and data set, their median and range."""
    one, two = [run["stage1"] for run in runs], [run["two_stage"] for run in runs]
    gains = [1 - b["aurc"] / a["aurc"] for a, b in zip(one, two, strict=True)]
    return [
        title(runs[0]), ", ".join(str(run["seed"]) for run in runs),
        spread([a["accuracy"] for a in one], "{:.2%}"), spread([b["accuracy"] for b in two], "{:.2%}"),
        spread([b["coverage"] for b in two], "{:.1%}"),
        spread([b["selective_accuracy"] for b in two], "{:.2%}"),
        spread([a["aurc"] for a in one], "{:.5f}"), spread([b["aurc"] for b in two], "{:.5f}"),
        spread(gains, "{:.1%}"), spread([run["minutes"] for run in runs], "{:.1f}"),
        spread([run["peak_memory_gb"] for run in runs], "{:.2f}"),
    ]  # fmt: skip


def seconds_by_part(run: dict) -> list[str]:
    """A row of the second table."""
    parts = run["training_seconds"]
    ratio = (parts["stage2_base"] + parts["stage2"]) / parts["stage1"]
    total = 60 * run["minutes"]
    rest = total - sum(parts.values())
    first = [f"{parts[name]:.0f}" for name in ("stage1", "stage2_base", "stage2")]
    last = [f"{parts['retraining']:.0f}", f"{rest:.0f} ({rest / total:.0%})"]
    return [title(run), str(run["seed"]), *first, f"{ratio:.2f}", *last]


def seconds_by_notebook(run: dict) -> list[str]:
    """A row of the third table; outside the notebooks: imports, checks, kernels, the last page."""
    notebooks = [seconds for name, seconds in run["seconds"].items() if name != "total"]
    total = 60 * run["minutes"]
    return [title(run), str(run["seed"]), *(f"{one:.0f}" for one in [*notebooks, total - sum(notebooks), total])]


def provenance(run: dict) -> list[str]:
    """A row of the last table."""
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return [f"`{run['command']}`", run["commit"], run["device"], run["policy"], versions]


def table(runs: list[dict]) -> str:
    """Its section of RESULTS.md from all the runs."""
    groups: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: list(KINDS).index(run["kind"])):
        groups.setdefault(title(run), []).append(run)
    lines = [
        "## Quality", "", "Written by `python benchmarks/quality.py` (see its first lines for the other forms).",
        "All figures are of the test split of the data set named; AURC is the area under the risk-coverage",
        "curve (lower is better), gain is how far the two stages are below Stage 1 alone, with its softmax, on the",
        "same model. Stage 1 sees one view of an image, the two stages see two. Median over the seeds, in brackets",
        "minimum and maximum.", "",
        *markdown(["run", "seeds", "Stage 1 accuracy", "of all answers", "coverage at 0.7",
                   "accuracy of the accepted", "AURC softmax",
                   "AURC two stages", "gain", "minutes", "peak memory, GB"], [summary(one) for one in groups.values()]),
        "Seconds of the epochs by part. The ratio is that of base and ten Stage 2 CNNs to Stage 1. Retraining is",
        "that of the two weakest categories. Not in the epochs: what prepares them, such as Stage 1's look at all",
        "train images before Stage 2.", "",
        *markdown(["run", "seed", "Stage 1", "stage2_base", "ten Stage 2 CNNs", "ratio", "retraining", "all else"],
                  [seconds_by_part(run) for run in runs]),
        "Seconds of the same runs by notebook.", "",
        *markdown(["run", "seed", "01", "02", "03", "04", "05", "outside", "total"],
                  [seconds_by_notebook(run) for run in runs]),
        *markdown(["command", "commit", "device", "arithmetic", "versions"], [provenance(run) for run in runs]),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measures, and replaces the runs of the same kind and seed in quality.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="light mode, seed 0")
    parser.add_argument("--long", action="store_true", help="40 epochs, seed 0")
    parser.add_argument("--documented", action="store_true", help="the documented defaults, seed 0")
    parser.add_argument("--whole", action="store_true", help="with --stage2_branch 0: whole CNNs as Stage 2")
    parser.add_argument("--seeds", type=numbers, default=(), help="comma-separated, in place of the form's own")
    parser.add_argument("--dataset", default="cifar10", help="as the command line's (default: cifar10)")
    options = parser.parse_args()
    kind = next((one for one in ("long", "documented") if getattr(options, one)), "light" if options.quick else "full")
    for seed in options.seeds or ((0, 1, 2) if kind == "full" else (0,)):
        new = measure(kind, seed, options.dataset, options.whole)
        runs = [run for run in read_json("quality", []) if identity(run) != identity(new)] + [new]
        runs.sort(key=identity)
        write("quality", runs, table(runs))
        targets.main()
    print(table(runs))


if __name__ == "__main__":
    main()
