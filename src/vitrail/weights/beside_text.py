"""What the JSON files beside weights say of a text tower: config.json and its companions.

Hugging Face's (`text_config` of a model of two towers, or the whole), open_clip's (`text_cfg`), and
those of sentence-transformers, which say how a sentence's vector is made. A tower that computes
something else under the same names is refused, as among images (`architectures.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitrail.errors import DataError
from vitrail.weights.beside import ACTIVATIONS, part, whole
from vitrail.weights.files import read_json

_KINDS = {
    *("clip", "clip_text_model", "siglip", "siglip_text_model", "siglip2", "siglip2_text_model"),
    *("bert", "vision-text-dual-encoder"),
}
_PLAIN: Mapping[str, tuple[Any, ...]] = {  # fields of open_clip whose other values are other towers
    "embed_cls": (None, False),
    "use_pad_mask": (None, False),
    "ls_init_value": (None,),
    "hf_model_name": (None,),
    "qk_norm": (None, False),
    "scaled_cosine_attn": (None, False),
    "scale_heads": (None, False),
    "scale_attn_inner": (None, False),
    "scale_attn": (None, False),
    "scale_fc": (None, False),
}
_CAUSAL = {"no_causal_mask": (None, False), "pool_type": (None, "argmax")}
_WHOLE = {"no_causal_mask": (True,), "pool_type": ("last",)}


def told_of_text(config: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Fields of a text tower's config that the files in `folder` tell, `config` its config.json.

    Raises `DataError` for a tower that is none of ours.
    """
    if "model_cfg" in config:
        told = _by_open_clip(part(config, "model_cfg"), where)
    else:
        told = _by_transformers(config, where)
    sentences = read_json(folder / "sentence_bert_config.json")
    pooling = read_json(folder / "1_Pooling" / "config.json")
    words = read_json(folder / "tokenizer_config.json")
    if pooling.get("pooling_mode_cls_token") is True:
        told["pool"] = "class"
    elif pooling.get("pooling_mode_mean_tokens") is True:
        told["pool"] = "mean"
    elif pooling:
        raise DataError(
            f"{folder / '1_Pooling' / 'config.json'} pools the tokens of a text in a way that "
            f"vitrail has not: it has their mean, and the first one"
        )
    told["context"] = whole(sentences.get("max_seq_length"))
    if isinstance(words.get("do_lower_case"), bool):
        told["lower"] = words["do_lower_case"]
    return {name: value for name, value in told.items() if value is not None}


def _by_transformers(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    tower = part(config, "text_config") or config
    kind = tower.get("model_type", config.get("model_type"))
    if isinstance(kind, str) and kind not in _KINDS:
        raise DataError(
            f"the config.json beside {where} names a text tower of transformers' {kind}, which "
            f"vitrail does not have: it has CLIP's, SigLIP's and BERT's"
        )
    end = tower.get("eos_token_id")
    words = whole(tower.get("vocab_size"))
    if kind in ("clip", "clip_text_model") and words and end not in (None, 2, words - 1):
        # 2 stands for the greatest, in configs that were written before it was looked at.
        raise DataError(
            f"the config.json beside {where} ends texts with token {end}, where CLIP's end with "
            f"their greatest: it is another tower"
        )
    positions = tower.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise DataError(f"the config.json beside {where} asks for positions {positions!r}")
    act, eps = tower.get("hidden_act"), tower.get("layer_norm_eps")
    if act is not None and str(act) not in ACTIVATIONS:
        raise DataError(f"the config.json beside {where} asks for the activation {act!r}")
    return {
        "heads": whole(tower.get("num_attention_heads")),
        "activation": ACTIVATIONS.get(str(act)),
        "norm_eps": eps if isinstance(eps, float) else None,
        "vocabulary": words,
        "segments": whole(tower.get("type_vocab_size")) if kind == "bert" else None,
    }


def _by_open_clip(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    tower = part(config, "text_cfg")
    siglip = tower.get("proj_bias") is True
    for field, plain in {**_PLAIN, **(_WHOLE if siglip else _CAUSAL)}.items():
        if tower.get(field) not in plain:
            raise DataError(
                f"the config beside {where} is of a text tower with {field} "
                f"{tower.get(field)!r}, which vitrail does not have"
            )
    told = {
        "heads": whole(tower.get("heads")),
        "vocabulary": whole(tower.get("vocab_size")),
    }
    if siglip:  # trained with the tanh form, whichever of the two open_clip runs it with
        return told
    return told | {"activation": "gelu_quick" if config.get("quick_gelu") is True else "gelu"}
