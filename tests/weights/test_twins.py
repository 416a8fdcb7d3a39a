"""Twins' weights from a file to logits."""

import pytest
import timm
import torch

from close import close
from vitrail.errors import DataError
from vitrail.weights import open_weights, pretrained
from vitrail.weights.load import convert
from vitrail.weights.write import write_safetensors

CLASSES = 7


def test_from_a_file_to_logits_and_back_to_a_file(randomised, tmp_path):
    theirs = randomised(timm.create_model("twins_pcpvt_small", num_classes=CLASSES))
    file = tmp_path / "theirs.safetensors"
    write_safetensors(file, theirs.state_dict(), {})
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = theirs(x)
        scale = expected.std().clamp(min=1)
        ours = pretrained(file)
        close(ours(x) / scale, expected / scale)
        again = pretrained(convert(open_weights(file), "timm", tmp_path / "back.safetensors"))
        assert torch.equal(again(x), ours(x))
    fewer = pretrained(file, classes=3, channels=1, image_size=(50, 75))
    assert fewer(torch.randn(1, 1, 50, 75)).shape == (1, 3)
    with pytest.raises(DataError, match="google has no counterpart of the family 'twins'"):
        convert(open_weights(file), "google", tmp_path / "ours.npz")
