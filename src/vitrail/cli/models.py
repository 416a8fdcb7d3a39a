"""`vitrail models`: the table of models, or one row in full."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from vitrail.cli.parse import parse
from vitrail.models import MODELS, build, count_parameters, model_config


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
        _print_table(rows)
        return {"models": rows}
    config = asdict(model_config(name))
    for field, value in config.items():
        print(f"{field:<16} {value}")
    print(f"{'parameters':<16} {describe(name)['parameters']:,}")
    return describe(name) | {"config": config}


def describe(name: str) -> dict[str, Any]:
    """A model's size in numbers; built on the meta device, so that even the largest is instant."""
    config = model_config(name)
    with torch.device("meta"):
        parameters = count_parameters(build(config))
    return {
        "name": name,
        "parameters": parameters,
        "depth": config.depth,
        "width": config.width,
        "heads": config.heads,
        "patch": list(config.patch),
        "image_size": list(config.image_size),
        "tokens": config.grid[0] * config.grid[1],
    }


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    for column in ("parameters", "depth", "width", "heads", "patch", "image", "tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            *(str(row[key]) for key in ("depth", "width", "heads")),
            "x".join(map(str, row["patch"])),
            "x".join(map(str, row["image_size"])),
            str(row["tokens"]),
        )
    Console().print(table)
