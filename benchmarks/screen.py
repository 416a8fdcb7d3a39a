"""Which models of timm, transformers and open_clip are read, and whether they are read right.

    python benchmarks/screen.py [--library timm ...] [--only GLOB] [--json FILE]

Every image model that the three libraries list is built with two blocks and random weights, and
read as a user's file would be: by its tensors alone, and with the config.json that the library
writes beside it. What is read is run beside the library's own code, at its own size. A model is

- equal      its outputs are the library's, within 1e-5 of their size
- asked      equal as soon as it is told what the message asks for: heads, activation and such
- assumed    other outputs, and equal ones when something that is printed as assumed is told to be
             otherwise; or, where ours has no such thing, a line that names the look-alike
- refused    one message says what it is, or that its tensors are of no layout that is known
- wrong      other outputs, and not a word: there must be none, and the script ends with 1

What cannot be built here, mostly for want of another package, is counted as `unbuilt`.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers

import torch
from torch import Tensor, nn

import vitrail
from vitrail.errors import DataError, UsageError
from vitrail.models import build
from vitrail.weights.architectures import check_architecture, remarks
from vitrail.weights.beside import told_by_config
from vitrail.weights.layouts import Found, understand

TOLERANCE = 1e-5
"""Of the largest output."""
MOST_PARAMETERS = 800_000_000
"""Of a model that is run; of a larger one only the tensors' shapes are looked at."""
OTHERWISE: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu", "gelu_tanh", "gelu_quick"),
    "norm_eps": (1e-6, 1e-5, 1e-12),
    "pool": ("class", "mean", "class_mean"),
}
"""What a field that no tensor shows may be instead."""


class Candidate(NamedTuple):
    """A model of a library, which can be built more than once."""

    name: str
    make: Callable[[], nn.Module]
    config: Callable[[nn.Module], Mapping[str, Any]]
    """The config.json that the library writes beside its weights."""
    outputs: Callable[[nn.Module, Tensor], Sequence[Tensor]]
    """Of images: the most that it makes of them first."""
    size: tuple[int, int]


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
    """What was assumed or asked, or why it was refused."""


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
    let_torchvision_be_imported()
    import timm
    from timm.models import get_pretrained_cfg

    for name in timm.list_models():

        def make(name: str = name) -> nn.Module:
            try:
                return timm.create_model(name, depth=2)
            except TypeError:
                return timm.create_model(name)

        published = get_pretrained_cfg(name)
        size = published.input_size[1:] if published else (224, 224)
        shape = {"input_size": [3, *size]}

        def config(model: nn.Module, name: str = name, shape: Any = shape) -> dict[str, Any]:
            pool = getattr(model, "global_pool", None)
            return {"architecture": name, "global_pool": pool, "pretrained_cfg": shape}

        yield Candidate(name, make, config, lambda model, x: [model(x)], size)


def of_open_clip() -> Iterator[Candidate]:
    let_torchvision_be_imported()
    import open_clip

    text = {"context_length": 7, "vocab_size": 9, "width": 64, "heads": 1, "layers": 1}
    for name in open_clip.list_models():
        whole = open_clip.get_model_config(name)
        vision = dict(whole["vision_cfg"])
        if isinstance(vision.get("layers"), int):
            vision["layers"] = 2
        side = vision.get("image_size", 224)
        cut = {**whole, "vision_cfg": vision}

        def make(cut: dict[str, Any] = cut) -> nn.Module:
            quick = cut.get("quick_gelu", False)
            return open_clip.CLIP(cut["embed_dim"], cut["vision_cfg"], text, quick_gelu=quick)

        yield Candidate(
            name,
            make,
            lambda model, cut=cut: {"model_cfg": cut},
            lambda model, x: [model.encode_image(x)],
            (side, side) if isinstance(side, int) else tuple(side),
        )


def of_transformers() -> Iterator[Candidate]:
    let_torchvision_be_imported()
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for kind in MODEL_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(kind)
        except Exception:  # of a kind that has no configuration of its own
            continue
        tower = getattr(config, "vision_config", None) or config
        size = getattr(tower, "image_size", None)
        if tower is config and size is None and not hasattr(config, "patch_size"):
            continue  # nothing for images
        for part in (config, tower, getattr(config, "text_config", None)):
            for field, least in (("num_hidden_layers", 2), ("vocab_size", 400)):
                if isinstance(getattr(part, field, None), int):
                    with suppress(AttributeError):
                        setattr(part, field, min(least, getattr(part, field)))

        def make(config: Any = config) -> nn.Module:
            return AutoModel.from_config(config, attn_implementation="eager")

        sides = size if isinstance(size, list | tuple) else (size or 224,) * 2
        said = json.loads(config.to_json_string())
        yield Candidate(kind, make, lambda model, said=said: said, _seen, tuple(sides[:2]))


def _seen(model: Any, x: Tensor) -> list[Tensor]:
    """What a model of transformers makes of images: embedding, pooled vector, class token, mean."""
    found = []
    if hasattr(model, "get_image_features"):
        embedded = model.get_image_features(pixel_values=x)
        found.append(embedded if isinstance(embedded, Tensor) else embedded.pooler_output)
    shown = getattr(model, "vision_model", model)(pixel_values=x)
    found.append(shown.get("pooler_output"))
    tokens = shown.get("last_hidden_state")
    if tokens is not None and tokens.ndim == 3:
        found += [tokens[:, 0], tokens.mean(dim=1)]
    return [output for output in found if output is not None]


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


def judge(library: str, candidate: Candidate) -> list[Verdict]:
    """Both ways to read it."""

    def verdict(beside: str, outcome: str, *words: str, **facts: Any) -> Verdict:
        return Verdict(library, candidate.name, beside, outcome, words=words, **facts)

    try:
        with torch.device("meta"):
            sketch = candidate.make()
        config = candidate.config(sketch)
        shapes = {key: value.to("meta") for key, value in sketch.state_dict().items()}
    except Exception as error:
        return [verdict("-", "unbuilt", _line(error))]
    ways = {"nothing": {}, "config.json": config}
    verdicts = {}
    for beside, said in ways.items():
        try:
            read(shapes, candidate.name, said)
        except DataError as error:
            if not _asks(error):
                verdicts[beside] = verdict(beside, "refused", _line(error))
    if len(verdicts) == len(ways):
        return list(verdicts.values())
    if sum(map(Tensor.numel, shapes.values())) > MOST_PARAMETERS:
        return [verdict("-", "unbuilt", "too large to be run here")]
    try:
        model = randomise(candidate.make())
        x = torch.randn(2, 3, *candidate.size)
        with torch.inference_mode():
            expected = [out for out in candidate.outputs(model, x) if isinstance(out, Tensor)]
    except Exception as error:
        return [verdict("-", "unbuilt", _line(error))]
    state = dict(model.state_dict())
    try:
        known = {"image_size": candidate.size, **told_by_config(config)}
    except DataError:
        known = {"image_size": candidate.size}
    del model
    for beside, said in ways.items():
        if beside in verdicts:
            continue
        told: dict[str, Any] = {}
        words = []
        while True:
            try:
                found = read(state, candidate.name, said, told)
                break
            except DataError as error:
                words.append(_line(error))
                answers = {k: v for k, v in known.items() if f"{k}=" in str(error)}
                if not answers.keys() - told.keys():
                    found = None
                    break
                told |= answers
        if found is None:
            verdicts[beside] = verdict(beside, "refused", words[-1])
            continue
        try:
            difference = compared(found, x, expected)
        except UsageError as error:  # an image that patches do not fill: it refuses, not errs
            verdicts[beside] = verdict(beside, "refused", _line(error))
            continue
        if difference <= TOLERANCE:
            outcome = "asked" if told else "equal"
        else:
            outcome = "wrong"
            for field, value in _alternatives(found):
                try:
                    other = build(replace(found.config, **{field: value}))
                except UsageError:  # which no such model can have
                    continue
                if _shapes(other.state_dict()) != _shapes(found.state):
                    continue
                if compared(found._replace(config=other.config), x, expected) <= TOLERANCE:
                    outcome = "assumed"
                    words.append(f"equal with {field} {value}")
            if set(found.layout.takes) & set(found.assumed):
                outcome = "assumed"
        verdicts[beside] = verdict(
            beside,
            outcome,
            *words,
            *found.assumed,
            layout=found.layout.name,
            difference=difference,
        )
    return list(verdicts.values())


def compared(found: Found, x: Tensor, expected: Sequence[Tensor]) -> float:
    """How far our outputs are from theirs."""
    ours = build(found.config).eval()
    ours.load_state_dict(found.state)
    with torch.inference_mode():
        features = ours.features(x)
        mine = [features.pooled, *features.prefix.unbind(1)[:1]]
        return _difference([ours(x)] if found.config.classes else mine, expected)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


def _alternatives(found: Found) -> Iterator[tuple[str, Any]]:
    """What the lines that say what was assumed leave open."""
    for words in found.assumed:
        field = words.split()[0]
        for value in OTHERWISE.get(field, ()):
            if getattr(found.config, field, value) != value:
                yield field, value


def read(
    state: Mapping[str, Tensor],
    name: str,
    config: Mapping[str, Any],
    told: Mapping[str, Any] | None = None,
) -> Found:
    """As `open_weights` reads a file with this config.json beside it."""
    if config:
        check_architecture(config, name)
    beside = told_by_config(config) if config else {}
    found = understand(dict(state), dict(told or {}), name, beside=beside, named=bool(config))
    return found._replace(assumed=found.assumed + remarks(config))


def _difference(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Of the best match between an output of ours and one of theirs, of its largest value."""
    return min(
        (
            float((a - b).abs().max() / b.abs().max())
            for a in mine
            for b in theirs
            if a.shape == b.shape
        ),
        default=float("inf"),
    )


def _asks(error: DataError) -> bool:
    """Whether the message is a question."""
    return "say " in str(error).lower()


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:300] or type(error).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    verdicts: list[Verdict] = []
    start = time.monotonic()
    for library in args.library:
        for candidate in LIBRARIES[library]():
            if fnmatchcase(candidate.name, args.only):
                verdicts += judge(library, candidate)
                for verdict in verdicts[-2:]:
                    if verdict.name == candidate.name and verdict.outcome in ("wrong", "assumed"):
                        print(*verdict[:4], verdict.difference, *verdict.words, sep="; ")
    counts = Counter((v.library, v.beside, v.outcome) for v in verdicts)
    for (library, beside, outcome), count in sorted(counts.items()):
        print(f"{library:<14}{beside:<14}{outcome:<10}{count:>6}")
    wrong = [verdict.name for verdict in verdicts if verdict.outcome == "wrong"]
    if args.json:
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now().date().isoformat(),
            "versions": {
                "vitrail": vitrail.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
            | {name: sys.modules[name].__version__ for name in args.library},
            "seconds": round(time.monotonic() - start),
            "counts": [[*key, count] for key, count in sorted(counts.items())],
            "verdicts": [verdict._asdict() for verdict in verdicts],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
