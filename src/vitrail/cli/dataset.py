"""The flags that say how DATA is understood: the same in every verb."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from vitrail.data.sources.csvfile import Columns
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.mask_meaning import AS_THEY_SAY, MaskRules


@dataclass(frozen=True)
class DataFlags:
    """How DATA is understood: called as in `vitrail train`, or in short."""

    image_column: Annotated[str | None, tyro.conf.arg(aliases=("--image-column",))] = None
    """Its name; in a list without a header its number, from 1."""
    label_column: Annotated[str | None, tyro.conf.arg(aliases=("--label-column",))] = None
    split_column: Annotated[str | None, tyro.conf.arg(aliases=("--split-column",))] = None
    parts: Annotated[str, tyro.conf.arg(aliases=("--parts",))] = USUAL.parts
    """Which folders of a folder are its parts. auto: by their names; none: all are classes; or as
    train=DIR,val=DIR,test=DIR, where a part may be given twice."""
    follow_links: Annotated[bool, tyro.conf.arg(aliases=("--follow-links",))] = USUAL.follow_links
    """Follow symbolic links to folders elsewhere. Those to files and within the data are
    followed anyway."""

    def columns(self) -> Columns:
        """As `open_data` takes them."""
        return Columns(self.image_column, self.label_column, self.split_column)

    def rules(self) -> FolderRules:
        """As `open_data` takes them."""
        return FolderRules(self.parts, self.follow_links)


@dataclass(frozen=True)
class AnyDataFlags(DataFlags):
    """The same for verbs that look at whatever is there, masks as well."""

    caption_column: Annotated[str | None, tyro.conf.arg(aliases=("--caption-column",))] = None
    """Of images with texts."""
    masks: MaskRules = AS_THEY_SAY
    """How masks are understood, where that is not as they say themselves."""

    def columns(self) -> Columns:
        return super().columns()._replace(caption=self.caption_column)


OfData = Annotated[DataFlags, tyro.conf.arg(name="data")]
OfAnyData = Annotated[AnyDataFlags, tyro.conf.arg(name="data")]
AS_FOUND = DataFlags()
"""Nothing is told: columns and parts are found by their names, or by what they hold."""
ALL_AS_FOUND = AnyDataFlags()
