"""The KServe v2 protocol, which Triton's and others' clients speak: bytes to values and back.

There is one input, `image`: BYTES [n], files of images. In a binary tensor they are as they are, in
JSON in base64. Outputs are by the model's kind (`OUTPUTS`), their first axis the images; masks are
PNGs of class indices. With the extension binary_data_tensor a body is JSON, of the length that the
header Inference-Header-Content-Length says, and then the tensors one after another.
"""

import base64
import io
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import HTTPException
from pydantic import BaseModel, Field, ValidationError

from vitrail import __version__
from vitrail.deploy.answers import mask_image
from vitrail.deploy.serve.bodies import check_json, check_number, of_base64
from vitrail.deploy.serve.limits import Limits
from vitrail.deploy.serve.service import Served

LENGTH = "inference-header-content-length"
INPUT = "image"
VERSION = "1"
PLATFORM = "vitrail"
SERVER = {"name": "vitrail", "version": __version__, "extensions": ["binary_tensor_data"]}
_PREFIX = struct.Struct("<I")
"""The length of each element of a binary BYTES tensor."""


class Output(NamedTuple):
    """A tensor of the answer, and what its axes after the first are: -1 where images differ."""

    name: str
    datatype: str
    axes: tuple[str | int, ...] = ()


OUTPUTS: Mapping[str, tuple[Output, ...]] = {
    "classify": (
        Output("label", "BYTES"),
        Output("probability", "FP32"),
        Output("probabilities", "FP32", ("classes",)),
    ),
    "segment": (Output("mask", "BYTES"), Output("shares", "FP32", ("classes",))),
    "detect": (
        Output("count", "INT32"),
        Output("boxes", "FP32", (-1, 4)),
        Output("scores", "FP32", (-1,)),
        Output("labels", "BYTES", (-1,)),
    ),
    "features": (Output("features", "FP32", (-1,)),),
}
"""By a model's kind. Of boxes there are as many rows as the image with the most has; `count` says
how many of them are an image's own."""


class _Loose(BaseModel):
    """What is not named here is let pass, as the protocol asks."""


class _Parameters(_Loose):
    binary_data_size: Annotated[int, Field(strict=True, ge=0)] | None = None
    binary_data: bool | None = None
    binary_data_output: bool = False
    timeout: Annotated[int, Field(ge=0)] | None = None
    shared_memory_region: str | None = None


class _Input(_Loose):
    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(max_length=8)]
    data: list[str] | None = None
    parameters: _Parameters = _Parameters()


class _Asked(_Loose):
    name: str
    parameters: _Parameters = _Parameters()


class _Inference(_Loose):
    id: str = ""
    inputs: list[_Input]
    outputs: list[_Asked] = []
    parameters: _Parameters = _Parameters()


class Wanted(NamedTuple):
    """An inference that is asked for."""

    id: str
    images: list[bytes]
    outputs: dict[str, bool]
    """By name, whether it is to be binary."""
    seconds: float | None
    """How long its answer is waited for; None: as long as the server says."""


def describe(served: Served) -> dict[str, Any]:
    """A model's metadata."""
    classes = len(served.model.names)
    return {
        "name": served.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {
                "name": output.name,
                "datatype": output.datatype,
                "shape": [-1, *(classes if axis == "classes" else axis for axis in output.axes)],
            }
            for output in OUTPUTS[served.model.kind]
        ],
    }


def config(served: Served, most: int) -> dict[str, Any]:
    """A model's configuration, as Triton names its fields."""
    about = describe(served)
    tensors = {
        side: [
            {"name": one["name"], "data_type": _TYPES[one["datatype"]], "dims": one["shape"][1:]}
            for one in about[side]
        ]
        for side in ("inputs", "outputs")
    }
    return {
        "name": served.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": most,
        "input": tensors["inputs"],
        "output": tensors["outputs"],
    }


_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "INT32": "TYPE_INT32"}


def wanted(body: bytes, length: str | None, kind: str, limits: Limits) -> Wanted:
    """What a body asks for; `length` is what the header LENGTH says, if it is there.

    Raises `HTTPException`.
    """
    if length == "0":  # the whole body is the one input
        return Wanted("", [body], dict.fromkeys(_names(kind), True), None)
    head, tail = body, b""
    if length is not None:
        if not (length.isascii() and length.isdecimal() and len(length) < 12):
            raise HTTPException(400, f"{LENGTH} '{length[:40]}' is no number of bytes")
        if int(length) > len(body):
            raise HTTPException(400, f"{LENGTH} is {length}, and the body has {len(body)} bytes")
        head, tail = body[: int(length)], body[int(length) :]
    check_json(head, limits)
    try:
        asked = _Inference.model_validate_json(head)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise HTTPException(
            400, f"the inference request{where and f', {where}'}: {fault['msg']}"
        ) from None
    outputs = {
        one.name: asked.parameters.binary_data_output
        if one.parameters.binary_data is None
        else one.parameters.binary_data
        for one in asked.outputs
    } or dict.fromkeys(_names(kind), asked.parameters.binary_data_output)
    for name in outputs:
        if name not in _names(kind):
            known = ", ".join(_names(kind))
            raise HTTPException(400, f"there is no output '{name[:60]}', but: {known}")
    micros = asked.parameters.timeout
    images = _images(asked.inputs, tail, limits)
    return Wanted(asked.id, images, outputs, micros / 1e6 if micros else None)


def _names(kind: str) -> list[str]:
    return [output.name for output in OUTPUTS[kind]]


def _images(inputs: Sequence[_Input], tail: bytes, limits: Limits) -> list[bytes]:
    if [one.name for one in inputs] != [INPUT] or inputs[0].datatype != "BYTES":
        raise HTTPException(
            400, f"give one input '{INPUT}' of datatype BYTES: the files' bytes; base64 in JSON"
        )
    image = inputs[0]
    if image.parameters.shared_memory_region is not None:
        raise HTTPException(400, "shared memory is not read: send the image's bytes")
    if (size := image.parameters.binary_data_size) is not None:
        if size != len(tail):
            raise HTTPException(400, f"binary_data_size is {size}, and {len(tail)} bytes follow")
        images = _elements(tail, limits.images)
    elif tail or image.data is None:
        raise HTTPException(400, f"input '{INPUT}' has neither data nor binary_data_size")
    else:
        images = [of_base64(text) for text in image.data]
    check_number(len(images), limits)
    if math.prod(image.shape) != len(images):
        raise HTTPException(400, f"the shape {image.shape} is not of {len(images)} images")
    return images


def _elements(tensor: bytes, most: int) -> list[bytes]:
    """The elements of a binary BYTES tensor; of too many one more than `most`."""
    found: list[bytes] = []
    start = 0
    while start < len(tensor) and len(found) <= most:
        if start + _PREFIX.size > len(tensor):
            raise HTTPException(400, "a BYTES tensor ends inside of a length")
        (size,) = _PREFIX.unpack_from(tensor, start)
        start += _PREFIX.size
        if start + size > len(tensor):
            raise HTTPException(400, f"a BYTES tensor ends before its element of {size} bytes does")
        found.append(tensor[start : start + size])
        start += size
    return found


def written(served: Served, asked: Wanted, answers: Sequence[Any]) -> tuple[bytes, dict[str, str]]:
    """A response's body and headers."""
    described, tail = [], b""
    for name, binary in asked.outputs.items():
        datatype = next(o.datatype for o in OUTPUTS[served.model.kind] if o.name == name)
        values = _values(name, served.model.names, answers)
        one: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if binary:
            raw = _raw(values)
            one["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        else:
            one["data"] = [_plain(name, value) for value in values.ravel().tolist()]
        described.append(one)
    about = {"model_name": served.name, "model_version": VERSION}
    head = json.dumps(
        {**about, **({"id": asked.id} if asked.id else {}), "outputs": described}, allow_nan=False
    ).encode()
    if not any(asked.outputs.values()):
        return head, {"content-type": "application/json"}
    return head + tail, {"content-type": "application/octet-stream", LENGTH: str(len(head))}


def _values(name: str, names: Sequence[str], answers: Sequence[Any]) -> np.ndarray:
    """An output of some images: numbers, or objects that are bytes."""
    match name:
        case "label":
            return _bytes(answer.label.encode() for answer in answers)
        case "mask":
            return _bytes(png(answer) for answer in answers)
        case "probability":
            return np.array([answer.probability for answer in answers], "<f4")
        case "probabilities" | "shares":
            each = [getattr(answer, name) for answer in answers]
            return np.array([[one.get(k, 0.0) for k in names] for one in each], "<f4")
        case "features":
            return np.stack([answer.features for answer in answers]).astype("<f4")
        case "count":
            return np.array([len(answer.scores) for answer in answers], "<i4")
    rows = max(len(answer.scores) for answer in answers)
    if name == "labels":
        return _bytes(
            answer.names[answer.labels[row]].encode() if row < len(answer.labels) else b""
            for answer in answers
            for row in range(rows)
        ).reshape(len(answers), rows)
    shape = (rows, 4) if name == "boxes" else (rows,)
    padded = np.zeros((len(answers), *shape), "<f4")
    for place, answer in zip(padded, answers, strict=True):
        own = getattr(answer, name)
        place[: len(own)] = own
    return padded


def _bytes(values: Iterable[bytes]) -> np.ndarray:
    found = list(values)
    array = np.empty(len(found), object)
    array[:] = found
    return array


def _raw(values: np.ndarray) -> bytes:
    if values.dtype != object:
        return values.tobytes()
    return b"".join(_PREFIX.pack(len(value)) + value for value in values.ravel())


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it."""
    if name == "mask":
        return base64.b64encode(value).decode()
    return value.decode() if isinstance(value, bytes) else value


def png(answer: Any) -> bytes:
    """A mask as a file: class indices, with a palette."""
    stream = io.BytesIO()
    mask_image(answer).save(stream, "PNG")
    return stream.getvalue()
