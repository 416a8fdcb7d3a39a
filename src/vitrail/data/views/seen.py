"""How a view lies in its image: scaling, cropping, mirroring and turning as one map.

    unit square of the image  --matrix-->  pixels of the view

Places are columns (x, y, 1), x to the right and y down. The image reaches from 0 to 1 on each axis,
whatever its size; a view of `w` pixels from 0 to `w`, and its first pixel's centre is at 0.5. So a
mask of another size than its image, a box and an answer find their way there and back.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64


class Seen(NamedTuple):
    """A view of an image.

    >>> half = Seen.of_box((0.0, 0.0, 320.0, 480.0), (480, 640), (224, 224))
    >>> half.there(np.array([[0.25, 0.5]])).tolist()
    [[112.0, 112.0]]
    >>> half.back(half.there(np.array([[0.25, 0.5]]))).tolist()
    [[0.25, 0.5]]
    """

    matrix: Float64[np.ndarray, "3 3"]
    """Invertible."""
    size: tuple[int, int]
    """(height, width) of the view, in pixels."""
    image: tuple[int, int]
    """(height, width) of the image, in pixels, of which nothing else here depends."""
    part: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """(left, top, right, bottom) in the image's unit square of what was cut from it for the view:
    where there is more of the view (what it was filled up with, and what a later move uncovers), it
    shows background."""

    @classmethod
    def of_box(
        cls,
        box: tuple[float, float, float, float],
        image: tuple[int, int],
        view: tuple[int, int],
    ) -> "Seen":
        """The part (left, top, right, bottom) of an image of (height, width) pixels, which may
        reach beyond it, scaled to a view of (height, width) pixels.
        """
        (height, width), (left, top, right, bottom) = image, box
        x, y = view[1] / (right - left), view[0] / (bottom - top)
        matrix = np.array([[x * width, 0, -x * left], [0, y * height, -y * top], [0, 0, 1.0]])
        shown = np.clip(np.divide(box, (width, height, width, height)), 0, 1).tolist()
        return cls(matrix, view, image, tuple(shown))

    def then(self, moved: Float64[np.ndarray, "3 3"]) -> "Seen":
        """The view after its pixels were moved: `moved` takes old places in it to new ones."""
        return self._replace(matrix=moved @ self.matrix)

    def there(self, places: Float[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n 2"]:
        """Places (x, y) in the image's unit square, in the view's pixels."""
        return _mapped(self.matrix, places)

    def back(self, places: Float[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n 2"]:
        """Places (x, y) in the view's pixels, in the image's unit square."""
        return _mapped(np.linalg.inv(self.matrix), places)


def _mapped(
    matrix: Float64[np.ndarray, "3 3"], places: Float[np.ndarray, "n 2"]
) -> Float64[np.ndarray, "n 2"]:
    return places @ matrix[:2, :2].T + matrix[:2, 2]
