"""What a user tells of weights that do not say it themselves, in the same words in every verb."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import tyro
from pydantic import TypeAdapter, ValidationError

from vitrail.cli.parse import parse_among
from vitrail.errors import UsageError, setting
from vitrail.nn import Activation, Eps, Pool, Position, Resample, Rope


def _short(name: str) -> Any:
    """The flag `--heads` as well as `--model.heads`."""
    return tyro.conf.arg(aliases=(f"--{name.replace('_', '-')}",))


@dataclass(frozen=True, kw_only=True)
class Told:
    """Fields of a model's config that no tensor shows: those of `vitrail.weights.unseen`.

    None: what the file or its makers say.
    """

    heads: Annotated[int | None, _short("heads")] = None
    activation: Annotated[Activation | None, _short("activation")] = None
    norm_eps: Annotated[float | None, _short("norm_eps")] = None
    image_size: Annotated[tuple[int, int] | None, _short("image_size")] = None
    """Height and width in pixels that its position table is for, if that is no square."""
    position: Annotated[Position | None, _short("position")] = None
    """What it has instead of a position table, or besides: learned_rope."""
    rope: Annotated[Rope | None, _short("rope")] = None
    """By whose angles rotary positions turn queries and keys."""
    rope_grid: Annotated[tuple[int, int] | None, _short("rope_grid")] = None
    """Rows and columns that rotary positions are scaled to."""
    pool: Annotated[Pool | None, _short("pool")] = None
    pool_norm: Annotated[bool | None, _short("pool_norm")] = None
    """Whether the final norm acts on the pooled vector, and not on the tokens."""
    layer_scale: Annotated[float | None, _short("layer_scale")] = None
    resample: Annotated[Resample | None, _short("resample")] = None
    """How its makers bring a position table to another grid, and patch kernels to another size."""
    stem_eps: Annotated[Eps | None, _short("stem_eps")] = None
    """Whose epsilons the ResNet of a hybrid has."""

    def fields(self) -> dict[str, Any]:
        """Those that are told."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Flags:
    told: Annotated[Told, tyro.conf.arg(name="model")] = field(default_factory=Told)


def told_by(args: Sequence[str], changes: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """What flags among `args` tell, or else the fields of a file's `changes`."""
    names = asdict(Told())
    filed = {name: changes[f"model.{name}"] for name in names if f"model.{name}" in changes}
    try:
        told = TypeAdapter(Told).validate_python(filed).fields()
    except ValidationError as error:
        fault = error.errors()[0]
        name = setting(f"model.{fault['loc'][0]}")
        raise UsageError(f"{name}, by the config: {fault['msg']}") from error
    found, _ = parse_among(_Flags, args, verb)
    return told | found.told.fields()
