"""The failures that were measured on published Lipschitz libraries, one test each: none may happen here.

Each docstring says what was seen to go wrong. The norm in training mode is measured in `test_audit.py`.
"""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from audit import example, of_role
from torch import Tensor, nn

import liplayers as lip
from liplayers import FAMILIES, lipschitz_bound
from liplayers.certification.radius import certified_radius
from liplayers.core.registry import ROLES
from liplayers.errors import LipschitzError, UnknownBoundError
from liplayers.linalg.norms import spectral_norm_bound, spectral_norm_lower_bound
from liplayers.testing.extremes import MATRICES, settings
from liplayers.testing.measure import executed_in_double, operator_norm, singular_values, train_to_exceed, worst_norm

EVERY = of_role(*ROLES)
CONVS = [FAMILIES[f].conv for f, _ in of_role("conv")]
LINEARS = [FAMILIES[f].linear for f, _ in of_role("linear")]


def shift_kernel(conv: nn.Conv2d, mode: str = "ones") -> nn.Conv2d:
    """Fill a kernel so that norms add up where positions are met more than once."""
    with torch.no_grad():
        conv.weight.fill_(1) if mode == "ones" else conv.weight.copy_(MATRICES["one-tap shift"](conv.weight, None))
    return conv


def assert_conv_bound(conv: nn.Conv2d, image: tuple[int, int]) -> None:
    shape = (conv.in_channels, *image)
    assert operator_norm(conv, shape) <= lipschitz_bound(conv, shape) * (1 + 1e-9)


def refused(make, *args, **kwargs) -> bool:
    """Whether the constructor refuses, and does so in the library's way."""
    try:
        make(*args, **kwargs)
    except LipschitzError:
        return True
    return False


# Norms above 1 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_border_padding(mode: str):
    """Reflected or replicated borders raised the norm of "normalised" convolutions to 1.16 – 1.66."""
    theirs = shift_kernel(nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode, bias=False, dtype=torch.float64), "shift")
    assert operator_norm(theirs, (1, 5, 5)) > 1.1  # the danger is real: one tap of size 1
    assert_conv_bound(theirs, (5, 5))
    for make in CONVS:
        assert refused(make, 2, 2, 3, padding=1, padding_mode=mode)


@pytest.mark.parametrize(("kernel", "padding"), [(3, 2), (2, 1), (4, 2), ((3, 1), 1)])
def test_wide_circular_padding(kernel: int | tuple[int, int], padding: int):
    """Circular padding beyond (k − 1)/2, or k/2 for an even kernel, repeats rows of the map: norm 2."""
    theirs = nn.Conv2d(1, 1, kernel, padding=padding, padding_mode="circular", bias=False, dtype=torch.float64)
    shift_kernel(theirs, "shift")
    assert operator_norm(theirs, (1, 4, 4)) > 1.1
    assert_conv_bound(theirs, (4, 4))
    with pytest.raises(UnknownBoundError, match="pass input_shape"):
        lipschitz_bound(theirs)
    for make in CONVS:
        assert refused(make, 2, 2, kernel, padding=padding, padding_mode="circular")


@pytest.mark.parametrize("size", [15, 7])
def test_circular_padding_with_a_stride_that_does_not_divide(size: int):
    """An image of 15 or 7 with stride 2 and circular padding met some positions more often than the proof counts."""
    theirs = nn.Conv2d(1, 1, 3, 2, 1, padding_mode="circular", dtype=torch.float64)
    with pytest.raises(UnknownBoundError, match="pass input_shape"):
        lipschitz_bound(theirs)
    for image in ((size, size), (size, 8), (8, 8)):
        assert_conv_bound(shift_kernel(theirs), image)
    for make in CONVS:
        if make is lip.BCOPConv2d:  # no strides at all
            assert refused(make, 2, 2, 3, 2, 1, padding_mode="circular")
            continue
        layer = make(2, 2, 3, 2, 1, padding_mode="circular")
        with pytest.raises(LipschitzError, match="stride"):
            layer(torch.zeros(1, 2, size, size))


@pytest.mark.parametrize(("dilation", "stride"), [(2, 2), (2, 4), (4, 2), (3, 3), (3, 2)])
def test_dilation_with_stride(dilation: int, stride: int):
    """With gcd(dilation, stride) > 1 all taps of a kernel meet at one position: 1.29 – 2.0."""
    theirs = nn.Conv2d(1, 1, 3, stride, 3, dilation, bias=False, dtype=torch.float64)
    assert_conv_bound(shift_kernel(theirs), (13, 12))
    built = 0
    for make in CONVS:
        if refused(make, 2, 3, 3, stride, 3, dilation):
            continue
        built += 1
        layer = make(2, 3, 3, stride, 3, dilation, dtype=torch.float64)
        for setting in settings(layer):
            assert operator_norm(layer, (2, 11, 9)) <= 1 + 1e-6, setting
    assert built


AVERAGES = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 4, "stride": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 3, "padding": 1, "count_include_pad": False},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 2, "divisor_override": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "divisor_override": 2},
]


@pytest.mark.parametrize("arguments", AVERAGES, ids=str)
def test_average_pooling_with_overlap(arguments: dict):
    """Overlap, ceil_mode and divisor_override made "1-Lipschitz" average and ℓ2 pooling reach 2 – 4."""
    pool = nn.AvgPool2d(**arguments)
    measured = max(operator_norm(pool, (1, h, w)) for h, w in [(7, 7), (6, 5), (5, 8)])
    assert measured <= lipschitz_bound(pool, (1, 7, 7)) * (1 + 1e-9)
    for make in (lip.ScaledAvgPool2d, lip.L2Pool2d, lip.MaxPool2d):
        assert refused(make, 3, 2)
    with pytest.raises(UnknownBoundError):
        lipschitz_bound(nn.LPPool2d(2, 3, 1), (1, 7, 7))


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (2, 1, 1), (3, 3, 1), (3, 2, 2), (3, 1, 1)])
def test_max_pooling_with_overlap(kernel: int, stride: int, dilation: int):
    """Max pooling with k > s was counted as 1; one large pixel enters several windows: 2."""
    pool = nn.MaxPool2d(kernel, stride, dilation=dilation)
    spikes = torch.randn(50, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).pow(3)
    spikes = torch.cat([spikes, torch.zeros(1, 1, 9, 9, dtype=torch.float64)])
    spikes[-1, 0, 4, 4] = 1
    measured = max(operator_norm(pool, (1, 9, 9), at=x) for x in spikes)
    if kernel > stride:
        assert measured > 1.3
    assert measured <= lipschitz_bound(pool, (1, 9, 9)) * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e-20])
def test_vanishing_scale_parameters(scale: float):
    """Scale parameters at 1e-6 … 1e-9 with an ε on one side of their ratio let SLL and sandwich blocks reach 2000."""
    for family, role in of_role("dense_block", "conv_block"):
        block, shape = example(family, role, torch.float64)
        with torch.no_grad():
            for name, p in block.named_parameters():
                if p.dim() < 2 and not name.endswith("bias"):
                    p[::2] = torch.tensor(scale, dtype=torch.float64).log()
                elif p.dim() >= 2:
                    p.copy_(MATRICES["gaussian"](p, torch.Generator().manual_seed(0)))
                    p[1::2] *= scale
        assert worst_norm(block, shape, nonlinear=True) <= lipschitz_bound(block) * (1 + 1e-6), (family, role)


def test_power_iteration_is_no_bound():
    """Power iteration reported 0.92 – 0.999 of the norm, and the layers were above 1 by as much."""
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    W = U @ torch.diag(torch.linspace(0.9, 1, 40, dtype=torch.float64)) @ U.mT
    few = spectral_norm_lower_bound(W, 3, torch.Generator().manual_seed(0))
    assert few < 0.99  # it under-reports indeed
    assert spectral_norm_bound(W) >= 1 - 1e-12
    layer = nn.Linear(40, 40, dtype=torch.float64)
    head = lip.NormalizedLinear(40, 40, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(W)
        head.raw.copy_(W)
    for module in (layer, head):
        bounds = {lipschitz_bound(module) for _ in range(3)}
        assert len(bounds) == 1
        assert operator_norm(module, (40,)) <= bounds.pop() * (1 + 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolution(groups: int):
    """Norms of the groups were multiplied, or measured at another image size; the map is block diagonal."""
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False, dtype=torch.float64)
    with torch.no_grad():
        theirs.weight[: 4 // groups] *= 5  # one dominant group
    shape = (4, 21, 23)
    measured = operator_norm(theirs, shape)
    bound = lipschitz_bound(theirs)
    assert measured <= bound
    assert bound <= 1.1 * measured
    for make in CONVS:
        if refused(make, 4, 4, 3, padding=1, groups=groups):
            assert groups > 1
            continue
        layer = make(4, 4, 3, padding=1, groups=groups, dtype=torch.float64)
        with torch.no_grad():
            layer.raw.copy_(MATRICES["gaussian"](layer.raw, torch.Generator().manual_seed(0)).abs())
        assert max(operator_norm(layer, (4, n, n + 1)) for n in (2, 5, 14)) <= 1 + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "role"), EVERY, ids=["-".join(e) for e in EVERY])
def test_weight_under_autocast(family: str, role: str, dtype: torch.dtype):
    """A weight that was computed under bf16 autocast had norm 1.003 – 1.03: it must be the same with and without."""
    layer, shape = example(family, role)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    expected = executed_in_double(copy.deepcopy(layer).eval())
    layer.eval()
    x = torch.randn(2, *shape)
    with torch.autocast("cpu", dtype), torch.no_grad():
        layer(x)  # fills the cache
    x = x.double()
    assert torch.equal(executed_in_double(layer)(x), expected(x))


def test_a_factor_counts_once():
    """A container's k_coef_lip went into every layer, or past the linear ones: 9.0 for a promised 1."""
    torch.manual_seed(0)
    layers = [lip.CayleyLinear(4, 4), lip.MaxMin(), lip.BROLinear(4, 4), lip.Scale(3.0), lip.CayleyLinear(4, 4)]
    model = nn.Sequential(*layers, lip.Scale(1 / 3)).double()
    assert lipschitz_bound(model[:5]) == pytest.approx(3)
    x = torch.randn(4, dtype=torch.float64)
    assert operator_norm(model[:5], (4,), at=x) == pytest.approx(3)
    assert lipschitz_bound(model) == pytest.approx(1)
    assert operator_norm(model, (4,), at=x) == pytest.approx(1)
    assert lipschitz_bound(nn.Sequential(lip.Scale(2.0), nn.Sequential(lip.Scale(2.0), lip.Scale(2.0)))) == 8


def test_batch_normalisation():
    """Batch normalisation was sold as Lipschitz: 8.4. It counts in eval mode and has no bound in training."""
    norm = nn.BatchNorm2d(3).double()
    norm.running_var.copy_(torch.tensor([1.0, 0.01, 4.0]))
    with pytest.raises(UnknownBoundError, match="eval"):
        lipschitz_bound(norm, (3, 4, 4))
    norm.eval()
    assert operator_norm(norm, (3, 4, 4)) > 8
    assert operator_norm(norm, (3, 4, 4)) == pytest.approx(lipschitz_bound(norm, (3, 4, 4)))


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), lip.Abs(), lip.MaxMin(), lip.GroupSort(2)], ids=str)
def test_activation_that_breaks_the_proof(activation: nn.Module):
    """SiLU, GELU, abs or MaxMin in a block whose proof needs slopes in [0, 1]: 1.4 – 7.9, even when set afterwards."""
    for make, image in [(lip.SLLBlock, ()), (lip.SLLConv2dBlock, (3, 3))]:
        assert refused(make, 4, activation=activation)
        block = make(4)
        block.activation = activation
        with pytest.raises(LipschitzError, match="activation"):
            lipschitz_bound(block, (4, *image))


@pytest.mark.parametrize("change", ["load_state_dict", "swap", "deepcopy", "dtype", "size"])
def test_stale_weight(change: str):
    """A cached weight outlived load_state_dict, an EMA swap, deepcopy, a cast, or a new image size."""
    for family, role in EVERY:
        layer, shape = example(family, role)
        layer.eval()
        x = torch.randn(2, *shape)
        with torch.no_grad():
            layer(x)
        values = {k: v + 0.3 * torch.randn_like(v) for k, v in layer.state_dict().items()}
        if change == "load_state_dict":
            layer.load_state_dict(values)
        elif change == "swap":
            for name, p in layer.named_parameters():
                p.data.copy_(values[name])
        elif change == "deepcopy":
            layer = copy.deepcopy(layer)
            layer.load_state_dict(values)
        elif change == "dtype":
            layer, x = layer.double(), x.double()
        elif len(shape) == 3:
            x = torch.randn(2, shape[0], 8, 3)
        fresh, _ = example(family, role, x.dtype)
        fresh.load_state_dict(layer.state_dict())
        with torch.no_grad():
            assert torch.equal(layer(x), fresh.train()(x)), (family, role)


def test_reading_a_weight_in_eval_has_no_memory():
    """Power-iteration buffers moved at each read: two reads of one weight differed by 2e-3."""
    for family, role in EVERY:
        layer, shape = example(family, role)
        layer.eval()
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        x = torch.randn(1, *shape)
        reads = [layer(x) for _ in range(3)]
        assert torch.equal(reads[0], reads[1])
        assert torch.equal(reads[1], reads[2])
        assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(("family", "role"), of_role("dense_block", "conv_block"), ids="-".join)
def test_residual_blocks_under_attack(family: str, role: str):
    """The published residual LDLT reached 1.36 – 1.58 times its promise when trained to: every residual block is."""
    block, shape = example(family, role, torch.float64)
    reached = train_to_exceed(block, shape, steps=60, lr=0.3)
    bound = lipschitz_bound(block)
    assert max(reached, worst_norm(block, shape, nonlinear=True)) <= bound * (1 + 1e-6)


# Certificates that are not proofs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [[2.0, 2.0, 1.0], [3.0, 3.0, 3.0], [0.0, -1.0, 0.0]])
def test_ties_certify_nothing(logits: list[float]):
    """A published code masked every logit equal to the largest and certified ties with radius ∞."""
    constants = 1.4 * (1 - torch.eye(3))
    assert certified_radius(torch.tensor([logits]), constants).item() == 0


def test_normalised_head_is_not_1_lipschitz():
    """A head with unit rows was counted as 1; as a map it had 1.8."""
    head = lip.NormalizedLinear(4, 10, dtype=torch.float64)
    with torch.no_grad():
        head.raw.copy_(torch.randn(10, 4) * 0.1 + 1)
    measured = operator_norm(head, (4,))
    assert measured > 1.8
    assert measured <= lipschitz_bound(head) * (1 + 1e-12)
    split = lip.split_head(nn.Sequential(lip.Scale(2.0), head))
    W = head.weight.detach()
    expected = 2 * torch.cdist(W[None], W[None])[0]
    torch.testing.assert_close(split.margin_lipschitz(10).detach(), expected, atol=1e-6, rtol=1e-6)


def test_input_normalisation_counts_by_the_smallest_std():
    """Per-channel normalisation multiplies the bound by 1/min(std), not by 1/max(std) or 1/mean(std)."""
    normalize = lip.Normalize([0.4, 0.5, 0.6], [0.2, 0.1, 0.5]).double()
    measured = operator_norm(normalize, (3, 2, 2))
    assert measured == pytest.approx(10)
    assert lipschitz_bound(nn.Sequential(normalize, lip.Scale(0.5))) == pytest.approx(0.5 * measured)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_certify_nothing(bad: float):
    """NaN or infinite logits got a radius."""
    constants = 1.4 * (1 - torch.eye(3))
    for place in range(3):
        logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
        logits[0, place] = bad
        radius = certified_radius(logits, constants)
        assert radius[0] == 0
        assert radius[1] > 0


def test_parameters_that_are_not_finite_have_no_bound():
    """A model with NaN in its weights must not be worth 1."""
    for family, role in EVERY:
        layer, _ = example(family, role)
        next(layer.parameters()).data.view(-1)[0] = float("nan")
        with pytest.raises(LipschitzError, match="NaN"):
            lipschitz_bound(nn.Sequential(nn.Identity(), layer))


def test_low_precision_is_counted():
    """bf16 in the forward pass at certification went uncounted."""
    torch.manual_seed(0)
    for layer, shape in [(lip.CayleyLinear(9, 9), (9,)), (lip.AOLConv2d(2, 3, 3), (2, 5, 5)), (lip.SLLBlock(5), (5,))]:
        assert lipschitz_bound(layer, shape) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert lipschitz_bound(layer, shape) > 1
        assert lipschitz_bound(layer.bfloat16(), shape) >= 1


@pytest.mark.parametrize("module", [nn.Hardshrink(), nn.LayerNorm(4), nn.GLU(1), nn.Bilinear(4, 4, 4)], ids=str)
def test_unknown_layers_raise(module: nn.Module):
    """Unknown layer types counted as 1; the error must name the path and the type."""
    model = nn.Sequential(lip.AOLLinear(4, 4), nn.Sequential(nn.Identity(), module))
    with pytest.raises(UnknownBoundError, match=rf"1\.1.*{type(module).__name__}"):
        lipschitz_bound(model)


def test_a_plain_skip_connection_is_two():
    """x + f(x) of a 1-Lipschitz f is 2-Lipschitz."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = lip.CayleyLinear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    assert lipschitz_bound(Skip(), (3,)) == 2


# Not drop-in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CONVS)
def test_every_way_to_write_a_convolution(make):
    """Rejected: device, dtype, bias=False, a tuple kernel with an int stride, non-square kernels and odd sizes."""
    cases = [
        ((3, 5, (3, 3), 1, 1), {"device": "cpu", "dtype": torch.float64, "bias": False}),
        ((3, 5, (3, 1), 1, (1, 0)), {}),
        ((3, 5, (1, 3)), {"stride": 1, "padding": (0, 1), "bias": False}),
        ((3, 7, 3), {"padding": "same"}),
        ((7, 3, [3, 3]), {"padding": [1, 1]}),
    ]
    for args, kwargs in cases:
        ours, theirs = make(*args, **kwargs), nn.Conv2d(*args, **kwargs)
        for image in [(7, 5), (5, 5), (1, 9)]:
            x = torch.zeros(2, args[0], *image, dtype=kwargs.get("dtype"))
            if image[0] == 1 and not (args[2] == (1, 3) or ours.padding in ("same", (1, 1), (1, 0))):
                continue
            assert ours(x).shape == theirs(x).shape
            assert ours(x).dtype == theirs(x).dtype
        assert (ours.bias is None) == (theirs.bias is None)


def test_parameters_exist_before_the_first_forward():
    """Parameters made at the first forward: an optimiser built before missed them, load_state_dict failed."""
    for family, role in EVERY:
        layer, shape = example(family, role)
        other, _ = example(family, role)
        names = [n for n, _ in layer.named_parameters()]
        layer(torch.zeros(1, *shape))
        assert [n for n, _ in layer.named_parameters()] == names
        other.load_state_dict(layer.state_dict())  # strict
        assert not any(isinstance(p, nn.UninitializedParameter) for p in other.parameters())


def test_state_dict_keys_do_not_depend_on_the_mode():
    """Keys that change between train and eval made checkpoints unreadable."""
    for family, role in EVERY:
        layer, shape = example(family, role)
        keys = []
        for training in (True, False, True):
            layer.train(training)
            with torch.set_grad_enabled(training):
                layer(torch.zeros(1, *shape))
            keys.append(list(layer.state_dict()))
        assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("make", CONVS)
def test_odd_images_keep_their_size(make):
    """FFT layers returned another image size for odd inputs."""
    for size, mode in product([(5, 5), (7, 4), (1, 3), (9, 11)], ["zeros", "circular"]):
        layer = make(2, 2, 3, padding=1, padding_mode=mode)
        assert layer(torch.zeros(1, 2, *size)).shape[-2:] == size


def test_layers_can_be_pickled_and_copied():
    """Lambdas and non-leaf weights on modules: they could not be pickled or deep-copied, least of all after a pass."""
    for family, role in EVERY:
        layer, shape = example(family, role)
        x = torch.randn(1, *shape)
        for training in (True, False):
            layer.train(training)
            y = layer(x)
            with torch.no_grad():
                layer(x)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert torch.equal(other(x), y)


@pytest.mark.parametrize("sizes", [(6, 3), (3, 6), (4, 4)])
def test_weight_decay_does_not_lose_the_weight(sizes: tuple[int, int]):
    """torch's own orthogonal parametrisation of a non-square weight becomes zero at the first weight decay."""
    x = torch.randn(8, sizes[0], dtype=torch.float64)
    for family, _ in of_role("linear"):
        layer = FAMILIES[family].linear(*sizes, dtype=torch.float64)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(layer(x), x[:, :1].expand(8, sizes[1])).backward()
            optimizer.step()
        values = singular_values(layer, (sizes[0],))
        assert values.max() > 0.3, family
        if "linear" in FAMILIES[family].orthogonal:
            assert (values - 1).abs().max() < 1e-6, family
