"""Which range of deep greys a data set is shown with, and that all who read it show the same."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import last_json, vitrail
from vitrail.data import FolderSource, read_image
from vitrail.data.batches.loader import EvalLoader, Reading, TrainLoader
from vitrail.data.check import check
from vitrail.data.pixels.greys import look_at_depths
from vitrail.data.sources.stream import StreamSource
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.canvas import input_of
from vitrail.data.views.preprocess import Preprocess

SIDE = 32


def save(folder: Path, images: list[np.ndarray]) -> Path:
    """As one class of a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.tiff")
    return folder.parent


def noise(mean: float, spread: float, images: int = 12, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [mean + spread * rng.uniform(-1, 1, (SIDE, SIDE)) for _ in range(images)]


def whole(images: list[np.ndarray], kind: type = np.uint16) -> list[np.ndarray]:
    return [np.rint(image).astype(kind) for image in images]


@pytest.mark.parametrize(
    "images, expected",
    [
        (whole(noise(2000, 1900)), (0, 4095)),  # 12 bits: what was not looked at fits as well
        (whole(noise(500, 400)), (0, 1023)),
        (whole(noise(30_000, 20_000)), (0, 65535)),
        (whole(noise(100, 100)), (0, 255)),
        ([x.clip(0.01, 0.99).astype("f4") for x in noise(0.5, 0.5)], (0, 1)),
        (whole([np.zeros((SIDE, SIDE)), np.full((SIDE, SIDE), 7.0)]), (0, 7)),
    ],
)
def test_what_the_values_fill_is_what_is_shown(
    tmp_path: Path, images: list[np.ndarray], expected: tuple[float, float]
) -> None:
    greys = look_at_depths(FolderSource(save(tmp_path / "a", images))).greys
    assert greys is not None and greys.range == expected and greys.clipped == 0


@pytest.mark.parametrize("offset", [0, 1000, -1000])
def test_a_narrow_window_is_kept_whole(tmp_path: Path, offset: int) -> None:
    images = whole(noise(offset + 200, 150), np.int32)
    greys = look_at_depths(FolderSource(save(tmp_path / "a", images))).greys
    assert greys is not None and greys.range is not None
    low, high = greys.range
    assert greys.clipped == 0 and low <= greys.least and greys.greatest <= high
    assert high - low <= 4 * 300  # at least 64 levels between the ends


def test_a_few_dead_pixels_do_not_decide(tmp_path: Path) -> None:
    images = whole(noise(150, 50, images=40))
    images[3][0, 0] = 60_000
    greys = look_at_depths(FolderSource(save(tmp_path / "a", images))).greys
    assert greys is not None and greys.range is not None
    assert greys.greatest == 60_000 and greys.range[1] < 600 and 0 < greys.clipped < 0.001
    assert "outside are cut off" in greys.sentence() and "--data.grey-range" in greys.sentence()


class OneShard:
    """A stream of so many images, and how often it was asked."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images
        self.asked = 0

    def __len__(self) -> int:
        return 1

    def read(self, shard: int, start: int) -> Iterator[tuple[bytes, int]]:
        for image in self.images[start:]:
            self.asked += 1
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG")
            yield stream.getvalue(), 0


def test_a_stream_is_asked_only_where_what_is_held_out_is_deep() -> None:
    deep = OneShard(whole(noise(2000, 1900)))
    stream = StreamSource(deep, ("a",), seed=0)
    held = StreamSource(OneShard(whole(noise(9000, 10))), ("a",), seed=0).sample(3)
    greys = look_at_depths(stream, held).greys
    assert greys is not None and greys.range == (0, 4095) and greys.images == 12
    deep.asked = 0
    usual = StreamSource(OneShard([np.zeros((4, 4), np.uint8)]), ("a",), seed=0).sample(1)
    assert look_at_depths(stream, usual) == (None, 0) and deep.asked == 0


def test_colours_and_usual_greys_ask_for_nothing(tmp_path: Path) -> None:
    save(tmp_path / "a", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)])
    (tmp_path / "a" / "damaged.png").write_bytes(b"\x89PNG")
    assert look_at_depths(FolderSource(tmp_path)) == (None, 0)


def test_images_of_one_value_have_no_range(tmp_path: Path) -> None:
    data = save(tmp_path / "a", whole([np.full((4, 4), 300.0)] * 3))
    greys = look_at_depths(FolderSource(data)).greys
    assert greys is not None and greys.range is None and "300 to 300" in greys.sentence()


def test_between_images_brightness_is_kept_also_of_signed_and_float_greys(tmp_path: Path) -> None:
    for kind in (np.int32, np.float32):
        folder = tmp_path / kind.__name__
        dark, bright = noise(-800, 30), noise(400, 30)
        data = save(folder / "a", [x.astype(kind) for x in (*dark, *bright)])
        source = FolderSource(data)
        found = look_at_depths(source).greys
        preprocess = Preprocess(size=(SIDE, SIDE), grey_range=found and found.range)
        means = {source.key(i): preprocess.view(source.load(i)).mean() for i in range(24)}
        assert max(means[f"a/{i}.tiff"] for i in range(12)) < 30
        assert min(means[f"a/{i}.tiff"] for i in range(12, 24)) > 225


@pytest.mark.parametrize(
    "decoders, cache", [("threads", "none"), ("threads", "memory"), ("processes", "disk")]
)
def test_every_reader_shows_the_same_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: str, cache: str
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    source = FolderSource(save(tmp_path / "set" / "a", whole(noise(2000, 1900, images=4))))
    reading = Reading(decoders=decoders, cache=cache)
    for grey_range in ((0, 4095), (1000, 3000)):  # from one cache folder
        preprocess = Preprocess(size=(SIDE, SIDE), grey_range=grey_range)
        expected = np.stack([input_of(preprocess, source.encoded(i)).numpy() for i in range(4)])
        low, high = grey_range
        levels = np.asarray(source.load(0)).clip(low, high) - float(low)
        half_a_level = 1.01 / 255
        assert np.allclose(expected[0, 0], levels / (high - low) * 2 - 1, atol=half_a_level)
        loaders = (
            EvalLoader(source, preprocess, reading=reading),
            TrainLoader(
                source, preprocess, AugmentConfig.off(), batch_size=4, seed=0, reading=reading
            ),
        )
        for passes in range(2):
            for loader in loaders:
                (batch,) = loader if isinstance(loader, EvalLoader) else loader.epoch(passes)
                assert (batch.images.numpy() == expected[batch.indices]).all()


def test_the_check_tells_deep_greys_apart_and_says_their_range(tmp_path: Path) -> None:
    save(tmp_path / "a", whole(noise(300, 20)))
    data = save(tmp_path / "b", whole(noise(310, 20, seed=1)))
    Image.fromarray(np.full((SIDE, SIDE), 4011, np.uint16)).save(data / "a" / "bright.tiff")
    report = check(FolderSource(data), 2)
    assert report.duplicates == () and report.greys is not None
    assert report.greys.images == 25 and report.greys.greatest == 4011
    assert report.greys.range == (0, 4095) and report.greys.clipped == 0
    assert "values 280 to 4,011; scaled from 0..4,095" in report.greys.sentence()


def test_deep_colours_are_counted(tmp_path: Path) -> None:
    """Pillow writes none, so these are bytes: 16 bits a channel, one red pixel."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + end

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 65535, 0, 0)))
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "deep.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixel + chunk(b"IEND", b""))
    assert read_image(file).getpixel((0, 0)) == (255, 0, 0)
    report = check(FolderSource(tmp_path), 1)
    assert (report.greys, report.deep_colours) == (None, 1)
    (sentence,) = look_at_depths(FolderSource(tmp_path)).sentences()
    assert "the upper 8 are read" in sentence


MODEL = {"depth": "1", "width": "32", "heads": "2", "mlp": "64", "stem": "patch"}
TINY = ["--model", "vit_mini16", "--model.patch", "8", "8", "--model.image-size", "32", "32"]
TINY += [word for name, value in MODEL.items() for word in (f"--model.{name}", value)]
TINY += ["--recipe", "scratch", "--data.batch-size", "8", "--epochs", "8", "--optim.lr", "3e-3"]
TINY += ["--evaluations", "1"]

SHORT = ["--epochs", "0.2"]


def test_a_set_of_12_bits_is_learned_and_its_range_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, mean in (("dim", 300), ("bright", 420)):  # both are level 1 or 2 of 65,536 / 256
        images = whole(noise(mean, 40, images=20, seed=mean))
        for image in images:
            image[0, :2] = 0, 1500
        save(tmp_path / "set" / name, images)
    code, out, err = vitrail(capfd, "train", "set", *TINY, "--out", "r", "--json")
    assert code == 0 and last_json(out)["metrics"]["top1"] == 1, err
    assert "greys     deep: values 0 to 1,500 in the 32 images" in err

    from vitrail.deploy import Predictor
    from vitrail.runs.load import load

    low, high = load("r").preprocess.grey_range or (0, 0)
    assert low == 0 and 460 < high < 2000 and "deep greys" in Path("r/report.html").read_text()
    file = tmp_path / "set" / "dim" / "0.tiff"
    predictor = Predictor("r")
    found = predictor(file)
    assert found.label == "dim"
    with file.open("rb") as stream, Image.open(file) as image:
        others = [file.read_bytes(), stream, image, np.asarray(image)]
        assert [predictor(other) for other in (str(file), *others)] == [found] * 5

    code, out, err = vitrail(
        capfd, "train", "set", *TINY, *SHORT, "--data.grey-range", "0", "65535", "--out", "whole"
    )
    assert code == 0 and "0..65,535 become black to white" in err, err
    assert load("whole").preprocess.grey_range == (0, 65535)

    for i in range(20):  # another camera's
        Image.fromarray(np.full((SIDE, SIDE), 20_000 + i, np.uint16)).save(
            tmp_path / "set" / "dim" / f"{i}.tiff"
        )
    code, out, err = vitrail(capfd, "evaluate", "r", "--data", "set")
    assert code == 0 and "50% of values outside are cut off" in out
    code, out, err = vitrail(capfd, "train", "set", *TINY, "--data.grey-range", "9", "1")
    assert code == 2 and "--data.grey-range 0 4095" in err


def test_a_run_without_a_range_goes_on_as_it_did() -> None:
    image = read_image(np.array([[0, 257, 65535]], np.uint16))
    preprocess = Preprocess.from_dict({"size": [1, 3]})
    assert preprocess.view(image)[0].tolist() == [[0, 1, 255]]
