"""Images and texts that find each other: CLIP (arXiv 2103.00020), SigLIP (2303.15343), LiT
(2111.07991).

Two towers give an image and a text a vector each, and a contrastive loss makes those of a pair more
alike than those of different pairs (contrastive.py). Afterwards words are all that is needed to
classify (zero_shot.py) and to search. What the three learn:

    clip     both towers, softmax over the batch
    siglip   both towers, a sigmoid for each pair
    lit      the text tower alone, either loss: the image tower is locked, and its vectors are
             computed once, without augmentation (kept.py), so that a step costs what texts cost

Of an image's texts one is drawn for each epoch, by (seed, epoch, index). Texts that are equal are
right for each other's images. The loss sees vectors alone, so a batch may be computed in parts and
keep all of its negatives (GradCache, arXiv 2101.06983).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vitrail.data import keyed
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader
from vitrail.data.targets import Classes, Targets, Texts
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError, setting
from vitrail.metrics.retrieval import RetrievalMetrics, judged, ranks
from vitrail.tasks.answers import Embedding, Reading
from vitrail.tasks.contrastive import sigmoid_loss, softmax_loss
from vitrail.tasks.kept import KeptVectors
from vitrail.tasks.task import Losses, Task
from vitrail.text.two_towers import TwoTowers, Vectors

PLAIN = ("{}", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}.")
"""Sentences around a class's name: the mean of several tells more than one (2103.00020, 3.1.4)."""
_AT_ONCE = 64
"""Texts that are read at once."""


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How images and texts are compared; a value out of range is a `UsageError`."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax is CLIP's, sigmoid SigLIP's; of lit it is either."""
    width: int | None = None
    """Of the vectors that are compared: both towers are projected to it. None: that of the image
    tower's own, which then has no projection."""
    scale: float = 1 / 0.07
    """What likenesses are multiplied with, to begin with; it is learned, up to 100."""
    bias: float = -10.0
    """Of the sigmoid, what is added to them, to begin with: nearly all pairs are none (SigLIP,
    section 3.2)."""
    templates: tuple[str, ...] = PLAIN
    """Sentences around the name of a class, `{}`, by which zero-shot is measured."""

    def __post_init__(self) -> None:
        if self.loss not in ("softmax", "sigmoid"):
            raise UsageError(f"{setting('pair.loss')} is softmax or sigmoid, not {self.loss}")
        if self.width is not None and self.width < 1:
            raise UsageError(f"{setting('pair.width')} must be at least 1, not {self.width}")
        if not 1 <= self.scale <= MOST:
            raise UsageError(f"{setting('pair.scale')} must be in [1, 100], not {self.scale}")
        check_templates(self.templates)


MOST = 100.0
"""Of the scale (CLIP, section 2.5)."""


def check_templates(templates: Sequence[str]) -> None:
    """Raise `UsageError` for sentences without a place for a name."""
    if bad := [each for each in templates if each.count("{}") != 1]:
        raise UsageError(f"a template needs {{}} once, where the name goes: not {bad[0]!r}")
    if not templates:
        raise UsageError(f"{setting('pair.templates')} needs one template at least: {{}}")


class Pair(Task):
    """Two towers, how they learn, and what images and texts are to each other."""

    coupled = True
    score_name = "retrieval"
    model: TwoTowers
    targets: Texts
    config: PairConfig
    seed: int
    locked: bool

    def __init__(
        self,
        model: TwoTowers,
        config: PairConfig,
        targets: Targets,
        seed: int = 0,
        *,
        locked: bool = False,
    ) -> None:
        """`targets`: texts, in whose table those of all images that it will see are; `locked`: the
        image tower stays as it is.
        """
        super().__init__()
        assert isinstance(targets, Texts)
        self.model = model
        self.config = config
        self.targets = targets.rows(np.arange(0))
        self.seed = seed
        self.locked = locked
        self._kept: KeptVectors | None = None
        self._seen: dict[int, Tensor] = {}
        if locked:
            model.backbone.requires_grad_(False)

    def keep(self, loader: Callable[[torch.device], EvalLoader]) -> None:
        """Of a locked image tower: the images to learn from, as they are measured."""
        self._kept = KeptVectors(loader)

    def prepare(
        self, device: torch.device, notify: Callable[[str], None] = lambda sentence: None
    ) -> dict[str, str]:
        """Look at all images, where the image tower is locked."""
        if self._kept is None:
            return {}
        return self._kept.look(self.model.backbone, device, notify)

    def weight(self, batch: Batch) -> float:
        """Its images, of those that can be read."""
        return float(len(self._rows(batch)))

    def loss(self, batch: Batch) -> Losses:
        """Of the batch's images and the texts that are drawn for them."""
        return self.of_vectors(batch, self.vectors(batch))

    def vectors(self, batch: Batch) -> Vectors:
        """All that the loss needs of a part of a batch."""
        tokens, mask = self._tokens(self.drawn(batch), batch.images)
        found = self.model.both(self._pooled(batch), batch.extent, tokens, mask)
        rows = self._rows(batch)
        return found._replace(images=found.images[rows], texts=found.texts[rows])

    def of_vectors(self, batch: Batch, vectors: Vectors) -> Losses:
        """The loss, of the vectors of all parts of a batch one after another."""
        codes = self.drawn(batch)[self._rows(batch)]
        images, texts, scale, bias = vectors
        if self.config.loss == "sigmoid":
            loss = sigmoid_loss(images, texts, codes, scale[0], bias[0])
            return Losses(loss, {"scale": scale[0].detach(), "bias": bias[0].detach()})
        found = softmax_loss(images, texts, codes, scale[0])
        return Losses(found.loss, {"accuracy": found.accuracy, "scale": scale[0].detach()})

    def drawn(self, batch: Batch) -> Int64[Tensor, " b"]:
        """Of each image one of its texts, as a row of the table."""
        own = batch.targets["texts"]
        if own.is_meta or not len(batch.indices):
            return own[:, 0]
        draws = keyed.uniform(self.seed, batch.epoch, batch.indices, "text", 1)[:, 0]
        chosen = torch.from_numpy(draws).to(own.device) * (own >= 0).sum(dim=1)
        return own.gather(1, chosen.long()[:, None])[:, 0]

    def _rows(self, batch: Batch) -> Int64[Tensor, " m"]:
        """The places of images that can be read; none in a blank batch, which has an image."""
        known = np.ones(len(batch.indices), bool)
        if self._kept is not None and self._kept.looked:
            known = self._kept.known[batch.indices]
        return torch.from_numpy(np.flatnonzero(known)).to(batch.images.device)

    def _pooled(self, batch: Batch) -> Tensor:
        """The images, or what a locked tower has made of them."""
        images = batch.images
        if self._kept is None:
            return images
        if images.is_meta or not len(batch.indices):
            return images.new_zeros(len(images), self.model.pooled)
        return self._kept.of(batch).to(images.device)

    def _tokens(
        self, codes: Int64[Tensor, " b"], like: Tensor
    ) -> tuple[Int64[Tensor, "b t"], Bool[Tensor, "b t"]]:
        if codes.is_meta:
            shape = len(codes), self.model.text.config.context
            tokens = torch.zeros(shape, dtype=torch.int64, device=like.device)
            return tokens, tokens == 0
        return self.read([self.targets.table[code] for code in codes.tolist()], like.device)

    def read(
        self, texts: Sequence[str], device: torch.device
    ) -> tuple[Int64[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """The tokens of texts, and which of them count."""
        found = self.model.words.tokenizer(texts)
        return torch.from_numpy(found.ids).to(device), torch.from_numpy(found.mask).to(device)

    @torch.no_grad()
    def embedded(self, texts: Sequence[str]) -> Float[Tensor, "m d"]:
        """The vectors of texts, on the CPU."""
        device = self.model.scale.device
        parts = [
            self.model.texts(*self.read(texts[start : start + _AT_ONCE], device)).cpu()
            for start in range(0, len(texts), _AT_ONCE)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.model.width)

    def named(
        self, names: Sequence[str], templates: Sequence[str] | None = None
    ) -> Float[Tensor, "c d"]:
        """The vectors of classes: of each name in all templates the mean, of vectors of length 1,
        and again of length 1.
        """
        templates = templates or self.config.templates
        said = [each.replace("{}", name) for name in names for each in templates]
        every = self.embedded(said).reshape(len(names), len(templates), -1)
        return F.normalize(every.mean(dim=1), dim=1)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`vectors [b d]` of images, `texts [b k]`, and `classes [b c]` where they are known."""
        known = {
            name: batch.targets[name] for name in ("texts", "classes") if name in batch.targets
        }
        return {"vectors": self._measured(batch), **known}

    def _measured(self, batch: Batch) -> Float[Tensor, "b d"]:
        """Of a locked tower they are the same every time, but for a projection that learns."""
        if not self.locked or self.model.projection is not None:
            return self.model(*batch.views[0])
        places = batch.indices.tolist()
        if not self._seen.keys() >= {*places}:
            found = self.model(*batch.views[0])
            self._seen |= dict(zip(places, found, strict=True))
        if not places:
            return self.model(*batch.views[0])
        return torch.stack([self._seen[i] for i in places])

    def found(
        self, rows: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "m d"], Int64[Tensor, "n k"], list[str]]:
        """The vectors of all texts of measured images; which of them are each image's, -1 for none;
        and the texts.
        """
        codes, own = rows["texts"].unique(return_inverse=True)
        first = int((codes < 0).sum())
        texts = [self.targets.table[code] for code in codes[first:].tolist()]
        return self.embedded(texts), own - first, texts

    def score(self, rows: Mapping[str, Tensor]) -> float:
        """The mean of R@1 both ways."""
        vectors, own, _ = self.found(rows)
        values = judged(rows["vectors"].float(), vectors, own).values()
        return ((values["image_to_text_r1"] or 0) + (values["text_to_image_r1"] or 0)) / 2

    def judge(self, rows: Mapping[str, Tensor]) -> RetrievalMetrics:
        """See `vitrail.metrics.retrieval`."""
        vectors, own, _ = self.found(rows)
        names = self.targets.names if "classes" in rows else ()
        return judged(
            rows["vectors"].float(),
            vectors,
            own,
            named=self.named([spoken(name) for name in names]) if names else None,
            classes=rows.get("classes"),
        )

    def summary(self, metrics: RetrievalMetrics, noun: str) -> list[str]:
        """How many images find their text, how many texts their image, and zero-shot."""
        lines = []
        for name, label, of, count in (
            ("image_to_text", "texts", f"of {metrics.texts:,} texts", metrics.images),
            ("text_to_image", "images", f"of {metrics.images:,} {noun}", metrics.texts),
        ):
            one, five = (metrics.summary[f"{name}_r{k}"] for k in (1, 5))
            assert one is not None and five is not None
            whose = "images find a text of theirs" if label == "texts" else "texts find their image"
            lines.append(
                f"{label:<10}{one.value:.1%} (95% interval {one.low:.1%} to {one.high:.1%}) of "
                f"{count:,} {whose}, first {of}; {five.value:.1%} among 5"
            )
        chance = metrics.chance["image_to_text_r1"]
        lines.append(f"{'baseline':<10}{chance:.2%} of the images would find theirs by chance")
        if zero := metrics.summary.get("zero_shot"):
            names = len(self.targets.names)
            lines.append(
                f"{'zero-shot':<10}{zero.value:.1%} (95% interval {zero.low:.1%} to "
                f"{zero.high:.1%}) by the names of {names} classes; always saying the most common "
                f"one gives {metrics.chance['zero_shot']:.1%}"
            )
        return lines

    def table(self, rows: Mapping[str, Tensor]) -> Iterable[Sequence[str]]:
        """text,nearest,likeness,rank of the best own text from 1 and, where classes are known,
        label,predicted.
        """
        vectors, own, texts = self.found(rows)
        images = rows["vectors"].float()
        labels = "classes" in rows and bool(self.targets.names)
        yield ("text", "nearest", "likeness", "rank", *(("label", "predicted") if labels else ()))
        said: list[tuple[str, ...]] = [()] * len(images)
        if labels:
            names = self.targets.names
            best = (images @ self.named([spoken(name) for name in names]).T).argmax(dim=1).tolist()
            said = [
                ("|".join(n for n, one in zip(names, row, strict=True) if one), names[k])
                for row, k in zip(rows["classes"].tolist(), best, strict=True)
            ]
        places = ranks(images, vectors, own).of_images.tolist()
        for image, mine, rank, more in zip(images, own, places, said, strict=True):
            alike = vectors @ image
            nearest, first = int(alike.argmax()), int(mine[mine >= 0][0])
            yield (texts[first], texts[nearest], f"{alike[nearest]:.6f}", f"{rank + 1}", *more)

    def outputs(
        self, images: Float[Tensor, "b c h w"], extent: Int64[Tensor, "b 2"] | None = None
    ) -> dict[str, Tensor]:
        """`features [b d]`, of length 1."""
        return {"features": self.model(images, extent)}

    @property
    def reading(self) -> Reading:
        """How these become answers: as they are."""
        return Reading(kind="features", names=())

    def answer(self, batch: Batch, seen: Sequence[Seen]) -> list[Embedding]:
        """Of each image its vector."""
        return [Embedding(row) for row in self.model(*batch.views[0]).float().cpu().numpy()]

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """The scale stays between 1 and 100."""
        self.model.scale.data.clamp_(0.0, float(np.log(MOST)))

    def state(self) -> dict[str, Any]:
        """The names of classes, by which it is measured."""
        several = isinstance(self.targets.classes, Classes) and self.targets.classes.several
        return {"classes": list(self.targets.names), "multi_label": several}


def spoken(name: str) -> str:
    """The name of a class as words.

    >>> spoken("smileys_emotion")
    'smileys emotion'
    """
    return " ".join(name.replace("_", " ").split())
