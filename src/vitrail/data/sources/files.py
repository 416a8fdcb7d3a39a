"""Images in files below one folder: what every source of files does alike."""

from pathlib import Path

from PIL import Image

from vitrail.data.names import PackedNames, printable
from vitrail.data.pixels.decode import read_image
from vitrail.data.sources.source import file_stamp


class FileImages:
    """Images by their names in a folder; what is said of them, a source adds."""

    def __init__(self, folder: Path | str, names: PackedNames) -> None:
        self.folder = str(folder)
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def key(self, i: int) -> str:
        """Its name, printable."""
        return printable(self.names[i])

    def load(self, i: int) -> Image.Image:
        """Image `i`, decoded; or `UnreadableImage`."""
        return read_image(self.encoded(i))

    def encoded(self, i: int) -> Path:
        """Where image `i` lies."""
        return Path(self.folder, self.names[i])

    def stamp(self, i: int) -> str:
        """Size and time of change."""
        return file_stamp(f"{self.folder}/{self.names[i]}")
