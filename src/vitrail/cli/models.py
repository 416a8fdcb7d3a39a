"""`vitrail models`: the table of models, or one row in full."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from textwrap import shorten
from typing import Annotated, Any

import tyro

from vitrail.bench.macs import macs
from vitrail.cli.parse import parse
from vitrail.cli.table import Column, print_table
from vitrail.models import (
    MODELS,
    DynamicViTConfig,
    ModelConfig,
    ViTConfig,
    model_config,
    parameters_of,
    with_tokens,
)

_MOST_WORDS = 46
"""Characters of a model's build in the list; `vitrail models NAME` has all of it."""
_COLUMNS = (
    Column("model", justify="left"),
    Column("parameters", 1),
    Column("build", 4, "left"),
    Column("stride", 3),
    Column("image", 2),
    Column("grid", 5),
)


@dataclass(frozen=True)
class ModelsArgs:
    """What `vitrail models` takes."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Show this model in full; without it, all of them."""


def models(args: Sequence[str]) -> dict[str, Any]:
    """List every model with its size, or show all fields of one."""
    name = parse(ModelsArgs, args, "models", "List the models, or show one in full.").name
    if name is None:
        rows = [describe(each) for each in MODELS]
        print_table(_COLUMNS, map(_cells, rows))
        return {"models": rows}
    config = model_config(name)
    found = describe(name) | {"macs": macs(config), "fewer_tokens": fewer_tokens(config)}
    for field, value in asdict(config).items():
        print(f"{field:<16} {value}")
    print(f"{'parameters':<16} {found['parameters']:,}")
    print(f"{'macs':<16} {found['macs'] / 1e9:.3f} G a picture of {_x(config.image_size)}, counted")
    for row in found["fewer_tokens"]:
        saved = 1 - row["macs"] / row["of"]
        print(f"{'--tokens':<16} {row['tokens']:<20} {row['macs'] / 1e9:.3f} G, {saved:.1%} saved")
    return found | {"config": asdict(config)}


def fewer_tokens(config: ModelConfig) -> list[dict[str, Any]]:
    """What working with fewer tokens would cost, in multiply-accumulates, and what all would."""
    if isinstance(config, DynamicViTConfig):
        whole = ViTConfig(**{f.name: getattr(config, f.name) for f in fields(ViTConfig)[1:]})
        ways = [f"dynamicvit:keep={keep}" for keep in (0.9, 0.8, 0.7, 0.6, 0.5)]
    elif isinstance(config, ViTConfig) and _merges(config):
        whole = config
        # As of the 196 patches of the published models, which gave up 4, 8, 13 and 16 a block.
        n = config.grid[0] * config.grid[1]
        counts = {round(r * n / 196 * 12 / config.depth) for r in (4, 8, 13, 16)}
        ways = [f"tome:r={r}" for r in sorted(counts) if r]
    else:
        return []
    of = macs(whole)
    return [{"tokens": way, "macs": macs(with_tokens(config, way)), "of": of} for way in ways]


def _merges(config: ViTConfig) -> bool:
    """Whether its tokens can be merged."""
    in_windows = config.cuts is not None or config.relative is not None
    return config.scales == "one" and config.position != "peg" and not in_windows


def describe(name: str) -> dict[str, Any]:
    """A model's size in numbers."""
    config = model_config(name)
    return {
        "name": name,
        "parameters": parameters_of(config),
        "family": config.family,
        "shape": config.shape,
        "stride": list(config.stride),
        "image_size": list(config.image_size),
        "grid": list(config.grid),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of `_COLUMNS`."""
    return (
        row["name"],
        f"{row['parameters']:,}",
        shorten(row["shape"], _MOST_WORDS, placeholder=" ..."),
        *(_x(row[key]) for key in ("stride", "image_size", "grid")),
    )


def _x(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
