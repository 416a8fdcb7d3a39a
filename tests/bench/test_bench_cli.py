"""`vitrail bench speed` and `vitrail bench patches`."""

from functools import partial

import pytest

from command import last_json
from vitrail.bench import patches
from vitrail.bench.macs import macs
from vitrail.bench.measure import Place
from vitrail.bench.patches import BASE, CLAIMS, ROWS, Case, measure_patches, verdicts
from vitrail.cli import main
from vitrail.models import model_config


def test_models_can_be_measured_without_training(capfd):
    args = ["bench", "speed", "vit_mu16,vit_nano8", "--size", "64", "--seconds", "0"]
    assert main([*args, "--threads", "1", "--json"]) == 0
    out = capfd.readouterr().out
    result = last_json(out)
    mu, nano = result["models"]
    assert mu["name"] == "vit_mu16" and mu["image_size"] == [64, 64] == nano["image_size"]
    assert nano["macs"] > mu["macs"] and nano["latency"] > mu["latency"]
    assert result["threads"] == 1 and result["batch"] == 16 and "MiB" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["speed", "vit_b_16"], "did you mean 'vit_b16'"),
        (["speed", "vit_b16", "--size", "100"], "cannot be cut into patches"),
        (["speed", "vit_mu16", "--threads", "-1"], "--threads"),
        (["sped", "vit_b16"], "did you mean 'speed'"),
        ([], "compare, speed or patches"),
    ],
)
def test_bad_usage(capfd, args, message):
    assert main(["bench", *args]) == 2
    assert message in capfd.readouterr().err


def test_what_patches_cost_as_counted():
    """The ratios that systems.md works out by hand."""
    ratios = {}
    for row in ROWS:
        base, *others = (
            macs(model_config(row, image_size=(side, side), patch=(patch, patch)))
            for side, patch in (BASE, *CLAIMS)
        )
        ratios[row] = [round(other / base, 2) for other in others]
    assert ratios == {
        "vit_ti16": [0.56, 6.11],
        "vit_s16": [0.56, 5.17],
        "vit_b16": [0.56, 4.61],
    }


def test_patches_are_measured_and_judged(capfd, monkeypatch):
    quick = partial(measure_patches, rows=("vit_mu16",), seconds=0.0)
    monkeypatch.setattr("vitrail.cli.bench.measure_patches", lambda place, **_: quick(place))
    assert main(["bench", "patches", "--threads", "1", "--json"]) == 0
    out = capfd.readouterr().out
    cases = last_json(out)["cases"]
    assert [(case["side"], case["patch"], case["tokens"]) for case in cases] == [
        (256, 16, 256),
        (384, 32, 144),
        (512, 16, 1024),
    ]
    assert cases[0]["latency_ratio"] == 1.0 and all(case["latency"] > 0 for case in cases)
    assert "384/32: the article says 0.7x; counted " in out and "512/16" in out


def test_a_verdict_counts_who_is_near():
    def case(side: int, patch: int, counted: float, measured: float) -> Case:
        return Case("m", side, patch, 1, 1, 1.0, counted, measured, CLAIMS.get((side, patch)))

    cases = [case(384, 32, 0.56, 0.66), case(384, 32, 0.57, 0.9)]
    cases += [case(512, 16, 3.3, 6.0), case(512, 16, 3.1, 5.0)]
    small, large = verdicts(cases)
    assert (small.counted, small.measured, small.models) == (0, 1, 2)
    assert (large.counted, large.measured) == (2, 0)
    assert small.latency == (0.66, 0.9)


def test_the_claims_are_the_articles():
    assert patches.CLAIMS == {(384, 32): 0.7, (512, 16): 3.2} and patches.BASE == (256, 16)
    assert Place("cpu", "float32", 1)._asdict().keys() == {"device", "precision", "threads"}
