"""MLP-Mixer in Google's two layouts and timm's, gMLP in timm's; and both for another grid.

Google's .npz (mixer_models/imagenet1k, imagenet21k, sam) has flax's names, and kernels with their
inputs first. An older kind, which big_vision reads as well, calls a block `Mixer/encoderblock_i`
and has the matrices of an MLP side by side (`kernel1`, `kernel2`), with axes of one to spare.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count, takewhile
from typing import Any

from torch import Tensor

from vitrail.errors import DataError
from vitrail.models.mixer import GmlpConfig, MixerConfig
from vitrail.nn import resample_patch, resample_table
from vitrail.weights.family import FamilyLayout
from vitrail.weights.names import State, rename

_STEM = "stem.proj.weight"
_MIXER = ("blocks.0.mlp_tokens.fc1.weight", "blocks.0.mlp_channels.fc1.weight")
_GMLP = ("blocks.0.gate.proj.weight", "blocks.0.fc1.weight")
"""Our keys of the first block's first maps across the tokens and across the channels."""


def _sized(
    theirs: Callable[[str], str], keys: tuple[str, str]
) -> Callable[[State], Mapping[str, Any]]:
    """The geometry, all of which the lengths of axes show."""

    def shown(state: State) -> Mapping[str, Any]:
        stem, tokens, channels = (state[theirs(key)] for key in (_STEM, *keys))
        if (stem.ndim, tokens.ndim, channels.ndim) != (4, 2, 2):
            return {}
        blocks = (theirs(keys[1].replace(".0.", f".{i}.", 1)) for i in count())
        patch, side = (stem.shape[2], stem.shape[3]), math.isqrt(tokens.shape[1])
        square = side**2 == tokens.shape[1]
        return {
            "depth": len(list(takewhile(state.__contains__, blocks))),
            "width": stem.shape[0],
            "tokens_mlp": tokens.shape[0],
            "mlp": channels.shape[0],
            "patch": patch,
            "tokens": tokens.shape[1],
            # So many tokens make more than one oblong grid: who knows which overrules this.
            "image_size": (side * patch[0], side * patch[1]) if square else None,
        }

    return shown


def _only(config: MixerConfig | GmlpConfig, whose: str, **fixed: object) -> None:
    """Raise `DataError` for a model that their code would compute otherwise."""
    for name, value in fixed.items():
        if (ours := getattr(config, name)) != value:
            raise DataError(f"{whose} has no counterpart of {name}={ours!r}: there it is {value!r}")


# --- Google ---

_GOOGLE = {
    "stem.proj": "stem",
    "norm": "pre_head_layer_norm",
    "head": "head",
    "norm1": "LayerNorm_0",
    "mlp_tokens.fc1": "token_mixing/Dense_0",
    "mlp_tokens.fc2": "token_mixing/Dense_1",
    "norm2": "LayerNorm_1",
    "mlp_channels.fc1": "channel_mixing/Dense_0",
    "mlp_channels.fc2": "channel_mixing/Dense_1",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def _google(key: str) -> str:
    module, _, leaf = key.rpartition(".")
    if leaf == "weight":
        leaf = "scale" if module.split(".")[-1].startswith("norm") else "kernel"
    if block := _BLOCK.fullmatch(module):
        return f"MixerBlock_{block[1]}/{_GOOGLE[block[2]]}/{leaf}"
    return f"{_GOOGLE[module]}/{leaf}"


def _google_turn(state: State) -> dict[str, Tensor]:
    """Outputs before inputs."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}
    return {k: t.permute(axes[t.ndim]) if t.ndim in axes else t for k, t in state.items()}


def _google_back(state: dict[str, Tensor], config: MixerConfig) -> dict[str, Tensor]:
    _only(config, "Google's Mixer", activation="gelu_tanh", norm_eps=1e-6)
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}
    return {k: t.permute(axes[t.ndim]) if t.ndim in axes else t for k, t in state.items()}


_PHASE = re.compile(r"Mixer/encoderblock_(\d+)/(token|channel)_mixing_phase_0/(kernel|bias)([12])")
_NORM = re.compile(r"Mixer/encoderblock_(\d+)/LayerNorm_(\d+)/(.+)")


def _modern(key: str) -> str:
    """An older file's key as later ones have it."""
    if part := _PHASE.fullmatch(key):
        return f"MixerBlock_{part[1]}/{part[2]}_mixing/Dense_{int(part[4]) - 1}/{part[3]}"
    if norm := _NORM.fullmatch(key):  # numbered among the norms, or among all parts of the block
        return f"MixerBlock_{norm[1]}/LayerNorm_{min(int(norm[2]), 1)}/{norm[3]}"
    key = key.replace("Mixer/encoder_norm/", "pre_head_layer_norm/")
    return re.sub("^embedding/", "stem/", key)


def _older_turn(state: State) -> dict[str, Tensor]:
    phases = {k: t.squeeze() if _PHASE.fullmatch(k) else t for k, t in state.items()}
    return _google_turn(rename(phases, _modern))


GOOGLE_MIXER = FamilyLayout(
    name="google-mixer",
    whose="Google's MLP-Mixer",
    family=MixerConfig,
    marks=tuple(_google(key) for key in (_STEM, *_MIXER)),
    theirs=_google,
    turn=_google_turn,
    back=_google_back,
    sized=_sized(_google, _MIXER),
    changes={"activation": "gelu_tanh", "norm_eps": 1e-6},
    writes=("google",),
)
GOOGLE_MIXER_OLDER = replace(
    GOOGLE_MIXER,
    name="google-mixer-older",
    marks=(
        "embedding/kernel",
        *(f"Mixer/encoderblock_0/{x}_mixing_phase_0/kernel1" for x in ("token", "channel")),
    ),
    turn=_older_turn,
    writes=(),
)

# --- timm ---


def _timm_mixer(key: str) -> str:
    return key


def _timm_gmlp(key: str) -> str:
    return re.sub(r"^(blocks\.\d+)\.(fc|gate)", r"\1.mlp_channels.\2", key)


def _timm_back(state: dict[str, Tensor], config: GmlpConfig) -> dict[str, Tensor]:
    _only(config, "timm's gMLP", gate_eps=1e-5)
    return state


TIMM_MIXER = FamilyLayout(
    name="timm-mixer",
    whose="timm's MLP-Mixer",
    family=MixerConfig,
    marks=(_STEM, *_MIXER),
    theirs=_timm_mixer,
    sized=_sized(_timm_mixer, _MIXER),
    changes={"activation": "gelu", "norm_eps": 1e-6},
    writes=("timm",),
)
TIMM_GMLP = FamilyLayout(
    name="timm-gmlp",
    whose="timm's gMLP",
    family=GmlpConfig,
    marks=tuple(_timm_gmlp(key) for key in (_STEM, *_GMLP)),
    theirs=_timm_gmlp,
    back=_timm_back,
    sized=_sized(_timm_gmlp, _GMLP),
    changes={"activation": "gelu", "norm_eps": 1e-6, "gate_eps": 1e-5},
    writes=("timm",),
)

LAYOUTS = (GOOGLE_MIXER, GOOGLE_MIXER_OLDER, TIMM_MIXER, TIMM_GMLP)

# --- another grid ---


def resize_tokens(
    state: State, stored: MixerConfig | GmlpConfig, wanted: MixerConfig | GmlpConfig
) -> dict[str, Tensor]:
    """Our state dict of a model `stored`, with the weights across tokens for the grid of `wanted`.

    What a unit reads from the tokens is a map on the grid, and what it writes to them is another.
    Maps that are written are resampled like position tables; those that read get the pseudo-inverse
    of that, like patch kernels (`resample_patch`), and so respond to a resampled map of tokens as
    they did to the map itself: exactly on a finer grid, as nearly as possible on a coarser one.
    Mixing across tokens then commutes with resampling them. docs/decisions.md has what it costs.
    """
    old, new = stored.grid, wanted.grid

    def reading(weight: Tensor) -> Tensor:
        return resample_patch(weight.unflatten(1, old)[:, None], new).flatten(1)

    def writing(tensor: Tensor) -> Tensor:
        return resample_table(tensor.reshape(len(tensor), -1), old, new).reshape(
            -1, *tensor.shape[1:]
        )

    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "mlp_tokens.fc1.weight": reading,
        "mlp_tokens.fc2.weight": writing,
        "mlp_tokens.fc2.bias": writing,
        "gate.proj.weight": lambda weight: writing(reading(weight)),
        "gate.proj.bias": writing,
    }
    return {
        key: rule(tensor) if (rule := rules.get(key.split(".", 2)[-1])) else tensor
        for key, tensor in state.items()
    }
