"""Calls of pysodmetrics (https://github.com/lartpang/PySODMetrics) for a map and its ground truth, uint8 (H, W) each.

The library is imported where it is used: it takes a second and 100 MB, and few need it.
"""

import warnings
from typing import Any

import numpy as np


def results(metric: Any, prediction: np.ndarray, ground_truth: np.ndarray) -> Any:
    """The results of a metric of the library for a single pair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about deprecated names that the library uses
        metric.step(prediction, ground_truth)
        return metric.get_results()


def scores(prediction: np.ndarray, ground_truth: np.ndarray, beta_squared: float) -> dict[str, Any]:
    """The fields of `metrics.PairScores` but `others`."""
    import py_sod_metrics as sod

    options = {"with_dynamic": True, "with_adaptive": False}
    handlers = {"precision": sod.PrecisionHandler(**options), "recall": sod.RecallHandler(**options)}
    handlers |= {"IoU": sod.IOUHandler(**options), "Dice": sod.DICEHandler(**options)}
    handlers["Fm"] = sod.FmeasureHandler(**options, beta=beta_squared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Fmeasure, which defines adpFm, is deprecated
        metrics = {"S": sod.Smeasure(), "wF": sod.WeightedFmeasure(), "F": sod.Fmeasure(), "MAE": sod.MAE()}
    metrics |= {"E": sod.Emeasure(), "curves": sod.FmeasureV2(handlers)}
    values = {name: results(metric, prediction, ground_truth) for name, metric in metrics.items()}
    curves = {name: value["dynamic"] for name, value in values["curves"].items()} | {"Em": values["E"]["em"]["curve"]}
    return {
        "Smeasure": values["S"]["sm"],
        "wFmeasure": values["wF"]["wfm"],
        "adpFm": values["F"]["fm"]["adp"],
        "adpEm": values["E"]["em"]["adp"],
        "MAE": values["MAE"]["mae"],
        **{name: curve[::-1] for name, curve in curves.items()},  # the library starts at threshold 255
    }


def correction_effort(prediction: np.ndarray, ground_truth: np.ndarray) -> float:
    """HCE at threshold 0.5, in clicks (Qin et al., "Highly Accurate Dichotomous Image Segmentation", ECCV 2022)."""
    import py_sod_metrics as sod

    return float(results(sod.HumanCorrectionEffortMeasure(), prediction, ground_truth)["hce"])


def multiscale_iou(prediction: np.ndarray, ground_truth: np.ndarray) -> float:
    """MSIoU at threshold 0.5 (Ahmadzadeh et al., "Multiscale IOU", ICIP 2021)."""
    import py_sod_metrics as sod
    from py_sod_metrics.utils import prepare_data

    metric = sod.MSIoU(with_dynamic=False, with_adaptive=False)
    stretched, mask = prepare_data(prediction, ground_truth)
    ratios = metric.multi_scale_iou(metric.get_edge(stretched > 0.5), metric.get_edge(mask))
    # The library's last step, the area below the ratios, needs numpy.trapz, which numpy 2.4 lacks.
    return float((sum(ratios) - (ratios[0] + ratios[-1]) / 2) / (len(ratios) - 1))


def size_invariant_f_measure(prediction: np.ndarray, ground_truth: np.ndarray) -> float:
    """The mean F-measure over thresholds and objects (Li et al., "Size-invariance Matters", ICML 2024)."""
    import py_sod_metrics as sod

    full = ground_truth.min() > 128  # without background, where the library's class fails
    kind = sod.FmeasureV2 if full else sod.SizeInvarianceFmeasureV2
    handler = sod.FmeasureHandler(with_dynamic=True, with_adaptive=False)
    curves = results(kind({"F": handler}), prediction, ground_truth)["F"]["dynamic"]  # (256,); [(objects, 256)]
    return float(np.mean(curves))


def size_invariant_mae(prediction: np.ndarray, ground_truth: np.ndarray) -> float:
    """The mean absolute error over objects and background (Li et al., likewise)."""
    import py_sod_metrics as sod

    if ground_truth.min() > 128:
        return float(results(sod.MAE(), prediction, ground_truth)["mae"])
    return float(results(sod.SizeInvarianceMAE(), prediction, ground_truth)["si_mae"])
