"""From a name or a file to weights that a model can start from: the one way in, and the way out.

    opened = open_weights("augreg_vit_b16")            # or a path, an https address, hf:owner/name
    model = pretrained("dinov2_s14", classes=9, image_size=(112, 112))

Whoever published the file: its layout is recognised, its model is built, every tensor is used or
named, and positions, patches and channels are fitted to the model that is asked for.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Discriminator, TypeAdapter, ValidationError
from torch import Size, Tensor

from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError, setting, unknown_name
from vitrail.heads.detector import DetectHeadConfig
from vitrail.models import MODELS, Model, ModelConfig, ViTConfig, build, model_config
from vitrail.weights import box_heads, eomt, mae, rfdetr
from vitrail.weights.architectures import check_architecture, named, remarks
from vitrail.weights.beside import preprocess_by, told_by_config
from vitrail.weights.classes import Match, match, named_by_config
from vitrail.weights.family import FamilyLayout
from vitrail.weights.fetch import cached_file, fetch, parse_source
from vitrail.weights.files import WeightsFile, read_weights
from vitrail.weights.fit import Fitted, fit, models_like
from vitrail.weights.heads import HeadWeights, from_header, to_header
from vitrail.weights.layouts import recognise, understand, write_as
from vitrail.weights.names import State
from vitrail.weights.table import WEIGHTS, Published
from vitrail.weights.texts import text_alone
from vitrail.weights.unseen import UNSEEN, Unseen, lines
from vitrail.weights.write import write_npz, write_safetensors

OURS = "vitrail"
"""Our own layout: safetensors whose header holds the config, the preprocessing and the classes."""
TARGETS = (OURS, "timm", "huggingface", "google", "eomt", "mae")
"""What weights can be written as; `eomt` is that of its authors, of a ViT with queries, and `mae`
Meta's, of an encoder with its decoder."""
_HEAD = "head."
"""Before the names of what lies beside a backbone, in our files: of a segmenter."""
_BOXES = "boxes."
"""And of a detector."""
_DECODER = "decoder."
"""And of MAE."""


class Opened(NamedTuple):
    """Published weights, read and understood."""

    source: str
    """What the user named."""
    sha256: str
    layout: str
    config: ModelConfig
    """Of the model as it was published: `state` is exactly its state dict."""
    state: dict[str, Tensor]
    preprocess: Preprocess | None
    """What the model was shown by its makers, if that is known."""
    classes: tuple[str, ...]
    """The names of the logits, if the file, or one beside it, says them."""
    notes: tuple[str, ...]
    """What was assumed or chosen."""
    left_out: tuple[str, ...]
    """Tensors of the file that are no part of an image model."""
    assumed: tuple[str, ...] = ()
    """What no tensor shows and nobody said, and is taken to be so; a line each."""
    named: str = ""
    """What the config.json beside the file calls the architecture."""
    unseen: tuple[Unseen, ...] = ()
    """What no tensor of such a model shows, and where each of it is from."""
    keys: Mapping[str, Size] = {}
    """What the tensors of `state` were called in the file, and their shapes there."""
    head: HeadWeights | None = None
    """Of a segmenter, what lies beside its backbone, whose `state` and `config` these are."""
    boxes: box_heads.BoxHeadWeights | None = None
    """The same of a detector."""
    decoder: mae.DecoderWeights | None = None
    """Of MAE, what lies beside its encoder."""

    @property
    def architecture(self) -> str:
        """The model in a line: our family and row, its build, and what the file calls it.

        >>> open_weights("dinov2_s14").architecture  # doctest: +SKIP
        'vit dinov2_s14: 12 blocks, width 384, 6 heads'
        """
        rows = self.fits[:1]
        ours = f"{' '.join([self.config.family, *rows])}: {self.config.shape}"
        return f"{ours}; {self.named}, by the config.json beside it" if self.named else ours

    @property
    def fits(self) -> list[str]:
        """The names in MODELS that these weights can be loaded into."""
        return models_like(self.config)

    def head_for(self, classes: Sequence[str]) -> Match:
        """Whether its head is one for images of these classes, and which row is for which."""
        if not self.config.classes:
            return Match(None, "the weights have none")
        return match(self.classes, classes)


def open_weights(
    source: str | Path,
    told: Mapping[str, Any] | None = None,
    *,
    row: str | None = None,
    wanted: Mapping[str, Any] | None = None,
    notify: Callable[[str], None] = lambda sentence: None,
) -> Opened:
    """Read weights by name (`WEIGHTS`), path, https address or `hf:owner/name`; fetch if need be.

    `told` has fields of the config that no shape shows (`unseen.UNSEEN`), and overrules what a row
    or a config.json says; its `part` names the model that is meant in a file of several. `wanted`
    has fields of a model that is to be made of it, which may differ: they settle what nothing else
    tells. `row` is the name in MODELS that the user expects.

    Raises `DataError` for a file that is damaged, hostile, unknown, or ambiguous; `UsageError` for
    what is told and no field, or which the tensors contradict.
    """
    file, said, published = read_source(source, told, notify)
    return open_file(str(source), file, said, published, row=row, wanted=wanted)


def read_source(
    source: str | Path, told: Mapping[str, Any] | None, notify: Callable[[str], None]
) -> tuple[WeightsFile, dict[str, Any], Published | None]:
    """The file that a user means, what is told besides the part of it, and its row in WEIGHTS."""
    place = parse_source(str(source))
    published = WEIGHTS.get(place) if isinstance(place, str) else None
    path = place if isinstance(place, Path) else fetch(place, notify)
    said = dict(told or {})
    return read_weights(path, said.pop("part", None)), said, published


def open_file(
    source: str,
    file: WeightsFile,
    said: dict[str, Any],
    published: Published | None = None,
    *,
    row: str | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> Opened:
    """The image model in a file that is read; `said` and the others as in `open_weights`."""
    if OURS in file.metadata:
        return _open_ours(source, file, said)
    if rfdetr.is_one(file.tensors):
        return _open_rfdetr(source, file, said)
    if text_alone(file.tensors):
        raise DataError(f"{source} is a text tower: give it as {setting('text_weights', source)}")
    if not published:
        check_architecture(file.config, source)
    queries = eomt.is_one(file.tensors)
    tensors = eomt.backbone_of(file.tensors) if queries else file.tensors
    known = _known(file, tensors, published, row)
    architecture = "" if published else named(file.config)
    sure = bool(published or architecture)
    whence = "by the config.json beside it" if file.config else f"by {row}, which it should be"
    whence = f"by {source}'s row in WEIGHTS" if published else whence
    found = understand(tensors, said, source, wanted, beside=known, named=sure, whence=whence)
    check_told(said, found.config, source)
    preprocess = published.preprocess if published else preprocess_by(file, found.config)
    head = None
    if queries:
        assert isinstance(found.config, ViTConfig)
        try:
            head = eomt.head_weights(file.tensors, found.config)
            preprocess = preprocess or eomt.preprocess_of(file.tensors, found.config.image_size)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise DataError(f"{source} is no EoMT that can be read: {_line(error)}") from error
        head = head._replace(names=named_by_config(file.config, head.classes))
    decoder = None
    if isinstance(found.config, ViTConfig):
        decoder = mae.decoder_of(tensors, found.config, file.config)
    assumed = found.assumed + (() if published or "activation" in said else remarks(file.config))
    if preprocess is None:
        assumed += (
            "images scaled to a mean of 0.5 and a deviation of 0.5: nothing says how its makers "
            "prepared them",
        )
    return Opened(
        source=source,
        sha256=file.sha256,
        layout=found.layout.name,
        config=found.config,
        state=found.state,
        preprocess=preprocess,
        classes=named_by_config(file.config, found.config.classes),
        notes=file.notes,
        left_out=tuple(key for key in found.left_out if not decoder or key not in decoder.keys),
        assumed=assumed,
        named=architecture,
        unseen=found.unseen,
        keys=found.keys,
        head=head,
        decoder=decoder,
    )


def _known(
    file: WeightsFile, tensors: State, published: Published | None, row: str | None
) -> dict[str, Any]:
    """What is known of a model besides its weights: by its row in WEIGHTS, or beside the file."""
    if published:
        expected = model_config(published.model, **published.changes)
        said = {name: getattr(expected, name, None) for name in UNSEEN}
        return {name: value for name, value in said.items() if value is not None}
    if row is not None and row not in MODELS:
        raise unknown_name("model", row, MODELS)
    layout, _ = recognise(tensors, str(file.path))
    if isinstance(layout, FamilyLayout):
        return {}  # all is in the shapes
    known = told_by_config(file.config)
    wanted = MODELS.get(row or "")
    if isinstance(wanted, ViTConfig) and "activation" in layout.asks:
        known = {"activation": wanted.activation} | known  # the name settles which CLIP it is
    return known


_CONFIGS: TypeAdapter[ModelConfig] = TypeAdapter(Annotated[ModelConfig, Discriminator("family")])


def _open_rfdetr(source: str, file: WeightsFile, told: Mapping[str, Any]) -> Opened:
    read = rfdetr.read_rfdetr(file.tensors, file.config)
    check_told(told, read.backbone, source)
    queries = DetectHeadConfig(head="queries", query=read.head)
    beside = {key: tensor for key, tensor in read.state.items() if key.startswith(_HEAD)}
    head = box_heads.BoxHeadWeights(queries, beside, read.names)
    how = dict.fromkeys(UNSEEN, "as in the code of RF-DETR")
    if file.config:
        how |= dict.fromkeys(("heads", "norm_eps"), "by the config.json beside it")
    return Opened(
        source=source,
        sha256=file.sha256,
        layout="rfdetr",
        config=read.backbone,
        state=_behind("backbone.", read.state),
        preprocess=preprocess_by(file, read.backbone) or read.preprocess,
        classes=(),
        notes=file.notes,
        left_out=read.left_out,
        assumed=read.assumed,
        named=named(file.config),
        unseen=lines(read.backbone, how),
        boxes=head,
    )


def _behind(module: str, state: State) -> dict[str, Tensor]:
    """The tensors of a module, under its own names."""
    return {k.removeprefix(module): t for k, t in state.items() if k.startswith(module)}


def _open_ours(source: str, file: WeightsFile, told: Mapping[str, Any]) -> Opened:
    try:
        header = json.loads(file.metadata[OURS])
        config = _CONFIGS.validate_python({**header["config"], **told})
        preprocess = header.get("preprocess")
        read = Preprocess.from_dict(preprocess) if preprocess else None
        classes = tuple(map(str, header.get("classes", ())))
        tensors, head, boxes, decoder = file.tensors, None, None, None
        if beside := header.get("head"):
            head = from_header(beside, _behind(_HEAD, tensors), config)
            tensors = {k: t for k, t in tensors.items() if not k.startswith(_HEAD)}
        if beside := header.get("boxes"):
            boxes = box_heads.from_header(beside, _behind(_BOXES, tensors), config)
            tensors = {k: t for k, t in tensors.items() if not k.startswith(_BOXES)}
        if (beside := header.get("decoder")) and isinstance(config, ViTConfig):
            decoder = mae.from_header(beside, _behind(_DECODER, tensors), config)
            tensors = {k: t for k, t in tensors.items() if not k.startswith(_DECODER)}
    except (
        *(ValueError, KeyError, TypeError, AttributeError, ValidationError),
        *(RuntimeError, OverflowError),  # sizes that no memory has
    ) as error:
        raise DataError(f"{source}: the header is not vitrail's: {_line(error)}") from error
    state = fit(tensors, config, config, source).state
    opened = Opened(source, file.sha256, OURS, config, state, read, classes, file.notes, ())
    opened = opened._replace(head=head, boxes=boxes, decoder=decoder)
    how = {name: "as told" if name in told else "by its header" for name in UNSEEN}
    return opened._replace(unseen=lines(config, how))


def check_told(told: Mapping[str, Any], config: ModelConfig, where: str) -> None:
    """Raise `UsageError` for what is told of weights and is not so."""
    known = asdict(config)
    for name, value in told.items():
        if name not in known:
            raise unknown_name(f"field of {type(config).__name__}", name, known)
        if known[name] != value:
            raise UsageError(
                f"{where}: {setting(f'model.{name}', value)} is not what its tensors show, which "
                f"is {setting(f'model.{name}', known[name])}: leave it out"
            )


def load_into(
    model: Model, opened: Opened, classes: tuple[str, ...] | None = None, *, new_head: str = ""
) -> Fitted:
    """Give `model` the weights, fitted to its geometry.

    `classes` are the names of the model's logits: the head is kept, its rows in their order, if
    they are known to be its own, and else stays as new as it is. None: whatever it is for, it is
    kept, unless `new_head` gives a reason not to. Raises `DataError` where the weights are of
    another structure.
    """
    found = Match(None, new_head) if classes is None else opened.head_for(classes)
    if found.order is None:
        new_head = found.why
    fitted = fit(
        opened.state, opened.config, model.config, opened.source, new_head, opened.preprocess
    )
    if found.order is not None and "head.weight" in fitted.state:
        state = {
            key: tensor[list(found.order)]
            if key.startswith(("head.", "head_distilled."))
            else tensor
            for key, tensor in fitted.state.items()
        }
        fitted = fitted._replace(state=state, notes=(*fitted.notes, f"head: {found.why}"))
    model.load_state_dict(model.state_dict() | fitted.state)
    return fitted


def pretrained(source: str | Path, **changes: Any) -> Model:
    """A model with published weights, in evaluation mode; `changes` as in `build`.

    `pretrained("deit_s16")` is the published model, bit by bit;
    `pretrained("deit_s16", num_classes=10, image_size=(96, 160))` the start of a fine-tuning: with
    a number of classes the head is a new one, for a number does not say which they are. What no
    tensor of a file shows is told in the same way: `pretrained("x.pth", heads=6)`.
    """
    if "num_classes" in changes:
        changes["classes"] = changes.pop("num_classes")
    published = WEIGHTS.get(str(source))
    if published and published.terms and not cached_file(str(source)).is_file():
        warnings.warn(f"{source}: {published.terms}", stacklevel=2)
    opened = open_weights(source, wanted=changes)
    model = build(started(opened, **changes))
    asked, had = changes.get("classes"), opened.config.classes
    if asked is not None and asked == had:
        warnings.warn(
            f"the head for {asked} classes is a new one: {source} has one for as many, but a "
            f"number does not say which they are. To keep it, leave num_classes out",
            stacklevel=2,
        )
    if opened.head or opened.boxes:
        head = "segmentation" if opened.head else "detection"
        warnings.warn(
            f"{source}: this is its backbone alone; the head of {head} is left out",
            stacklevel=2,
        )
    load_into(model, opened, new_head="" if asked is None else "a number does not say which")
    return model.eval()


def started(
    opened: Opened, classes_named: tuple[str, ...] | None = None, **changes: Any
) -> ModelConfig:
    """The config of a model that starts from these weights, with fields changed.

    With `classes` the head is a new, plain one, for a representation layer was part of the old;
    unless `classes_named` are their names and the old one's too.
    """
    config = opened.config
    kept = classes_named is not None and opened.head_for(classes_named).order is not None
    if isinstance(config, ViTConfig) and "classes" in changes and not kept:
        changes = {"representation": 0, "head_bias": True, **changes}
    try:
        return replace(config, **changes)
    except TypeError:
        known = list(asdict(config))
        wrong = next(name for name in changes if name not in known)
        raise unknown_name(f"field of {type(config).__name__}", wrong, known) from None


def convert(opened: Opened, to: str, out: Path, *, overwrite: bool = False) -> Path:
    """Write the weights in another layout: safetensors, or .npz for Google's. Of a segmenter the
    backbone alone, unless `head_is_written`.

    Raises `DataError` where that layout has no place for something the model has.
    """
    if to not in TARGETS:
        raise unknown_name("layout to convert to", to, TARGETS)
    if (to == "google") != (out.suffix == ".npz"):
        ending = ".npz" if to == "google" else ".safetensors"
        raise UsageError(f"the layout {to} is written as {ending}: call it {out.stem}{ending}")
    if to == OURS:
        save_weights(
            out,
            opened.config,
            opened.state,
            opened.preprocess,
            opened.classes,
            opened.head,
            opened.boxes,
            opened.decoder,
            overwrite=overwrite,
        )
    elif to == "google":
        write_npz(out, _written(opened, to), overwrite=overwrite)
    else:
        tensors = _written(opened, to)
        write_safetensors(out, tensors, {"format": "pt"}, overwrite=overwrite)
    return out


def head_is_written(opened: Opened, to: str) -> bool:
    """Whether `convert` writes the head too: ours has a place for every one, EoMT's two layouts for
    queries on a ViT, and Hugging Face's RF-DETR for those for boxes. The others have that of the
    backbone alone.
    """
    if opened.boxes is not None:
        config, queries = opened.config, opened.boxes.config.head == "queries"
        theirs = queries and isinstance(config, ViTConfig) and config.windows > 0
        return to == OURS or (to == "huggingface" and theirs)
    if opened.head is None or to == OURS:
        return opened.head is not None
    return opened.head.config.head == "queries" and to in _EOMT


def decoder_is_written(opened: Opened, to: str) -> bool:
    """Whether `convert` writes a decoder of MAE too."""
    return opened.decoder is not None and (to == OURS or to in _MAE)


_EOMT: Mapping[str, eomt.EomtLayout] = {"huggingface": "huggingface", "eomt": "authors"}
_MAE: Mapping[str, mae.MaeLayout] = {"huggingface": "huggingface", "mae": "mae"}


def _written(opened: Opened, to: str) -> dict[str, Tensor]:
    """The weights in another layout, or as they came if it is their own."""
    if opened.boxes is not None and head_is_written(opened, to):
        body = {f"backbone.{key}": tensor for key, tensor in opened.state.items()}
        assert isinstance(opened.config, ViTConfig)
        queries = opened.boxes.config.query
        return rfdetr.write_rfdetr(body | opened.boxes.state, opened.config, queries)
    if head_is_written(opened, to):
        assert opened.head is not None
        return eomt.write(opened.state, opened.config, opened.head, _EOMT[to], opened.preprocess)
    if to == "eomt":
        raise DataError(
            f"{opened.source} is no segmenter with queries, and EoMT is one: use "
            f"{setting('to', 'timm')} or another layout"
        )
    if opened.decoder is not None and to in _MAE:
        assert isinstance(opened.config, ViTConfig)
        return mae.write_mae(opened.state, opened.config, opened.decoder, _MAE[to])
    if to == "mae":
        raise DataError(
            f"{opened.source} has no decoder of MAE, which its authors' files are: use "
            f"{setting('to', 'timm')}, which has the same names, or another layout"
        )
    own = opened.layout == to or opened.layout.startswith(f"{to}-")
    return write_as(to, opened.state, opened.config, opened.keys if own else None)


def save_weights(
    out: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    preprocess: Preprocess | None = None,
    classes: tuple[str, ...] = (),
    head: HeadWeights | None = None,
    boxes: box_heads.BoxHeadWeights | None = None,
    decoder: mae.DecoderWeights | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write one file that says all of itself: weights, config, preprocessing, class names."""
    header: dict[str, Any] = {"config": asdict(config), "classes": classes}
    if head is not None:
        header["head"] = to_header(head)
        state = {**state, **{_HEAD + key: tensor for key, tensor in head.state.items()}}
    if boxes is not None:
        header["boxes"] = to_header(boxes)
        state = {**state, **{_BOXES + key: tensor for key, tensor in boxes.state.items()}}
    if decoder is not None:
        header["decoder"] = decoder.to_header()
        state = {**state, **{_DECODER + key: tensor for key, tensor in decoder.state.items()}}
    if preprocess is not None:
        header["preprocess"] = preprocess.to_dict()
    write_safetensors(out, state, {OURS: json.dumps(header), "format": "pt"}, overwrite=overwrite)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
