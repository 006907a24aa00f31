"""A family of its own: measured and documented by being registered, and audited. `python -m docs.new_family`"""

from torch import Tensor

from benchmarks.layers import run
from docs.catalogue import family_text
from liplayers import FAMILIES, Family, register
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.linalg.orthogonal import block_reflector
from liplayers.testing import audit


class MirrorLinear(LipschitzLinear):
    """Orthogonal dense layer: W = I − 2vvᵀ/‖v‖², a Householder reflection, cut to out × in.

    Signal gain at initialisation: 1, at least √(out/in) on average. Cost: one outer product.
    Source: Householder 1958."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features)
        self.raw = self.new_parameter((max(in_features, out_features), 1), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def map_weight(self, raw: Tensor) -> Tensor:
        return block_reflector(raw, self.out_features, self.in_features)


register(Family("mirror", linear=MirrorLinear, orthogonal=frozenset({"linear"})))
if __name__ == "__main__":
    print(family_text("mirror"))
    print([f"{row['size']}: training step {row['train_ratio']:.1f} x plain" for row in run(["mirror"], quick=True)])
    print(audit(FAMILIES["mirror"]))
