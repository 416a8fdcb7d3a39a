"""Data: from files to labelled images. What makes batches of them, and what looks for faults, is
imported from its own file.

Nothing here imports torch, so that looking at data is quick. A name is imported when it is first
used, for every process that decodes images begins with this package.
"""

from typing import TYPE_CHECKING

from vitrail.lazy import lazy

if TYPE_CHECKING:
    from vitrail.data.pixels.decode import UnreadableImage as UnreadableImage
    from vitrail.data.pixels.decode import read_image as read_image
    from vitrail.data.sources.csvfile import CsvSource as CsvSource
    from vitrail.data.sources.folder import FolderSource as FolderSource
    from vitrail.data.sources.formats import FORMATS as FORMATS
    from vitrail.data.sources.formats import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS
    from vitrail.data.sources.samples import SAMPLES as SAMPLES
    from vitrail.data.sources.samples import cache_folder as cache_folder
    from vitrail.data.sources.samples import fetch as fetch
    from vitrail.data.sources.source import PARTS as PARTS
    from vitrail.data.sources.source import ArraySource as ArraySource
    from vitrail.data.sources.source import PartedSource as PartedSource
    from vitrail.data.sources.source import Source as Source
    from vitrail.data.sources.source import Subset as Subset
    from vitrail.data.split import Splits as Splits
    from vitrail.data.split import open_data as open_data
    from vitrail.data.split import open_splits as open_splits
    from vitrail.data.split import open_streamed as open_streamed
    from vitrail.data.split import write_split as write_split
    from vitrail.data.targets import Classes as Classes
    from vitrail.data.targets import Targets as Targets

_ROOMS = {
    "vitrail.data.pixels.decode": ("UnreadableImage", "read_image"),
    "vitrail.data.sources.csvfile": ("CsvSource",),
    "vitrail.data.sources.folder": ("FolderSource",),
    "vitrail.data.sources.formats": ("FORMATS", "IMAGE_EXTENSIONS"),
    "vitrail.data.sources.samples": ("SAMPLES", "cache_folder", "fetch"),
    "vitrail.data.sources.source": ("PARTS", "ArraySource", "PartedSource", "Source", "Subset"),
    "vitrail.data.split": ("Splits", "open_data", "open_splits", "open_streamed", "write_split"),
    "vitrail.data.targets": ("Classes", "Targets"),
}

_HOMES = {name: (room, name) for room, names in _ROOMS.items() for name in names}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy(__name__, _HOMES)
