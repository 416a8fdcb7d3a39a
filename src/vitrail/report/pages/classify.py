"""What the report says of classification."""

from typing import Any

from vitrail.evaluation import Evaluation
from vitrail.report import charts
from vitrail.report.numbers import numbers
from vitrail.report.pages import classes, gallery
from vitrail.tasks.classify import most_common, right

_MEANINGS = {
    "top1": ("Top-1 accuracy", "the likeliest class is the right one"),
    "top5": ("Top-5 accuracy", "the right class is among the five likeliest"),
    "map": ("Mean average precision", "how well each label ranks the images, on average"),
    "precision": ("Precision", "of what is said to be a class, the share that is; mean of classes"),
    "recall": ("Recall", "of what is a class, the share that is found; mean of classes"),
    "f1": ("F1", "precision and recall in one number; mean of classes"),
    "auroc": ("AUROC", "how often an image of a class scores above one that is not; 50% is chance"),
    "exact_match": ("Exact match", "every label of the image is right"),
    "log_loss": ("Log loss", "mean surprise at the truth, in nats; 0 is perfect"),
    "ece": ("Calibration error", "mean gap between how sure it is and how often it is right (ECE)"),
}
_NO_SHARES = ("log_loss",)


def content(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that classify.html.jinja names beside the shell's."""
    metrics, rows = evaluation.metrics, classes.class_rows(evaluation)
    top, share = most_common(metrics)
    return {
        "headline_words": f"{right(metrics)} of {metrics.images} right",
        "right": right(metrics),
        "most_common": (evaluation.loaded.names[top], share),
        "numbers": numbers(
            metrics.summary, _MEANINGS, no_shares=_NO_SHARES, over_all=metrics.over_all_classes
        ),
        "rows": rows,
        "cards": classes.cards(rows),
        "images_per_square": classes.images_per_square(evaluation),
        "matrix": classes.matrix(evaluation),
        "confused": classes.most_confused(evaluation),
        "best": gallery.best(evaluation),
        "worst": gallery.worst(evaluation),
        "calibration": charts.calibration(metrics.calibration),
        "sureness": _sureness(evaluation),
    }


def _sureness(evaluation: Evaluation) -> tuple[float, float] | None:
    """Mean probability of what was predicted, and how often it was right."""
    if evaluation.metrics.multi_label:
        return None
    confidence = float(evaluation.rows["probabilities"].max(dim=1).values.double().mean())
    return confidence, right(evaluation.metrics) / evaluation.metrics.images
