"""Models: plain functions of a layer choice and sizes, each returning an nn.Sequential that ends in `head`."""

from liplayers.models.blockmlp import blockmlp as blockmlp
from liplayers.models.lipconvnet import lipconvnet as lipconvnet
from liplayers.models.mlp import mlp as mlp
from liplayers.models.sllnet import sllnet as sllnet
