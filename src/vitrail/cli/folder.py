"""The flags that say how a folder of images is understood: the same in every verb."""

from typing import Annotated

import tyro

from vitrail.data.layout import FolderRules

FolderFlags = Annotated[FolderRules, tyro.conf.arg(name="data")]
"""--data.parts and --data.follow-links, as `vitrail train` calls them."""
