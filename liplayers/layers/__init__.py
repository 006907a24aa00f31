"""The layers: one file per family. A new family is a file and a line here."""

from liplayers.layers.activations import *
from liplayers.layers.aol import *
from liplayers.layers.base import cached as cached
from liplayers.layers.bcop import *
from liplayers.layers.bjorck import *
from liplayers.layers.bro import *
from liplayers.layers.cayley import *
from liplayers.layers.cholesky import *
from liplayers.layers.containers import *
from liplayers.layers.cpl import *
from liplayers.layers.gershgorin import *
from liplayers.layers.heads import *
from liplayers.layers.ldlt import *
from liplayers.layers.lipnext import *
from liplayers.layers.liresnet import *
from liplayers.layers.lot import *
from liplayers.layers.manifold import *
from liplayers.layers.offsets import *
from liplayers.layers.pooling import *
from liplayers.layers.registry import FAMILIES as FAMILIES
from liplayers.layers.registry import Family as Family
from liplayers.layers.registry import get_layer as get_layer
from liplayers.layers.registry import register as register
from liplayers.layers.rescaled import *
from liplayers.layers.rko import *
from liplayers.layers.sandwich import *
from liplayers.layers.sll import *
from liplayers.layers.soc import *
