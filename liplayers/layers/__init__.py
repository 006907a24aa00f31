"""The families: one file each. A new family is a file and a line here."""

from liplayers.layers.aol import *
from liplayers.layers.bcop import *
from liplayers.layers.bjorck import *
from liplayers.layers.bro import *
from liplayers.layers.cayley import *
from liplayers.layers.cholesky import *
from liplayers.layers.cpl import *
from liplayers.layers.free import *
from liplayers.layers.gershgorin import *
from liplayers.layers.ldlt import *
from liplayers.layers.lipnext import *
from liplayers.layers.liresnet import *
from liplayers.layers.lot import *
from liplayers.layers.manifold import *
from liplayers.layers.normalized import *
from liplayers.layers.rescaled import *
from liplayers.layers.rko import *
from liplayers.layers.sandwich import *
from liplayers.layers.sll import *
from liplayers.layers.soc import *
