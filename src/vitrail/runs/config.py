"""Everything a training run depends on, as one frozen value that a YAML file can hold.

A recipe (vitrail.recipes) makes the value, a file and flags change fields of it, and the run folder
keeps it as config.yaml: enough to run it again. This module reads and writes; it does not train.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, TypeAdapter, ValidationError

from vitrail.data.batches.loader import Reading
from vitrail.data.sources.hub import HUB_PREFIX, STREAM_PREFIX
from vitrail.data.sources.layout import FolderRules
from vitrail.data.sources.mask_meaning import MaskRules
from vitrail.data.sources.stream import StreamSettings
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.mix import check_mixable
from vitrail.data.views.preprocess import Interpolation, Preprocess, Resize
from vitrail.errors import DataError, UsageError, setting, unknown_name
from vitrail.models import ModelConfig, ViTConfig
from vitrail.tasks import (
    TASKS,
    ClassifyConfig,
    DetectConfig,
    DinoConfig,
    DistillConfig,
    DistillFeaturesConfig,
    EmbedConfig,
    LejepaConfig,
    MaeConfig,
    MocoConfig,
    PairConfig,
    PruneConfig,
    SegmentConfig,
)
from vitrail.text import TextConfig

TaskName = Literal[
    "classify",
    "segment",
    "detect",
    "mocov3",
    "dino",
    "lejepa",
    "mae",
    "distill-features",
    "clip",
    "siglip",
    "lit",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they become batches."""

    path: str
    """A folder, .csv, .txt, .npz, IDX files, tar shards, samples:NAME, hf:NAME, hf-stream:NAME."""
    batch_size: int = 64
    """Images an optimiser step sees (before accumulation). `--data.batch-size auto`: as many as
    there is memory for."""
    workers: int = 2
    """Threads that decode and crop; with decoders processes, as many processes beside them."""
    decoders: Literal["auto", "threads", "processes"] = "auto"
    """What decodes files. A decoder that crashes or hangs ends a run of threads, but costs
    processes only that image. auto: processes from 256 files on."""
    image_seconds: float = 60.0
    """A process that takes longer over one image is stopped, and the image left out."""
    cache: Literal["memory", "disk", "none"] = "memory"
    """Where decoded images are kept: 2 GiB of memory, or a file in the user's cache folder. Those
    that a stream trains on are not kept."""
    decode: Literal["exact", "fast"] = "exact"
    """fast: large JPEGs are reduced while decoded, crops cut at whole pixels, torch scales."""
    val_fraction: float = 0.2
    """Share of each class held out, where the data brings no split of its own."""
    image_column: str | None = None
    """Its name; in a list without a header its number, from 1."""
    label_column: str | None = None
    split_column: str | None = None
    caption_column: str | None = None
    """Of images with texts."""
    parts: str = "auto"
    """Which folders of a folder are its parts. auto: by their names; none: all are classes; or as
    train=DIR,val=DIR,test=DIR, where a part may be given twice."""
    follow_links: bool = False
    """Follow symbolic links to folders elsewhere. Those to files and within the data are
    followed anyway."""
    max_unreadable: float = 0.01
    """Share of damaged images up to which training goes on without them."""
    resize: Resize = "crop"
    """How an image is fitted to the model's size: crop, squash, pad; native, which keeps its shape
    and has as many patches; letterbox, which fills up with background; tiles, of boxes."""
    crop: float = 1.0
    """The share of the scaled image's side that evaluation shows, in the middle."""
    tile: int | None = None
    """Of boxes, where objects are small in large images: the side in pixels of the tiles that an
    image is cut into, in training and in prediction, where what was found in them is merged."""
    train_size: tuple[int, int] | None = None
    """(height, width) of training crops; None: the model's. A random crop enlarges what it shows:
    at 7/8 of the model's size things are as large as evaluation shows them (arXiv 1906.06423)."""
    first_size: tuple[int, int] | None = None
    """(height, width) of training images in the first steps, scaled down from `train_size`: they
    grow patch by patch until 70% of the run are done (progressive resizing, arXiv 2104.00298)."""
    multiscale: tuple[float, float] | None = None
    """The size of training images changes from step to step, between these factors of
    `train_size`, in whole patches: (0.75, 1.25) is usual for boxes, which are scaled with them."""
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5,)
    """Per channel, or one for all, of pixel values in 0..1."""
    std: tuple[float, ...] = (0.5,)
    grey_range: tuple[float, float] | None = None
    """Of greys of more than 8 bits, the values that become black and white; what is outside is
    clipped. None: found by a look at the training images, where there are such greys."""

    masks: MaskRules = field(default_factory=MaskRules)
    """How masks are understood, where that is not as they say themselves."""
    stream: StreamSettings = field(default_factory=StreamSettings)
    """How hf-stream:NAME is read."""

    @property
    def streamed(self) -> bool:
        """Whether training images are read from front to back."""
        return self.path.startswith(STREAM_PREFIX)

    def rules(self) -> FolderRules:
        """How a folder of images is understood."""
        return FolderRules(parts=self.parts, follow_links=self.follow_links)

    def reading(self) -> Reading:
        """How images are read."""
        return Reading(
            decoders=self.decoders,
            image_seconds=self.image_seconds,
            cache=self.cache,
            decode=self.decode,
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule."""

    name: Literal["adamw", "sgd", "muon", "lamb", "adafactor"] = "adamw"
    """muon: the matrices between stem and head by Muon, all else by AdamW, at AdamW's learning
    rates. lamb: for large batches, at about 3e-3. adafactor: AdamW with a twentieth of its second
    moments' memory."""
    lr: float = 1e-3
    """The highest learning rate, after warm-up."""
    weight_decay: float = 0.05
    """On matrices and convolution kernels only: not on biases, norms, tokens, positions."""
    final_weight_decay: float | None = None
    """Where weight decay ends, on a cosine from where it starts (DINO: 0.04 to 0.4); None: it stays
    as it is."""
    beta1: float = 0.9
    """Decay of the first moment; the momentum of SGD."""
    beta2: float = 0.999
    """Decay of the second moment."""
    muon_momentum: float = 0.95
    """Decay of the momentum of Muon's matrices."""
    state: Literal["float32", "bfloat16"] = "float32"
    """What the first moment is kept in, of every optimiser: bfloat16 takes half the memory (AugReg,
    2106.10270). The second moment moves by less a step than a bfloat16 can show."""
    schedule: Literal["cosine", "linear", "constant", "trapezoid"] = "cosine"
    """trapezoid: constant, then linear in the last `cooldown` of the run (arXiv 2405.18392)."""
    warmup: float = 0.05
    """Share of the run in which the learning rate climbs from 0."""
    cooldown: float = 0.2
    """Share of the run in which a trapezoid falls."""
    final_lr: float = 0.01
    """Where the schedule ends, as a share of `lr`."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    clip_by: Literal["all", "tensor"] = "all"
    """tensor: each tensor's gradient is cut to `clip` by its own norm (DINO), not all by theirs."""

    def __post_init__(self) -> None:
        for name, share in (
            ("beta1", self.beta1),
            ("beta2", self.beta2),
            ("muon_momentum", self.muon_momentum),
        ):
            if not 0 <= share < 1:
                raise UsageError(f"{setting(f'optim.{name}')} must be in [0, 1), not {share}")
        if self.weight_decay < 0:
            raise UsageError(
                f"{setting('optim.weight_decay')} cannot be negative: {self.weight_decay}"
            )
        if self.final_weight_decay is not None and self.final_weight_decay < 0:
            raise UsageError(
                f"{setting('optim.final_weight_decay')} cannot be negative: "
                f"{self.final_weight_decay}"
            )
        if self.clip is not None and self.clip <= 0:
            raise UsageError(f"{setting('optim.clip')} must be above 0, or None, not {self.clip}")
        if not 0 < self.cooldown <= 1:
            raise UsageError(f"{setting('optim.cooldown')} must be in (0, 1], not {self.cooldown}")
        if self.schedule == "trapezoid" and self.warmup + self.cooldown > 1:
            raise UsageError(
                f"{setting('optim.warmup')} {self.warmup} and {setting('optim.cooldown')} "
                f"{self.cooldown} are more than the run together: make one of them smaller"
            )


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What of a model learns, how fast, and how its head starts: for weights that know something.

    The defaults train everything alike. A value out of range is a `UsageError`.
    """

    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by name, with * ? [ ]: 'stem.*' 'encoder.blocks.[0-5].*'.
    Frozen modules act as in evaluation; what is frozen from the input on costs no backward pass."""
    last_blocks: int | None = None
    """Train the last so many blocks and all that follows them; 0: final norm, pooling and head."""
    layer_decay: float = 1.0
    """Each layer's learning rate as a share of the next one's (BEiT, arXiv 2106.08254)."""
    head_lr: float = 1.0
    """The head's learning rate, times `optim.lr`. Where tune says head, a DynamicViT's predictors
    are meant as well."""
    head_init: Literal["zeros", "probe"] = "zeros"
    """zeros: of a new head; that of weights for the very classes of the data is kept. probe: any
    head becomes the one that solves the linear problem, before a step is taken (2202.10054)."""
    head_warmup: float = 0.0
    """Share of the run in which only the head learns; each of the two parts has a whole schedule
    of its own."""
    lora_rank: int = 0
    """Learn the head, and a product of this rank beside each matrix of `lora_targets`; all else is
    frozen (LoRA, arXiv 2106.09685). 0: none."""
    lora_alpha: float = 16.0
    """The product counts `lora_alpha / lora_rank` times."""
    lora_targets: tuple[str, ...] = ("qkv", "proj")
    """Last names of linear layers: qkv, proj, fc1, fc2."""
    kept_views: int = 0
    """Of a frozen backbone under a head for masks, or of a teacher of features: each image has so
    many views, which come again in turn, and what is said of them is kept in memory. 0: each epoch
    has its own."""

    def __post_init__(self) -> None:
        for name, share in (("layer_decay", self.layer_decay), ("head_lr", self.head_lr)):
            if not 0 < share < math.inf:
                raise UsageError(f"{setting(f'tune.{name}')} must be above 0, not {share}")
        if self.layer_decay > 1:
            raise UsageError(
                f"{setting('tune.layer_decay')} must be in (0, 1], not {self.layer_decay}: early "
                f"layers are to learn more slowly than late ones"
            )
        if not 0 <= self.head_warmup < 1:
            raise UsageError(
                f"{setting('tune.head_warmup')} must be in [0, 1), not {self.head_warmup}"
            )
        numbers = ("last_blocks", "lora_rank", "kept_views")
        for name, number in ((name, getattr(self, name)) for name in numbers):
            if number is not None and number < 0:
                raise UsageError(f"{setting(f'tune.{name}')} cannot be negative: {number}")
        if self.lora_rank and not self.lora_targets:
            raise UsageError(
                f"{setting('tune.lora_rank')} is set, but {setting('tune.lora_targets')} is empty: "
                f"name layers"
            )
        if not 0 < self.lora_alpha < math.inf:
            raise UsageError(f"{setting('tune.lora_alpha')} must be above 0, not {self.lora_alpha}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: DataConfig
    model: Annotated[ModelConfig, Discriminator("family")]
    row: str = ""
    """The name in MODELS that `model` started from."""
    weights: str | None = None
    """Published weights to start from: a name that `vitrail weights` lists, a file, an https
    address, hf:OWNER/NAME, or a run folder. None starts at random."""
    text: Annotated[TextConfig | None, Discriminator("family")] = None
    """The text tower, of clip, siglip and lit."""
    text_row: str = ""
    """The name in TEXTS that `text` started from."""
    text_weights: str | None = None
    """Published weights of the text tower to start from: a name that `vitrail weights` lists, or a
    file. None starts at random."""
    task: TaskName = "classify"
    """What is learned: classes of images or of pixels, boxes of objects, features from images
    without labels, or which text goes with which image. Without the flag the data decides: masks
    are for segment, boxes for detect, texts for clip."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    lejepa: LejepaConfig = field(default_factory=LejepaConfig)
    mae: MaeConfig = field(default_factory=MaeConfig)
    pair: PairConfig = field(default_factory=PairConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    distill_features: DistillFeaturesConfig = field(default_factory=DistillFeaturesConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    method: Literal["gradient", "probe"] = "gradient"
    """probe: nothing but a linear head, solved exactly on features that are computed once. Length,
    `optim`, `ema` and `accumulate` then mean nothing; mirror images count if `hflip` is above 0."""
    epochs: float | None = None
    """Length of the run in passes over the data."""
    minutes: float | None = None
    """Length in minutes of training; the schedule ends when the time does. With both, the first."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    micro_batch: int | None = None
    """Images computed at once; the gradients stay those of the whole batch, or the run says what
    does not. None: all, until memory runs out. `--micro-batch auto`: as there is memory for."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: a rounded copy of the weights computes; what is learned and kept stays float32."""
    compile: bool = False
    """torch.compile of each block: slower to start, then faster; where it fails, the run says why
    and goes on without."""
    checkpointing: bool = False
    """Keep only each block's input for the backward pass, and compute the block again (arXiv
    1604.06174): far less memory for a fifth more work; on a CPU, where freed memory is handed back
    as well, at half the speed."""
    devices: int = 1
    """Processes on this machine, one a device. Under torchrun it decides instead."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes, each has the whole model (ddp) or its rows of everything (fsdp)."""
    stall_seconds: float = 600.0
    """Of several processes: a step that takes longer ends the run, and names who did not come."""
    ema: float = 0.0
    """Decay of the running average of the weights that is evaluated and kept; 0: none."""
    evaluations: int = 10
    """How often in a run the held-out images are measured, and a checkpoint is kept."""
    patience: int | None = None
    """Stop after so many evaluations without a better top-1."""
    checkpoint_minutes: float = 10.0
    """Most minutes of training between two checkpoints; each evaluation keeps one as well."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on the disk, beside the best."""
    profile: int = 0
    """Look at so many steps after the first few, and write RUN/profile."""
    keep: Literal["last", "best"] = "last"
    """Which checkpoint the report judges. `best` is chosen on the held-out images themselves."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU when there is one."""
    threads: int | None = None
    """CPU threads of one operation; None leaves torch's choice."""
    seed: int = 0
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (extra: tensorboard)."""

    def __post_init__(self) -> None:
        for field_name, value in known_fields(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
                raise UsageError(f"{setting(field_name)} must be a finite number, not {value}")
        for name, value in (("epochs", self.epochs), ("minutes", self.minutes)):
            if value is not None and value <= 0:
                raise UsageError(f"{setting(name)} must be positive, not {value}")
        if self.epochs is None and self.minutes is None:
            raise UsageError(
                f"a run needs a length: set {setting('epochs')} or {setting('minutes')}"
            )
        for name, number in (
            ("data.batch_size", self.data.batch_size),
            ("data.workers", self.data.workers),
            ("accumulate", self.accumulate),
            ("micro_batch", self.micro_batch),
            ("devices", self.devices),
            ("evaluations", self.evaluations),
            ("patience", self.patience),
            ("threads", self.threads),
        ):
            if number is not None and number < 1:
                raise UsageError(f"{setting(name)} must be at least 1, not {number}")
        if self.profile < 0:
            raise UsageError(
                f"{setting('profile')} is a number of steps, and cannot be {self.profile}"
            )
        if not abs(self.seed) < 2**63:
            raise UsageError(f"{setting('seed')} must fit into 64 bits, and {self.seed} does not")
        if self.keep_checkpoints < 2:
            raise UsageError(
                f"{setting('keep_checkpoints')} must be at least 2, not {self.keep_checkpoints}: "
                f"if the newest is damaged, the one before it is there"
            )
        for name, least in (
            ("checkpoint_minutes", self.checkpoint_minutes),
            ("stall_seconds", self.stall_seconds),
        ):
            if not least > 0:
                raise UsageError(f"{setting(name)} must be above 0, not {least}")
        for name, share in (
            ("data.val_fraction", self.data.val_fraction),
            ("data.max_unreadable", self.data.max_unreadable),
            ("optim.warmup", self.optim.warmup),
            ("classify.label_smoothing", self.classify.label_smoothing),
            ("ema", self.ema),
        ):
            if not 0 <= share < 1:
                raise UsageError(f"{setting(name)} must be in [0, 1), not {share}")
        if self.optim.lr <= 0:
            raise UsageError(f"{setting('optim.lr')} must be positive, not {self.optim.lr}")
        if self.data.resize in ("pad", "native") and not isinstance(self.model, ViTConfig):
            raise UsageError(
                f"{setting('data.resize')} {self.data.resize}: images of different sizes in one "
                f"batch are for ViTs, not for the family '{self.model.family}'; take crop or squash"
            )
        self._check_task()
        self._check_channels()
        check_mixable(self.augment, self.train_preprocess())
        self.data.reading()
        if self.data.train_size is not None:
            self.model.check_size(self.data.train_size)
        self._check_multiscale()
        self._check_growth()
        if self.data.streamed:
            self._check_stream()
        elif self.data.stream != StreamSettings():
            raise UsageError(
                f"data.stream says how a stream is read, and {self.data.path} is none: leave it "
                f"out, or stream a Hugging Face data set, {STREAM_PREFIX}NAME"
            )
        if self.method == "probe":
            self._check_probe()

    def _check_task(self) -> None:
        """Refuse what the task would have to ignore although it was asked for."""
        if self.augment.size is not None:
            raise UsageError(
                f"{setting('augment.size')} is of a task's own views: training images are of "
                f"{setting('data.train_size')}"
            )
        if (self.data.tile is not None or self.data.resize == "tiles") and self.task != "detect":
            raise UsageError(f"tiles of an image are for {setting('task', 'detect')}")
        if self.data.tile is not None and self.data.resize != "tiles":
            raise UsageError(
                f"{setting('data.tile', self.data.tile)} is of images that are cut into tiles, and "
                f"{setting('data.resize', self.data.resize)} shows them whole: add "
                f"{setting('data.resize', 'tiles')}"
            )
        if self.task == "detect" and self.data.crop != 1:
            raise UsageError(
                f"{setting('data.crop', self.data.crop)} cuts off the edges of images, and boxes "
                f"are judged whole: leave it at 1"
            )
        if self.task == "classify":
            if self.data.resize in ("short", "letterbox"):
                raise UsageError(
                    f"{setting('data.resize', self.data.resize)} is for what lies in an image: "
                    f"take crop or pad"
                )
            return
        one_size = self.task != "detect"  # while boxes are scaled with their images
        kind = TASKS[self.task]
        asked = {
            f"{setting('method')} probe": self.method == "probe",
            f"{setting('tune.head_init')} probe": self.tune.head_init == "probe",
            f"{setting('augment.mixup')} and cutmix": self.augment.mixes,
            setting("distill.teacher"): kind.teacher == "none" and self.distill.teacher is not None,
            "a stream": self.data.streamed,
            setting("data.first_size"): one_size and self.data.first_size is not None,
            setting("data.multiscale"): one_size and self.data.multiscale is not None,
            "classify": self.classify != ClassifyConfig(),
            **kind.refused(self),
        }
        if refused := [name for name, is_asked in asked.items() if is_asked]:
            raise UsageError(
                f"{setting('task', self.task)} cannot follow {', '.join(refused)}: {kind.why}. "
                f"Leave that out"
            )
        for view in self.views():
            if view.size is not None:
                self.model.check_size(view.size)

    @property
    def locked(self) -> bool:
        """Whether the image tower stays as it is, and looks at each image once."""
        return self.task == "lit"

    def _check_channels(self) -> None:
        channels = self.model.channels
        if channels not in (1, 3):
            raise UsageError(
                f"{setting('model.channels')} {channels}: images are read in grey (1) or in colour "
                f"(3), and no model is trained here on others"
            )
        for name, given in (("data.mean", self.data.mean), ("data.std", self.data.std)):
            if len(given) not in (1, channels):
                raise UsageError(
                    f"{setting(name)} has {len(given)} numbers, and {setting('model.channels')} is "
                    f"{channels}: give one for all channels, or one for each"
                )

    def _check_growth(self) -> None:
        first, whole = self.data.first_size, self.train_preprocess().size
        if first is None:
            return
        if any(f < 1 or f > w for f, w in zip(first, whole, strict=True)):
            raise UsageError(
                f"{setting('data.first_size')} {first[0]}x{first[1]} must be within "
                f"{whole[0]}x{whole[1]}, the size of training images"
            )
        if self.data.resize == "native" or self.distill.teacher is not None:
            raise UsageError(
                f"{setting('data.first_size')} is for images of one size and without a teacher: "
                f"leave it out"
            )
        for size in self.train_sizes():
            self.model.check_size(size)

    def _check_multiscale(self) -> None:
        factors = self.data.multiscale
        if factors is None:
            return
        name = setting("data.multiscale", factors)
        if not 0.1 <= factors[0] < factors[1] <= 4:
            raise UsageError(f"{name}: give 0.1 <= least < greatest <= 4")
        asked = {
            setting("data.first_size"): self.data.first_size is not None,
            setting("distill.teacher"): self.distill.teacher is not None,
            setting("tune.kept_views"): self.tune.kept_views > 0,
            setting("data.resize", self.data.resize): not self.train_preprocess().one_size,
        }
        if refused := [other for other, is_asked in asked.items() if is_asked]:
            raise UsageError(
                f"{name} is for images of one size, which changes from step to step, and cannot "
                f"follow {', '.join(refused)}: leave that out"
            )
        if len(self.train_sizes()) < 2:
            height, width = self.train_preprocess().size
            raise UsageError(
                f"{name}: of the sizes between these factors of {height}x{width} the model takes "
                f"no two: give factors that are further apart"
            )

    def _check_stream(self) -> None:
        """Refuse what needs all of the training images, or the same ones again."""
        asked = {
            f"{setting('method')} probe": self.method == "probe",
            f"{setting('tune.head_init')} probe": self.tune.head_init == "probe",
            f"{setting('classify.class_weights')} balanced": self.classify.class_weights
            == "balanced",
            f"{setting('data.cache')} disk": self.data.cache == "disk",
        }
        if refused := [name for name, is_asked in asked.items() if is_asked]:
            raise UsageError(
                f"a stream is read from front to back, an image at a time, so it cannot follow "
                f"{', '.join(refused)}: leave that out, or read the data whole, as "
                f"{HUB_PREFIX}{self.data.path.removeprefix(STREAM_PREFIX)}"
            )

    def _check_probe(self) -> None:
        """Refuse what a probe would have to ignore although it was asked for."""
        asked = asdict(self.augment) | {"hflip": 0.0}
        seen = asdict(AugmentConfig.off()) | {n: asked[n] for n in ("ops", "magnitude", "fill")}
        ignored = [setting(f"augment.{name}") for name in asked if asked[name] != seen[name]]
        if self.tune != TuneConfig():
            ignored.append("tune")
        if self.data.first_size is not None:
            ignored.append(setting("data.first_size"))
        if self.data.multiscale is not None:
            ignored.append(setting("data.multiscale"))
        if self.distill.teacher is not None:
            ignored.append(setting("distill.teacher"))
        if ignored:
            raise UsageError(
                f"{setting('method')} probe looks at each image once, as it is, and learns the "
                f"head alone, so it cannot follow {', '.join(ignored)}: leave that out, or use "
                f"{setting('method')} gradient"
            )

    def train_preprocess(self) -> Preprocess:
        """What training crops are made to be."""
        preprocess = self.preprocess()
        if preprocess.resize == "tiles":  # each is an image of its own
            preprocess = replace(preprocess, resize="letterbox", tile=self.tile)
        return replace(preprocess, size=self.data.train_size or preprocess.size)

    @property
    def tile(self) -> int:
        """The side in pixels of a tile of an image: as many as the model sees, if none is given."""
        return self.data.tile or max(self.model.image_size)

    def views(self) -> tuple[AugmentConfig, ...]:
        """What happens to each view of a training image."""
        return TASKS[self.task].views(self)

    def train_sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) of training images, a patch apart, the largest last: in the order in
        which they come, where images grow; with `multiscale` those that a step's is drawn from.
        """
        whole, steps = self.train_preprocess().size, self.model.stride
        if self.data.multiscale is not None:
            return self._drawn_sizes(whole, self.data.multiscale)
        first = self.data.first_size or whole
        stages = max(-(-(w - f) // s) for w, f, s in zip(whole, first, steps, strict=True))
        sizes = []
        for stage in range(stages):
            grown = [f + (w - f) * stage / stages for w, f in zip(whole, first, strict=True)]
            height, width = (max(1, round(g / s)) * s for g, s in zip(grown, steps, strict=True))
            sizes.append((height, width))
        return (*sizes, whole)

    def _drawn_sizes(
        self, whole: tuple[int, int], factors: tuple[float, float]
    ) -> tuple[tuple[int, int], ...]:
        """Those that the model takes, of about the aspect of `whole`."""
        patch = self.model.stride
        step = max(p / w for p, w in zip(patch, whole, strict=True))
        # A hair wider, so that rounding loses no size that is one of the factors exactly.
        least, greatest = math.ceil(factors[0] / step - 1e-9), math.floor(factors[1] / step + 1e-9)
        sizes = []
        for k in range(least, greatest + 1):
            height, width = (
                max(1, round(k * step * w / p)) * p for w, p in zip(whole, patch, strict=True)
            )
            if self._takes((height, width)):
                sizes.append((height, width))
        return tuple(sizes) or (whole,)

    def _takes(self, size: tuple[int, int]) -> bool:
        try:
            self.model.check_size(size)
        except UsageError:
            return False
        return True

    def preprocess(self) -> Preprocess:
        """How evaluation sees an image: at the model's size and channels."""
        channels, data = self.model.channels, self.data
        return Preprocess(
            size=self.model.image_size,
            resize=data.resize,
            crop=data.crop,
            interpolation=data.interpolation,
            mean=data.mean * channels if len(data.mean) == 1 else data.mean,
            std=data.std * channels if len(data.std) == 1 else data.std,
            patch=self.model.stride,
            tile=data.tile,
            grey_range=data.grey_range,
        )


ALIASES: Mapping[str, str] = {
    "train": "",
    "optimizer": "optim",
    "gradient_clipping": "optim.clip",
    "gradient_accumulation": "accumulate",
    "batch_size": "data.batch_size",
    "workers": "data.workers",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "label_smoothing": "classify.label_smoothing",
    "image_size": "model.image_size",
}
"""What other tools' files call our fields: `train: {optimizer: {lr: 3e-4}}` is `optim.lr`."""

_PRECISIONS = {"bf16": "bfloat16", "fp32": "float32", "32": "float32"}


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, as it stands. Raises `DataError`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold fields such as 'epochs: 10', not {content!r:.60}")
    return content


def read_changes(path: Path) -> dict[str, Any]:
    """The fields that a YAML file sets, by dotted name: `{"optim.lr": 3e-4}`."""
    changes = dict(_flatten(read_tree(path)))
    if changes.get("precision") in _PRECISIONS:
        changes["precision"] = _PRECISIONS[changes["precision"]]
    return changes


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        path = ALIASES.get(str(key), f"{prefix}{key}")
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}." if path else "")
        else:
            yield path, value


def known_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of a config by its dotted name.

    >>> known_fields(OptimConfig())["lr"]
    0.001
    """
    known: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            known |= known_fields(value, f"{prefix}{item.name}.")
        else:
            known[f"{prefix}{item.name}"] = value
    return known


def with_changes(config: TrainConfig, changes: Mapping[str, Any], origin: str) -> TrainConfig:
    """The config with dotted fields changed, checked and converted to their types.

    `origin` names where the changes come from, for the messages. Raises `UsageError`.
    """
    known = known_fields(config)
    tree = to_dict(config)
    for name, value in changes.items():
        if name not in known:
            raise unknown_name(f"field in {origin}:", name, known)
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch[parent]
        branch[leaf] = value
    return from_dict(tree, origin)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values: what YAML and JSON can hold."""
    return _PLAIN.dump_python(asdict(config), mode="json")


_PLAIN = TypeAdapter(dict[str, Any])


@cache
def _reader() -> TypeAdapter[TrainConfig]:
    """Made once, and not at import: it takes longer than any reading."""
    return TypeAdapter(TrainConfig)


def from_dict(tree: Mapping[str, Any], origin: str) -> TrainConfig:
    """The inverse of `to_dict`, for values from a file: text such as 3e-4 becomes its number."""
    try:
        return _reader().validate_python(dict(tree))
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            # Behind "model" stands the family by which its config was told from the others.
            loc = [p for i, p in enumerate(fault["loc"]) if (i, fault["loc"][0]) != (1, "model")]
            place = ".".join(map(str, loc))
            reason = fault["msg"].removeprefix("Value error, ")
            faults.append(f"{setting(place)}: {reason}" if place else reason)
        raise UsageError(f"{origin}: {'; '.join(faults)}") from error


def write_yaml(config: TrainConfig) -> str:
    """The whole config as a commented YAML text that `--config` takes."""
    return "# vitrail train --config FILE runs this again\n" + yaml.safe_dump(
        to_dict(config), sort_keys=False, allow_unicode=True
    )
