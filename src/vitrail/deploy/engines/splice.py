"""OpenVINO models put together and cut apart, where one hands views to the next.

    image -> [resizing] -> views -> [the model, float or quantised] -> outputs

What leaves us takes images; our own engine scales with Pillow, which is what the model was measured
with, and gives views to the second part.
"""

from typing import Any

from vitrail.deploy.engines.calm import openvino
from vitrail.errors import DataError

IMAGE, VIEWS = "image", "views"
"""What the whole takes, uint8 `[b h w c]`, and its second part, uint8 `[b c H W]`."""


def joined(front: Any, model: Any) -> Any:
    """The `ov.Model` of both: `front` has one output, `model` one parameter, and keeps its results,
    their names, and what was noted in it. Neither is changed.
    """
    whole, front = model.clone(), front.clone()
    made = front.output(0).get_node().input_value(0)
    made.get_node().set_friendly_name(VIEWS)
    _feed(whole, whole.get_parameters()[0], made, front.get_parameters()[0])
    return whole


def without_front(whole: Any) -> Any:
    """What `joined` has made, from the views on. Raises `DataError` where there are none."""
    model, ov = whole.clone(), openvino()
    made = next((op for op in model.get_ops() if op.get_friendly_name() == VIEWS), None)
    if made is None:
        raise DataError(f"the OpenVINO model has nothing called '{VIEWS}' in it: export it again")
    views = made.output(0)
    parameter = ov.opset15.parameter(views.partial_shape, views.element_type, VIEWS)
    parameter.output(0).set_names({VIEWS})
    _feed(model, made, parameter.output(0), parameter)
    return model


def _feed(model: Any, old: Any, new: Any, parameter: Any) -> None:
    """Give to all that took the only output of the node `old` the output `new`, which comes from
    `parameter`: in place of the model's only one.
    """
    for taker in old.output(0).get_target_inputs():
        taker.replace_source_output(new)
    before = model.get_parameters()[0]
    model.add_parameters([parameter])
    model.remove_parameter(before)
    model.validate_nodes_and_infer_types()
