"""What no tensor of a file shows: the one list of it, and where each was taken from.

Two models with the same tensors differ in these fields and give other outputs. Whoever knows better
tells them in the same words everywhere: `pretrained(FILE, pool="mean")`, `--model.pool mean` for
`vitrail train`, `weights show` and `weights convert`, `model.pool: mean` in a config. Else a row of
WEIGHTS or the config.json beside the file says them, or the layout's own code fixes them, which is
said; and where that leaves a choice, the user is asked.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from vitrail.models import ModelConfig

UNSEEN: Mapping[str, str] = {
    "heads": "how many heads attention has",
    "activation": "which GELU the MLPs have",
    "norm_eps": "the epsilon of the norms",
    "pool": "which tokens make up an image's one vector",
    "pool_norm": "whether the final norm acts on that vector, and not on the tokens",
    "position": "what it has instead of a position table, or besides",
    "rope": "by whose angles rotary positions turn queries and keys",
    "rope_grid": "the rows and columns that rotary positions are scaled to",
    "image_size": "the image, and so the grid, that its position table is for",
    "resample": "how its makers bring table and patch kernel to other sizes",
    "layer_scale": "what LayerScale began with",
    "stem_eps": "whose epsilons a hybrid's ResNet has",
}
"""Field of the config -> what it is. The flags of `vitrail.cli.told` are these."""

SHOWN = "by its tensors"
IF_ASKED = "as the model that is asked for"


class Unseen(NamedTuple):
    """One of those fields in one file."""

    field: str
    value: Any
    how: str
    """Where the value is from, in words."""
    assumed: bool = False
    """Whether nobody said it, and it is only taken to be so."""

    def __str__(self) -> str:
        return f"{self.field} {self.value}, {self.how}"


class Settled:
    """The fields of a model's config while they are found, and where each unseen one is from."""

    def __init__(
        self,
        facts: Mapping[str, Any],
        told: Mapping[str, Any],
        hints: Mapping[str, Any],
        *,
        beside: Collection[str],
        whence: str,
    ) -> None:
        """`facts` are what the tensors show, and overrule what is `told`; a field that is told and
        in `beside` is from `whence`. `hints` count where nothing else tells.
        """
        self.fields: dict[str, Any] = {**told, **facts}
        self._hints = hints
        self._how = dict.fromkeys(facts, SHOWN)
        self._assumed: set[str] = set()
        for name, value in told.items():
            if facts.get(name, value) == value:
                self._how[name] = whence if name in beside else "as told"

    def take(self, name: str, value: Any, why: str, *, aloud: bool = True) -> None:
        """Take a field as the hint has it, else to be `value`, and say why."""
        if name in self.fields:
            return
        self.fields[name] = self._hints.get(name, value)
        same = self.fields[name] == value
        self._how[name] = why if same else IF_ASKED
        if same and aloud:
            self._assumed.add(name)

    def explain(self, name: str, why: str) -> None:
        """Say why a field is what it is, where tensors show it less than wholly."""
        if self._how.get(name) == SHOWN:
            self._how[name] = why

    def lines(self, config: ModelConfig) -> tuple[Unseen, ...]:
        """Each unseen field of `config`."""
        return lines(config, self._how, self._assumed)


def lines(
    config: ModelConfig, how: Mapping[str, str], assumed: Collection[str] = ()
) -> tuple[Unseen, ...]:
    """Each unseen field of `config` that matters to such a model; `how` says where it is from."""
    matters = {
        "stem_eps": getattr(config, "stem", "") == "resnet",
        "layer_scale": getattr(config, "layer_scale", None) is not None,
        "resample": getattr(config, "has_table", False),
        "rope": getattr(config, "turned", False),
        "rope_grid": getattr(config, "turned", False),
    }
    return tuple(
        Unseen(name, getattr(config, name), how[name], name in assumed)
        for name in UNSEEN
        if name in how and hasattr(config, name) and matters.get(name, True)
    )
