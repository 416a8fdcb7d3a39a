"""Segmentation: what is learned, how masks are judged, and a run from the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from close import close
from command import contents, interrupted, last_json, vitrail
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Coding, MaskArrays, Masks
from vitrail.data.views.canvas import Canvas, canvas_of
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError
from vitrail.heads import build_segmenter
from vitrail.models import ViTConfig, build
from vitrail.runs import Run
from vitrail.runs.load import load
from vitrail.tasks import SegmentConfig
from vitrail.tasks.answers import starts
from vitrail.tasks.kept import KeptMaps
from vitrail.tasks.segment import Segment
from vitrail.weights import convert, open_weights, pretrained

NAMES = ("ground", "red", "green")
TINY = [
    *("--model", "vit_mini16", "--model.image-size", "32", "32", "--model.patch", "8", "8"),
    *("--model.depth", "2", "--model.width", "32", "--model.heads", "2", "--model.mlp", "64"),
    *("--data.batch-size", "8", "--minutes", "None", "--threads", "1", "--device", "cpu"),
    *("--precision", "float32", "--evaluations", "2"),
]


class Channels(nn.Module):
    """Says of each pixel the channel that is brightest there."""

    stride = (1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, extent=None):
        return self.scale * x

    def pixels(self, logits, size):
        return logits[:, :, : size[0], : size[1]]

    def enter(self, done):
        pass


def task(size=(16, 24), mode="whole", **fields) -> Segment:
    resize = "short" if mode == "slide" else "squash"
    preprocess = Preprocess(size=size, resize=resize, patch=(4, 4), interpolation="bilinear")
    masks = Masks(NAMES, MaskArrays((), ""), Coding({}))
    return Segment(Channels(), SegmentConfig(mode=mode), masks, preprocess, **fields).eval()


def measured(segment: Segment, image: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """The confusion of one image."""
    view = segment.preprocess.view(Image.fromarray(image))
    shown = canvas_of(segment.preprocess, [view])
    targets = {"mask": torch.from_numpy(mask)[None], "size": torch.tensor([mask.shape])}
    return segment.measure(Batch((shown,), targets, np.arange(1)))["confusion"][0]


def blocks(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of two halves and a square, and its mask; the last row does not count."""
    mask = np.zeros((height, width), np.int16)
    mask[:, width // 2 :] = 1
    mask[height // 4 : height // 2, : width // 4] = 2
    image = np.eye(3, dtype=np.uint8)[mask] * 200
    mask[-1] = -1
    return image, mask


@pytest.mark.parametrize("size", [(16, 24), (64, 96), (48, 48)])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_masks_are_judged_at_their_own_size(size, mode):
    image, mask = blocks(32, 48)
    confusion = measured(task(size, mode), image, mask)
    assert confusion.sum() == (mask >= 0).sum()
    wrong = int(confusion.sum() - confusion.diagonal().sum())
    # A view of another size blurs borders by a pixel or two, and moves nothing.
    assert wrong <= 0.08 * confusion.sum()
    if size == (64, 96) and mode == "whole":
        assert wrong == 0


def test_a_window_as_large_as_the_image_is_the_whole_image():
    image, mask = blocks(40, 40)
    whole, slid = (measured(task((40, 40), mode), image, mask) for mode in ("whole", "slide"))
    assert torch.equal(whole, slid)


def test_windows_cover_a_side_and_stay_inside():
    for side in range(1, 200):
        begun = starts(side, 32)
        covered = np.zeros(side, bool)
        for start in begun:
            assert start >= 0 and (start + 32 <= side or start == 0)
            covered[start : start + 32] = True
        assert covered.all()


def test_the_loss_is_the_mean_of_the_pixels_that_have_a_class():
    torch.manual_seed(0)
    images, masks = torch.randn(3, 3, 6, 5), torch.randint(-1, 3, (3, 6, 5))
    segment = task()
    whole = Batch((Canvas(images, None),), {"mask": masks}, np.arange(3))
    pieces = [whole.rows(slice(a, b)) for a, b in ((0, 1), (1, 3))]
    loss = segment.loss(whole).total
    close(loss, F.cross_entropy(images, masks, ignore_index=-1))
    weights = [segment.weight(piece) for piece in pieces]
    assert sum(weights) == segment.weight(whole) == (masks >= 0).sum()
    parts = [segment.loss(p).total * w for p, w in zip(pieces, weights, strict=True)]
    close(torch.stack(parts).sum() / sum(weights), loss)


def test_pixels_without_a_class_alone_give_no_loss():
    nothing = torch.full((2, 4, 4), -1)
    batch = Batch((Canvas(torch.randn(2, 3, 4, 4), None),), {"mask": nothing}, np.arange(2))
    segment = task()
    assert segment.weight(batch) == 0 and segment.loss(batch).total == 0


def test_mirrored_looks_are_averaged_where_they_belong():
    image, mask = blocks(32, 48)
    once, twice = (measured(task((64, 96), tta=tta), image, mask) for tta in ("none", "flip"))
    assert torch.equal(once, twice)
    # Windows too: of the mirrored image, the first one is the last one's mirror image.
    segment, slid = task((16, 16), "slide", tta="flip"), task((16, 16), "slide")
    seen: list[torch.Tensor] = []
    forward = segment.model.forward
    segment.model.forward = lambda x, extent=None: seen.append(x) or forward(x, extent)
    assert torch.equal(measured(segment, image, mask), measured(slid, image, mask))
    assert len(seen) == 4 and torch.equal(seen[2], seen[1].flip(-1))
    scaled = measured(task((64, 96), tta="flip+scales"), image, mask)
    assert (scaled.sum() - scaled.diagonal().sum()) <= 0.05 * scaled.sum()


# A run


def scene(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Two rectangles on noise, and where they are."""
    height, width = rng.integers(40, 70, 2)
    mask = np.zeros((height, width), np.uint8)
    for k in (1, 2):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        mask[top : top + 18, left : left + 18] = k
    image = rng.integers(0, 60, (height, width, 3)) + np.eye(3)[mask] * 150 * (mask > 0)[..., None]
    return Image.fromarray(image.astype(np.uint8)), Image.fromarray(mask)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for part, n in (("train", 24), ("val", 8)):
        for i in range(n):
            image, mask = scene(rng)
            for kind, picture in (("images", image), ("masks", mask)):
                file = folder / kind / part / f"{i:02}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


@pytest.mark.parametrize("head", ["linear", "deeplab", "queries"])
def test_a_folder_with_masks_becomes_a_run_that_goes_on_and_answers(head, scenes, tmp_path, capfd):
    before = contents(scenes)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = ["--segment.head", head, "--segment.queries", "6", "--segment.joint-blocks", "1"]
    more += ["--segment.width", "16"]
    code, out, said = vitrail(
        capfd, "train", scenes, *TINY, *more, "--epochs", 2, "--out", whole, "--json"
    )
    assert code == 0 and "holds masks" in said, said
    told = last_json(out)
    assert {"miou", "pixel_accuracy", "boundary_iou"} <= set(told["metrics"])
    assert set(told["estimates"]["miou"]) == {"value", "low", "high"}
    written = json.loads((whole / "metrics.json").read_text())
    assert written["mode"] == "whole" and written["classes"] == list(NAMES)
    assert "Mean IoU" in (whole / "report.html").read_text()
    interrupted(whole, halves, step=3)
    assert vitrail(capfd, "train", "--resume", halves)[0] == 0
    first, second = ([e["loss"] for e in Run(r).metrics() if "loss" in e] for r in (whole, halves))
    assert len(first) == 6 and first == second
    one, two = (load_file(Run(r).checkpoint("last") / "model.safetensors") for r in (whole, halves))
    assert all(torch.equal(one[key], two[key]) for key in one)
    image = scenes / "images" / "val" / "03.png"
    code, out, said = vitrail(capfd, "predict", whole, image, "--out", tmp_path / "found", "--json")
    assert code == 0, said
    with Image.open(tmp_path / "found" / "03.png") as mask, Image.open(image) as own:
        assert mask.size == own.size and mask.mode == "P"
        assert np.asarray(mask).max() < len(NAMES)
    assert (tmp_path / "found" / "03-overlay.jpg").is_file()
    assert contents(scenes) == before


def test_a_frozen_backbone_stays_what_it_was(scenes, tmp_path, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    assert vitrail(capfd, "train", scenes, *TINY, "--epochs", 1, "--out", first)[0] == 0
    frozen = ["--tune.freeze", "backbone.*", "--weights", first, "--tune.layer-decay", "1"]
    frozen += ["--model.image-size", "32", "32", *TINY[TINY.index("--data.batch-size") :]]
    code, _, said = vitrail(capfd, "train", scenes, *frozen, "--epochs", 1, "--out", second)
    assert code == 0, said
    one, two = (load(run).model.backbone.state_dict() for run in (first, second))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("head", ["linear", "deeplab"])
def test_kept_maps_change_nothing_and_are_computed_once(head, randomised):
    shape = ViTConfig(
        depth=2, width=32, heads=2, mlp=64, patch=(8, 8), image_size=(32, 48), classes=0
    )
    config = SegmentConfig(head=head, width=16, dropout=0.0)
    model = randomised(build_segmenter(build(shape), config, len(NAMES))).eval()
    preprocess = Preprocess(size=(32, 48), resize="squash", patch=(8, 8))
    masks, kept = Masks(NAMES, MaskArrays((), ""), Coding({})), KeptMaps()
    plain = Segment(model, config, masks, preprocess)
    keeping = Segment(model, config, masks, preprocess, kept=kept)
    images, truth = torch.randn(6, 3, 32, 48), torch.randint(-1, 3, (6, 32, 48))
    expected: dict[tuple, torch.Tensor] = {}
    for epoch, order in ((0, [0, 1, 2]), (1, [5, 2, 0]), (0, [2, 0, 1]), (0, [1])):
        rows = np.array(order)
        batch = Batch((Canvas(images[rows] + epoch, None),), {"mask": truth[rows]}, rows, epoch)
        close(keeping.loss(batch).total, plain.loss(batch).total)
        for row, maps in zip(order, kept.of(keeping.fixed, batch)[0], strict=True):
            assert torch.equal(expected.setdefault((epoch, row), maps), maps)
    assert len(kept) == len(expected) == 6
    # What a process computes with the others that has nothing to compute itself.
    blank = Batch((Canvas(images[:1], None),), {"mask": truth[:1]}, np.arange(0))
    assert torch.isfinite(keeping.loss(blank).total) and len(kept) == 6


def test_a_frozen_run_with_kept_maps(scenes, tmp_path, capfd):
    flags = [*TINY, "--tune.kept-views", "2", "--epochs", 5, "--out", tmp_path / "run"]
    flags += ["--model.depth", "1"]
    code, _, said = vitrail(capfd, "train", scenes, *flags)
    assert code == 2 and "add --tune.freeze 'backbone.*'" in " ".join(said.split()), said
    code, _, said = vitrail(
        capfd, "train", scenes, *flags, "--tune.freeze", "backbone.*", "--segment.head", "queries"
    )
    assert code == 2 and "is for a head that reads a backbone's maps" in " ".join(said.split())
    flags += ["--tune.freeze", "backbone.*"]
    code, out, said = vitrail(capfd, "train", scenes, *flags, "--plan")
    assert code == 0 and "times are those of the first 2 epochs" in said + out, said
    code, _, said = vitrail(capfd, "train", scenes, *flags, "--micro-batch", "auto")
    assert code == 0, said
    assert len([e for e in Run(tmp_path / "run").metrics() if "loss" in e]) == 15


def eomt(folder: Path, randomised, names: tuple[str, ...]) -> hf.EomtForUniversalSegmentation:
    """One of transformers' own, as its users save it."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_blocks": 2}
    shape |= {"image_size": 32, "patch_size": 8, "num_queries": 6, "num_upscale_blocks": 1}
    named = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = randomised(hf.EomtForUniversalSegmentation(hf.EomtConfig(**shape, **named)))
    model.attn_mask_probs.zero_()
    model.save_pretrained(folder)
    return model


def test_an_eomt_of_transformers_learns_on_and_goes_back(scenes, tmp_path, capfd, randomised):
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    eomt(theirs, randomised, ("green", "ground", "red"))
    code, out, said = vitrail(capfd, "weights", "show", theirs)
    assert code == 0 and "6 queries in 2 blocks; 3 classes: 'green', 'ground', 'red'" in out, said
    flags = TINY[TINY.index("--data.batch-size") :]
    flags += ["--model.image-size", "32", "32", "--optim.lr", "1e-9", "--tune.layer-decay", "1"]
    flags += ["--optim.weight-decay", "0", "--ema", "0"]
    code, out, said = vitrail(
        capfd, "train", scenes, "--weights", theirs, *flags, "--epochs", 1, "--out", run
    )
    assert code == 0 and "kept, its 3 classes put in the order of the data's" in said, said
    assert load(run).config.segment.queries == 6
    back = tmp_path / "back" / "model.safetensors"
    code, out, said = vitrail(capfd, "weights", "convert", run, back, "--to", "huggingface")
    assert code == 0 and "head         with that of segmentation" in out, said
    shutil.copy(theirs / "config.json", back.parent)
    again = hf.EomtForUniversalSegmentation.from_pretrained(back.parent).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        (ours,), expected = load(run).model.eval().predictions(x), again(x)
    close(ours.classes, expected.class_queries_logits)
    close(ours.masks, expected.masks_queries_logits)


@pytest.mark.parametrize("to", ["eomt", "vitrail"])
def test_a_segmenter_comes_back_from_a_file(to, tmp_path, capfd, randomised):
    eomt(tmp_path / "theirs", randomised, NAMES)
    file = tmp_path / "ours.safetensors"
    assert vitrail(capfd, "weights", "convert", tmp_path / "theirs", file, "--to", to)[0] == 0
    told = {} if to == "vitrail" else {"heads": 2}
    first, second = open_weights(tmp_path / "theirs"), open_weights(file, told)
    for one, two in ((first.state, second.state), (first.head.state, second.head.state)):
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert first.head.config == second.head.config
    assert second.head.names == (NAMES if to == "vitrail" else ())

    assert second.preprocess == first.preprocess


def test_the_colours_of_a_segmenter_come_back(tmp_path, randomised):
    eomt(tmp_path / "theirs", randomised, NAMES)
    opened = open_weights(tmp_path / "theirs")
    shown = replace(opened.preprocess, mean=(0.5, 0.25, 0.75), std=(0.5, 1.0, 0.125))
    file = convert(opened._replace(preprocess=shown), "eomt", tmp_path / "eomt.safetensors")
    again = open_weights(file, {"heads": 2}).preprocess
    assert (again.mean, again.std) == (shown.mean, shown.std)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda head: head["classes"].pop(), "is for 3 classes, and the header names 2"),
        (lambda head: head["config"].update(queries=10**18), "the header is not vitrail's"),
        (lambda head: head["config"].update(queries=7), "the head does not fit its config"),
        (lambda head: head["config"].update(head="unet"), "unet"),
        (lambda head: head.pop("config"), "the header is not vitrail's"),
    ],
)
def test_a_header_that_says_other_things_than_the_head(change, words, tmp_path, randomised):
    eomt(tmp_path / "theirs", randomised, NAMES)
    file = convert(open_weights(tmp_path / "theirs"), "vitrail", tmp_path / "ours.safetensors")
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()["vitrail"])
    change(header["head"])
    save_file(tensors, file, {"vitrail": json.dumps(header), "format": "pt"})
    with pytest.raises(DataError, match=words):
        open_weights(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_mask_probs": torch.zeros(0)},
        {"attn_mask_probs": torch.zeros(())},
        {"attn_mask_probs": torch.zeros(9)},
        {"query.weight": torch.zeros(0, 32)},
        {"class_predictor.weight": torch.zeros(1, 32), "class_predictor.bias": torch.zeros(1)},
    ],
)
def test_a_damaged_eomt_is_a_data_error(changes, tmp_path, randomised):
    eomt(tmp_path / "theirs", randomised, NAMES)
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({**load_file(file), **changes}, file)
    with pytest.raises(DataError):
        open_weights(tmp_path / "theirs")


def test_what_becomes_of_a_head_is_said(scenes, tmp_path, capfd, randomised):
    theirs, flags = tmp_path / "theirs", TINY[TINY.index("--data.batch-size") :]
    eomt(theirs, randomised, ("sky", "red", "green"))
    flags += ["--model.image-size", "32", "32", "--epochs", 1, "--weights", theirs]
    for more, words in (
        ([], "what says the classes is new: the old one is for other classes: it does not know"),
        (["--segment.head", "linear"], "a new one, linear: that of the weights is queries"),
        (["--segment.queries", "5"], "a new one: that of the weights is of another shape"),
    ):
        out = tmp_path / (more[-1] if more else "plain")
        code, _, said = vitrail(capfd, "train", scenes, *flags, *more, "--out", out)
        assert code == 0 and words in " ".join(said.split()), said
    file = tmp_path / "timm.safetensors"
    code, out, _ = vitrail(capfd, "weights", "convert", theirs, file, "--to", "timm")
    assert code == 0 and "without that of segmentation: 6 queries" in out
    assert open_weights(file, {"heads": 2}).head is None
    other = ("weights", "convert", tmp_path / "linear", tmp_path / "x.safetensors", "--to", "eomt")
    code, _, said = vitrail(capfd, *other)
    assert code == 3 and "is no segmenter with queries" in said
    with pytest.warns(UserWarning, match="the head of segmentation is left out"):
        pretrained(theirs)


def test_masks_that_ignore_every_pixel_measure_nothing(scenes, tmp_path, capfd):
    data, run = shutil.copytree(scenes, tmp_path / "data"), tmp_path / "run"
    assert vitrail(capfd, "train", data, *TINY, "--epochs", 1, "--out", run)[0] == 0
    for file in (data / "masks" / "val").iterdir():
        with Image.open(file) as mask:
            nothing = Image.new(mask.mode, mask.size, 255)
        nothing.save(file)
    code, out, said = vitrail(capfd, "evaluate", run, "--data", data, "--split", "val", "--json")
    assert code == 0, said
    assert last_json(out)["metrics"]["miou"] is None
    assert "nothing was measured: the masks of all" in " ".join((out + said).split())
    assert "No pixel to judge" in Path(last_json(out)["report"]).read_text()
    code, _, said = vitrail(capfd, "train", data, *TINY, "--epochs", 1, "--out", tmp_path / "other")
    assert code == 3 and "has a pixel that counts" in said


def test_a_mask_that_cannot_be_read_is_left_out_and_counted(scenes, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    for part, name in (("train", "05"), ("val", "02")):
        file = data / "masks" / part / f"{name}.png"
        Image.new("L", (7, 9)).save(file)
    before, run = contents(data), tmp_path / "run"
    args = ("train", data, *TINY, "--epochs", 1, "--data.max-unreadable", "0.2", "--out", run)
    code, out, said = vitrail(capfd, *args)
    assert code == 0 and "2 images unreadable" in out, said
    skipped = (run / "skipped.csv").read_text()
    assert skipped.count("a mask must be as large as its image") == 2
    assert json.loads((run / "metrics.json").read_text())["images"] == 7
    assert contents(data) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "probe"], "--task segment cannot follow --method probe"),
        (["--augment.mixup", "0.5"], "--augment.mixup and cutmix"),
        (["--segment.mode", "slide"], "needs --data.resize short, not squash"),
        (["--data.resize", "crop"], "needs --data.resize squash, not crop"),
        (["--data.first-size", "16", "16"], "cannot follow --data.first-size"),
        (["--segment.head", "unet"], "unet"),
        (["--task", "classify"], "images, masks hold train, val each"),
    ],
)
def test_what_cannot_be_is_one_message(flags, words, scenes, tmp_path, capfd):
    code, out, said = vitrail(
        capfd, "train", scenes, *TINY, *flags, "--epochs", 1, "--out", tmp_path / "run"
    )
    assert code in (2, 3) and words in " ".join((out + said).split()), said
    assert not (tmp_path / "run").exists()


def test_a_run_with_queries_is_planned(scenes, tmp_path, capfd):
    args = [*TINY, "--segment.head", "queries", "--segment.queries", 6, "--epochs", 2]
    code, out, said = vitrail(capfd, "train", scenes, *args, "--plan", "--json")
    assert code == 0 and last_json(out)["plan"]["flops"] > 0, said
