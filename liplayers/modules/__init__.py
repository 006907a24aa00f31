"""Fixed modules: activations, pooling, containers, offsets, shifts, and what frozen layers run as."""

from liplayers.modules.activations import *
from liplayers.modules.containers import *
from liplayers.modules.offsets import *
from liplayers.modules.pooling import *
from liplayers.modules.shift import *
