"""The README's commands do what it says: every block marked `<!-- test -->` is run as it stands."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- test -->\n```(\w+)\n(.*?)```", README, re.DOTALL)
QUICK = [
    "--model.heads",
    "2",
    "--model.width",
    "32",
    "--model.mlp",
    "64",
    "--model.depth",
    "1",
    "--minutes",
    "0.005",
    "--evaluations",
    "1",
]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label, level in (("cat", 0), ("dog", 120)):
        for i in range(8):
            file = tmp_path / "my_photos" / label / f"{i:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(level, level + 100, (120, 160, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
    Image.open(file).save("image.jpg")


def test_the_readmes_commands_run(photos, capsys):
    ran = []
    for language, block in BLOCKS:
        if language == "sh":
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "vitrail"
                # Only its length is cut down: five minutes are not for a test.
                assert main([*words[1:], *(QUICK if words[1] == "train" else [])]) == 0, line
                ran.append(words[1])
        else:
            exec(compile(block, "README.md", "exec"), {})
            ran.append(language)
    assert ran == [
        *("data", "train", "evaluate", "predict", "models"),
        *("train", "weights", "weights", "python"),
    ]


def test_the_readmes_yaml_is_a_config():
    from vitrail.runs.config import read_changes

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    file = ROOT / ".pytest_cache" / "readme.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    assert read_changes(file)["optim.clip"] == 1.0


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_of_models_is_the_table_of_models():
    from vitrail.cli.models import describe
    from vitrail.models import MODELS

    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(MODELS)
    for name, parameters in rows:
        assert int(parameters.replace(",", "")) == describe(name)["parameters"], name
