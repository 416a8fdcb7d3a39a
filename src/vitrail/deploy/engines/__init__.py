"""Runtimes, one file each: `load(bundle)` gives an `Engine`, which says of views what the model
says. Prediction, measurement, serving and benchmarks know no other way to an exported model.
"""

from vitrail.deploy.engines.engine import ENGINES as ENGINES
from vitrail.deploy.engines.engine import USUAL as USUAL
from vitrail.deploy.engines.engine import Engine as Engine
from vitrail.deploy.engines.engine import Setting as Setting
from vitrail.deploy.engines.engine import check_installed as check_installed
from vitrail.deploy.engines.engine import engine_of as engine_of
from vitrail.deploy.engines.engine import runtime as runtime
from vitrail.deploy.engines.engine import runtime_of as runtime_of
