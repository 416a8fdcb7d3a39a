"""`vitrail search RUN DATA "words"`: images found by words, or by an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.cli.dataset import AS_FOUND, OfData
from vitrail.cli.parse import parse
from vitrail.cli.screen import CountingScreen
from vitrail.cli.table import width
from vitrail.data import open_data
from vitrail.data.sources.formats import IMAGE_EXTENSIONS
from vitrail.data.targets import Nothing
from vitrail.deploy.search import Searcher
from vitrail.errors import DataError, UsageError
from vitrail.report.words import tail
from vitrail.runs.load import load

_LEAST_NAME = 24


@dataclass(frozen=True)
class SearchArgs:
    """What `vitrail search` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder that vitrail train wrote, with --task clip, siglip or lit; to search by an image,
    of a run without labels too."""
    data: Annotated[str, tyro.conf.Positional]
    """The images: whatever `vitrail train` takes."""
    query: Annotated[str, tyro.conf.Positional]
    """Words; or an image file, to find what is like it."""
    top: int = 10
    """How many images to find."""
    how: OfData = AS_FOUND
    checkpoint: str | None = None


def search(args: Sequence[str]) -> dict[str, Any]:
    """Find images. Those that cannot be read are counted."""
    about = "Find images by words or by an image. An index of DATA is made once, and kept."
    given = parse(SearchArgs, args, "search", about)
    if given.top < 1:
        raise UsageError(f"--top must be at least 1, not {given.top}")
    by_image = given.query.lower().endswith(IMAGE_EXTENSIONS)
    if by_image and not Path(given.query).expanduser().is_file():
        raise DataError(f"no such image: {given.query}")
    searcher = Searcher(load(given.run, given.checkpoint))
    if by_image:
        query = searcher.image(Path(given.query).expanduser())
    else:
        query = searcher.words(given.query)
    source = open_data(given.data, given.how.columns(), given.how.rules(), targets=Nothing)
    with CountingScreen("looking", len(source)) as screen:
        index = searcher.index(source, screen.done)
    found = index.nearest(query, given.top)
    for hit in found:
        print(f"{hit.score:7.3f}  {tail(hit.key, max(_LEAST_NAME, width() - 9))}")
    said = "looked at now, and kept" if index.built else "looked at before"
    print(f"of {len(index.keys):,} images, {said}")
    if index.skipped:
        print(f"{len(index.skipped):,} images cannot be read, and are left out")
    return {
        "query": given.query,
        "by": "image" if by_image else "words",
        "found": [{"key": hit.key, "score": round(hit.score, 6)} for hit in found],
        "images": len(index.keys),
        "built": index.built,
        "skipped": [{"key": key, "reason": why} for key, why in index.skipped.items()],
        "exit_code": 0,
    }
