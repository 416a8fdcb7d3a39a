"""Every layout: recognised by its keys, equal to its own code's outputs, there and back."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from close import close
from vitrail.errors import DataError, UsageError
from vitrail.models import ViT, ViTConfig, build
from vitrail.nn import resample_table
from vitrail.weights.architectures import told_by_timm
from vitrail.weights.layouts import LAYOUTS, Found, recognise, understand, write_as
from vitrail.weights.timm import TIMM
from vitrail.weights.unseen import UNSEEN
from weights.sources import (
    CLASSES,
    HUGGING_FACE,
    SOURCES,
    SQUARE,
    P,
    Source,
    in_turns,
    naflex_inputs,
    naflex_pooled,
    one_of_each,
)

every_source = pytest.mark.parametrize("name", SOURCES)


def opened(source: Source, state: dict[str, Tensor]) -> Found:
    told = {"heads": source.expected.heads, "image_size": source.size, **source.told}
    return understand(state, told, "a file")


def model_of(found: Found) -> ViT:
    model = ViT(found.config).eval()
    model.load_state_dict(found.state)
    return model


@every_source
def test_outputs_are_those_of_their_own_code(name, randomised, tmp_path):
    source = SOURCES[name]
    theirs = randomised(source.build())
    found = opened(source, source.tensors(theirs, tmp_path))
    assert found.layout.name == source.layout
    assert found.config == source.expected
    x = torch.randn(3, 3, *source.size)
    with torch.inference_mode():
        expected = source.run(theirs, x)
        assert 0.2 < expected.std() < 3, "outputs of order 1"
        close(model_of(found)(x), expected)
        close(model_of(found)(x[:1]), expected[:1])


@every_source
def test_what_is_left_out_and_assumed_is_named(name, randomised, tmp_path):
    source = SOURCES[name]
    found = opened(source, source.tensors(randomised(source.build()), tmp_path))
    assert set(found.left_out) == source.left_out
    fields = [words for words in found.assumed if words not in found.layout.takes]
    assumed = dict(words.split(", as in ")[0].split(" ", 1) for words in fields)
    assert len(found.assumed) == len(fields) + len(found.layout.takes)
    missing = {*found.layout.assumes, "pool"} - set(source.told)
    if found.layout is TIMM:  # others have the same names: DINO, MAE, MoCo v3
        missing |= {"resample"}
    if found.config.activation == "swiglu":  # which the shapes show
        missing -= {"activation"}
    missing &= UNSEEN.keys()
    if found.config.pool == "map":  # so is this
        missing -= {"pool"}
    assert assumed == {field: str(getattr(found.config, field)) for field in missing}


@every_source
def test_a_file_comes_back_bit_by_bit(name, randomised, tmp_path):
    source = SOURCES[name]
    file = source.tensors(randomised(source.build()), tmp_path)
    found = opened(source, file)
    _, prefix = recognise(file, "a file")
    back = found.layout.write(found.state, found.config)
    again = found.layout.read(back, found.config)
    for key, tensor in found.state.items():
        assert torch.equal(again[key], tensor), key
    if source.exact:

        def bare(key: str) -> str:
            return key.removeprefix(prefix).removeprefix("vision_model.")

        wanted = {bare(k): t for k, t in file.items() if k not in source.left_out}
        given = {bare(k): t for k, t in back.items()}
        extra = given.keys() - wanted.keys()
        assert all(found.layout.leaves_out(key) for key in extra), "a mask token of zeros"
        for key, tensor in wanted.items():
            assert torch.equal(given[key], tensor), key


@every_source
def test_our_weights_come_back_bit_by_bit(name, randomised):
    source = SOURCES[name]
    layout, config = LAYOUTS[source.layout], source.expected
    state = randomised(ViT(config)).state_dict()
    if "eva" in source.layout or "gap" in source.layout:
        with pytest.raises(DataError, match=r"keys have no bias there.* set the middle"):
            layout.write(state, config)
    if not source.key_bias or "eva" in source.layout or "gap" in source.layout:
        for key in state:
            if key.endswith("attn.qkv.bias"):
                state[key].chunk(3)[1].zero_()
    before = {key: tensor.clone() for key, tensor in state.items()}
    found = layout.read(layout.write(state, config), config)
    assert found.keys() == state.keys()
    for key, tensor in before.items():
        assert torch.equal(found[key], tensor), key
        assert torch.equal(state[key], tensor), f"{key} was changed in place"


@pytest.mark.parametrize("name", ["PE Core", "PE Lang", "EVA-02, small", "EVA-02-CLIP"])
def test_their_own_names_are_those_that_timm_reads(name, randomised):
    theirs = randomised(SOURCES[name].build())
    file = SOURCES[name].file(dict(theirs.state_dict()))
    read = timm.models.eva.checkpoint_filter_fn(file, theirs)
    for key, tensor in theirs.state_dict().items():
        if key == "head.bias" and "PE" in name:  # their projection has none
            tensor = torch.zeros(CLASSES)
        assert torch.equal(read.pop(key), tensor), key
    assert not read


def test_a_table_and_turned_queries_are_told_of_what_looks_like_deit3(randomised):
    """RoPE-ViT with a position table, in whose tensors nothing shows that queries are turned."""
    theirs = timm.models.eva.Eva(
        img_size=SQUARE,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        mlp_ratio=2.0,
        num_classes=CLASSES,
        global_pool="token",
        attn_type="rope",
        no_embed_class=True,
        use_rot_pos_emb=True,
        rope_grid_indexing="xy",
        rope_temperature=100.0,
        init_values=0.1,
        dynamic_img_size=True,
    )
    file = randomised(theirs).state_dict()
    told = {"heads": 3, "position": "learned_rope", "resample": "bicubic_antialias"}
    with pytest.raises(DataError, match=r"by whose angles .*: say rope='axial' for RoPE-ViT"):
        understand(file, told, "a file")
    found = understand(file, {**told, "rope": "axial"}, "a file")
    assert not any(words.startswith("no positions but") for words in found.assumed)
    for size in (SQUARE, (16, 40)):
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            close(model_of(found)(x), theirs(x))
    back = write_as("timm", found.state, found.config)
    assert back.keys() == file.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in file.items())
    assert understand(file, {"heads": 3}, "a file").config.position == "learned"


# --- however it was wrapped ---

WRAPPERS = (
    *("module.", "model.", "net.", "_orig_mod.", "state_dict.", "ema.", "ema_model.module."),
    *("backbone.", "encoder.", "model.model.", "visual.trunk.", "teacher."),
)


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(prefix=st.lists(st.sampled_from(WRAPPERS), min_size=1, max_size=4).map("".join))
@pytest.mark.parametrize("name", {source.layout: name for name, source in SOURCES.items()}.values())
def test_wrappers_change_nothing(name, prefix, randomised, tmp_path):
    """Whose a file is said to be, its tensors and what is assumed are those of the bare file."""
    source = SOURCES[name]
    file = source.tensors(randomised(source.build()), tmp_path)
    bare, wrapped = opened(source, file), opened(source, {prefix + k: t for k, t in file.items()})
    assert wrapped.layout is bare.layout
    assert (wrapped.config, wrapped.assumed) == (bare.config, bare.assumed)
    assert wrapped.left_out == tuple(prefix + key for key in bare.left_out)
    assert wrapped.state.keys() == bare.state.keys()
    assert all(torch.equal(wrapped.state[key], tensor) for key, tensor in bare.state.items())


@pytest.mark.parametrize("other", ["ema_model.module.", "momentum.", "encoder_k."])
def test_of_two_models_in_a_file_the_evaluated_one_is_taken_or_asked_for(other):
    file = file_of("timm", "model.") | file_of("timm", other)
    found = opened(SOURCES["timm"], file)
    assert set(found.left_out) == {key for key in file if key.startswith(other)}
    both = file_of("timm", "encoder_q.") | file_of("timm", other.replace("model", "net"))
    with pytest.raises(DataError, match=r"holds several models.*say which one is meant, part="):
        opened(SOURCES["timm"], {k.replace("module.", ""): t for k, t in both.items()})


def test_a_projection_beside_a_tower_is_its_head():
    """open_clip's, of which timm's model does not know."""
    whole = file_of("timm")
    file = {
        key.replace("head.", "visual.head.proj.")
        if key.startswith("head.")
        else f"visual.trunk.{key}": tensor
        for key, tensor in whole.items()
    }
    found, plain = opened(SOURCES["timm"], file), opened(SOURCES["timm"], whole)
    assert found.left_out == () and found.config == plain.config and found.config.classes
    assert all(torch.equal(found.state[key], tensor) for key, tensor in plain.state.items())
    del file["visual.head.proj.bias"]
    bare = opened(SOURCES["timm"], file)
    assert not bare.config.head_bias
    assert torch.equal(bare.state["head.weight"], plain.state["head.weight"])


def test_every_layout_has_a_source():
    tested = {source.layout for source in SOURCES.values()}
    tested |= {"google", "huggingface-eomt"}  # test_google.py, test_eomt.py
    tested |= {"detectron2-vitdet", "huggingface-vitdet"}  # test_vitdet.py
    assert tested == set(LAYOUTS)


# --- what has to be asked ---


def file_of(name: str, prefix: str = "") -> dict[str, Tensor]:
    """A file of the layout that a source writes, by our own hand."""
    source = SOURCES[name]
    state = LAYOUTS[source.layout].write(build(source.expected).state_dict(), source.expected)
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("name", ["OpenAI's CLIP", "HF CLIP, the image tower", "timm, CLIP"])
def test_clips_activation_is_asked_for(name):
    source = SOURCES[name]
    with pytest.raises(
        DataError, match=r"activation='gelu_quick' for OpenAI's.*activation='gelu' for"
    ):
        understand(file_of(name), {"image_size": source.size, "heads": 3}, "a file")


def test_mocos_heads_are_asked_for_at_the_width_where_they_are_its_own():
    config = ViTConfig(width=384, depth=1, heads=12, mlp=1536, image_size=(32, 32), classes=0)
    state = LAYOUTS["mocov3"].write(build(config).state_dict(), config)
    file = {f"module.base_encoder.{key}": tensor for key, tensor in state.items()}
    with pytest.raises(DataError, match="MoCo v3's ViT-S has 12 and DeiT's 6: say heads=12 or"):
        understand(file, {}, "a file")
    assert understand(file, {"heads": 12}, "a file").config.heads == 12
    # The same tensors without the prefix are as likely another's.
    with pytest.raises(DataError, match="no published model has width 384, depth 1"):
        understand(state, {}, "a file")


def test_heads_are_those_of_the_published_models_of_the_shape():
    config = ViTConfig(width=192, heads=3, mlp=768, image_size=(32, 32), classes=2)
    found = understand(write_as("timm", build(config).state_dict(), config), {}, "a file")
    assert found.config == config
    assert "heads 3, as in vit_ti16" in found.assumed


def test_an_oblong_grid_is_asked_for():
    file = file_of("timm")
    with pytest.raises(
        DataError, match=r"7 rows, no square grid: .* image_size=\(16, 24\) if that was 2x3"
    ):
        understand(file, {"heads": 3}, "a file")
    with pytest.raises(DataError, match="no square grid"):
        understand(file, {"heads": 3, "image_size": (32, 32)}, "a file")


def test_told_sizes_win_over_a_square_that_would_do_as_well():
    config = ViTConfig(**{**vars(SOURCES["timm"].expected), "image_size": (8, 72)})
    file = write_as("timm", build(config).state_dict(), config)
    assert understand(file, {"heads": 3}, "a file").config.image_size == (24, 24)
    told = {"heads": 3, "image_size": (8, 72)}
    assert understand(file, told, "a file").config.image_size == (8, 72)


def test_a_size_that_is_no_whole_number_of_patches_is_cut_to_one():
    """Of google/siglip-so400m-patch14-384, which has patches of 14 pixels."""
    source = SOURCES["HF SigLIP, the image tower"]
    told = {"heads": 3, "image_size": (28, 28)}  # patches of 8, 3x3 of them
    found = understand(file_of("HF SigLIP, the image tower"), told, "a file")
    assert found.config.image_size == source.size
    assert "image_size (24, 24), by its positions, though (28, 28) is said" in found.assumed


# --- positions on another grid, as their own code brings them there ---


def interpolating(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, interpolate_pos_encoding=True)


ANY_SIZE = ("timm-naflex", "timm-dinov3", "dinov3", "huggingface-dinov3")
"""Layouts whose own code takes images of any size as it is."""
RESAMPLED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "HF ViT": lambda model, x: interpolating(model, x).logits,
    "HF DeiT with teacher": lambda model, x: interpolating(model, x).logits,
    "HF DINOv2": SOURCES["HF DINOv2"].run,
    "HF DINOv2 with registers": SOURCES["HF DINOv2 with registers"].run,
    "HF CLIP, the image tower": lambda model, x: interpolating(model, x).image_embeds,
    "HF SigLIP, the image tower": lambda model, x: interpolating(model, x).pooler_output,
    "HF TIPSv2, the image tower": SOURCES["HF TIPSv2, the image tower"].run,
    "HF I-JEPA, a classifier": lambda model, x: interpolating(model, x).logits,
    "HF SigLIP without its head, as in PaliGemma": lambda model, x: interpolating(
        model, x
    ).last_hidden_state.mean(dim=1),
    "HF Idefics3": SOURCES["HF Idefics3"].run,
    "HF SigLIP 2 of any size": naflex_pooled,
    "HF DINOv3": SOURCES["HF DINOv3"].run,
    "DINOv3": SOURCES["DINOv3"].run,
    "timm, NaFlex": SOURCES["timm, NaFlex"].run,
    "timm, SigLIP 2 of any size": SOURCES["timm, SigLIP 2 of any size"].run,
    "timm": SOURCES["timm"].run,
    "timm, no_embed_class and registers": SOURCES["timm, no_embed_class and registers"].run,
    **{
        name: SOURCES[name].run
        for name in (
            *("timm, EVA-02-CLIP", "timm, EVA-02, small", "timm, rotary, registers"),
            *("timm, RoPE-ViT", "timm, PE Core", "timm, PE Lang"),
        )
    },
}


@pytest.mark.parametrize("size", [(40, 24), (16, 32), (64, 48)], ids=str)
@pytest.mark.parametrize("name", RESAMPLED)
def test_positions_are_resampled_as_their_own_code_does(name, size, randomised, tmp_path):
    source = SOURCES[name]
    theirs = source.build()
    if source.layout.startswith(ANY_SIZE):
        pass
    elif "timm" in name:
        theirs = source.build(img_size=SQUARE, dynamic_img_size=True)
        source = replace(source, size=SQUARE)
    elif source.size != SQUARE:
        theirs = source.build(size=SQUARE)  # transformers takes a table as square
        source = replace(source, size=SQUARE)
    ours = model_of(opened(source, source.tensors(randomised(theirs), tmp_path)))
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = RESAMPLED[name](theirs, x)
        close(ours(x), expected)


def batch_of_sizes(shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Images of so many patches at the top left of a canvas, noise around them; and the numbers."""
    rows, columns = (max(sides) for sides in zip(*shapes, strict=True))
    return torch.randn(len(shapes), 3, rows * P, columns * P), torch.tensor(shapes)


SHAPES = [(2, 3), (4, 2), (3, 3)]  # torch 2.13 resamples to one column wrongly


@pytest.mark.parametrize(
    "name", ["HF SigLIP 2 of any size", "timm, SigLIP 2 of any size", "timm, NaFlex"]
)
def test_images_of_any_size_share_a_batch_as_in_naflex(name, randomised, tmp_path):
    source = SOURCES[name]
    theirs = randomised(source.build())
    ours = model_of(opened(source, source.tensors(theirs, tmp_path)))
    x, extent = batch_of_sizes(SHAPES)
    with torch.inference_mode():
        if name.startswith("HF"):
            expected = naflex_pooled(theirs, x, SHAPES)
        else:
            inputs = naflex_inputs(x, SHAPES)
            grids = [torch.cartesian_prod(*map(torch.arange, shape)) for shape in SHAPES]
            length = inputs["pixel_values"].shape[1]
            where = [nn.functional.pad(grid, (0, 0, 0, length - len(grid))) for grid in grids]
            valid = inputs["pixel_attention_mask"].bool()
            patches = {"patches": inputs["pixel_values"], "patch_coord": torch.stack(where)}
            expected = theirs(patches | {"patch_valid": valid})
        features = ours.features(x, extent)
        found = features.pooled if ours.head is None else ours.logits(features)[:, 0]
        close(found, expected)


def test_dinos_own_formula(randomised):
    """facebookresearch/dino: by scale, of a grid taken as 0.1 larger than it is."""
    whole = file_of("DINO, a student", "backbone.") | {"head.last_layer.weight_v": torch.ones(1)}
    found = opened(SOURCES["DINO, a student"], whole)
    table = found.state["position.table"][1:]
    old, new = found.config.grid, (5, 4)
    expected = nn.functional.interpolate(
        table.reshape(1, *old, -1).permute(0, 3, 1, 2),
        scale_factor=((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1]),
        mode="bicubic",
    )
    ours = resample_table(table, old, new, found.config.resample)
    close(ours, expected.permute(0, 2, 3, 1).reshape(-1, table.shape[1]))


@pytest.mark.parametrize("size", [(40, 24), (16, 16)], ids=str)
def test_tips_resamples_its_table_bilinearly(size, randomised, tmp_path):
    """google-deepmind/tips: DINOv2's code with `interpolate_antialias`, bilinear, no offset; its
    JAX twin calls jax.image.resize(..., "bilinear")."""
    source = replace(SOURCES["TIPS"], size=SQUARE)
    theirs = randomised(source.build(img_size=SQUARE))
    ours = model_of(opened(source, source.tensors(theirs, tmp_path)))
    grid = tuple(side // P for side in SQUARE)
    state = theirs.state_dict()
    table = state["pos_embed"].view(1, *grid, -1).permute(0, 3, 1, 2)
    new = [side // P for side in size]
    table = nn.functional.interpolate(table, size=new, mode="bilinear", antialias=True)
    other = source.build(img_size=size).eval()
    other.load_state_dict({**state, "pos_embed": table.flatten(2).mT})
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        close(ours(x), other(x))


# --- what is not read, or not written ---


@pytest.mark.parametrize(
    "keys, message",
    [
        (["to_patch_embedding.1.weight", "transformer.layers.0.0.to_qkv.weight"], "vit-pytorch"),
        (["vit.to_patch_embedding.2.weight"], "queries, keys and values without bias"),
        (["patch_embed.backbone.conv1.0.weight", "patch_embed.proj.weight"], "their ResNet-D"),
        (["patch_embed.backbone.0.conv.weight"], "MobileCLIP's hybrids"),
        (["vit.embeddings.patch_embeddings.backbone.bit.norm.weight"], "transformers' ViTHybrid"),
        (["layers.0.blocks.0.attn.relative_position_bias_table"], "Swin, BEiT"),
        (["layers.0.blocks.0.attn.cpb_mlp.0.weight"], "Swin V2"),
        (["image_encoder.blocks.0.attn.rel_pos_h"], "Segment Anything"),
        (["vision_encoder.layers.0.attn.rel_pos_h"], "Segment Anything"),
        (["vision_encoder.backbone.pos_embed_window"], "Hiera, or SAM 2"),
        (["patch_embed.proj.weight", "blocks.2.proj.weight"], "Hiera, or SAM 2"),
        (["vision_model.embeddings.rms_norm.weight"], "AIMv2: RMS norms"),
        (["trunk.blocks.0.mlp.fc3.weight"], "AIMv2: RMS norms"),
        (["blocks.0.mlp.fc1_g.weight", "blocks.0.norm1.weight"], "AIMv2: RMS norms"),
        (["radio_model.input_conditioner.norm_mean"], "C-RADIO"),
        (["embeds.cls_token", "embeds.pos_embed", "embeds.proj.weight"], "C-RADIO"),
        (["embeds.pos_embed_y", "embeds.pos_embed_x"], "naflexvit_.*_parfac_"),
        (["blocks.0.attn.norm.weight", "blocks.0.attn.qkv.bias"], "BEiT-3"),
        (["beit3.encoder.layers.0.self_attn.inner_attn_ln.weight"], "BEiT-3"),
        (["vision_model.encoder.layers.0.ls1"], "InternViT"),
        (["encoder.layer.0.attention.projection_layer.weight"], "InternViT"),
        (
            ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"],
            "InternViT in timm's names",
        ),
        (["encoder.layer.0.lambda_1"], "Data2Vec"),
        (["vision_model.class_pos_emb"], "MLCD"),
        (["encoder.embeddings.patch_embeddings.proj.weight"], "V-JEPA 2: videos"),
        (["rope.freqs", "patch_embed.proj.weight"], "vit_.*_rope_mixed"),
        (["blocks.0.in_proj.weight", "blocks.0.mlp_out_proj.weight"], "parallel blocks .pwee, xp"),
        (["blocks.0.attns.1.qkv.weight"], "parallel blocks: two attentions"),
        (
            ["conv1.weight", "bn1.weight"],
            "no model that vitrail knows.*'conv1.weight'.*Google, .*DINOv3",
        ),
    ],
)
def test_other_models_are_refused_and_named(keys, message):
    with pytest.raises(DataError, match=message):
        understand({key: torch.zeros(1) for key in keys}, {}, "a file")


def test_patches_with_an_axis_of_time_are_refused_and_named():
    """Qwen-VL's towers, and V-JEPA 2 in its makers' names, have keys of timm's."""
    file = file_of("timm", "visual.")
    kernel = file["visual.patch_embed.proj.weight"]
    file["visual.patch_embed.proj.weight"] = kernel[:, :, None].expand(-1, -1, 2, -1, -1)
    with pytest.raises(DataError, match=r"does not read: a model of videos .* frames .Qwen-VL."):
        understand(file, {}, "a file")


@pytest.mark.parametrize("name", ["timm", "DINOv2", "HF ViT", "OpenAI's CLIP", "torchvision"])
def test_a_key_too_many_or_too_few_is_named(name):
    source = SOURCES[name]
    told = {"heads": 3, "image_size": source.size, **source.told}
    with pytest.raises(DataError, match=r"unexpected 'another\.weight'"):
        understand(file_of(name) | {"another.weight": torch.zeros(1)}, told, "a file")
    file = file_of(name)
    bias = next(k for k in file if "1." in k and k.endswith("bias"))
    del file[bias]
    with pytest.raises(DataError, match=f"missing '{bias}'"):
        understand(file, told, "a file")


@in_turns((), (4,), (1, 1, 1, 1, 1), (0, 24))
@pytest.mark.parametrize(
    "name",
    [
        *("timm", "DINOv2", "HF SigLIP", "OpenAI's CLIP", "torchvision", "HF SigLIP 2 of any size"),
        *("DINOv3, gated, without biases", "timm, DINOv3 with biases, gated", "timm, NaFlex"),
    ],
)
def test_a_tensor_of_any_other_shape_is_one_clear_error(name, shapes):
    source = SOURCES[name]
    told = {"heads": 3, "image_size": source.size, **source.told}
    file = file_of(name)
    for key, shape in zip(one_of_each(file), cycle(shapes), strict=False):
        if not LAYOUTS[source.layout].leaves_out(key):
            with pytest.raises(DataError):
                understand(file | {key: torch.zeros(shape)}, told, "a file")


OURS = SOURCES["timm"].expected


@pytest.mark.parametrize(
    "to, changes, message",
    [
        ("timm", {"stem": "conv"}, r"timm has no counterpart of 'stem\.convs\.0\.0\.weight'"),
        ("timm", {"representation": 8}, "timm has no counterpart of 'representation.weight'"),
        ("timm", {"position": "none"}, "timm has no counterpart of position='none'"),
        ("timm", {"position": "rope"}, "timm has no counterpart of position='rope'"),
        ("timm", {"pool": "mean", "pool_prefix": True}, "no counterpart of pool_prefix=True"),
        ("timm", {"final_norm": False}, "timm has no counterpart of final_norm=False"),
        ("timm", {"mlp_norm": True}, r"no counterpart of 'encoder\.blocks\.0\.mlp\.norm"),
        (
            "timm",
            {"position": "rope", "rope": "axial", "rope_grid": (9, 9), "heads": 3},
            r"RoPE-ViT in timm's names has no counterpart of rope_grid=\(9, 9\)",
        ),
        ("google", {}, "Google has no counterpart of activation='gelu': there it is 'gelu_tanh'"),
        ("huggingface", {"pool": "mean"}, "pool='mean': there it is 'class'"),
        ("huggingface", {"prefix_position": False}, "ViT has no counterpart of prefix_position"),
        ("huggingface", {"layer_scale": 0.1}, "DINOv2 has no counterpart of 'head.weight'"),
        ("huggingface", {"head_bias": False}, "ViT has no counterpart of head_bias=False"),
        ("huggingface", {"activation": "swiglu"}, "ViT has no counterpart of activation='swiglu'"),
        ("huggingface", {"pre_norm": True}, "CLIP has no counterpart of stem_bias=True"),
    ],
)
def test_a_model_without_a_counterpart_is_refused(to, changes, message):
    config = ViTConfig(**{**vars(OURS), **changes})
    with pytest.raises(DataError, match=message):
        write_as(to, build(config).state_dict(), config)


def test_a_target_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match="'tim': did you mean 'timm'"):
        write_as("tim", build(OURS).state_dict(), OURS)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_what_is_written_for_hugging_face_is_the_same_model_again(name, randomised):
    source = HUGGING_FACE[name]
    ours = randomised(ViT(source.expected))
    found = opened(source, write_as("huggingface", ours.state_dict(), source.expected))
    assert found.config == source.expected
    for key, tensor in ours.state_dict().items():
        assert torch.equal(found.state[key], tensor), key


@pytest.mark.parametrize("to", ["timm", "huggingface"])
@pytest.mark.parametrize("position", ["sincos_mae", "sincos_1d"])
def test_a_fixed_position_table_is_written_out(to, position, randomised):
    config = ViTConfig(**{**vars(OURS), "position": position})
    ours = randomised(ViT(config))
    told = {"heads": 3, "image_size": OURS.image_size, "norm_eps": 1e-6}
    found = understand(write_as(to, ours.state_dict(), config), told, "a file")
    assert found.config.position == "learned"
    x = torch.randn(2, 3, *OURS.image_size)
    with torch.inference_mode():
        close(model_of(found)(x), ours(x))


def test_timms_heads_have_a_bias(randomised):
    source = SOURCES["open_clip"]
    ours = randomised(ViT(source.expected))
    theirs = write_as("timm", ours.state_dict(), source.expected)
    assert torch.equal(theirs["head.bias"], torch.zeros(CLASSES))
    found = understand(theirs, {"heads": 3, "image_size": source.size, **source.told}, "a file")
    x = torch.randn(2, 3, *source.size)
    with torch.inference_mode():
        close(model_of(found)(x), ours(x))


@pytest.mark.parametrize("changes", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_rows_for_registers_come_back_to_the_model_they_came_from(changes, randomised):
    """A table without them would not load there; with zeros for them it is the same function."""
    source = SOURCES["timm, registers with positions"]
    theirs = randomised(source.build(**changes))
    told = {"heads": 3, "image_size": source.size}
    found = understand(theirs.state_dict(), told, "a file", named=True)
    back = write_as("timm", found.state, found.config, found.keys)
    again = source.build(**changes).eval()
    again.load_state_dict(back)
    x = torch.randn(2, 3, *source.size)
    with torch.inference_mode():
        close(again(x), theirs(x))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("vit_so150m_patch16_reg4_gap_256", {"width": 896, "depth": 18, "heads": 14, "mlp": 2304}),
        ("vit_so150m2_patch16_reg1_gap_256", {"width": 832, "depth": 21, "heads": 13}),
        ("vit_mediumd_patch16_reg4_gap_256", {}),
    ],
)
def test_what_is_written_has_the_shapes_that_timm_has_for_registers(name, changes):
    """so150m's tables have rows for them, other models' have not: whatever the model came from."""
    with torch.device("meta"):
        theirs = timm.create_model(name).state_dict()
    found = understand(theirs, told_by_timm(name), "a file", named=True)
    assert all(getattr(found.config, field) == value for field, value in changes.items())
    written = write_as("timm", build_meta(found.config), found.config)
    assert {key: t.shape for key, t in written.items()} == {k: t.shape for k, t in theirs.items()}


def build_meta(config: ViTConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build(config).state_dict()


def test_timm_has_no_pooling_of_the_first_patch():
    config = ViTConfig(**{**vars(OURS), "class_token": False, "pool": "first"})
    with pytest.raises(DataError, match="timm has no counterpart of pool='first'"):
        write_as("timm", build(config).state_dict(), config)


def test_where_there_is_one_norm_it_is_told_that_it_acts_on_the_pooled_vector(randomised):
    """open_clip's CLIPA with a norm before its blocks: `final_ln_after_pool`, the same tensors."""
    source = SOURCES["open_clip"]
    config = ViTConfig(**{**vars(source.expected), "pool": "mean", "pool_norm": True})
    ours = randomised(ViT(config))
    names = {"pool_norm.weight": "encoder.norm.weight", "pool_norm.bias": "encoder.norm.bias"}
    plain = {names.get(key, key): tensor for key, tensor in ours.state_dict().items()}
    file = LAYOUTS["open_clip"].write(plain, source.expected)
    told = {"heads": 3, "image_size": source.size, **source.told, "pool_norm": True}
    found = understand(file, told, "a file")
    assert found.config == config, "the class token is not what a norm after pooling is for"
    assert torch.equal(found.state["pool_norm.weight"], file["ln_post.weight"])
    with pytest.raises(DataError, match=r"no counterpart of pool='mean'"):
        found.layout.write(found.state, found.config)
