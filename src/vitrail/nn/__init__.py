"""Building blocks: what two or more families use unchanged. Imports nothing above itself."""

from vitrail.nn.attention import Attention as Attention
from vitrail.nn.encoder import Block as Block
from vitrail.nn.encoder import DropPath as DropPath
from vitrail.nn.encoder import Encoder as Encoder
from vitrail.nn.encoder import LayerScale as LayerScale
from vitrail.nn.encoder import drop_path_rates as drop_path_rates
from vitrail.nn.features import Features as Features
from vitrail.nn.features import tokens_to_map as tokens_to_map
from vitrail.nn.mlp import Activation as Activation
from vitrail.nn.mlp import Mlp as Mlp
from vitrail.nn.mlp import SwiGLU as SwiGLU
from vitrail.nn.patch import ConvStem as ConvStem
from vitrail.nn.patch import Indivisible as Indivisible
from vitrail.nn.patch import PatchEmbed as PatchEmbed
from vitrail.nn.patch import patch_grid as patch_grid
from vitrail.nn.pooling import AttentionPool as AttentionPool
from vitrail.nn.pooling import Pool as Pool
from vitrail.nn.position import LearnedPosition as LearnedPosition
from vitrail.nn.position import Peg as Peg
from vitrail.nn.position import Position as Position
from vitrail.nn.position import RotaryPosition as RotaryPosition
from vitrail.nn.position import SinCosPosition as SinCosPosition
from vitrail.nn.position import sincos_table as sincos_table
