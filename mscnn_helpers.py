"""MSCNN: a two-stage image classifier that says OTHER when it should.

    uint8 images ──► Stage 1 CNN ──► category c ─┐
         │                                       ├──► confidence P(c is correct) ──► ≥ threshold ?  c : OTHER
         └────► Stage 2 CNN of category c ───────┘          (calibrated)

Stage 1 sorts an image into one of C categories. Stage 2 has one small CNN per category; the predicted
category's CNN verifies Stage 1's answer. Both scores are combined into one calibrated confidence, and an image whose
confidence is below the threshold is OTHER. The field calls this selective classification, misclassification
detection, or classification with a reject option. An image whose OOD score is too high is OTHER, too
(out-of-distribution detection).

This module is the door: it hands on what the notebooks use. Everything has a room in `mscnn_parts`, in this order, from
which each uses only those before it; `model` has the Keras model, `MultiStageCNN`:

    zoo · settings · files · checks · quiet · output
    on_disk · data · downloads · pictures · sources · decision · thresholds · ood · metrics · data_checks
    torch_files · kernels · layers · networks
    inference · model_files · model
    optimizers · callbacks · fitting · transfer · training · explanation
    figures · explorer · diagnosis
    run_folder · runs · pages · execution · commands · cli · lab
    tuning · exercises

In comments beside tensors: B images in a batch, N in a split, H × W pixels, C categories.

References
    Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.
    Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019 (AURC).
    Platt, "Probabilistic Outputs for Support Vector Machines", 1999 (logistic calibration).
    Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024 (the shape of the CNNs; airbench).
    Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024 (the steps of their kernels).
    Tan & Le, "EfficientNetV2: Smaller Models and Faster Training", ICML 2021 (small images first).
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    Hendrycks & Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017.
    Jaeger et al., "A Call to Reflect on Evaluation Practices for Failure Detection", ICLR 2023.
    Traub et al., "Overcoming Common Flaws in the Evaluation of Selective Classification", NeurIPS 2024 (AUGRC).
    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples", NeurIPS 2018.
    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.
    Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016 (CAM).
    Selvaraju et al., "Grad-CAM", ICCV 2017.
"""

from __future__ import annotations

if __name__ == "__main__":  # before Keras is imported, so that --help answers at once
    import sys

    from mscnn_parts.cli import main

    sys.exit(main())

import os

from mscnn_parts.quiet import quiet_import

if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":  # before Keras looks for it, in its own words
    raise ImportError(f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']}: this project needs tensorflow. Unset it.")

with quiet_import():
    import keras  # noqa: F401
    import tensorflow as tf  # noqa: F401

from mscnn_parts.cli import main
from mscnn_parts.data import Dataset, Split
from mscnn_parts.decision import (
    ACCEPTED,
    LOW_CONFIDENCE,
    OUT_OF_DISTRIBUTION,
    Decisions,
    apply_threshold,
    cross_fitted,
    fit_shared_calibration,
    halves,
    log_odds,
    margin,
)
from mscnn_parts.explanation import class_activation_map, grad_cam, has_cam, map_layers, split_at, trace_decisions
from mscnn_parts.explorer import ThresholdExplorer
from mscnn_parts.figures import (
    CAM_COLORMAP,
    plot_augmentation,
    plot_confusion,
    plot_decision_traces,
    plot_gallery,
    plot_history,
    plot_images,
    plot_reliability,
    plot_retraining,
    plot_risk_coverage,
    plot_samples,
    plot_thresholds,
)
from mscnn_parts.fitting import Trainer, batches, compile_classifier, train_classifier
from mscnn_parts.kernels import gradient_of_kernel
from mscnn_parts.layers import Conv2D
from mscnn_parts.metrics import (
    aurc,
    category_metrics,
    compare_decisions,
    decision_confusion,
    decision_report,
    evaluate,
    failure_metrics,
    format_difference,
    log_loss_by_category,
    reliability,
    risk_coverage,
    stage_report_labels,
)
from mscnn_parts.model import MultiStageCNN
from mscnn_parts.model_files import load_model
from mscnn_parts.networks import build_cnn, fastest_policy
from mscnn_parts.ood import fit_ood, foreign_photographs, ood_score, synthetic_ood_images, unnoticed
from mscnn_parts.optimizers import (
    Muon,
    Recipe,
    default_recipe,
    learning_rate_schedule,
    orthogonalize,
    phase_recipes,
    stage1_optimizer,
)
from mscnn_parts.pictures import read_image
from mscnn_parts.run_folder import NOTEBOOKS, Run, open_run
from mscnn_parts.runs import begin_run_data, continue_run_data, device_name, load_run_model, set_threshold, versions
from mscnn_parts.settings import OTHER, MSCNNError, categories_from
from mscnn_parts.sources import load_dataset
from mscnn_parts.thresholds import (
    Certificate,
    threshold_for_costs,
    threshold_for_coverage,
    threshold_for_risk,
    thresholds_by_category,
)
from mscnn_parts.training import (
    Stage2Trainer,
    keeps_stage2,
    retrain_stage2,
    sample_hard_negatives,
    train_stage1,
    train_stage2,
    train_stage2_base,
    weakest_categories,
)
from mscnn_parts.transfer import stage2_base_logits
from mscnn_parts.zoo import NETWORKS

__all__ = [
    "ACCEPTED", "CAM_COLORMAP", "LOW_CONFIDENCE", "NETWORKS", "NOTEBOOKS", "OTHER", "OUT_OF_DISTRIBUTION",
    "Certificate", "Conv2D", "Dataset", "Decisions", "MSCNNError", "MultiStageCNN", "Muon", "Recipe", "Run",
    "Split", "Stage2Trainer", "ThresholdExplorer", "Trainer", "apply_threshold", "aurc", "batches",
    "begin_run_data", "build_cnn", "categories_from", "category_metrics", "class_activation_map",
    "compare_decisions", "compile_classifier", "continue_run_data", "cross_fitted", "decision_confusion",
    "decision_report", "default_recipe", "device_name", "evaluate", "failure_metrics", "fastest_policy",
    "fit_ood", "fit_shared_calibration", "foreign_photographs", "format_difference", "grad_cam",
    "gradient_of_kernel", "halves", "has_cam", "keeps_stage2", "learning_rate_schedule", "load_dataset", "load_model",
    "load_run_model", "log_loss_by_category", "log_odds", "main", "map_layers", "margin", "ood_score",
    "open_run", "orthogonalize", "phase_recipes", "plot_augmentation", "plot_confusion", "plot_decision_traces",
    "plot_gallery", "plot_history", "plot_images", "plot_reliability", "plot_retraining", "plot_risk_coverage",
    "plot_samples", "plot_thresholds", "read_image", "reliability", "retrain_stage2", "risk_coverage",
    "sample_hard_negatives", "set_threshold", "split_at", "stage1_optimizer", "stage2_base_logits",
    "stage_report_labels", "synthetic_ood_images", "threshold_for_costs", "threshold_for_coverage",
    "threshold_for_risk", "thresholds_by_category", "trace_decisions", "train_classifier", "train_stage1",
    "train_stage2", "train_stage2_base", "unnoticed", "versions", "weakest_categories",
]  # fmt: skip
