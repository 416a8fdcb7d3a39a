"""What the values in the masks of three well-known data sets mean, where no file beside them says.

VOC: 0 is the background, which is a class, and 255 the border. Cityscapes: 19 of 34 ids count.
ADE20K: 0 is what has no class.
"""

from vitrail.data.sources.class_map import ClassMap

VOC = ClassMap(
    (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
        *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
        *("sheep", "sofa", "train", "tvmonitor"),
    ),
    {value: value for value in range(21)},
    colours=False,
    ignored=(255,),
)

_CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)

CITYSCAPES_TRAIN_IDS = ClassMap(
    _CITYSCAPES, {value: value for value in range(19)}, colours=False, ignored=(255,)
)
CITYSCAPES_IDS = ClassMap(
    _CITYSCAPES,
    {value: index for index, value in enumerate(_CITYSCAPES_IDS)},
    colours=False,
    ignored=tuple(value for value in (*range(-1, 34), 255) if value not in _CITYSCAPES_IDS),
)

ADE20K = ClassMap(
    tuple(str(value) for value in range(1, 151)),
    {value: value - 1 for value in range(1, 151)},
    colours=False,
    ignored=(0,),
)
