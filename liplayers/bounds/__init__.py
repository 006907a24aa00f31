"""What can be proved about a whole module."""

from liplayers.bounds.composition import ClassifierBounds as ClassifierBounds
from liplayers.bounds.composition import HeadSplit as HeadSplit
from liplayers.bounds.composition import classifier_bounds as classifier_bounds
from liplayers.bounds.composition import layer_bounds as layer_bounds
from liplayers.bounds.composition import lipschitz_bound as lipschitz_bound
from liplayers.bounds.composition import register_bound as register_bound
from liplayers.bounds.composition import split_head as split_head
from liplayers.bounds.explain import Explained as Explained
from liplayers.bounds.explain import Explanation as Explanation
from liplayers.bounds.explain import explain as explain
from liplayers.bounds.lipsdp import LipSDP as LipSDP
from liplayers.bounds.lipsdp import lipsdp_bound as lipsdp_bound
from liplayers.bounds.table import NormRow as NormRow
from liplayers.bounds.table import norm_table as norm_table
