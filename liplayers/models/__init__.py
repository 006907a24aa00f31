"""Models: plain functions of a layer choice and sizes, each returning an nn.Sequential that ends in `head`."""

from liplayers.models.aolnet import aolnet as aolnet
from liplayers.models.blockmlp import blockmlp as blockmlp
from liplayers.models.bronet import bronet as bronet
from liplayers.models.convnet import convnet as convnet
from liplayers.models.lbdn import lbdn as lbdn
from liplayers.models.lipconvnet import lipconvnet as lipconvnet
from liplayers.models.lipnext import lipnext as lipnext
from liplayers.models.liresnet import liresnet as liresnet
from liplayers.models.mlp import mlp as mlp
from liplayers.models.sllnet import sllnet as sllnet
