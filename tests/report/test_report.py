import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import vitrail.report
from vitrail.evaluation import evaluate
from vitrail.models import ViTConfig, build
from vitrail.report import write_report
from vitrail.report.page import render
from vitrail.report.pages.positions import similarity, why_none
from vitrail.runs import Run
from vitrail.tasks.classify import right

HOSTILE = "\"'><script>alert(1)</script>&lt<img src=http://evil.example/x onerror=alert(2)>"
VOID = {"meta", "link", "img", "br"}
STYLE = (Path(vitrail.report.__file__).parent / "style.css").read_text()


class Page(HTMLParser):
    """A page as a browser takes it: its elements, and that each is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def report(run: Run, **options) -> Page:
    text = write_report(run, evaluate(run, **options)).read_text()
    return Page(text)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("trained")
    return tiny.train(tiny.photos(folder / "photos"), folder / "run")


@pytest.fixture(scope="module")
def page(trained) -> Page:
    return report(trained)


def test_the_page_stands_alone(page, trained):
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert not page.all("script") and len(page.all("link")) == 1
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert value is not None and value.startswith(("data:", "#")), (tag, value)
    assert "url(" not in STYLE and "@import" not in STYLE
    assert (trained.path / "report.html").stat().st_size < 300_000


def test_every_picture_has_words(page):
    pictures = page.all("img")
    assert len(pictures) >= 9
    assert all(each["alt"] and each["width"] and each["height"] for each in pictures)
    labelled = [each for each in page.all("svg") if "aria-label" in each or "aria-hidden" in each]
    in_figures = [each for each in page.all("figure") if "aria-label" in each]
    assert len(labelled) + len(in_figures) == len(page.all("svg"))


def test_ids_are_unique_and_what_is_used_is_there(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {each["href"] for each in page.all("use")}
    used |= {
        re.sub(r"url\((#[^)]+)\)", r"\1", attributes["clip-path"] or "")
        for _, attributes in page.elements
        if "clip-path" in attributes
    }
    assert used <= {f"#{each}" for each in ids}


def test_it_says_how_good_the_model_is_and_compared_with_what(trained):
    evaluation = evaluate(trained)
    words = Page(render(trained, evaluation)).words
    assert f"{right(evaluation.metrics)} of 6 held\N{NON-BREAKING HYPHEN}out images right" in words
    assert "Always guessing the most common class, apple, would give 33.3%" in words
    for said in (
        "Class by class", "What is taken for what", "The numbers", "bootstrap",
        "Can its probabilities be trusted?", "Training loss", "Held-out accuracy",
        "Learning rate", "Images per second in training", "patches, 16 in all",
        "vit_tiny", "Places side by side have a similarity of", "seed", "18 images",
        trained.environment()["command"], f"vitrail evaluate {trained.path}",
    ):  # fmt: skip
        assert said in words, said
    assert render(trained, evaluation) == render(trained, evaluation)


def test_names_from_outside_stay_text(tiny, tmp_path):
    file = "<script>alert(3)<b>.png"
    data = tiny.table(tmp_path, (HOSTILE, "plain", "$x_1$ {{ 7 * 7 }}"), names=(file,))
    run = tiny.train(data, tmp_path / "run")
    words = report(run, split="all").words
    assert HOSTILE in words and "{{ 7 * 7 }}" in words and file in words
    raw = (run.path / "report-all.html").read_text()
    assert "<script" not in raw and "<img src=http" not in raw


def test_several_labels_have_a_page_without_what_makes_no_sense(tiny, tmp_path):
    run = tiny.train(tiny.table(tmp_path, ("red", "red|warm", "cold|wet")), tmp_path / "run")
    words = report(run).words
    assert "Every label right for" in words and "Mean average precision" in words
    assert "What is taken for what" not in words and "most common class" not in words
    assert "average precision" in words and "found" in words


def test_many_classes_get_pairs_instead_of_a_matrix(tiny, tmp_path):
    run = tiny.train(
        tiny.photos(tmp_path / "photos", [f"c{k:02}" for k in range(31)], 4), tmp_path / "run"
    )
    page = report(run)
    assert "pairs of classes that are mixed up most often" in page.words
    assert "The 12 of 31 classes with the most mistakes" in page.words
    assert not [each for each in page.all("table") if each.get("class") == "matrix"]


def test_what_could_not_be_read_is_listed(tiny, tmp_path):
    data = tiny.photos(tmp_path / "photos")
    run = tiny.train(data, tmp_path / "run")
    run.write_skipped({"apple/lost.png": "it is <empty>"})
    key = evaluate(run).keys[0]
    (data / key).write_bytes(b"")
    words = report(run).words
    assert "2 images could not be read" in words
    assert "it is <empty>" in words and key in words


def test_other_images_have_a_page_of_their_own(tiny, trained, tmp_path):
    tiny.photos(tmp_path / "more", ("brick",), n=1)
    evaluation = evaluate(trained, data=str(tmp_path / "more"))
    page = write_report(trained, evaluation)
    assert re.fullmatch(r"report-more-all-[0-9a-f]{8}\.html", page.name)
    words = Page(page.read_text()).words
    assert "of 1 images right" in words and f"--data {tmp_path / 'more'}" in words
    assert "the true share lies" in words, "one image says next to nothing, and the page says so"
    assert "measured on only 1 images: the intervals are wide" in words


def test_a_best_checkpoint_is_called_flattering(trained):
    assert "flatters it" in report(trained, checkpoint="best").words
    assert "flatters it" not in report(trained).words


def test_a_run_without_a_log_has_a_page(tiny, tmp_path):
    run = tiny.train(tiny.photos(tmp_path / "photos"), tmp_path / "run")
    run.metrics_file.unlink()
    words = report(run).words
    assert "Training loss" not in words and "How fast" in words


@pytest.mark.parametrize("position", ["none", "rope", "peg"])
def test_without_a_table_of_positions_there_is_a_reason(tiny, position):
    model = build(replace(tiny.model, position=position))
    assert similarity(model) is None and len(why_none(model)) > 40


def test_the_similarity_of_positions(tiny):
    fixed = similarity(build(replace(tiny.model, position="sincos_mae", width=64, heads=2)))
    assert fixed is not None and not fixed.learned and fixed.near > fixed.far
    learned = build(replace(tiny.model, image_size=(32, 64)))
    with torch.no_grad():  # a class token's row comes first, and is none of the places
        learned.position.table[0] = 1e3
    found = similarity(learned)
    assert found is not None and found.learned and abs(found.near) < 0.3
    assert (found.picture.width, found.picture.height) == (8 * 9 - 1, 4 * 5 - 1)
    large = similarity(build(ViTConfig(depth=1, width=32, heads=1, mlp=32, image_size=(512, 512))))
    assert large is not None and large.step == 2


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_written_can_be_read(scheme):
    """WCAG 2.2: text has a contrast of at least 4.5 to 1."""
    light, dark, *_ = re.findall(r":root \{(.*?)\}", STYLE, flags=re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6});", dark))
    pairs = [("ink", "paper"), ("ink", "panel"), ("ink", "heat-right"), ("ink", "heat-wrong")]
    pairs += [("muted", "paper"), ("right", "paper"), ("wrong", "paper")]
    for text, ground in pairs:
        a, b = sorted((luminance(colours[text]), luminance(colours[ground])))
        assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)
