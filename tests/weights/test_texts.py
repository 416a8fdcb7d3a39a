"""Text towers and pairs: random weights of other code bases give the same vectors here."""

import json
import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from close import close
from command import vitrail
from vitrail.errors import DataError, UsageError, VitrailError
from vitrail.models import build, count_parameters
from vitrail.text import TEXTS, TextConfig, build_text, text_config
from vitrail.weights import (
    WEIGHTS,
    open_pair,
    open_text_weights,
    open_weights,
    save_pair,
)
from vitrail.weights.fetch import cached_file
from vitrail.weights.load import load_into, started
from vitrail.weights.text_table import TEXT_WEIGHTS
from vitrail.weights.texts import TEXT_LAYOUTS, text_shapes
from vitrail.weights.write import write_npz

D, H, M, DEPTH, WORDS, CONTEXT, E = 24, 3, 48, 2, 50, 9, 12
P, SIDE = 8, 24


def randomised(model: nn.Module) -> nn.Module:
    """No tensor of zeros or ones, which a missing bias or norm would not show."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens_of(count: int = 4, end: int = WORDS - 1) -> Tensor:
    """Texts padded with zeros, each with one end, the greatest number."""
    tokens = torch.zeros(count, CONTEXT, dtype=torch.int64)
    for i, row in enumerate(tokens):
        length = 3 + 2 * i
        row[: length - 1] = torch.randint(1, end, (min(length, CONTEXT) - 1,))[: length - 1]
        row[min(length, CONTEXT) - 1] = end
    return tokens


class Theirs(NamedTuple):
    """A model of another code base, and what it makes of texts and images."""

    model: nn.Module
    text: Callable[[Tensor], Tensor]
    image: Callable[[Tensor], Tensor] | None = None


TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": D,
    "intermediate_size": M,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": H,
    "max_position_embeddings": CONTEXT,
}
VISION: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": M,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": H,
    "image_size": SIDE,
    "patch_size": P,
}
ENDS = {"eos_token_id": WORDS - 1, "bos_token_id": 1, "pad_token_id": 0}


def vectors(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output


def clip(activation: str = "quick_gelu") -> Theirs:
    config = hf.CLIPConfig(
        text_config={**TEXT, **ENDS, "hidden_act": activation, "projection_dim": E},
        vision_config={**VISION, "hidden_act": activation},
        projection_dim=E,
    )
    model = randomised(hf.CLIPModel(config))
    return Theirs(
        model,
        lambda tokens: vectors(model.get_text_features(tokens)),
        lambda x: vectors(model.get_image_features(x)),
    )


def clip_text(end: int = WORDS - 1) -> Theirs:
    config = hf.CLIPTextConfig(**TEXT, **{**ENDS, "eos_token_id": end}, projection_dim=E)
    model = randomised(hf.CLIPTextModelWithProjection(config))
    return Theirs(model, lambda tokens: model(tokens).text_embeds)


def bare(kind: Any, config: Any) -> Theirs:
    """A tower alone, as transformers 5 writes it: its names have no prefix."""
    model = randomised(kind(config))
    return Theirs(model, lambda tokens: vectors(model(tokens)))


def siglip() -> Theirs:
    config = hf.SiglipConfig(
        text_config={**TEXT, "projection_size": D, **ENDS}, vision_config=VISION
    )
    model = randomised(hf.SiglipModel(config))
    return Theirs(
        model,
        lambda tokens: vectors(model.get_text_features(tokens)),
        lambda x: vectors(model.get_image_features(x)),
    )


def siglip2() -> Theirs:
    """Of images of any size: they come as patches."""
    side = SIDE // P
    config = hf.Siglip2Config(
        text_config={**TEXT, "projection_size": D, **ENDS},
        vision_config={
            **{key: value for key, value in VISION.items() if key != "image_size"},
            "num_patches": side**2,
        },
    )
    model = randomised(hf.Siglip2Model(config))

    def image(x: Tensor) -> Tensor:
        patches = x.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 4, 5, 1)
        rows, columns = patches.shape[1:3]
        return vectors(
            model.get_image_features(
                patches.flatten(3).flatten(1, 2),
                pixel_attention_mask=torch.ones(len(x), rows * columns),
                spatial_shapes=torch.tensor([[rows, columns]] * len(x)),
            )
        )

    return Theirs(model, lambda tokens: vectors(model.get_text_features(tokens)), image)


def bert(pool: str = "mean") -> Theirs:
    model = randomised(hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=pool == "class"))

    def text(tokens: Tensor) -> Tensor:
        mask = tokens != 0
        found = model(tokens, attention_mask=mask.long()).last_hidden_state
        kept = mask[..., None]
        return found[:, 0] if pool == "class" else (found * kept).sum(1) / kept.sum(1)

    return Theirs(model, text)


def of_open_clip(quick_gelu: bool) -> Theirs:
    model = open_clip.CLIP(
        embed_dim=E,
        vision_cfg={
            **{"image_size": SIDE, "layers": DEPTH, "width": D, "head_width": D // H},
            **{"patch_size": P, "mlp_ratio": M / D},
        },
        text_cfg={
            **{"context_length": CONTEXT, "vocab_size": WORDS, "width": D, "heads": H},
            **{"layers": DEPTH, "mlp_ratio": M / D},
        },
        quick_gelu=quick_gelu,
    )
    randomised(model)
    return Theirs(model, model.encode_text, model.encode_image)


def siglip_of_open_clip() -> Theirs:
    model = open_clip.CustomTextCLIP(
        embed_dim=D,
        vision_cfg={
            **{"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False},
            **{"timm_pool": "map", "timm_proj": "none", "image_size": 32},
        },
        text_cfg={
            **{"context_length": CONTEXT, "vocab_size": WORDS, "width": D, "heads": H},
            **{"layers": DEPTH, "mlp_ratio": M / D, "no_causal_mask": True, "proj_bias": True},
            **{"pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
            "act_kwargs": {"approximate": "tanh"},
        },
        init_logit_bias=-10,
    )
    randomised(model)
    return Theirs(model, model.encode_text)


SOURCES: dict[str, tuple[Callable[[], Theirs], str, dict[str, Any]]] = {
    "CLIPModel": (clip, "huggingface-clip", {}),
    "CLIPModel, exact GELU": (lambda: clip("gelu"), "huggingface-clip", {}),
    "CLIPTextModelWithProjection": (clip_text, "huggingface-clip", {}),
    "CLIPTextModelWithProjection, old": (lambda: clip_text(2), "huggingface-clip", {}),
    "CLIPTextModel": (
        lambda: bare(hf.CLIPTextModel, hf.CLIPTextConfig(**TEXT, **ENDS)),
        "huggingface-clip-bare",
        {},
    ),
    "SiglipTextModel": (
        lambda: bare(hf.SiglipTextModel, hf.SiglipTextConfig(**TEXT, **ENDS, projection_size=D)),
        "huggingface-siglip-bare",
        {},
    ),
    "SiglipModel": (siglip, "huggingface-siglip", {}),
    "Siglip2Model": (siglip2, "huggingface-siglip", {}),
    "BertModel": (bert, "huggingface-bert", {}),
    "BertModel, its first token": (lambda: bert("class"), "huggingface-bert", {"pool": "class"}),
    "open_clip": (
        lambda: of_open_clip(False),
        "open_clip",
        {"activation": "gelu", "heads": H, "vocabulary": WORDS},
    ),
    "OpenAI's": (
        lambda: of_open_clip(True),
        "open_clip",
        {"activation": "gelu_quick", "heads": H, "vocabulary": WORDS},
    ),
    "open_clip's SigLIP": (siglip_of_open_clip, "open_clip-siglip", {"heads": H}),
}


def saved(theirs: Theirs, folder: Path) -> Path:
    """As its own code writes it."""
    if isinstance(theirs.model, hf.PreTrainedModel):
        theirs.model.save_pretrained(folder)
        return folder
    folder.mkdir(exist_ok=True)
    save_file(theirs.model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_texts_have_the_vectors_of_their_makers_code(name: str, tmp_path: Path) -> None:
    make, layout, told = SOURCES[name]
    theirs = make()
    path = saved(theirs, tmp_path / "model")
    said: list[str] = []
    config, state, tokenizer = open_text_weights(path, told, notify=said.append)
    tower = build_text(config).eval()
    tower.load_state_dict(state)
    tokens = tokens_of()
    close(tower(tokens, tokens != 0), theirs.text(tokens))
    assert tokenizer is None
    assert any("no vocabulary" in line or "no tokenizer" in line for line in said)
    has_images = theirs.image is not None or "SigLIP" in name
    assert any("no text tower's" in line for line in said) == has_images
    written = TEXT_LAYOUTS[layout].write(state, config)
    whole = load_file(path / "model.safetensors") if path.is_dir() else load_file(path)
    prefix = "text." if "SigLIP" in name else ""
    assert all(torch.equal(written[key], whole[prefix + key]) for key in written)


@pytest.mark.parametrize("name", ("CLIPModel", "SiglipModel", "Siglip2Model", "OpenAI's"))
@torch.no_grad()
def test_a_pair_is_both_towers_and_their_temperature(name: str, tmp_path: Path) -> None:
    make, layout, told = SOURCES[name]
    theirs = make()
    assert theirs.image is not None
    path = saved(theirs, tmp_path / "model")
    image_told = {"activation": told["activation"], "heads": H} if told else None
    pair = open_pair(path, image_told, told)
    assert pair.text_layout == layout
    model = build(started(pair.image, image_size=(SIDE, SIDE))).eval()
    load_into(model, pair.image)
    x = torch.randn(2, 3, SIDE, SIDE)
    close(model(x), theirs.image(x), 2e-5)
    tower = build_text(pair.text.config).eval()
    tower.load_state_dict(pair.text.state)
    tokens = tokens_of()
    close(tower(tokens), theirs.text(tokens))
    assert pair.scale == pytest.approx(theirs.model.logit_scale.exp().item(), rel=1e-6)
    bias = getattr(theirs.model, "logit_bias", None)
    assert pair.bias == (None if bias is None else pytest.approx(bias.item()))
    assert pair.image.left_out == ()
    to = layout.split("-")[0]
    out = tmp_path / "again.safetensors"
    save_pair(out, pair, to)
    again, whole = load_file(out), theirs.model.state_dict()
    assert again.keys() == whole.keys() - {k for k in whole if k.endswith("position_ids")}
    for key, tensor in again.items():
        assert torch.equal(tensor, whole[key]) or "logit" in key, key
        assert tensor.shape == whole[key].shape, key
    # And the verbs that want its image half alone.
    alone = open_weights(path, image_told)
    assert all(torch.equal(tensor, pair.image.state[key]) for key, tensor in alone.state.items())


def lit(text: str, **changes: Any) -> tuple[TextConfig, dict[str, Tensor]]:
    """Arrays under the names of a LiT .npz, and the config of its text tower."""
    small = {"vocabulary": WORDS, "depth": DEPTH, "width": D, "heads": H, "mlp": M, "out": D}
    config = text_config(text, **small, **changes)
    tower = randomised(build_text(config))
    layout = "google-bert" if config.family == "bert" else "google-text"
    text_arrays = TEXT_LAYOUTS[layout].write(tower.state_dict(), config)
    image = randomised(
        build("vit_b16", depth=DEPTH, width=D, heads=H, mlp=M, patch=(P, P), num_classes=0,
              image_size=(SIDE, SIDE), activation="gelu_tanh")
    )  # fmt: skip
    from vitrail.weights.google import to_google

    arrays = {f"img/{key}": t for key, t in to_google(image.state_dict(), image.config).items()}
    arrays |= {f"txt/{key}": t for key, t in text_arrays.items()}
    return config, {**arrays, "t": torch.tensor([2.5])}


@pytest.mark.parametrize("text", ("lit_bert_base", "lit_s"))
def test_lit_comes_and_goes_as_google_has_it(text: str, tmp_path: Path) -> None:
    extra = {"positions": 20} if text == "lit_bert_base" else {}
    config, arrays = lit(text, **extra)
    file = tmp_path / "LiT.npz"
    write_npz(file, arrays)
    heads = {"heads": H} if text == "lit_bert_base" else {}
    pair = open_pair(file, None, heads | ({} if extra else {"reading": "lit"}))
    assert pair.text.config == config
    assert pair.scale == pytest.approx(12.18249, rel=1e-6)
    assert pair.bias is None and pair.text.tokenizer is None
    assert any("no vocabulary" in note for note in pair.notes)
    save_pair(tmp_path / "again.npz", pair, "google")
    again = open_pair(tmp_path / "again.npz", None, heads | ({} if extra else {"reading": "lit"}))
    for ours, theirs in (
        (again.text.state, pair.text.state),
        (again.image.state, pair.image.state),
    ):
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_lits_bert_is_transformers_with_its_arrays_renamed(tmp_path: Path) -> None:
    """Names of systems.md, section 3.4: kernels with inputs first, a head behind."""
    _, arrays = lit("lit_bert_base", positions=20)
    theirs = hf.BertModel(
        hf.BertConfig(**{**TEXT, "max_position_embeddings": 20, "hidden_act": "gelu_pytorch_tanh"}),
        add_pooling_layer=False,
    ).eval()
    flax = {key.removeprefix("txt/BertEncoder_0/"): t for key, t in arrays.items()}
    state = {}
    for key in theirs.state_dict():
        if key.endswith("position_ids"):
            continue
        name = key.replace("embeddings.LayerNorm.", "layer_norm/")
        for part, ending in (
            ("word", "token"),
            ("position", "position"),
            ("token_type", "segment"),
        ):
            name = name.replace(
                f"embeddings.{part}_embeddings.weight", f"embedder/embedders_{ending}_ids/embedding"
            )
        name = name.replace("encoder.layer.", "encoder_block/layer_sequence/layers_")
        for theirs_part, part in (
            (".attention.self.", "/attention_block/attention_layer/"),
            (".attention.output.dense.", "/attention_block/dense_layer/"),
            (".attention.output.LayerNorm.", "/attention_block/layer_norm/"),
            (".intermediate.dense.", "/mlp_block/mlp/dense_layer/"),
            (".output.dense.", "/mlp_block/dense_layer/"),
            (".output.LayerNorm.", "/mlp_block/layer_norm/"),
        ):
            name = name.replace(theirs_part, part)
        name = name.replace(".", "/")
        if "norm" in name:
            state[key] = flax[name.replace("/weight", "/scale")]
        else:
            array = flax[name.replace("/weight", "/kernel")]
            state[key] = array.T if name.endswith("/weight") else array
    theirs.load_state_dict(state)
    file = tmp_path / "LiT.npz"
    write_npz(file, arrays)
    found, ours, _ = open_text_weights(file, {"heads": H})
    tower = build_text(found).eval()
    tower.load_state_dict(ours)
    tokens = tokens_of()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0]
        expected = expected @ arrays["txt/head/kernel"] + arrays["txt/head/bias"]
        close(tower(tokens, tokens != 0), expected)


def test_old_small_towers_add_their_two_position_tables(tmp_path: Path) -> None:
    _, arrays = lit("lit_s")
    table = arrays["txt/pos_embedding"]
    extra = torch.randn_like(table)
    write_npz(tmp_path / "a.npz", {**arrays, "txt/Encoder_0/pos_embedding": extra})
    _, state, _ = open_text_weights(tmp_path / "a.npz")
    assert torch.equal(state["position"], (table + extra)[0])


def test_scanned_blocks_are_read(tmp_path: Path) -> None:
    """As newer big_vision writes them: one block, whose arrays have an axis of blocks."""
    _, arrays = lit("lit_s")
    blocks = [f"txt/Encoder_0/encoderblock_{i}/" for i in range(DEPTH)]
    scanned = {key: t for key, t in arrays.items() if not key.startswith(tuple(blocks))}
    for key in arrays:
        if key.startswith(blocks[0]):
            part = key.removeprefix(blocks[0])
            scanned[f"txt/Encoder_0/encoderblock/{part}"] = torch.stack(
                [arrays[block + part] for block in blocks]
            )
    write_npz(tmp_path / "new.npz", scanned)
    write_npz(tmp_path / "old.npz", arrays)
    new, old = (open_text_weights(tmp_path / f"{name}.npz") for name in ("new", "old"))
    assert new.config == old.config
    assert all(torch.equal(tensor, old.state[key]) for key, tensor in new.state.items())


def test_what_lies_beside_a_sentence_model_is_read(tmp_path: Path) -> None:
    theirs = bert()
    path = saved(theirs, tmp_path / "model")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS - 4))]
    (path / "vocab.txt").write_text("\n".join(words))
    config, _, tokenizer = open_text_weights(path)
    assert (config.context, config.pool, config.lower) == (7, "class", False)
    assert tokenizer is not None and tokenizer.context == 7
    (path / "vocab.txt").write_text("\n".join(words[:-20]))
    with pytest.raises(DataError, match=r"30 words.*table of 50.*another"):
        open_text_weights(path)
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(DataError, match="pools the tokens"):
        open_text_weights(path)


WHOLE = {  # pretrain.md, B.1, B.2; systems.md, 1.4: image tower, changes, text tower, numbers
    "CLIP B/32": ("clip_b32", {}, "clip_b32", 1, 151_277_313),
    "CLIP B/16": ("clip_b16", {}, "clip_b16", 1, 149_620_737),
    "CLIP L/14": ("clip_l14", {}, "clip_l14", 1, 427_616_513),
    "CLIP L/14, 336": ("clip_l14", {"image_size": (336, 336)}, "clip_l14", 1, 427_944_193),
    "SigLIP B/16": ("siglip_b16", {}, "siglip_b16", 2, 203_155_970),
    "SigLIP L/16": ("siglip_l16", {"image_size": (256, 256)}, "siglip_l16", 2, 652_150_786),
    "SigLIP So400m/14": ("siglip_so400m14", {}, "siglip_so400m14", 2, 877_360_306),
    "SigLIP 2 B/16": ("siglip_b16", {}, "siglip2_b16", 2, 375_187_970),
    "SigLIP 2 B/32": ("siglip_b32", {"image_size": (256, 256)}, "siglip2_b16", 2, 376_856_066),
    "SigLIP 2 L/16": ("siglip_l16", {"image_size": (256, 256)}, "siglip2_l16", 2, 881_526_786),
    "SigLIP 2 So400m/14": ("siglip_so400m14", {}, "siglip2_so400m14", 2, 1_135_463_602),
    "SigLIP 2 NaFlex": ("siglip_b16", {"image_size": (256, 256)}, "siglip2_b16", 2, 375_234_050),
    "LiT-B16B": ("vit_b16", {"classes": 768}, "lit_bert_base", 1, 195_871_489),
    "LiT-B16B_2": ("vit_b16", {"classes": 0}, "lit_bert_base", 1, 195_280_897),
    "LiT-L16L": ("vit_l16", {"classes": 0}, "lit_bert_large", 1, 638_443_521),
    "LiT-L16S": ("vit_l16", {"classes": 0}, "lit_s", 1, 331_140_353),
    "LiT-L16Ti": ("vit_l16", {"classes": 0}, "lit_ti", 1, 311_913_089),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_have_their_papers_sizes(name: str) -> None:
    image, changes, text, numbers, count = WHOLE[name]
    with torch.device("meta"):
        towers = build(image, **changes), build_text(text)
    assert sum(map(count_parameters, towers)) + numbers == count


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_model_of_open_clip(tmp_path: Path) -> None:
    theirs = open_clip.create_model("ViT-S-32-alt", pretrained=None).eval()
    save_file(theirs.state_dict(), tmp_path / "alt.safetensors")
    pair = open_pair(tmp_path / "alt.safetensors", {"activation": "gelu"})
    assert pair.text.config == TEXTS["clip_s32_alt"]
    assert pair.text.tokenizer is not None
    tower = build_text(pair.text.config).eval()
    tower.load_state_dict(pair.text.state)
    captions = ["a photo of a cat", "two dogs", "word " * 100]
    tokens = pair.text.tokenizer(captions)
    assert tokens.cut == 1
    expected = theirs.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(captions))
    close(tower(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)), expected)
    model = build(pair.image.config).eval()
    load_into(model, pair.image)
    x = torch.randn(2, 3, 224, 224)
    close(model(x), theirs.encode_image(x), 2e-5)


@torch.no_grad()
def test_minilms_wheel_is_transformers() -> None:
    file = cached_file("minilm_l6")
    if not file.is_file():
        pytest.skip("MiniLM is not in the cache: vitrail weights fetch minilm_l6")
    config, state, tokenizer = open_text_weights("minilm_l6")
    assert config == TEXTS["minilm_l6"] and tokenizer is not None
    tower = build_text(config).eval()
    tower.load_state_dict(state)
    said = hf.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    theirs = hf.BertModel(said, add_pooling_layer=False).eval()
    tensors = load_file(file)
    theirs.load_state_dict({k: t for k, t in tensors.items() if "pooler" not in k}, strict=False)
    vocabulary = tokenizer.files["vocab.txt"].decode().splitlines()
    words = hf.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    captions = ["A cat sits on the mat.", "Naïve café — 你好!", "stock prices fell sharply", ""]
    tokens = tokenizer(captions)
    inputs = words(captions, padding=True, return_tensors="pt")
    assert torch.equal(torch.from_numpy(tokens.ids), inputs["input_ids"])
    hidden = theirs(**inputs).last_hidden_state
    kept = inputs["attention_mask"][..., None]
    found = tower(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask))
    close(found, (hidden * kept).sum(1) / kept.sum(1))


def changed(path: Path, **changes: Any) -> None:
    """The config.json beside weights, with fields of its text tower changed."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "make, changes, message",
    (
        (bert, {"model_type": "roberta"}, "transformers' roberta"),
        (bert, {"position_embedding_type": "relative_key"}, "relative_key"),
        (bert, {"hidden_act": "silu_and"}, "activation 'silu_and'"),
        (clip_text, {"eos_token_id": 7}, "ends texts with token 7"),
    ),
)
def test_other_towers_under_the_same_names_are_refused(
    make: Callable[[], Theirs], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(make(), tmp_path / "model")
    changed(path, **changes)
    with pytest.raises(DataError, match=message):
        open_text_weights(path)


@pytest.mark.parametrize(
    "field, value", (("no_causal_mask", True), ("pool_type", "eos"), ("embed_cls", True))
)
def test_other_towers_of_open_clip_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    path = saved(of_open_clip(False), tmp_path / "model")
    text = {"vocab_size": WORDS, "heads": H, field: value}
    (path.parent / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"text_cfg": text, "vision_cfg": {}}})
    )
    with pytest.raises(DataError, match=field):
        open_text_weights(path)


def test_what_no_tensor_shows_is_asked_for(tmp_path: Path) -> None:
    path = saved(of_open_clip(True), tmp_path / "model")
    with pytest.raises(DataError, match="another model"):
        open_text_weights(path)
    with pytest.raises(DataError, match="which GELU"):
        open_text_weights(path, {"vocabulary": WORDS})
    said: list[str] = []
    told = {"vocabulary": WORDS, "activation": "gelu"}
    assert open_text_weights(path, told, notify=said.append).config.heads == 1
    assert any("heads 1" in line for line in said)
    file = saved(bert(), tmp_path / "bert") / "model.safetensors"
    (file.parent / "config.json").unlink()
    with pytest.raises(DataError, match="how many heads"):
        open_text_weights(file)
    with pytest.raises(UsageError, match="not what its tensors show"):
        open_text_weights(file, {"heads": H, "width": 8})
    with pytest.raises(UsageError, match="unknown field"):
        open_text_weights(file, {"heads": H, "colour": 8})


def test_files_of_one_tower_are_no_pairs(tmp_path: Path) -> None:
    text = saved(clip_text(), tmp_path / "text")
    with pytest.raises(DataError, match="is a text tower: give it as"):
        open_pair(text)
    with pytest.raises(DataError, match="is a text tower: give it as"):
        open_weights(text)
    image = {
        key: tensor
        for key, tensor in load_file(
            saved(clip(), tmp_path / "whole") / "model.safetensors"
        ).items()
        if not key.startswith(("text", "logit"))
    }
    save_file(image, tmp_path / "image.safetensors")
    with pytest.raises(DataError, match="no text tower"):
        open_pair(tmp_path / "image.safetensors", {"activation": "gelu"})
    with pytest.raises(DataError, match="no text tower"):
        open_text_weights(tmp_path / "image.safetensors")


def test_a_tower_with_more_parts_or_less_is_refused(tmp_path: Path) -> None:
    path = saved(siglip(), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for key, change in (
        ("text_model.encoder.layers.1.mlp.fc1.bias", None),
        ("text_model.encoder.layers.1.extra", torch.zeros(3)),
        ("text_model.final_layer_norm.weight", torch.zeros(3)),
        ("text_projection.weight", torch.zeros(D, D)),
    ):
        broken = {**tensors, key: change}
        save_file({k: t for k, t in broken.items() if t is not None}, path / "model.safetensors")
        with pytest.raises(DataError):
            open_text_weights(path)
    del tensors["logit_scale"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(DataError, match="no temperature"):
        open_pair(path)


BROKEN = (torch.zeros(()), torch.zeros(0, 3), torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("make", (siglip, clip, bert), ids=lambda make: make.__name__)
def test_shapes_that_make_no_sense_are_told(make: Callable[[], Theirs], tmp_path: Path) -> None:
    path = saved(make(), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    others = ("vision", "visual", "logit", "pooler")
    keys = [key for key in tensors if not key.startswith(others) and "s.1." not in key]
    for key, broken in zip(keys, cycle(BROKEN), strict=False):
        save_file({**tensors, key: broken}, path / "model.safetensors")
        with pytest.raises(VitrailError):
            open_text_weights(path)


@pytest.mark.parametrize("text", ("lit_bert_base", "lit_s"))
def test_arrays_that_make_no_sense_are_told(text: str, tmp_path: Path) -> None:
    _, arrays = lit(text)
    keys = [key for key in arrays if key.startswith("txt/") and "_1/" not in key]
    for key, broken in zip(keys, cycle(BROKEN), strict=False):
        write_npz(tmp_path / "x.npz", {**arrays, key: broken}, overwrite=True)
        with pytest.raises(VitrailError):
            open_text_weights(tmp_path / "x.npz", {"heads": H})


def test_a_temperature_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    path = saved(siglip(), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for broken, words in ((torch.tensor([1e9]), "damaged"), (torch.zeros(2), "2 numbers")):
        save_file({**tensors, "logit_scale": broken}, path / "model.safetensors")
        with pytest.raises(DataError, match=words):
            open_pair(path)


def test_the_command_line_shows_and_converts_both(tmp_path: Path, capfd) -> None:
    path = saved(siglip(), tmp_path / "model")
    code, out, _ = vitrail(capfd, "weights", "show", path)
    assert code == 0
    assert re.search(r"text +siglip: 2 blocks, width 24", out) and re.search("bias +", out)
    both, one = tmp_path / "both.safetensors", tmp_path / "one.safetensors"
    code, out, _ = vitrail(capfd, "weights", "convert", path, both, "--to", "huggingface", "--both")
    assert code == 0 and "both towers" in out
    assert load_file(both).keys() == load_file(path / "model.safetensors").keys()
    code, out, _ = vitrail(capfd, "weights", "convert", path, one, "--to", "huggingface")
    assert code == 0 and "--both writes the two" in out


def test_other_layouts_are_named(tmp_path: Path) -> None:
    pair = open_pair(saved(siglip(), tmp_path / "model"))
    with pytest.raises(UsageError, match="unknown layout of two towers"):
        save_pair(tmp_path / "x.safetensors", pair, "timm")
    with pytest.raises(UsageError, match=r"x\.npz"):
        save_pair(tmp_path / "x.safetensors", pair, "google")
    with pytest.raises(DataError, match="by timm"):
        save_pair(tmp_path / "x.safetensors", pair, "open_clip")
    with pytest.raises(DataError, match="no counterpart"):
        TEXT_LAYOUTS["open_clip"].write(pair.text.state, pair.text.config)


@pytest.mark.parametrize("name", sorted(TEXT_WEIGHTS))
def test_a_row_is_written_out(name: str) -> None:
    row = TEXT_WEIGHTS[name]
    layout = TEXT_LAYOUTS[row.layout]
    assert layout.family is type(row.config)
    assert name not in WEIGHTS
    assert row.licence in ("Apache-2.0", "MIT")
    shapes = text_shapes(row.config)
    assert sum(len(layout._pieces(key, shape)) for key, shape in shapes.items()) >= len(shapes)
