"""MAE: its loss and its steps against transformers, and what is hidden of whom."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from close import close, largest
from vitrail.data import keyed
from vitrail.data.batches.batch import Batch
from vitrail.data.targets import Nothing
from vitrail.data.views.canvas import Canvas
from vitrail.errors import UsageError
from vitrail.heads.masked import DecoderConfig, PatchDecoder, patch_pixels
from vitrail.models import ViTConfig, build, count_parameters, model_config
from vitrail.tasks.embed import EmbedConfig
from vitrail.tasks.mae import Mae, MaeConfig, kept, masks
from vitrail.weights import convert, open_weights

TINY = ViTConfig(
    depth=2,
    width=16,
    heads=2,
    mlp=32,
    patch=(8, 8),
    image_size=(32, 32),
    classes=0,
    position="sincos_mae",
)
SMALL = MaeConfig(decoder=DecoderConfig(depth=1, width=8, heads=2))


def task_of(config: MaeConfig = SMALL, model: ViTConfig = TINY, seed: int = 0) -> Mae:
    torch.manual_seed(seed)
    return Mae(build(model), config, Nothing(5), EmbedConfig(), seed)


def batch_of(n: int = 6, size: tuple[int, int] = (32, 32), first: int = 0) -> Batch:
    torch.manual_seed(1)
    images = torch.randn(first + n, 3, *size)[first:]
    return Batch((Canvas(images, None),), {}, np.arange(first, first + n), epoch=2)


def theirs(norm_pixels: bool = True) -> hf.ViTMAEForPreTraining:
    torch.manual_seed(0)
    config = hf.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=32, patch_size=8, mask_ratio=0.75, norm_pix_loss=norm_pixels,
        layer_norm_eps=1e-6, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4, decoder_intermediate_size=64,
    )  # fmt: skip
    model = hf.ViTMAEForPreTraining(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    # transformers 5 builds new models with zeros for these; published files have sines, cosines.
    model.decoder.initialize_weights(16)
    return model.eval()


def of_file(folder: Path, norm_pixels: bool = True) -> Mae:
    """A task of ours that goes on from the weights in `folder`."""
    opened = open_weights(folder)
    assert opened.decoder is not None
    task = Mae(
        build(opened.config), MaeConfig(norm_pixels=norm_pixels, decoder=opened.decoder.config),
        Nothing(0), EmbedConfig(), seed=0,
    )  # fmt: skip
    task.model.load_state_dict(opened.state)
    assert task.begin(opened) == ["decoder: kept"]
    return task


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_and_gradients_are_those_of_transformers(norm_pixels: bool, tmp_path: Path) -> None:
    other = theirs(norm_pixels)
    other.save_pretrained(tmp_path)
    task = of_file(tmp_path, norm_pixels)
    images, noise = torch.randn(5, 3, 32, 32), torch.rand(5, 16)
    expected = other(images, noise=noise)
    hidden = masks(noise.numpy(), 0.75)
    assert torch.equal(hidden.hidden, expected.mask)
    seen = task.model.shown(images, hidden.seen)
    close(task.decoder(seen, hidden.seen, (4, 4)), expected.logits)
    found = task.reconstruction(images, hidden)
    close(found, expected.loss)
    found.backward()
    expected.loss.backward()
    close(task.decoder.mask_token.grad, other.decoder.mask_token.grad[0, 0])
    close(
        task.model.stem.proj.weight.grad,
        other.vit.embeddings.patch_embeddings.projection.weight.grad,
    )


@pytest.mark.parametrize("to", ["huggingface", "mae", "vitrail"])
def test_a_checkpoint_goes_out_and_comes_back_with_its_decoder(to: str, tmp_path: Path) -> None:
    other = theirs()
    other.save_pretrained(tmp_path / "theirs")
    opened = open_weights(tmp_path / "theirs")
    assert opened.left_out == () and opened.decoder.line == "2 blocks, width 16, 4 heads"
    file = convert(opened, to, tmp_path / "out.safetensors")
    # Of ours the header says what no shape shows; the others' decoders have 16 heads in the code.
    ours = to == "vitrail"
    again = open_weights(file, {} if ours else {"norm_eps": 1e-6, "heads": 3})
    assert again.decoder.config == replace(opened.decoder.config, heads=4 if ours else 16)
    for name, tensor in opened.state.items():
        assert torch.equal(again.state[name], tensor), name
    for name, tensor in opened.decoder.state.items():
        assert torch.equal(again.decoder.state[name], tensor), name


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    other = theirs()
    other.save_pretrained(tmp_path / "theirs")
    opened = open_weights(tmp_path / "theirs")
    out = tmp_path / "ours"
    out.mkdir()
    convert(opened, "huggingface", out / "model.safetensors")
    shutil.copy(tmp_path / "theirs" / "config.json", out)
    # Published files have no decoder_encoder, which is what transformers 5 itself writes.
    assert "decoder.decoder_layers.0.output.dense.bias" in load_file(out / "model.safetensors")
    again = hf.ViTMAEForPreTraining.from_pretrained(out)
    for name, tensor in other.state_dict().items():
        close(again.state_dict()[name], tensor, msg=name)
    assert open_weights(out).decoder.state.keys() == opened.decoder.state.keys()


def test_a_decoder_of_other_positions_or_in_part_is_left_out(tmp_path: Path) -> None:
    other = theirs()
    torch.nn.init.normal_(other.decoder.decoder_pos_embed)
    other.save_pretrained(tmp_path)
    opened = open_weights(tmp_path)
    assert opened.decoder is None and "decoder.decoder_pos_embed" in opened.left_out


@pytest.mark.parametrize(
    ("depth", "width", "count"),
    [(8, 512, 25_811_712), (4, 256, 3_455_744), (4, 192, 2_002_176)],
)
def test_decoders_of_a_vit_s_have_so_many_weights(depth: int, width: int, count: int) -> None:
    shape = model_config("vit_s16")
    with torch.device("meta"):
        decoder = PatchDecoder(
            DecoderConfig(depth=depth, width=width), shape.width, shape.grid, 768
        )
    assert count_parameters(decoder) == count


class Plain:
    """MAE as models_mae.py says it, on our modules' weights: gathers and concatenations."""

    def __init__(self, task: Mae) -> None:
        self.model, self.decoder = copy.deepcopy(task.model), copy.deepcopy(task.decoder)

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        model, n = self.model, noise.shape[1]
        x = model.stem.proj(images).flatten(2).transpose(1, 2) + model.position.table
        order = noise.argsort(dim=1)
        back, keep = order.argsort(dim=1), int(n * 0.25)
        x = x.gather(1, order[:, :keep, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([model.prefix.expand(len(x), -1, -1), x], dim=1)
        for block in model.encoder.blocks:
            x = block(x)
        y = self.decoder.embed(model.encoder.norm(x))
        token = self.decoder.mask_token.expand(len(y), n - keep, -1)
        rows = torch.cat([y[:, 1:], token], dim=1)
        rows = rows.gather(1, back[:, :, None].expand(-1, -1, rows.shape[2]))
        y = torch.cat([y[:, :1], rows + self.decoder.position.table], dim=1)
        for block in self.decoder.encoder.blocks:
            y = block(y)
        y = self.decoder.predict(self.decoder.encoder.norm(y))[:, 1:]
        patches = images.reshape(len(images), 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).flatten(3)
        patches = patches.flatten(1, 2)
        t = (patches - patches.mean(-1, True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
        hidden = (back >= keep).double()
        return ((y - t).square().mean(-1) * hidden).sum() / hidden.sum()


def test_a_step_is_a_plain_one() -> None:
    task = task_of().double()
    plain, batch = Plain(task), batch_of()
    batch = batch._replace(views=(Canvas(batch.images.double(), None),))
    noise = torch.from_numpy(keyed.uniform(0, 2, batch.indices, "mask", 16))
    found, expected = task.loss(batch).total, plain.loss(batch.images, noise)
    # The pixels are guessed in float32, whatever computes.
    close(found.double(), expected, 1e-5)
    found.backward()
    expected.backward()
    size = largest(p.grad for p in plain.model.parameters() if p.grad is not None)
    pairs = zip(
        [*task.model.parameters(), *task.decoder.parameters()],
        [*plain.model.parameters(), *plain.decoder.parameters()],
        strict=True,
    )
    for mine, its in pairs:
        close(mine.grad, its.grad, 1e-5, size=size)


def test_who_is_hidden_follows_from_seed_epoch_and_image_alone() -> None:
    task, whole = task_of(), batch_of()
    losses = [task.loss(batch_of(2, first=first)).total for first in (0, 2, 4)]
    close(torch.stack(losses).mean(), task.loss(whole).total)  # in parts, as micro-batches are
    assert task.loss(whole._replace(epoch=3)).total != task.loss(whole).total
    assert not task.coupled
    other = task_of()
    other.seed = 1
    assert other.loss(whole).total != task.loss(whole).total


@pytest.mark.parametrize(("n", "share", "seen"), [(196, 0.75, 49), (16, 0.75, 4), (9, 0.5, 4)])
def test_so_many_are_seen_and_each_image_has_its_own(n: int, share: float, seen: int) -> None:
    noise = keyed.uniform(0, 0, np.arange(50), "mask", n)
    found = masks(noise, share)
    assert found.seen.shape == (50, seen) == (50, kept(n, share))
    assert (found.hidden.sum(dim=1) == n - seen).all()
    assert (found.hidden.gather(1, found.seen) == 0).all()
    assert len({tuple(row) for row in found.seen.tolist()}) > 40


def test_what_is_hidden_is_not_seen() -> None:
    """The encoder gives the same for images that differ in hidden patches alone."""
    for change in (
        {},
        {"position": "learned"},
        {"position": "rope"},
        {"stem": "patchify"},
        {"class_token": False, "pool": "mean"},
        {"registers": 3},
    ):
        task = task_of(model=replace(TINY, **change)).eval()
        images = batch_of(2).images
        found = masks(keyed.uniform(0, 0, np.arange(2), "mask", 16), 0.75)
        mask = found.hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        with torch.no_grad():
            seen = task.model.shown(images, found.seen)
            other = task.model.shown(images + mask * torch.randn_like(images), found.seen)
        prefix = 0 if task.model.prefix is None else len(task.model.prefix)
        assert torch.equal(seen, other) and seen.shape[1] == prefix + 4


def test_all_patches_shown_are_the_models_features() -> None:
    for change in ({}, {"position": "rope"}, {"registers": 2, "position": "learned"}):
        model = build(replace(TINY, **change)).eval()
        images, everywhere = batch_of(2).images, torch.arange(16).expand(2, -1)
        features = model.features(images)
        close(model.shown(images, everywhere), torch.cat([features.prefix, features.patches], 1))


@pytest.mark.parametrize("change", [{}, {"pool": "map"}, {"pool": "mean", "pool_norm": True}])
def test_all_that_learns_has_a_gradient_for_which_processes_wait(change: dict) -> None:
    task = task_of(model=replace(TINY, **change))
    task.loss(batch_of()).total.backward()
    without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_images_of_another_size_than_the_models() -> None:
    task = task_of()
    assert task.loss(batch_of(2, (48, 40))).total.isfinite()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stem": "conv"}, "none has seen another before"),
        ({"position": "peg"}, "none has seen another before"),
        ({"merge": 1}, "merge"),
        ({"window": (2, 2)}, "window"),
        ({"scales": "adaptive", "patch": (8, 8)}, "one size"),
        ({"image_size": (8, 16)}, "larger images"),
    ],
)
def test_a_model_that_cannot_leave_patches_out_is_refused(change: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        task_of(model=replace(TINY, **change))


def test_only_a_vit() -> None:
    with pytest.raises(UsageError, match="for ViTs"):
        Mae(build("resnet18", classes=0), SMALL, Nothing(0), EmbedConfig(), 0)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_wrong_share_is_named(share: float) -> None:
    with pytest.raises(UsageError, match=r"mae.mask must be in \(0, 1\)"):
        MaeConfig(mask=share)
    with pytest.raises(UsageError, match="divisible"):
        DecoderConfig(width=10, heads=4)


def test_one_image_duplicates_and_bfloat16_pass() -> None:
    task = task_of()
    assert task.loss(batch_of(1)).total.isfinite()
    batch = batch_of()
    same = batch.rows(np.zeros(6, int))
    assert task.loss(same).total.isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        close(task.loss(batch).total, task_of().loss(batch).total, 0.05)
    flat = batch._replace(views=(Canvas(torch.zeros(6, 3, 32, 32), None),))
    task.loss(flat).total.backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_a_step_can_be_had_on_paper() -> None:
    with torch.device("meta"):
        task = Mae(build(TINY), SMALL, Nothing(0), EmbedConfig(), 0)
        view = Canvas(torch.empty(4, 3, 32, 32), None)
        task.loss(Batch((view,), {}, np.arange(4))).total.backward()
    assert task.decoder.predict.weight.grad.is_meta


def test_patches_have_their_pixels_by_row_column_channel() -> None:
    images = torch.randn(2, 3, 16, 24)
    found = patch_pixels(images, (8, 4))
    assert found.shape == (2, 12, 96)
    assert torch.equal(found[1, 7], images[1, :, 8:16, 4:8].permute(1, 2, 0).flatten())


def test_it_learns_what_is_hidden() -> None:
    task = task_of()
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2)
    torch.manual_seed(3)
    images = F.interpolate(torch.randn(4, 3, 3, 3), (32, 32), mode="bicubic").repeat(8, 1, 1, 1)
    losses = []
    for epoch in range(60):
        total = task.loss(Batch((Canvas(images, None),), {}, np.arange(32), epoch)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


def _share(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    mine = batch_of().rows(slice(0, 4) if rank == 0 else slice(4, 6))
    total = task_of().loss(mine).total * len(mine.indices) / 6
    torch.save(total.detach(), folder / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    start = torch.multiprocessing.start_processes
    start(_share, (tmp_path,), nprocs=2, start_method="fork")
    found = sum(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    close(found, task_of().loss(batch_of()).total.detach(), 1e-6)
