import json
import math
import time

import pytest
import sklearn.metrics as sklearn
import torch
from torchmetrics.functional import classification as oracle

from vitrail.errors import DataError
from vitrail.metrics import Estimate, classification, multi_label


def guesses(n: int, c: int, skill: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randint(c, (n,))
    logits = torch.randn(n, c) + skill * torch.eye(c)[targets]
    return logits.softmax(dim=1), targets


def several(n: int, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    targets = (torch.rand(n, c) < 0.3).long()
    p = (torch.randn(n, c) + 2 * targets - 1).sigmoid()
    return (p * 50).round() / 50, targets  # many equal scores


def inside(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.low <= estimate.value <= estimate.high


def test_four_images_by_hand():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
    found = classification(p, torch.tensor([0, 1, 1, 2]))
    values = found.values()
    assert found.confusion == ((1, 0, 0), (1, 1, 0), (0, 0, 1))
    assert values["top1"] == 0.75 and "top5" not in values
    # Precision 1/2, 1, 1; recall 1, 1/2, 1; F1 2/3, 2/3, 1.
    assert values["precision"] == pytest.approx(2.5 / 3)
    assert values["recall"] == pytest.approx(2.5 / 3)
    assert values["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # One against the rest: 0.8 above {0.6, 0.2, 0.1}; {0.3, 0.7} above {0.1, 0.1}; 0.8 above 0.1.
    assert values["auroc"] == 1.0
    log_loss = -(math.log(0.8) + math.log(0.3) + math.log(0.7) + math.log(0.8)) / 4
    assert values["log_loss"] == pytest.approx(log_loss)
    # 0.8 twice, right; 0.6 wrong; 0.7 right: each in a bin of its own.
    assert values["ece"] == pytest.approx((2 * 0.2 + 0.6 + 0.3) / 4)
    assert [(part.decisions, part.accuracy) for part in found.calibration] == [
        (1, 0.0), (1, 1.0), (2, 1.0),
    ]  # fmt: skip
    assert [(each.support, each.predicted) for each in found.per_class] == [(1, 2), (2, 1), (1, 1)]


@pytest.mark.parametrize(("n", "c"), [(300, 3), (500, 7)])
def test_one_label_agrees_with_torchmetrics(n, c):
    p, t = guesses(n, c)
    p = (p * 200).round() / 200  # ties; still probabilities as far as these measures go
    found = classification(p, t)
    # Without ties at the top, where the order of classes would decide.
    unique = p + torch.linspace(1e-6, 0, c)
    macro = {"num_classes": c, "average": "macro"}
    expected = {
        "top1": oracle.multiclass_accuracy(unique, t, num_classes=c, average="micro"),
        "precision": oracle.multiclass_precision(unique, t, **macro),
        "recall": oracle.multiclass_recall(unique, t, **macro),
        "f1": oracle.multiclass_f1_score(unique, t, **macro),
        "auroc": oracle.multiclass_auroc(p, t, **macro),
    }
    for name, value in expected.items():
        assert found.values()[name] == pytest.approx(value.item(), abs=2e-5), name
    assert found.confusion == tuple(
        map(tuple, oracle.multiclass_confusion_matrix(unique, t, num_classes=c).tolist())
    )
    areas = oracle.multiclass_auroc(p, t, num_classes=c, average=None)
    f1 = oracle.multiclass_f1_score(unique, t, num_classes=c, average=None)
    for each, area, score in zip(found.per_class, areas, f1, strict=True):
        assert each.scores["auroc"].value == pytest.approx(area.item(), abs=2e-5)
        assert each.scores["f1"].value == pytest.approx(score.item(), abs=2e-5)


def test_calibration_error_and_top5_agree_with_torchmetrics():
    p, t = guesses(400, 9)
    values = classification(p, t).values()
    ece = oracle.multiclass_calibration_error(p, t, num_classes=9, n_bins=15)
    top5 = oracle.multiclass_accuracy(p, t, num_classes=9, top_k=5, average="micro")
    assert values["ece"] == pytest.approx(ece.item(), abs=1e-6)
    assert values["top5"] == pytest.approx(top5.item(), abs=1e-6)
    assert values["log_loss"] == pytest.approx(
        torch.nn.functional.nll_loss(p.log(), t).item(), abs=1e-6
    )


def test_several_labels_agree_with_torchmetrics():
    p, t = several(400, 6)
    found = multi_label(p, t)
    macro = {"num_labels": 6, "average": "macro"}
    above = (p >= 0.5).long()  # a label is predicted from a half on, not above it
    expected = {
        "map": oracle.multilabel_average_precision(p, t, **macro),
        "precision": oracle.multilabel_precision(above, t, **macro),
        "recall": oracle.multilabel_recall(above, t, **macro),
        "f1": oracle.multilabel_f1_score(above, t, **macro),
        "auroc": oracle.multilabel_auroc(p, t, **macro),
        "exact_match": oracle.multilabel_exact_match(above, t, num_labels=6),
        "ece": oracle.binary_calibration_error(p.flatten(), t.flatten(), n_bins=15),
    }
    for name, value in expected.items():
        # Probabilities of a fiftieth lie on edges of bins: float32 and float64 sort them apart.
        assert found.values()[name] == pytest.approx(
            value.item(), abs=2e-2 if name == "ece" else 1e-5
        ), name
    assert found.confusion is None and found.headline == "map"
    average = oracle.multilabel_average_precision(p, t, num_labels=6, average=None)
    for each, value, labels in zip(found.per_class, average, t.T, strict=True):
        assert each.scores["average_precision"].value == pytest.approx(value.item(), abs=1e-5)
        assert each.support == labels.sum()


def test_intervals_are_the_bootstraps_and_shrink_with_the_images():
    p, t = guesses(400, 4)
    few, many = classification(p[:100], t[:100]), classification(p, t)
    for metrics in (few, many):
        assert all(inside(metrics.summary[name]) for name in ("top1", "f1", "auroc", "log_loss"))
    width = many.summary["top1"].high - many.summary["top1"].low
    share = many.summary["top1"].value
    # Of a share, the bootstrap's interval is the binomial's.
    assert width == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 400), rel=0.15)
    assert few.summary["top1"].high - few.summary["top1"].low > 1.4 * width
    assert classification(p, t) == many, "the same predictions have the same intervals"


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    p, t = guesses(6000, 3)
    truth = classification(p, t).values()["top1"]
    parts = zip(p.split(100), t.split(100), strict=True)
    found = [classification(*part).summary["top1"] for part in parts]
    covered = sum(each.low <= truth <= each.high for each in found) / len(found)
    assert 0.85 <= covered <= 1.0


def test_a_class_that_is_absent_is_none_and_counts_nowhere():
    p, t = guesses(60, 3)
    p = torch.cat([p, torch.zeros(60, 1)], dim=1)
    found, without = classification(p, t), classification(p[:, :3], t)
    assert found.per_class[3].support == 0
    assert set(found.per_class[3].scores.values()) == {None}
    assert found.values() == pytest.approx(without.values())
    only = classification(torch.tensor([[0.7, 0.3], [0.6, 0.4]]), torch.tensor([0, 0]))
    assert only.summary["auroc"] is None and only.values()["top1"] == 1.0


def macro_of_sklearn(t, predicted, **how):
    names = ("precision", "recall", "f1")
    return {n: getattr(sklearn, f"{n}_score")(t, predicted, average="macro", **how) for n in names}


def agree(found: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=2e-5), name


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore::UserWarning")  # that a class is absent
def test_several_labels_of_which_some_are_absent_agree_with_both_libraries(seed):
    torch.manual_seed(seed)
    p, t = several(60, 8)
    t[:, seed % 8] = 0
    t[:, (seed + 3) % 8] = 0  # of two absent classes one is never predicted
    p[:, seed % 8] *= 0.4
    found = multi_label(p, t)
    assert found.absent == tuple(sorted({seed % 8, (seed + 3) % 8}))
    over = {name: each.value for name, each in found.over_all_classes.items()}
    every, predicted = found.values() | over, (p >= 0.5).long()
    agree(every, macro_of_sklearn(t, predicted, zero_division=0))
    agree(every, {"map": sklearn.average_precision_score(t, p, average="macro")})
    macro = {"num_labels": 8, "average": "macro"}
    theirs = {
        "precision": oracle.multilabel_precision(predicted, t, **macro),
        "recall": oracle.multilabel_recall(predicted, t, **macro),
        "f1": oracle.multilabel_f1_score(predicted, t, **macro),
        "auroc": oracle.multilabel_auroc(p, t, **macro),
        "map": oracle.multilabel_average_precision(p, t, **macro),
    }
    agree(every, theirs)
    assert math.isnan(sklearn.roc_auc_score(t, p, average="macro"))
    # What counts in the summary: the classes that are there, and those that are claimed to be.
    there = [k for k in range(8) if t[:, k].any() or predicted[:, k].any()]
    agree(found.values(), macro_of_sklearn(t[:, there], predicted[:, there], zero_division=0))
    shown = [k for k in range(8) if t[:, k].any()]
    areas = sklearn.roc_auc_score(t[:, shown], p[:, shown], average="macro")
    agree(found.values(), {"auroc": areas})


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_label_with_absent_classes_agrees_with_both_libraries(seed):
    torch.manual_seed(seed)
    p, t = guesses(60, 5)
    p = torch.cat([p[:, :4], p[:, 4:] / 2, torch.zeros(60, 1)], dim=1)
    t = torch.where(t == 4, 0, t)  # 4 is absent, and now and then predicted; 5 is neither
    p /= p.sum(dim=1, keepdim=True)
    found, predicted = classification(p, t), p.argmax(dim=1)
    assert found.absent == (4, 5)
    over = {name: each.value for name, each in found.over_all_classes.items()}
    agree(found.values(), macro_of_sklearn(t, predicted, zero_division=0))
    agree(over, macro_of_sklearn(t, predicted, zero_division=0, labels=range(6)))
    macro = {"num_classes": 6, "average": "macro"}
    for name in ("precision", "recall", "f1"):
        theirs = getattr(oracle, f"multiclass_{name}" + ("_score" if name == "f1" else ""))
        agree(found.values(), {name: theirs(predicted, t, **macro)})
    agree(over, {"auroc": oracle.multiclass_auroc(p, t, **macro)})
    for name, each in found.over_all_classes.items():
        assert each.low <= each.value <= each.high < found.summary[name].high


def test_where_every_class_is_there_only_one_number_is():
    assert classification(*guesses(200, 3)).over_all_classes == {}
    assert multi_label(*several(200, 3)).over_all_classes == {}


def test_a_class_that_is_absent_but_predicted_counts_as_a_miss():
    found = classification(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
    scores = found.per_class[1].scores
    assert scores["precision"].value == 0 and scores["recall"] is None and scores["f1"].value == 0
    assert found.values()["f1"] == pytest.approx(2 / 3 / 2)


def test_a_single_image():
    found = classification(torch.tensor([[0.2, 0.8]]), torch.tensor([1]))
    value, low, high = found.summary["top1"]
    assert (value, high) == (1, 1) and low < 0.1, "one image says next to nothing"
    json.dumps(found.to_dict(), allow_nan=False)
    several = multi_label(torch.tensor([[0.2, 0.8]]), torch.tensor([[0, 0]]))
    assert several.summary["map"] is None
    json.dumps(several.to_dict(), allow_nan=False)


def test_certain_and_wrong_is_still_a_number():
    found = classification(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1]))
    assert math.isfinite(found.values()["log_loss"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused(bad):
    p, t = guesses(5, 3)
    p[2, 1] = bad
    with pytest.raises(DataError, match="not numbers for 1 of 5"):
        classification(p, t)
    with pytest.raises(DataError, match="not numbers"):
        multi_label(p, torch.zeros(5, 3, dtype=torch.int64))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[5, 3\] and targets \[4\]"):
        classification(torch.rand(5, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one"):
        classification(torch.rand(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[n c\]"):
        multi_label(torch.rand(5, 3), torch.zeros(5, dtype=torch.int64))


def test_what_json_holds():
    p, t = guesses(50, 6)
    found = json.loads(json.dumps(classification(p, t).to_dict(), allow_nan=False))
    assert set(found["top1"]) == {"value", "low", "high"}
    assert found["images"] == 50 and found["draws"] == 1000 and not found["multi_label"]
    assert len(found["confusion"]) == 6 and sum(map(sum, found["confusion"])) == 50
    assert set(found["per_class"][0]) >= {"support", "predicted", "precision", "f1", "auroc"}
    assert sum(part["decisions"] for part in found["calibration"]) == 50


def test_ten_thousand_images_take_seconds():
    p, t = guesses(10_000, 10)
    before = time.process_time()
    classification(p, t)
    assert time.process_time() - before < 20, "about 1.5 on an idle core"
