"""The names of `import liplayers`."""

from liplayers.bounds import explain as explain
from liplayers.bounds import layer_bounds as layer_bounds
from liplayers.bounds import lipschitz_bound as lipschitz_bound
from liplayers.bounds import register_bound as register_bound
from liplayers.bounds import split_head as split_head
from liplayers.bundles import load_bundle as load_bundle
from liplayers.bundles import load_pretrained as load_pretrained
from liplayers.bundles import save_bundle as save_bundle
from liplayers.conversion import convert as convert
from liplayers.conversion import from_torch as from_torch
from liplayers.core.registry import FAMILIES as FAMILIES
from liplayers.core.registry import Family as Family
from liplayers.core.registry import get_layer as get_layer
from liplayers.core.registry import register as register
from liplayers.core.weights import cached as cached
from liplayers.errors import LipschitzError as LipschitzError
from liplayers.evaluator import Certification as Certification
from liplayers.evaluator import certify as certify
from liplayers.export import export_onnx as export_onnx
from liplayers.export import export_program as export_program
from liplayers.export import export_safetensors as export_safetensors
from liplayers.export import freeze as freeze
from liplayers.layers import *
from liplayers.linalg.norms import row_distances as row_distances
from liplayers.modules import *
from liplayers.modules import BatchCentering as BatchCentering
from liplayers.modules import ConvexResidual as ConvexResidual
from liplayers.modules import ScaledAvgPool2d as ScaledAvgPool2d

# names of before 0.2, which models and checkpoints of others may have
AvgPool2d, Centring, Residual = ScaledAvgPool2d, BatchCentering, ConvexResidual
