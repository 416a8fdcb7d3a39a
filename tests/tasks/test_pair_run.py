"""Images and texts from the command line: runs that go on exactly, labels in words, search."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from close import close
from command import interrupted, last_json, vitrail
from vitrail.runs import Run
from vitrail.runs.load import load

TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.patch", "8", "8"),
    *("--model.depth", "1", "--model.width", "16", "--model.heads", "2", "--model.mlp", "32"),
    *("--data.batch-size", "8", "--minutes", "None", "--threads", "1", "--device", "cpu"),
    *("--evaluations", "2", "--precision", "float32"),
]
TEXT = [
    *("--text", "clip_s32_alt", "--text.depth", "1", "--text.width", "16", "--text.heads", "2"),
    *("--text.mlp", "32", "--text.context", "12"),
]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (230,) * 3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Pictures of four colours, two texts each, and a class of two."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = ["file\tcaption\tlabel"]
    for i in range(32):
        name = [*COLOURS][i % 4]
        pixels = rng.integers(0, 25, (36, 36, 3)) + np.array(COLOURS[name])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02}.png")
        label = "pale" if name == "white" else "bright"
        lines += [f"{i:02}.png\t{text}\t{label}" for text in (f"a {name} square", f"{name}")]
    (folder / "pairs.tsv").write_text("\n".join(lines))
    return folder / "pairs.tsv"


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(pairs, cached, tmp_path_factory) -> Path:
    """A run that has learned the colours."""
    from vitrail.cli import main

    place = tmp_path_factory.mktemp("runs") / "run"
    args = ["train", pairs, "--task", "clip", *TINY, *TEXT, "--pair.width", "8"]
    args += ["--epochs", "20", "--optim.lr", "0.01", "--out", place]
    assert main([str(arg) for arg in args]) == 0
    return place


def weights_of(capfd, pairs: Path, file: Path) -> list[str]:
    """A start for a locked tower."""
    args = (
        "train",
        pairs.parent,
        "--task",
        "mocov3",
        *TINY,
        "--moco.hidden",
        "16",
        "--moco.out",
        "8",
    )
    assert vitrail(capfd, *args, "--epochs", 1, "--out", file)[0] == 0
    return ["--weights", str(file)]


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("clip", ["--pair.width", "8"]),
        ("siglip", ["--pair.width", "8", "--precision", "bfloat16", "--micro-batch", "3"]),
        ("lit", ["--precision", "bfloat16"]),
        ("lit", ["--pair.loss", "sigmoid", "--pair.width", "8", "--ema", "0.9"]),
    ],
)
def test_a_run_goes_on_exactly(task, flags, pairs, cached, tmp_path, capfd):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    start = weights_of(capfd, pairs, tmp_path / "start") if task == "lit" else []
    plain = [flag for flag in TINY if task != "lit" or flag not in ("--model", "vit_mini16")]
    args = ("train", pairs, "--task", task, *plain, *TEXT, *start, *flags, "--epochs", 2)
    code, out, said = vitrail(capfd, *args, "--out", whole, "--json")
    assert code == 0, said
    told = last_json(out)
    assert {"image_to_text_r1", "text_to_image_r10", "zero_shot"} <= told["metrics"].keys()
    assert told["texts"] >= 4 and 0 < told["chance"]["image_to_text_r1"] < 1
    interrupted(whole, halves, step=3)
    assert vitrail(capfd, "train", "--resume", halves)[0] == 0
    first, second = ([e["loss"] for e in Run(r).metrics() if "loss" in e] for r in (whole, halves))
    assert first == second and len(first) == 6
    for name in ("model", "optimizer"):
        one, two = (
            load_file(run.checkpoint("last") / f"{name}.safetensors")
            for run in (Run(whole), Run(halves))
        )
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    if task == "lit":
        before = load_file(Run(tmp_path / "start").checkpoint("last") / "model.safetensors")
        assert all(torch.equal(one_of(whole, f"backbone.{k}"), x) for k, x in before.items())
    page = (whole / "report.html").read_text()
    assert "find their text" in page and "Text to image R@10" in page
    again = json.loads((whole / "metrics.json").read_text())
    assert vitrail(capfd, "evaluate", whole)[0] == 0
    now = json.loads((whole / "metrics.json").read_text())
    assert all(now[k] == again[k] for k in told["metrics"])


def one_of(run: Path, key: str) -> torch.Tensor:
    return load_file(Run(run).checkpoint("last") / "model.safetensors")[key]


def test_words_are_enough_to_classify(run, pairs, tmp_path, capfd):
    photos = [pairs.parent / f"{i:02}.png" for i in range(4)]
    labels = [f"a {name} square" for name in COLOURS]
    code, out, err = vitrail(capfd, "predict", run, *photos, "--labels", *labels, "--json")
    assert code == 0, err
    found = last_json(out)
    assert found["classes"] == labels
    assert [row["label"] for row in found["predictions"]] == labels
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(COLOURS) + "\n", encoding="utf-8-sig")
    more = ("--templates", "a {} square", "{}")
    code, out, _ = vitrail(capfd, "predict", run, photos[2], "--labels", file, *more, "--json")
    assert code == 0 and last_json(out)["predictions"][0]["label"] == "blue"
    code, out, _ = vitrail(capfd, "predict", run, photos[2], "--json")
    assert len(last_json(out)["predictions"][0]["features"]) == 8


def test_search_by_words_and_by_an_image(run, pairs, capfd):
    folder = pairs.parent
    code, out, err = vitrail(capfd, "search", run, folder, "a green square", "--top", 5, "--json")
    assert code == 0, err
    first = last_json(out)
    keys = [hit["key"] for hit in first["found"]]
    assert all(int(Path(key).stem) % 4 == 1 for key in keys) and len(keys) == 5
    scores = [hit["score"] for hit in first["found"]]
    assert scores == sorted(scores, reverse=True) and first["built"] and first["images"] == 32
    code, out, _ = vitrail(capfd, "search", run, folder, folder / "02.png", "--top", 3, "--json")
    second = last_json(out)
    assert not second["built"] and second["by"] == "image"
    assert second["found"][0] == {"key": "02.png", "score": pytest.approx(1, abs=1e-5)}
    assert all(int(Path(hit["key"]).stem) % 4 == 2 for hit in second["found"])
    # By the table, which has texts, it is the same images; one more is another index.
    Image.new("RGB", (36, 36), (30, 200, 30)).save(folder / "99.png")
    try:
        code, out, _ = vitrail(capfd, "search", run, folder, "green", "--top", 1, "--json")
        assert last_json(out)["built"] and last_json(out)["images"] == 33
    finally:
        (folder / "99.png").unlink()


def test_one_start_for_another(run, pairs, tmp_path, capfd):
    """A run's towers are what `--weights` and `--text-weights` name."""
    other = tmp_path / "other"
    args = ("train", pairs, "--task", "siglip", "--weights", run, "--text-weights", run)
    args += ("--epochs", 1, "--minutes", "None", "--data.batch-size", "100", "--optim.lr", "1e-9")
    size = ("--model.image-size", "32", "32")
    code, _, said = vitrail(capfd, *args, *size, "--threads", 1, "--out", other)
    assert code == 0, said
    assert "a batch has all 25 images" in " ".join(said.split())
    first, second = load(run), load(other)
    assert second.model.text.config == first.model.text.config and second.config.pair.width == 8
    now = dict(second.model.named_parameters())
    for name, x in first.model.named_parameters():  # projection and scale among them
        torch.testing.assert_close(now[name], x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--data.batch-size", "1"], 2, "tells the texts of a batch apart"),
        (["--task", "lit"], 2, "LiT locks an image tower"),
        (["--augment.mixup", "1"], 2, "cannot follow --augment.mixup"),
        (["--tune.layer-decay", "0.5"], 2, "cannot follow tune, but for freeze"),
        (["--text", "bert_base"], 2, "need its vocabulary"),
        (["--text", "clip_b99"], 2, "clip_b"),
        (["--pair.loss", "sigmoid"], 2, "learns by softmax"),
        (["--caption-column", "nothing"], 2, ""),
    ],
)
def test_what_cannot_be_is_one_message(flags, code, words, pairs, tmp_path, capfd):
    base = [*TINY, *(TEXT if "--text" not in flags else [])]
    args = ("train", pairs, "--task", "clip", *base, *flags, "--epochs", 1)
    found, out, said = vitrail(capfd, *args, "--out", tmp_path / "run")
    assert found == code and words in " ".join((out + said).split()), said
    assert not (tmp_path / "run").exists()


def test_who_knows_no_words_says_so(pairs, tmp_path, capfd):
    run = tmp_path / "plain"
    weights_of(capfd, pairs, run)
    photo = pairs.parent / "00.png"
    code, _, err = vitrail(capfd, "predict", run, photo, "--labels", "a", "b")
    assert code == 2 and "learned from images and texts" in " ".join(err.split())
    code, _, err = vitrail(capfd, "search", run, pairs.parent, "a red square")
    assert code == 2 and "knows no words" in " ".join(err.split())
    code, out, err = vitrail(capfd, "search", run, pairs.parent, photo, "--json")
    assert code == 0 and last_json(out)["found"][0]["key"] == "00.png"
    code, _, err = vitrail(capfd, "search", run, pairs.parent, "none.png")
    assert code == 3 and "no such image" in err
    code, _, err = vitrail(capfd, "predict", run, photo, "--templates", "a {}")
    assert code == 2 and "--templates are for --labels" in " ".join(err.split())
    code, _, err = vitrail(
        capfd, "train", pairs.parent, "--text", "clip_b32", "--task", "mocov3", *TINY
    )
    assert code == 2 and "is for images with texts" in " ".join(err.split())


def test_a_published_pair_starts_as_it_was(pairs, cached, tmp_path, capfd):
    """Both towers of one file, with the projection, the scale, and what they say."""
    theirs = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 8}
    clip = theirs.CLIPModel(
        theirs.CLIPConfig(
            text_config={**sizes, "vocab_size": 49408, "max_position_embeddings": 12},
            vision_config={**sizes, "image_size": 32, "patch_size": 8},
            projection_dim=8,
            logit_scale_init_value=3.0,
        )
    ).eval()
    clip.save_pretrained(tmp_path / "clip")
    file, out = tmp_path / "clip" / "model.safetensors", tmp_path / "out"
    args = ("train", pairs, "--task", "clip", "--weights", file, "--text-weights", file)
    args += ("--epochs", 1, "--minutes", "None", "--optim.lr", "1e-9", "--model.image-size", 32, 32)
    code, _, said = vitrail(capfd, *args, "--precision", "float32", "--threads", 1, "--out", out)
    assert code == 0, said
    task = load(out).task
    assert task.model.scale.item() == pytest.approx(3.0, abs=1e-4) and task.config.width == 8
    texts, x = ["a red square", "blue"], torch.randn(2, 3, 32, 32)
    ids, mask = task.read(texts, torch.device("cpu"))
    with torch.no_grad():
        expected = clip(input_ids=ids, pixel_values=x, attention_mask=mask)
        close(task.model(x), expected.image_embeds, 1e-4)
        close(task.embedded(texts), expected.text_embeds, 1e-4)
