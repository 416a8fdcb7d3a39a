"""Which models of timm, transformers and open_clip are read, and whether they are read right.

    python benchmarks/screen.py [--library timm ...] [--only GLOB] [--json FILE]

Every image model that the three libraries list is built with two blocks and random weights, written
as its library writes it, and read as a user's file is: by its tensors alone, and with the
config.json beside them. What is read is run beside the library's own code, at its own size. It is

- equal      its outputs are the library's, within 1e-5 of their size
- asked      equal as soon as it is told what the message asks for: heads, activation and such
- assumed    other outputs, and equal ones when something that is printed as assumed is told to be
             otherwise; or, where ours has no such thing, a line that names the look-alike
- refused    one message says what it is, or that its tensors are of no layout that is known
- wrong      other outputs, and not a word: there must be none, and the script ends with 1

What cannot be built here (it wants another package, or more than an image) is counted as `unbuilt`.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vitrail
from vitrail.errors import DataError, UsageError
from vitrail.models import ModelConfig, build
from vitrail.weights import open_weights
from vitrail.weights.beside import told_by_config
from vitrail.weights.layouts import FAMILY_LAYOUTS, LAYOUTS, recognise

TOLERANCE = 1e-5
"""Of the largest output."""
MOST_PARAMETERS = 500_000_000
"""Of a model that is run."""
OTHERWISE: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu", "gelu_tanh", "gelu_quick"),
    "norm_eps": (1e-6, 1e-5, 1e-12),
    "pool": ("class", "mean", "class_mean"),
}
"""What a field that no tensor shows may be instead."""


class Candidate(NamedTuple):
    """A model of a library."""

    name: str
    make: Callable[[], nn.Module]
    see: Callable[[Any, Tensor], Sequence[Any]]
    """Its outputs for images: the most that it makes of them first."""
    write: Callable[[Any, Path], None]
    """Its weights and config.json, into a folder."""
    size: tuple[int, int]
    plain: bool = True
    """Whether what is written has the names of its state dict."""


class Verdict(NamedTuple):
    """What became of it."""

    library: str
    name: str
    beside: str
    """`nothing`, or `config.json`."""
    outcome: str
    layout: str = ""
    difference: float | None = None
    """Of the largest output."""
    words: tuple[str, ...] = ()
    """What was asked or assumed, or why it was refused."""


# --- what the libraries have ---


def let_torchvision_be_imported() -> None:
    """By timm and others, where its compiled part matches no torch for CPUs."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # No torchvision matches a CPU-only torch: its operators have no schema.
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["operators"] = operators  # they last as long as this object


def of_timm() -> Iterator[Candidate]:
    import timm
    from timm.models import get_pretrained_cfg

    for name in timm.list_models():
        published = get_pretrained_cfg(name)
        size = published.input_size[1:] if published else (224, 224)

        def write(model: Any, folder: Path) -> None:
            cut = {"depth": 2} if len(getattr(model, "blocks", ())) == 2 else {}
            timm.models.save_for_hf(model, folder, model_args=cut, safe_serialization=True)

        make = partial(_shallow, timm.create_model, name)
        yield Candidate(name, make, lambda model, x: [model(x)], write, size)


def _shallow(create: Callable[..., nn.Module], name: str, **options: Any) -> nn.Module:
    """A model of timm with two blocks, if it has blocks to be counted."""
    try:
        return create(name, depth=2, **options)
    except Exception:  # it has stages, or blocks that differ
        return create(name, **options)


def of_open_clip() -> Iterator[Candidate]:
    import open_clip
    import timm

    text = {"context_length": 7, "vocab_size": 9, "width": 64, "heads": 1, "layers": 1}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        config["vision_cfg"] = vision = dict(config["vision_cfg"])
        if isinstance(vision.get("layers"), int):
            vision["layers"] = 2

        def make(config: dict[str, Any] = config) -> nn.Module:
            embedding, quick = config["embed_dim"], config.get("quick_gelu", False)
            with patch.object(timm, "create_model", partial(_shallow, timm.create_model)):
                if whole := config.get("multimodal_cfg"):
                    towers = (whole | {"layers": 1}, text, config["vision_cfg"])
                    return open_clip.CoCa(embedding, *towers, quick_gelu=quick)
                return open_clip.CLIP(embedding, config["vision_cfg"], text, quick_gelu=quick)

        def write(model: Any, folder: Path, config: dict[str, Any] = config) -> None:
            _write(model, folder, {"model_cfg": config})

        side = vision.get("image_size", 224)
        size = (side, side) if isinstance(side, int) else tuple(side)
        yield Candidate(name, make, _embedded, write, size)


def _embedded(model: Any, x: Tensor) -> list[Tensor]:
    """What a model of open_clip makes of images, before it is set to length 1."""
    return [model.encode_image(x, normalize=False)]


def of_transformers() -> Iterator[Candidate]:
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for kind in MODEL_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(kind)
        except Exception:  # of a kind that has no configuration of its own
            continue
        tower = getattr(config, "vision_config", None) or config
        side = getattr(tower, "image_size", None)
        if tower is config and side is None and not hasattr(config, "patch_size"):
            continue  # nothing for images
        for part in (config, tower, getattr(config, "text_config", None)):
            for field, least in (("num_hidden_layers", 2), ("vocab_size", 400)):
                if isinstance(getattr(part, field, None), int):
                    with suppress(AttributeError):
                        setattr(part, field, min(least, getattr(part, field)))

        if hasattr(tower, "mask_ratio"):
            tower.mask_ratio = 0.0  # an MAE hides three patches in four, at random, in use as well

        def make(config: Any = config) -> nn.Module:
            return AutoModel.from_config(config, attn_implementation="eager")

        def write(model: Any, folder: Path) -> None:
            model.save_pretrained(folder)

        size = tuple(side[:2]) if isinstance(side, list | tuple) else (side or 224,) * 2
        # Since transformers 5 the names in memory are others than those in files.
        yield Candidate(kind, make, _seen, write, size, plain=False)


def _seen(model: Any, x: Tensor) -> list[Any]:
    """What a model of transformers makes of images: embedding, pooled vector, class token, mean."""
    if model.config.model_type == "mobilevit":
        x = x.flip(1)  # as its image processor does
    found = []
    with suppress(Exception):  # of a model that wants texts, or a list of sizes, besides
        embedded = model.get_image_features(pixel_values=x)
        found.append(embedded if isinstance(embedded, Tensor) else embedded.pooler_output)
    towers = (getattr(model, name, None) for name in ("vision_model", "vision_tower"))
    shown = next((tower for tower in towers if tower is not None), model)(pixel_values=x)
    found.append(shown.get("pooler_output"))
    tokens = shown.get("last_hidden_state")
    if tokens is not None and tokens.ndim == 3:
        found += [tokens[:, 0], tokens.mean(dim=1)]
    return found


def _write(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


LIBRARIES = {"timm": of_timm, "transformers": of_transformers, "open_clip": of_open_clip}


# --- what becomes of one ---


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Random values everywhere, outputs of order 1: zeros would hide faults."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("weight") and tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif tensor.ndim > 1 or name.endswith(("bias", "running_mean")):
            tensor.normal_(std=0.5)
        elif name.endswith(("weight", "gamma", "gamma_1", "gamma_2", "lambda1", "running_var")):
            tensor.uniform_(0.5, 1.5)
    return model.eval()


def judge(library: str, candidate: Candidate, folder: Path) -> list[Verdict]:
    """Both ways to read it, from files in `folder`."""

    def verdict(beside: str, outcome: str, *words: str) -> Verdict:
        return Verdict(library, candidate.name, beside, outcome, words=words)

    try:
        with torch.device("meta"):
            sketch = candidate.make().state_dict()
        if candidate.plain and (why := _unknown(sketch)):
            return [verdict(beside, "refused", why) for beside in ("nothing", "config.json")]
        if sum(map(Tensor.numel, sketch.values())) > MOST_PARAMETERS:
            return [verdict("-", "unbuilt", "too large to be run here")]
        model = randomise(candidate.make())
        x = torch.randn(2, 3, *candidate.size)
        with torch.inference_mode():
            outputs = [out[0] if isinstance(out, tuple) else out for out in candidate.see(model, x)]
        theirs = [out for out in outputs if isinstance(out, Tensor)]
        candidate.write(model, folder)
        config = json.loads((folder / "config.json").read_text())
    except Exception as error:  # whatever it wants besides an image
        return [verdict("-", "unbuilt", _line(error))]
    del model
    known: dict[str, Any] = {"image_size": candidate.size}
    with suppress(DataError):
        known |= told_by_config(config)
    named = verdict("config.json", "")._replace(**_read(folder, known, x, theirs))
    (folder / "config.json").unlink()
    return [verdict("nothing", "")._replace(**_read(folder, known, x, theirs)), named]


def _unknown(sketch: Mapping[str, Tensor]) -> str:
    """Why no layout has these names; empty if one has."""
    try:
        recognise(sketch, "it")
    except DataError as error:
        return _line(error)
    except (NotImplementedError, RuntimeError):  # a layout looks at values, which a sketch has not
        pass
    return ""


def _read(
    folder: Path, known: Mapping[str, Any], x: Tensor, theirs: Sequence[Tensor]
) -> dict[str, Any]:
    """The verdict on the file in `folder`; `known` is what a question can be answered with."""
    told: dict[str, Any] = {}
    words: list[str] = []
    while True:
        try:
            opened = open_weights(folder, told)
            break
        except (DataError, UsageError) as error:
            words.append(_line(error))
            answers = {field: known[field] for field in known if f"{field}=" in str(error)}
            if not answers.keys() - told.keys():
                return {"outcome": "refused", "words": (words[-1],)}
            told |= answers
    try:
        difference = _difference(opened.config, opened.state, x, theirs)
    except UsageError as error:  # an image that its patches do not fill
        return {"outcome": "refused", "words": (_line(error),)}
    outcome = "asked" if told else "equal"
    if difference > TOLERANCE:
        layout = {**LAYOUTS, **FAMILY_LAYOUTS}[opened.layout]
        equal = [
            f"equal with {field} {value}"
            for field, value in _alternatives(opened.assumed)
            if _otherwise(opened.config, opened.state, x, theirs, field, value) <= TOLERANCE
        ]
        outcome = "assumed" if equal or {*layout.takes} & {*opened.assumed} else "wrong"
        words += equal
    words += opened.assumed
    return {
        "outcome": outcome,
        "layout": opened.layout,
        "difference": difference,
        "words": tuple(words),
    }


def _difference(
    config: ModelConfig, state: Mapping[str, Tensor], x: Tensor, theirs: Sequence[Tensor]
) -> float:
    """Of the best match between an output of ours and one of theirs, of its largest value."""
    model = build(config).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        features = model.features(x)
        ours = [features.pooled, *features.prefix.unbind(1)[:1]]
        if config.classes:
            ours = [model(x)]
    pairs = ((a, b) for a in ours for b in theirs if a.shape == b.shape)
    return min((float((a - b).abs().max() / b.abs().max()) for a, b in pairs), default=float("inf"))


def _alternatives(assumed: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What the lines that say what was assumed leave open."""
    for line in assumed:
        field = line.split()[0]
        yield from ((field, value) for value in OTHERWISE.get(field, ()))


def _otherwise(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    x: Tensor,
    theirs: Sequence[Tensor],
    field: str,
    value: Any,
) -> float:
    """The difference with another value of a field, if a model with these tensors can have it."""
    try:
        return _difference(replace(config, **{field: value}), state, x, theirs)
    except (UsageError, RuntimeError, TypeError):
        return float("inf")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    let_torchvision_be_imported()
    verdicts: list[Verdict] = []
    start = time.monotonic()
    for library in args.library:
        for candidate in LIBRARIES[library]():
            if fnmatchcase(candidate.name, args.only):
                with tempfile.TemporaryDirectory() as folder:
                    found = judge(library, candidate, Path(folder))
                verdicts += found
                for verdict in found:
                    if verdict.outcome in ("wrong", "assumed"):
                        print(
                            *verdict[:4], verdict.difference, *verdict.words, sep="; ", flush=True
                        )
    counts = Counter((v.library, v.beside, v.outcome) for v in verdicts)
    for (library, beside, outcome), count in sorted(counts.items()):
        print(f"{library:<14}{beside:<14}{outcome:<10}{count:>6}")
    if args.json:
        versions = {name: sys.modules[name].__version__ for name in args.library}
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now().date().isoformat(),
            "versions": {
                "vitrail": vitrail.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                **versions,
            },
            "seconds": round(time.monotonic() - start),
            "counts": [[*key, count] for key, count in sorted(counts.items())],
            "verdicts": [verdict._asdict() for verdict in verdicts],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(verdict.outcome == "wrong" for verdict in verdicts))


if __name__ == "__main__":
    main()
