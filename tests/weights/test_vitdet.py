"""Files of ViTDet's backbones: understood by their tensors, or refused in words."""

from dataclasses import replace

import pytest
import torch

from vitrail.errors import DataError
from vitrail.models import ViT, model_config
from vitrail.weights import vitdet
from vitrail.weights.layouts import understand, write_as

SMALL = replace(
    model_config("vitdet_b"),
    depth=3,
    width=32,
    heads=2,
    mlp=64,
    image_size=(48, 48),
    window=(2, 2),
    global_blocks=(1,),
    relative=(5, 5),
)


@pytest.fixture
def ours():
    torch.manual_seed(0)
    state = ViT(SMALL).state_dict()
    return {key: torch.randn_like(tensor) for key, tensor in state.items()}


@pytest.mark.parametrize("layout", [vitdet.DETECTRON2, vitdet.HUGGING_FACE])
def test_written_and_read_it_is_the_same(layout, ours):
    theirs = layout.write(ours, SMALL)
    found = understand(theirs, {}, "it")
    assert (found.layout, found.config) == (layout, SMALL)
    assert all(torch.equal(found.state[key], tensor) for key, tensor in ours.items())
    assert found.state.keys() == ours.keys()


def test_a_detectors_other_parts_are_left_out_and_named(ours):
    net = vitdet.DETECTRON2.write(ours, SMALL)
    file = {f"backbone.net.{key}": tensor for key, tensor in net.items()}
    others = {"backbone.simfp_4.0.weight": torch.zeros(2), "roi_heads.box.fc1.bias": torch.zeros(2)}
    found = understand({**file, **others}, {}, "it")
    assert found.config == SMALL and set(found.left_out) == others.keys()


def test_tables_of_one_size_leave_a_question(ours):
    same = replace(SMALL, relative=SMALL.window)
    theirs = vitdet.DETECTRON2.write(ViT(same).state_dict(), same)
    with pytest.raises(DataError, match="which blocks attend to the whole image"):
        understand(theirs, {}, "it")
    assert understand(theirs, {"global_blocks": (1,)}, "it").config == same


@pytest.mark.parametrize(
    ("key", "tensor", "words"),
    [
        ("blocks.0.attn.rel_pos_h", torch.zeros(4, 16), "odd number"),
        ("blocks.0.attn.rel_pos_w", torch.zeros(3), "odd number"),
        ("blocks.2.attn.rel_pos_h", torch.zeros(7, 16), "3 grids"),
        ("blocks.0.attn.rel_pos_h", torch.zeros(3, 8), "rel_pos"),
        ("neck.0.weight", torch.zeros(8, 32, 1, 1), "Segment Anything"),
        ("pos_embed", torch.zeros(3), "pos_embed|position.table"),
        ("blocks.0.residual.conv1.weight", torch.zeros(3), "residual"),
    ],
)
def test_a_file_at_fault_is_refused(ours, key, tensor, words):
    theirs = {**vitdet.DETECTRON2.write(ours, SMALL), key: tensor}
    with pytest.raises(DataError, match=words):
        understand(theirs, {}, "it")


@pytest.mark.parametrize("to", ["timm", "google", "huggingface"])
@pytest.mark.parametrize("changes", [{"window": (2, 2)}, {"windows": 2}])
def test_windows_are_not_lost_in_layouts_without_them(to, changes):
    config = replace(model_config("vit_ti16"), depth=1, **changes)
    with pytest.raises(DataError, match="window"):
        write_as(to, ViT(config).state_dict(), config)
