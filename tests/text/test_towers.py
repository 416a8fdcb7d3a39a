"""Towers have their papers' sizes, and read of a text what they should and nothing else."""

import pytest
import torch
from torch import Tensor

from close import close
from vitrail.errors import UsageError
from vitrail.models import count_parameters
from vitrail.text import TEXTS, TextConfig, build_text, text_config

COUNTS = {  # sums of the papers' tables, those of LiT as in its own tests (models_test.py)
    "clip_s32_alt": 20_631_808,
    "clip_b32": 63_428_096,
    "clip_b16": 63_428_096,
    "clip_l14": 123_650_304,
    "clip_h14": 354_032_640,
    "clip_bigg14": 694_659_840,
    "siglip_b16": 110_271_744,
    "siglip_l16": 336_194_560,
    "siglip_so400m14": 449_679_600,
    "siglip2_b16": 282_303_744,
    "siglip2_l16": 565_570_560,
    "siglip2_so400m14": 707_782_896,
    "siglip2_g16": 708_225_648,
    "lit_s": 27_838_720,
    "lit_ti": 8_611_456,
    "minilm_l6": 22_565_376,
    "minilm_l12": 33_212_160,
    "bert_base": 108_891_648,
    "bert_large": 334_092_288,
    "lit_bert_base": 109_482_240,
    "lit_bert_large": 335_141_888,
}
SMALL = {"vocabulary": 50, "depth": 2, "width": 16, "heads": 2, "mlp": 32}
FAMILIES = {
    "clip": text_config("clip_b32", **SMALL, context=9, out=6),
    "siglip": text_config("siglip_b16", **SMALL, context=9, out=6),
    "bert": text_config("minilm_l6", **SMALL, context=9, positions=12),
    "bert, its first token": text_config("lit_bert_base", **SMALL, context=9, positions=12, out=6),
}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_parameters_are_exact(name: str) -> None:
    with torch.device("meta"):
        tower = build_text(name)
    assert count_parameters(tower) == COUNTS[name]


def test_every_count_is_of_a_row() -> None:
    assert COUNTS.keys() == TEXTS.keys()


def texts(config: TextConfig, lengths: tuple[int, ...] = (3, 7, 9)) -> tuple[Tensor, Tensor]:
    """Tokens of texts of these lengths, whose last has the greatest number, and their mask."""
    tokens = torch.zeros(len(lengths), config.context, dtype=torch.int64)
    mask = torch.arange(config.context) < torch.tensor(lengths)[:, None]
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(1, config.vocabulary - 1, (length - 1,))
        row[length - 1] = config.vocabulary - 1
    return tokens, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_one_vector_whatever_stands_beside_it(family: str) -> None:
    config = FAMILIES[family]
    tower = build_text(config).eval()
    tokens, mask = texts(config)
    found = tower(tokens, mask)
    assert found.shape == (3, tower.width) == (3, config.out or config.width)
    for i in range(3):
        close(tower(tokens[i : i + 1], mask[i : i + 1])[0], found[i])
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ("clip", "bert", "bert, its first token"))
def test_padding_says_nothing(family: str) -> None:
    config = FAMILIES[family]
    tower = build_text(config).eval()
    tokens, mask = texts(config)
    other = tokens.masked_fill(~mask, 7)
    close(tower(other, mask), tower(tokens, mask))
    close(tower(tokens[:1, :3], mask[:1, :3]), tower(tokens[:1], mask[:1]))


def test_siglip_reads_its_padding_and_refuses_texts_without() -> None:
    config = FAMILIES["siglip"]
    tower = build_text(config).eval()
    tokens, mask = texts(config)
    assert (tower(tokens.masked_fill(~mask, 7)) - tower(tokens))[0].abs().max() > 0.01
    with pytest.raises(UsageError, match="padded to context=9 tokens, and these have 7"):
        tower(tokens[:, :7])


def test_a_clip_sees_only_what_comes_before() -> None:
    config = FAMILIES["clip"]
    tower = build_text(config).eval()
    tokens, _ = texts(config, (9,))
    early = tokens.clone()
    early[0, 4] = config.vocabulary - 1  # its first end is the one that counts
    changed = early.clone()
    changed[0, 5:] = 3
    close(tower(early), tower(changed))


def test_a_text_of_nothing_has_a_vector() -> None:
    tower = build_text(FAMILIES["bert"]).eval()
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.tensor([[False] * 4, [True, True, False, False]])
    assert tower(tokens, mask).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_but_that_of_other_segments_learns(family: str) -> None:
    config = FAMILIES[family]
    tower = build_text(config)
    tokens, mask = texts(config)
    tower(tokens, mask).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("qkv.bias"):  # a third of it, the keys', changes nothing
            assert parameter.grad.any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_are_too_long_are_refused(family: str) -> None:
    with pytest.raises(UsageError, match="too long for a tower of context=9"):
        build_text(FAMILIES[family])(torch.zeros(1, 10, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"width": 15}, "not divisible by 2 heads"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"context": 0}, "context must be at least 1"),
        ({"out": -1}, "out cannot be negative"),
        ({"norm_eps": 0.0}, "norm_eps must be in"),
        ({"activation": "swiglu"}, "unknown activation"),
        ({"family": "other"}, "is of the family"),
    ),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_checks_itself(family: str, changes: dict, message: str) -> None:
    from dataclasses import replace

    with pytest.raises(UsageError, match=message):
        replace(FAMILIES[family], **changes)


def test_fields_and_names_that_are_not_there_are_told() -> None:
    with pytest.raises(UsageError, match="did you mean 'clip_b32'"):
        build_text("clip_b_32")
    with pytest.raises(UsageError, match="did you mean 'context'"):
        build_text("clip_b32", contxt=3)
    with pytest.raises(UsageError, match="more than there are positions"):
        text_config("minilm_l6", context=600)
    with pytest.raises(UsageError, match="unknown pool"):
        text_config("minilm_l6", pool="max")
    with pytest.raises(UsageError, match="unknown reading"):
        text_config("siglip_b16", reading="clip")
