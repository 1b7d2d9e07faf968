"""Makes notebooks/pretrained/cifar10.keras, the model that load_model="pretrained" stands for, and its model card.

    python benchmarks/pretrained.py runs/quality/full_0    the folder of a finished run on all of CIFAR-10
    python benchmarks/pretrained.py --renew                the model as it is, its weights and calibration untouched
    python benchmarks/pretrained.py --stage2               its Stage 1 and base network, with a new Stage 2

The second form is for changes of what the model does with its weights: its OOD statistics (see `ood_score`) and the
certificate are made anew, and all figures measured anew. The third is for changes of Stage 2: it is trained, and its
weakest categories are retrained, as notebooks 03 and 04 do.

The kernels of the convolutions are stored in 16 bits, at half the size. The model is refused if that changes more than
0.1 % of the decisions on the test split. Its threshold stays 0.7; a certificate for 1 % of errors is made where the
data allow it, and stands in the card.
"""

import argparse
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import h5py
import ml_dtypes
from common import ROOT, commit, commit_of_run

import mscnn_helpers as mscnn
from mscnn_parts.model_files import check_matches
from mscnn_parts.settings import PRETRAINED

RISK = 0.01
ALLOWED_CHANGE = 0.001  # share of the decisions on the test split
ALLOWED_BYTES = 8_000_000


def halve(source: Path, target: Path) -> None:
    """Copies a `.keras` file with the kernels of its convolutions in 16 bits; Keras reads them into float32 again.

    They are rounded to bfloat16, to which `mixed_bfloat16` rounds them anyway, and stored as float16, which HDF5 knows
    and which holds a bfloat16 of such a size exactly. All else keeps its precision.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        weights = Path(folder) / "model.weights.h5"
        weights.write_bytes(old.read("model.weights.h5"))
        small = Path(folder) / "half.h5"
        with h5py.File(weights) as was, h5py.File(small, "w") as now:
            now.attrs.update(was.attrs)

            def copy(name: str, item) -> None:
                if isinstance(item, h5py.Group):
                    made = now.require_group(name)
                else:
                    half = item.ndim == 4 and "whitening" not in name
                    value = item[()].astype(ml_dtypes.bfloat16).astype("float16") if half else item[()]
                    made = now.create_dataset(name, data=value)
                made.attrs.update(item.attrs)

            was.visititems(copy)
        for entry in old.infolist():
            data = small.read_bytes() if entry.filename == "model.weights.h5" else old.read(entry.filename)
            new.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)


def figures_of(model, data) -> dict[str, float]:
    """What the card says of the model, on the test split."""
    decisions = model.decide(data.test.images)
    measured = mscnn.evaluate(decisions, data.test.labels, model.threshold)
    one, two = measured["stage1"], measured["two_stage"]
    return {
        "accuracy of Stage 1, a single view": one["accuracy"], "accuracy of all answers": two["accuracy"],
        "coverage": two["coverage"], "accuracy of the accepted": two["selective_accuracy"],
        "AURC of Stage 1's softmax, a single view": one["aurc"], "AURC of two stages": two["aurc"],
    }  # fmt: skip


def certificate_of(model, data) -> str:
    """The guarantee for at most RISK errors, in words; the model's threshold stays."""
    threshold = model.threshold
    try:
        return model.certify(data.certification, RISK).text()
    except mscnn.MSCNNError as error:
        return str(error)
    finally:
        model.threshold = threshold


def certified_coverage(model, data) -> float:
    """The share of the test split that is accepted at the certified threshold; 0 without a certificate."""
    if model.certificate is None:
        return 0.0
    decisions = model.decide(data.test.images, model.certificate.threshold)
    return float((decisions.category < len(model.category_names)).mean())


def card(record: dict) -> str:
    """The model card, from its record."""
    changed = f"{record['changed']:.2%}"
    figures = "\n".join(f"| {name} | {value:.5f} |" for name, value in record["figures"].items())
    return f"""# The pretrained model

`cifar10.keras` is what `load_model="pretrained"` stands for: both stages, calibration and certificate, trained on
CIFAR-10's train split (45,000 of the 50,000 images, seed {record["seed"]}). Written by
`{record["command"]}` at commit {record["commit"]}; the run{record["of_run"]}, at commit {record["trained_at"]}, was

    {record["run"]}

On CIFAR-10's 10,000 test images, threshold {record["threshold"]:g}:

| measure | value |
| --- | --- |
{figures}

{record["certificate"]}
As loaded the model decides at threshold {record["threshold"]:g}, where nothing is guaranteed;
`model.threshold = model.certificate.threshold` takes the certified one.
{record["certified_coverage"]:.1%} of the test images are accepted there.

AURC, the area under the risk-coverage curve: accept the most confident image, then the next, and so on; the mean of
the error rates on the way.

Kernels of convolutions are stored in 16 bits: against float32 this changed {changed} of the decisions on the test set,
when the model was made.
Made on {record["device"]} with {", ".join(f"{name} {version}" for name, version in record["versions"].items())}.

**What it is for.** To look at notebook 05 without any training, or to begin a retraining with, in notebook 04.
**What it is not for.** It knows ten categories in pictures of 32 x 32 pixels, and its confidences hold for images such
as CIFAR-10's. On other pictures neither accuracy nor the guarantee has been shown. The data: Krizhevsky, "Learning
Multiple Layers of Features from Tiny Images", 2009. The licence is the project's.
"""


def rounded(whole: Path, data, target: Path) -> float:
    """Writes the model with rounded kernels and a certificate to `target`: the share of decisions that this changed."""
    before = mscnn.load_model(whole).decide(data.test.images).category
    halve(whole, target)
    model = mscnn.load_model(target)
    certificate_of(model, data)  # of what the small file decides
    model.save(certified := target.with_name("certified.keras"))
    halve(certified, target)  # nothing is rounded a second time
    return float((mscnn.load_model(target).decide(data.test.images).category != before).mean())


class Source(NamedTuple):
    """A model, and what the card says of where it comes from."""

    model: object  # mscnn.MultiStageCNN
    data: object  # mscnn.Dataset, which it was trained on
    told: dict  # seed, run, trained_at, command
    changed: float | None = None  # by rounding the kernels, if that has been done already


def finished_run(run_dir: Path) -> Source:
    """The model of a run that quality.py has measured: it knows at which commit.

    Raises:
        SystemExit: it has not.
    """
    parameters = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))["parameters"]
    folder = os.path.relpath(run_dir, ROOT)
    trained_at = commit_of_run(run_dir)
    if trained_at is None:
        raise SystemExit(f"quality.json does not say at which commit {folder} was made: let quality.py make the run.")
    arguments = f"--epochs {parameters['epochs']} --batch_size {parameters['batch_size']} --seed {parameters['seed']}"
    told = {
        "seed": parameters["seed"], "run": f"python mscnn_helpers.py {arguments} --dataset cifar10",
        "trained_at": trained_at, "command": f"python benchmarks/pretrained.py {folder}", "of_run": "",
    }  # fmt: skip
    data = mscnn.load_dataset("cifar10", seed=told["seed"])
    return Source(mscnn.load_model(run_dir / "multistage_cnn_model.keras"), data, told)


def committed() -> dict:
    """The record of the committed model."""
    return json.loads((ROOT / "notebooks" / PRETRAINED).with_suffix(".json").read_text(encoding="utf-8"))


def pretrained_as_it_is() -> Source:
    """The committed model, which learns anew what is known."""
    card = committed()
    told = {name: card[name] for name in ("seed", "run", "trained_at", "of_run")}
    told["command"] = "python benchmarks/pretrained.py --renew"
    data, model = mscnn.load_dataset("cifar10", seed=card["seed"]), mscnn.load_model("pretrained")
    mscnn.fit_ood(model, data)
    return Source(model, data, told, card["changed"])


def pretrained_with_new_stage2() -> Source:
    """The committed model's Stage 1 and base network, with a Stage 2 that is trained as the notebooks do."""
    card, old = committed(), mscnn.load_model("pretrained")
    told = {name: card[name] for name in ("seed", "run", "trained_at")}
    told |= {"command": "python benchmarks/pretrained.py --stage2", "of_run": " of Stage 1 and the base network"}
    data = mscnn.load_dataset("cifar10", seed=card["seed"])
    model = mscnn.MultiStageCNN.for_dataset(data, old.policy, card["seed"])
    for name in ("stage1", "stage2_base"):
        getattr(model, name).set_weights(getattr(old, name).get_weights())
    epochs = int(card["run"].partition("--epochs ")[2].split()[0])
    recipe = mscnn.default_recipe(len(data.train), epochs)
    mscnn.fit_ood(model, data)
    mscnn.train_stage2(model, data, recipe, card["seed"])
    model.calibrate(data.calibration)
    mscnn.retrain_stage2(model, data, mscnn.weakest_categories(model, data), recipe, card["seed"] + 1)
    return Source(model, data, told)


def main() -> None:
    """Makes the model and its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("run_dir", type=Path, nargs="?", help="folder of a finished run")
    sources.add_argument("--renew", action="store_true", help="keep the model's weights and calibration")
    sources.add_argument("--stage2", action="store_true", help="keep the model's Stage 1 and base network")
    options = parser.parse_args()
    made, target = commit(), ROOT / "notebooks" / PRETRAINED
    if options.run_dir:
        source = finished_run(options.run_dir)
    else:
        source = pretrained_with_new_stage2() if options.stage2 else pretrained_as_it_is()
    check_matches(source.model, source.data)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole, small = Path(folder) / "whole.keras", Path(folder) / "small.keras"
        source.model.save(whole)
        changed = rounded(whole, source.data, small)
        if changed > ALLOWED_CHANGE or small.stat().st_size > ALLOWED_BYTES:
            raise SystemExit(f"{changed:.2%} of the decisions changed, {small.stat().st_size:,} bytes: not kept.")
        os.replace(small, target)
    model = mscnn.load_model(target)
    record = {
        **source.told, "commit": made, "device": mscnn.device_name(), "versions": mscnn.versions(),
        "threshold": model.threshold, "figures": figures_of(model, source.data),
        "certificate": certificate_of(model, source.data),
        "certified_coverage": certified_coverage(model, source.data),
        "changed": changed if source.changed is None else source.changed, "fingerprints": model.fingerprints(),
    }  # fmt: skip
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (target.parent / "README.md").write_text(card(record), encoding="utf-8")
    print(card(record))


if __name__ == "__main__":
    main()
