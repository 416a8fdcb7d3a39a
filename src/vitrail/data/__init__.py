"""Data: from files to labelled images. What makes batches of them is imported from its own file.

Nothing here imports torch, so that looking at data is quick.
"""

from vitrail.data.check import CheckReport as CheckReport
from vitrail.data.check import Spread as Spread
from vitrail.data.check import check as check
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
