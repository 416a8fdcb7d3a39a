"""Tables on terminals of every width: names whole, nothing cut, what is left out named."""

import re

import pytest

from command import vitrail
from vitrail.bench.measure import Speed
from vitrail.cli import bench
from vitrail.cli.table import Column, print_table
from vitrail.models import MODELS
from vitrail.weights.table import WEIGHTS

WIDTHS = (60, 80, 120, 200)


def lines(monkeypatch, capfd, columns: int, *args) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = vitrail(capfd, *args)
    assert code == 0, err
    printed = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, printed)) <= columns
    assert not any("…" in line for line in printed)
    return printed


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_weights_keep_their_names_and_name_what_has_no_room(monkeypatch, capfd, columns):
    printed = lines(monkeypatch, capfd, columns, "weights")
    assert [line.split()[0] for line in printed[1 : len(WEIGHTS) + 1]] == list(WEIGHTS)
    hidden = re.search(r"\(no room for (.*?):", " ".join(printed))
    shown = printed[0].split() + (hidden[1].split(", ") if hidden else [])
    assert sorted(shown) == sorted(
        ["weights", "model", "params", "size", "top-1", "images", "licence", "source", "cached"]
    )


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_models_keep_their_names_and_sizes(monkeypatch, capfd, columns):
    printed = lines(monkeypatch, capfd, columns, "models")
    assert [line.split()[0] for line in printed[1 : len(MODELS) + 1]] == list(MODELS)
    assert all(re.search(r" \d[\d,]*( |$)", line) for line in printed[1 : len(MODELS) + 1])
    assert ("build" in printed[0]) == (columns >= 120)


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_measures_of_models_fit(monkeypatch, capfd, columns):
    monkeypatch.setattr(bench, "speeds", lambda models, *_: dict.fromkeys(models, Speed(9, 1, 2)))
    monkeypatch.setattr(bench, "peak_memory", lambda models, _: dict.fromkeys(models, 10**9))
    speed = ("bench", "speed", "vit_mu16,mobilevit_xxs", "--size", "32")
    printed = lines(monkeypatch, capfd, columns, *speed)
    assert [line.split()[0] for line in printed[1:3]] == ["vit_mu16", "mobilevit_xxs"]
    assert "images/s" in printed[0]


def test_a_plan_fits(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = "train samples:emoji --plan --epochs 1 --model vit_mu16 --model.image-size 32 32"
    printed = lines(monkeypatch, capfd, 60, *asked.split(), "--cluster.gpus", "8")
    named = {re.split("[ ,]", line)[0] for line in printed if line and line[0] != " "}
    assert {"model", "step", "speed", "length", "memory", "disk", "DDP", "FSDP"} <= named


def test_a_pipe_gets_every_column(monkeypatch, capfd):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table([Column("name"), Column("more", 1)], [["n" * 300, "m" * 300]])
    assert capfd.readouterr().out.split() == ["name", "more", "n" * 300, "m" * 300]


def test_the_least_important_column_goes_first_and_names_stay(monkeypatch, capfd):
    columns = [Column("name", justify="left"), Column("second", 1), Column("third", 2)]
    for width, seen in ((40, "name second third"), (20, "name second"), (12, "name")):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(columns, [["vit_so400m14", "1", "2"]])
        printed = capfd.readouterr().out.splitlines()
        assert printed[0].split() == seen.split()
        assert printed[1].split()[0] == "vit_so400m14"
