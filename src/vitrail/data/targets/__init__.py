"""What is said of images: classes, masks, boxes, texts, nothing; one file a kind."""

from vitrail.data.targets.boxes import ANY as ANY
from vitrail.data.targets.boxes import NO_BOXES as NO_BOXES
from vitrail.data.targets.boxes import Boxes as Boxes
from vitrail.data.targets.boxes import Said as Said
from vitrail.data.targets.boxes import Sizes as Sizes
from vitrail.data.targets.classes import Classes as Classes
from vitrail.data.targets.classes import classes_of as classes_of
from vitrail.data.targets.coding import IGNORE as IGNORE
from vitrail.data.targets.coding import Coding as Coding
from vitrail.data.targets.masks import MaskArrays as MaskArrays
from vitrail.data.targets.masks import Masks as Masks
from vitrail.data.targets.nothing import Nothing as Nothing
from vitrail.data.targets.targets import Targets as Targets
from vitrail.data.targets.targets import blank_rows as blank_rows
from vitrail.data.targets.targets import stacked as stacked
from vitrail.data.targets.texts import Texts as Texts
