"""What it costs that a model scales images itself: how far its pixels are from Pillow's, and
whether its answers are others than where Pillow scales.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vitrail.data import Source
from vitrail.deploy.bundle import Bundle
from vitrail.deploy.engines import Engine
from vitrail.deploy.engines.calm import core
from vitrail.deploy.export.alike import same_answer
from vitrail.deploy.export.compose import resizing
from vitrail.deploy.export.pixels import PixelDifference, pixel_difference
from vitrail.tasks.answers import Outputs

_MOST = 64
"""Images that are looked at."""

Run = Callable[[UInt8[np.ndarray, "b h w c"]], Outputs]


class Inside(NamedTuple):
    """Of images that the model scaled, beside the same that Pillow did."""

    pixels: PixelDifference
    same: float
    """The share of images with the same answer."""

    def sentence(self) -> str:
        """For a terminal."""
        far = self.pixels
        return (
            f"its own resizing: at most {far.most} of 255 levels from Pillow's, {far.at_all:.2%} "
            f"of the pixels off, {self.same:.1%} of {far.images} answers the same"
        )


def compare(bundle: Bundle, engine: Engine, source: Source) -> Inside:
    """Ask about held-out images both ways."""
    some = range(min(_MOST, len(source)))
    front, whole = _RUNS[bundle.runtime](bundle)
    preprocess, same = bundle.preprocess, []

    def images() -> Any:
        return (source.load(i) for i in some)

    for image in images():
        pixels = np.array(preprocess.convert(image))
        pixels = pixels.reshape(1, *pixels.shape[:2], preprocess.channels)
        view, seen = preprocess.view(image), preprocess.seen(image.height, image.width)
        (one,) = bundle.reading.answers(engine.run, [view], [seen])
        said = whole(pixels)
        (other,) = bundle.reading.answers(lambda _: said, [view], [seen])  # noqa: B023
        same.append(same_answer(one, other, bundle.reading.several))
    pixels_off = pixel_difference(images(), preprocess, lambda x: front(x)["views"])
    return Inside(pixels_off, float(np.mean(same)))


def _in_onnx(bundle: Bundle) -> tuple[Run, Run]:
    import onnxruntime

    def of(model: bytes) -> Run:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_outputs()]
        return lambda x: dict(zip(names, session.run(names, {"image": x}), strict=True))

    return of(resizing(bundle.preprocess).SerializeToString()), of(bundle.model.read_bytes())


def _in_openvino(bundle: Bundle) -> tuple[Run, Run]:

    def of(model: Any) -> Run:
        compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = [output.get_any_name() for output in compiled.outputs]

        def run(x: UInt8[np.ndarray, "b h w c"]) -> Outputs:
            found = compiled([x])
            return {name: found[i] for i, name in enumerate(names)}

        return run

    front = core().read_model(resizing(bundle.preprocess).SerializeToString())
    return of(front), of(core().read_model(str(bundle.model)))


_RUNS: Mapping[str, Callable[[Bundle], tuple[Run, Run]]] = {
    "onnx": _in_onnx,
    "openvino": _in_openvino,
}
"""Runtime -> what its resizing alone makes of images, and what the model says of them."""
