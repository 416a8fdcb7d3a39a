"""RF-DETR's files: transformers' own models give the same, and ours come back as they were."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from close import close
from vitrail.errors import DataError
from vitrail.heads import DetectHeadConfig, build_detector
from vitrail.heads.deformable import QueryBoxes, QueryBoxesConfig
from vitrail.models import build
from vitrail.tasks.box_matching import Truths, box_loss
from vitrail.weights.box_heads import load_box_head
from vitrail.weights.load import convert, head_is_written, open_weights, pretrained
from vitrail.weights.rfdetr import (
    COCO,
    is_one,
    plain,
    read_rfdetr,
    their_name,
    write_rfdetr,
)

CLASSES = 5


def theirs(**changes):
    backbone = hf.RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        num_windows=2,
        out_features=["stage1", "stage2", "stage4"],
    )
    config = {
        "d_model": 32,
        "decoder_ffn_dim": 48,
        "decoder_layers": 2,
        "num_queries": 7,
        "group_detr": 3,
        "decoder_cross_attention_heads": 4,
        "decoder_self_attention_heads": 2,
        "num_labels": CLASSES,
        "dropout": 0.0,
    }
    config["backbone_config"] = backbone
    return hf.RfDetrForObjectDetection(hf.RfDetrConfig(**config | changes))


def ours(other) -> tuple[torch.nn.Module, QueryBoxes]:
    read = read_rfdetr(other.state_dict(), other.config.to_dict())
    body = build(read.backbone)
    head = QueryBoxes((32,) * 3, read.classes, read.head)
    for name, module in (("backbone.", body), ("head.", head)):
        module.load_state_dict(
            {k.removeprefix(name): t for k, t in read.state.items() if k.startswith(name)}
        )
    return body.eval(), head.eval()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_outputs_as_transformers(batch, randomised):
    other = randomised(theirs())
    body, head = ours(other)
    x = torch.randn(batch, 3, 64, 64)
    with torch.inference_mode():
        expected = other(x)
        found = head.predictions(body.taps(x, head.config.taps))
    close(found[-1].logits, expected.logits)
    close(found[-1].boxes, expected.pred_boxes)
    close(found[0].logits, expected.enc_outputs_class)
    close(found[0].boxes, expected.enc_outputs_coord_logits)


def test_the_same_loss_as_transformers(randomised):
    """Of all groups, of the first stage and each layer; and its gradients."""
    other = randomised(theirs()).train()
    body, head = ours(other)
    head.train()
    x = torch.randn(3, 3, 64, 64)
    counts = (4, 0, 2)
    sides = [torch.rand(n, 2) * 0.5 + 0.1 for n in counts]
    labels = [
        {
            "class_labels": torch.randint(CLASSES, (n,)),
            "boxes": torch.cat([torch.rand(n, 2) * 0.5 + 0.25, side], dim=1),
        }
        for n, side in zip(counts, sides, strict=True)
    ]
    expected = other(x, labels=labels)
    targets = padded(labels, 4)
    found = box_loss(
        head.predictions(body.taps(x, head.config.taps)), Truths.of(targets, (64, 64)), head.groups
    )
    close(found.total, expected.loss)
    expected.loss.backward()
    found.total.backward()
    close(head.queries.grad.flatten(0, 1), other.model.query_feat.weight.grad, 1e-4)
    close(body.stem.proj.weight.grad, patches_of(other).projection.weight.grad, 1e-4)


def patches_of(other):
    return other.model.backbone.backbone.embeddings.patch_embeddings


def padded(labels: list[dict], most: int) -> dict[str, torch.Tensor]:
    """As a batch has them, in pixels of 64."""
    boxes = torch.zeros(len(labels), most, 4)
    classes = torch.full((len(labels), most), -1)
    for i, one in enumerate(labels):
        n = len(one["class_labels"])
        centres, sides = one["boxes"].chunk(2, dim=1)
        boxes[i, :n] = 64 * torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
        classes[i, :n] = one["class_labels"]
    return {"boxes": boxes, "labels": classes, "ignored": -(classes == -1).to(torch.int8)}


def test_as_many_parameters_as_transformers_base():
    """32,248,546 with 91 classes, of which 384 are a token of the ViT's pre-training."""
    with torch.device("meta"):
        other = hf.RfDetrForObjectDetection(hf.RfDetrConfig(num_labels=91))
        read = read_rfdetr(other.state_dict(), other.config.to_dict())
        head = QueryBoxes((384,) * 4, 91, read.head)
        body = build(read.backbone)
    assert read.backbone.windows == 4 and read.backbone.global_blocks == (2, 5, 8, 11)
    assert read.head == QueryBoxesConfig(points=4, projector_eps=1e-5, taps=(1, 4, 7, 10))
    count = sum(t.numel() for module in (head, body) for t in module.parameters())
    assert count == sum(t.numel() for t in other.parameters()) - 384 == 32_248_546 - 384
    assert read.preprocess.size == (560, 560)


def test_two_maps_are_read_as_in_lw_detr(randomised):
    """Its decoder is RF-DETR's; its projector has batch norms."""
    backbone = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "num_windows": 4,
        "window_block_indices": [0],
        "out_indices": [0, 1],
    }
    config = hf.LwDetrConfig(
        backbone_config=hf.LwDetrViTConfig(**backbone),
        projector_scale_factors=[2.0, 0.5],
        d_model=32,
        decoder_ffn_dim=48,
        decoder_layers=2,
        num_queries=7,
        group_detr=2,
        decoder_cross_attention_heads=4,
        decoder_self_attention_heads=2,
        num_labels=CLASSES,
    )
    other = randomised(hf.LwDetrForObjectDetection(config))
    shape = QueryBoxesConfig(
        queries=7,
        groups=2,
        layers=2,
        width=32,
        heads=2,
        cross_heads=4,
        points=4,
        mlp=48,
        scales=(2.0, 0.5),
    )
    head = QueryBoxes((32, 32), CLASSES, shape).eval()
    state = plain(other.state_dict())
    own = head.state_dict()
    for key, tensor in own.items():
        if not key.startswith("projectors"):
            tensor.copy_(state[their_name(key)].view_as(tensor))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = other(x)
        levels = other.model.backbone(x, torch.ones(2, 64, 64))
        found = head.decoded(tuple(level for level, _ in levels))[-1]
    assert len(levels) == 2
    close(found.logits, expected.logits)
    close(found.boxes, expected.pred_boxes)


def saved(other, folder) -> dict[str, torch.Tensor]:
    """The tensors of its file, which transformers writes with the names of its authors."""
    other.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def published(**changes):
    """Of the heads and patches that Roboflow's own have, whose files say nothing of them."""
    backbone = hf.RfDetrDinov2Config(
        hidden_size=64,
        num_hidden_layers=12,
        num_attention_heads=1,
        mlp_ratio=1,
        image_size=64,
        patch_size=16,
        num_windows=2,
        out_features=["stage3", "stage6", "stage9", "stage12"],
    )
    own = {"decoder_self_attention_heads": 8, "decoder_cross_attention_heads": 16}
    own |= {"decoder_n_points": 2, "layer_norm_eps": 1e-6, "backbone_config": backbone}
    return theirs(**own | changes)


def test_the_authors_names_give_the_same(tmp_path, randomised):
    other = randomised(published(num_labels=91))
    expected = read_rfdetr(other.state_dict(), other.config.to_dict())
    state = saved(other, tmp_path)
    assert is_one(state)
    assert "transformer.decoder.layers.1.self_attn.in_proj_weight" in state
    found = read_rfdetr({**state, "segmentation_head.bias": torch.zeros(1)})
    assert found.backbone == expected.backbone and found.head == expected.head
    assert found.head.taps == (2, 5, 8, 11) and found.backbone.global_blocks == (3, 6, 9)
    assert set(found.state) == set(expected.state)
    assert all(torch.equal(found.state[key], t) for key, t in expected.state.items())
    assert found.left_out == ("segmentation_head.bias",) and len(found.assumed) == 3
    assert found.names[1] == "person" and found.names[12] == "N/A 12"
    assert found.names[90] == "toothbrush" and found.preprocess.size == (64, 64)


def test_coco_has_80_names():
    assert len(COCO) == 91 and len(set(COCO)) == 81


def test_there_and_back(tmp_path, randomised):
    other = randomised(theirs())
    state = saved(other, tmp_path)
    read = read_rfdetr(state, other.config.to_dict())
    written = write_rfdetr(read.state, read.backbone, read.head)
    assert set(written) == set(state)
    mask = "backbone.0.encoder.encoder.embeddings.mask_token"  # of a training that is over
    assert all(torch.equal(written[key], t) for key, t in state.items() if key != mask)


def test_classes_are_those_of_the_file(randomised):
    names = {0: "N/A", 1: "car", 2: "N/A", 3: "bus", 4: "van"}
    other = theirs(id2label=names)
    read = read_rfdetr(other.state_dict(), {**other.config.to_dict(), "id2label": NAMED})
    assert read.names == ("N/A 0", "car", "N/A 2", "bus", "van")
    assert not read.assumed


NAMED = {"0": "N/A", "1": "car", "2": "N/A", "3": "bus", "4": "van"}


def test_what_is_no_rf_detr(tmp_path):
    other = theirs()
    state, config = saved(other, tmp_path), other.config.to_dict()
    with pytest.raises(DataError, match="this is no RF-DETR"):
        read_rfdetr({"vit.head": torch.zeros(1)})
    key = "transformer.decoder.layers.1.linear1.weight"
    with pytest.raises(DataError, match=r"missing 'transformer.decoder.layers.1.linear1.weight'"):
        read_rfdetr({k: t for k, t in state.items() if k != key}, config)
    with pytest.raises(
        DataError, match=r"of another shape 'transformer.decoder.layers.1.linear1.weight"
    ):
        read_rfdetr({**state, key: torch.zeros(3)}, config)
    with pytest.raises(DataError, match=r"unexpected 'more.weight'"):
        read_rfdetr({**state, "more.weight": torch.zeros(3)}, config)
    with pytest.raises(DataError, match="nothing says the windows"):
        read_rfdetr(state)
    with pytest.raises(DataError, match="not whole"):
        read_rfdetr({k: t for k, t in state.items() if "position_embeddings" not in k}, config)
    with pytest.raises(DataError, match="no 5 groups"):
        extra = {f"transformer.enc_output.{i}.weight": torch.zeros(1) for i in (3, 4)}
        read_rfdetr({**state, **extra}, config)
    with pytest.raises(DataError, match="other nonlinearities"):
        read_rfdetr(state, {**config, "activation_function": "gelu"})
    with pytest.raises(DataError, match="heads"):
        read_rfdetr(state, {**config, "decoder_cross_attention_heads": "many"})


@pytest.fixture
def folder(tmp_path, randomised):
    """As `save_pretrained` writes it."""
    other = randomised(theirs())
    other.config.id2label = {int(i): name for i, name in NAMED.items()}
    other.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_ours_keeps_the_head_and_its_classes(folder, tmp_path):
    opened = open_weights(folder)
    assert opened.layout == "rfdetr" and opened.config.windows == 2
    assert opened.boxes.names == ("N/A 0", "car", "N/A 2", "bus", "van") and not opened.assumed
    ours_, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    again = open_weights(convert(opened, "vitrail", ours_))
    assert again.config == opened.config and again.boxes.config == opened.boxes.config
    assert again.boxes.names == opened.boxes.names and again.preprocess == opened.preprocess
    for one, other in ((again.state, opened.state), (again.boxes.state, opened.boxes.state)):
        assert set(one) == set(other) and all(torch.equal(one[key], t) for key, t in other.items())
    assert head_is_written(opened, "huggingface") and not head_is_written(opened, "timm")
    written = load_file(convert(again, "huggingface", back))
    assert set(written) == set(load_file(folder / "model.safetensors"))
    other = hf.RfDetrForObjectDetection.from_pretrained(folder)
    other.save_pretrained(tmp_path / "in memory", save_original_format=False)
    named = load_file(tmp_path / "in memory" / "model.safetensors")
    assert "model.decoder.layers.1.self_attn.q_proj.weight" in named
    third = open_weights(tmp_path / "in memory")
    assert all(torch.equal(third.boxes.state[key], t) for key, t in opened.boxes.state.items())


def test_the_authors_own_file_is_opened(tmp_path, randomised):
    """A torch file with the arguments of its training."""
    state = saved(randomised(published()), tmp_path / "theirs")
    torch.save({"model": state, "args": Namespace(num_queries=7)}, tmp_path / "rf-detr.pth")
    opened = open_weights(tmp_path / "rf-detr.pth")
    assert opened.layout == "rfdetr" and opened.boxes.names == ()
    assert opened.boxes.config.query.queries == 7 and len(opened.assumed) == 2
    with pytest.warns(UserWarning, match="the head of detection is left out"):
        assert pretrained(tmp_path / "rf-detr.pth").config == opened.config


def test_a_new_task_keeps_the_classes_it_has_in_common(folder):
    opened = open_weights(folder)
    old = opened.boxes

    def detector(classes, config=old.config):
        return build_detector(build(replace(opened.config, classes=0)), config, classes)

    model = detector(2)
    assert load_box_head(model, old, ("van", "car")) == ["head: kept, with 2 of its 5 classes"]
    head = model.head
    close(head.classifier.bias, old.state["head.classifier.bias"][[4, 1]])
    first = head.proposals[2].classifier
    close(first.bias, old.state["head.proposals.2.classifier.bias"][[4, 1]])
    (said,) = load_box_head(detector(1), old, ("tree",))
    assert said == "head: kept, but what says the classes is new: the old one does not know 'tree'"
    other = replace(old.config, query=replace(old.config.query, layers=1))
    (said,) = load_box_head(detector(2, other), old, ("van", "car"))
    assert "a new one: that of the weights is of another shape" in said
    (said,) = load_box_head(detector(2, DetectHeadConfig(width=8)), old, ("van", "car"))
    assert said == "head: a new one, dense: that of the weights is queries"


def test_a_header_that_lies(folder, tmp_path):
    opened = open_weights(folder)
    path = convert(opened, "vitrail", tmp_path / "ours.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["vitrail"])
    for field, value, why in (
        ("layers", 10**9, "must be 1 to 1,000"),
        ("layers", 1, "does not fit its config"),
        ("scales", [7.0], "scales"),
    ):
        lie = {**header, "boxes": {**header["boxes"]}}
        said = header["boxes"]["config"]
        lie["boxes"]["config"] = {**said, "query": {**said["query"], field: value}}
        save_file(tensors, tmp_path / "lie.safetensors", {"vitrail": json.dumps(lie)})
        with pytest.raises(DataError, match=why):
            open_weights(tmp_path / "lie.safetensors")
