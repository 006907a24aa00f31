"""What was proven stays what runs; calls in threads do not meet; a report is compared sample by sample."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liplayers as lp
from liplayers.bounds.rounding import RoundingAnalysis
from liplayers.bounds.twin import twin
from liplayers.certification import Certificates, CertifiedNetwork, certified_radius, certify, report
from liplayers.certification.network import LARGEST_RADIUS
from liplayers.cli.verify import _compare_certificates
from liplayers.core.precision import exact_precision
from liplayers.errors import ArgumentError, CheckpointError, LipschitzError, VerificationError
from liplayers.export.freeze import freeze

F64 = torch.float64
MODES = pytest.mark.parametrize("mode", ["proof", "fast"])


class Added(nn.Module):
    """A module that is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(lp.CayleyLinear(8, 8), lp.MaxMin())

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * self.inner(x)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(lp.Scale(0.5), nn.Flatten(), lp.AOLLinear(4, 8), Added(), nn.Linear(8, 3)).eval()


def inputs(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=F64)


def certified(mode: str = "proof", model: nn.Module | None = None) -> CertifiedNetwork:
    return CertifiedNetwork(classifier() if model is None else model, (1, 2, 2), 3, mode=mode)


def results(network: CertifiedNetwork, x: Tensor) -> tuple[Any, ...]:
    return (*(t.tolist() for t in (network(x), network.radius(x), network.margin_lipschitz)), network.sha256())


# Nothing reaches what runs --------------------------------------------------------------------------------------------


def tenfold(tensor: Tensor) -> None:
    tensor.data.mul_(10)


def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 10 * output


def write_everywhere(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tenfold(tensor)
    for part in module.modules():
        part.register_forward_hook(hook)
        if isinstance(part, lp.Scale):
            vars(part)["factor"] = 10.0  # a setting cannot be set again


def replace(module: nn.Sequential) -> None:
    module[0] = lp.Scale(10.0)
    module[4].weight = nn.Parameter(10 * module[4].weight.detach())


ON_COPIES = {
    "data of what is handed out", "a module of what is handed out", "the model afterwards", "the state", "the weights",
    "the constants", "the bounds", "the dtypes",
}  # fmt: skip
ATTEMPTS: dict[str, Callable[[CertifiedNetwork, nn.Sequential], Any]] = {
    "data of what is handed out": lambda n, m: write_everywhere(n.network),
    "a module of what is handed out": lambda n, m: replace(n.network),  # type: ignore[arg-type]
    "the model afterwards": lambda n, m: (write_everywhere(m), replace(m), m.train()),
    "the state": lambda n, m: [tenfold(t) for t in n.state_dict().values()],
    "the weights": lambda n, m: [tenfold(t) for t in n.weights().values()],
    "parameters, buffers, modules": lambda n, m: write_everywhere(n) or [p.append(m) for p in n.children()],
    "the constants": lambda n, m: n.margin_lipschitz.mul_(0.01),
    "the bounds": lambda n, m: (n.bounds.upper.update({"": 0.01}), tenfold(n.bounds.split.head.weight)),
    "the dtypes": lambda n, m: n.stored_dtypes.clear(),
    "other constants": lambda n, m: setattr(n, "margin_lipschitz", torch.zeros(3, 3)),
    "another network": lambda n, m: setattr(n, "network", nn.Flatten()),
    "another forward": lambda n, m: setattr(n, "forward", lambda x: 10 * x),
    "another shape": lambda n, m: setattr(n, "input_shape", (4,)),
    "another mode": lambda n, m: setattr(n, "mode", "quick"),
    "a new attribute": lambda n, m: setattr(n, "_roundings", {1.0: None}),
    "none": lambda n, m: delattr(n, "training"),
    "training": lambda n, m: n.train(),
    "another dtype": lambda n, m: n.half(),
    "a state": lambda n, m: n.load_state_dict(n.state_dict()),
    "compiling": lambda n, m: n.compile(backend="eager"),
    "a hook": lambda n, m: n.register_forward_hook(hook),
    "a hook before": lambda n, m: n.register_forward_pre_hook(lambda module, args: (10 * args[0],)),
    "every parameter by apply": lambda n, m: n.apply(write_everywhere),
}


def refusal(function: Callable[[], Any]) -> str:
    """What an error of liplayers says; nothing where none is raised."""
    try:
        function()
    except LipschitzError as error:
        return str(error)
    return ""


@MODES
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_is_done_to_it_is_refused_or_changes_nothing(attempt: str, mode: str):
    model = classifier()
    network, x = certified(mode, model), inputs()
    before = results(network, x)
    said = refusal(lambda: ATTEMPTS[attempt](network, model))
    if "hook" in (at_call := refusal(lambda: network(x))):
        said = at_call
        assert "hook" in refusal(lambda: network.radius(x))
    else:
        assert results(network, x) == before
    assert "\n" not in said
    # copies may be changed; what would be a change of this object is not accepted in silence
    assert bool(said) == (attempt not in ON_COPIES)


@MODES
def test_the_model_stays_as_it_was(mode: str):
    model = classifier().train()
    state = copy.deepcopy(model.state_dict())
    certified(mode, model)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_whose_copy_shares_its_weights_is_refused():
    class Sharing(nn.Linear):
        def __deepcopy__(self, memo: dict) -> Sharing:
            return self

    class SharingWeights(nn.Linear):
        def __deepcopy__(self, memo: dict) -> SharingWeights:
            other = SharingWeights(4, 3)
            other.weight = self.weight
            return other

    for kind in (Sharing, SharingWeights):
        with pytest.raises(ArgumentError, match=r"1 \(Sharing.*\): copy.deepcopy shares it"):
            certified(model=nn.Sequential(nn.Flatten(), kind(4, 3)))


def test_a_model_that_cannot_be_copied_is_refused_in_one_line():
    model = classifier()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="cannot be copied"):
        certified(model=model)


@MODES
def test_what_changes_the_computation_of_the_whole_process_is_refused(mode: str):
    network, x = certified(mode), inputs()
    before = results(network, x)
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.raises(ArgumentError, match="hook"):
            network.radius(x)
    finally:
        handle.remove()
    torch.set_default_dtype(F64)  # of no tensor here
    try:
        assert results(network, x) == before
    finally:
        torch.set_default_dtype(torch.float32)
    if torch.set_flush_denormal(True):
        try:
            with pytest.raises(ArgumentError, match="subnormal"):
                network.radius(x)
        finally:
            torch.set_flush_denormal(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert results(network, x) == before


class Reading(nn.Module):
    """A forward that reads what its copies share."""

    factor = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * Reading.factor


@MODES
def test_what_a_forward_reads_outside_of_its_module_is_seen_by_what_it_computes(
    mode: str, monkeypatch: pytest.MonkeyPatch
):
    model = nn.Sequential(Reading(), nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), lp.Scale(2.0), nn.Linear(8, 3))
    network, x = certified(mode, model), inputs()
    before = results(network, x)
    for owner, name, value in [
        (Reading, "factor", 5.0),
        (nn.functional, "relu", lambda x, inplace=False: 10 * x.clamp_min(0)),
        (lp.Scale, "forward", lambda self, x: 20 * x),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            for call in (network, network.radius):
                with pytest.raises(ArgumentError, match="has changed"):
                    call(x)
        assert results(network, x) == before


# Inputs ---------------------------------------------------------------------------------------------------------------


class Doubling(Tensor):
    """A tensor that computes otherwise."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * out.as_subclass(Tensor) if func is nn.functional.linear else out


def test_inputs_of_other_kinds_are_certified_as_the_numbers_that_they_are():
    network = certified()
    x = (inputs() * 8).round()
    expected = network.radius(x)
    assert (expected > 0).any()
    wide = torch.stack([x, x], -1)[..., 0]
    assert not wide.is_contiguous()
    for other in (x.half(), x.float(), x.to(torch.uint8), x.long(), wide, x.clone().requires_grad_(), nn.Parameter(x)):
        assert torch.equal(network.radius(other), expected)
    assert torch.equal(network.radius(x.as_subclass(Doubling)), expected)
    assert network.radius(x[:0]).shape == (0,)


@pytest.mark.parametrize("x", [inputs() + 0j, inputs().numpy(), torch.full((1, 1, 2, 2), 2**53 + 1)], ids=range(3))
def test_inputs_that_are_no_float64_numbers_are_refused(x: Any):
    with pytest.raises(ArgumentError, match="inputs: "):
        certified().radius(x)


class Forgiving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(x)


@MODES
def test_inputs_that_are_not_finite_have_no_radius(mode: str, monkeypatch: pytest.MonkeyPatch):
    from liplayers.bounds import rounding

    lp.register_bound(Forgiving, lambda module, shape: 1.0)
    monkeypatch.setitem(rounding.RULES, torch.ops.aten.nan_to_num, lambda run, out, x, *rest: run.get(x))
    network = certified(mode, nn.Sequential(Forgiving(), classifier()))
    x = inputs(3)
    x[1, 0, 0, 0], x[2, 0, 1, 1] = torch.nan, torch.inf
    assert network(x).isfinite().all()
    assert (network.radius(x) > 0).tolist() == [True, False, False]


def test_gradients_with_respect_to_inputs_flow():
    network, model = certified(), classifier().double()
    x = inputs().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x)
    (expected,) = torch.autograd.grad(freeze(model, (1, 2, 2))(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


# Copies ---------------------------------------------------------------------------------------------------------------


def through_pickle(network: CertifiedNetwork) -> CertifiedNetwork:
    return pickle.loads(pickle.dumps(network))


def through_file(network: CertifiedNetwork) -> CertifiedNetwork:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@MODES
@pytest.mark.parametrize("way", [through_pickle, through_file, copy.deepcopy, copy.copy])
def test_copies_prove_the_same_and_stay_so(way: Callable[[CertifiedNetwork], CertifiedNetwork], mode: str):
    network, x = certified(mode), inputs()
    before = results(network, x)
    again = way(network)
    assert results(again, x) == before
    assert results(again, 100 * x) == results(network, 100 * x)  # with roundings that are analysed now
    for change in (lambda: setattr(again, "mode", "fast"), again.train, again.float):
        with pytest.raises(ArgumentError, match="stays"):
            change()


def test_a_copy_on_another_device_is_refused():
    file = io.BytesIO()
    torch.save(certified(), file)
    file.seek(0)
    with pytest.raises(ArgumentError, match="on cpu was loaded to meta"):
        torch.load(file, weights_only=False, map_location="meta")


# Threads --------------------------------------------------------------------------------------------------------------


def settings() -> list[Any]:
    backends = torch.backends
    new = (backends, backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    legacy = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    return [*(backend.fp32_precision for backend in new), *legacy, backends.cudnn.enabled]


def inherited() -> str:
    """The precision of cudnn's convolutions where only the general setting says anything."""
    torch.backends.fp32_precision = "ieee"
    try:
        return torch.backends.cudnn.conv.fp32_precision
    finally:
        torch.backends.fp32_precision = "none"


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
def test_precision_is_exact_until_the_last_thread_leaves_and_then_as_before(device: str, lowered: bool):
    backends = torch.backends
    used = [backends.cudnn.conv, backends.cuda.matmul] if device == "cuda" else [backends.mkldnn.matmul]
    entered, leave = threading.Event(), threading.Event()

    def other() -> list[str]:
        with exact_precision(torch.device(device)):
            entered.set()
            assert leave.wait(60)
            return [backend.fp32_precision for backend in used]

    torch.set_float32_matmul_precision("medium" if lowered else "highest")
    before, general = settings(), inherited()
    try:
        with ThreadPoolExecutor(1) as pool:
            with exact_precision(torch.device(device)):
                found = pool.submit(other)
                assert entered.wait(60)
            leave.set()
            assert set(found.result(60)) <= {"ieee", "none"}
        assert settings() == before
        assert inherited() == general
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_somebody_sets_meanwhile_stays():
    backend = torch.backends.mkldnn.matmul
    backend.fp32_precision = "bf16"
    try:
        with exact_precision(torch.device("cpu")):
            backend.fp32_precision = "tf32"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = "none"


def test_a_forward_pass_on_the_cpu_sets_nothing_where_torch_is_exact():
    layer, seen = lp.RKOConv2d(2, 2, 3), []
    compute, before = layer.map_weight, settings()

    def spying(*key: Any) -> Any:
        seen.append(settings())
        return compute(*key)

    layer.map_weight = spying  # type: ignore[method-assign]
    layer(torch.rand(1, 2, 5, 5))
    assert seen == [before]


def test_six_threads_of_two_hundred_certifications_get_equal_results():
    torch.manual_seed(0)
    model = nn.Sequential(
        lp.CayleyConv2d(1, 2, 3, padding=1), nn.Flatten(), lp.AOLLinear(8, 8), Added(), nn.Linear(8, 3)
    )
    network, alone = certified(model=model), certified(model=model)
    batches = [inputs(4) * 4.0 ** (i % 10) for i in range(200)]  # each power has a rounding of its own
    expected = [alone.radius(x).tolist() for x in batches]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: [network.radius(x).tolist() for x in batches], range(6)))
    assert found == [expected] * 6
    assert any(radius > 0 for radius in expected[-1])


def test_bounds_of_one_model_in_threads_are_equal_and_disturb_no_forward_pass():
    model, x = classifier().train(), inputs().float()
    calls: list[Callable[[], Any]] = [
        lambda: model(x).tolist(),
        lambda: lp.lipschitz_bound(model, (1, 2, 2)),
        lambda: [tensor.tolist() for tensor in freeze(model, (1, 2, 2)).state_dict().values()],
        lambda: lp.layer_bounds(model, (1, 2, 2)),
    ]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: calls[i % 4](), range(120)))
    assert found == 30 * expected
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_a_trace_leaves_the_calls_of_other_threads_alone():
    """While torch traces, every call of a module in the process comes to the tracer."""
    found: list[Tensor] = []

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                found.append(
                    in_thread(lambda: model.inner(torch.ones(4)) + shared.inner(torch.ones(4)) + model.inner.bias)
                )
            return self.inner(x)

    shared, model = Slow(), Slow()
    lp.lipschitz_bound(model, (4,))
    assert found
    expected = model.inner(torch.ones(4)) + shared.inner(torch.ones(4)) + model.inner.bias
    assert all(torch.equal(value, expected) for value in found)


def test_trial_runs_leave_modes_and_hooks_of_the_model_alone(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    model: nn.Module = classifier().train()
    linear = nn.functional.linear

    def state() -> list[Any]:
        return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    def spying(*args: Any) -> Tensor:
        seen.append(state())
        return linear(*args)

    monkeypatch.setattr(nn.functional, "linear", spying)
    for work in (lp.lipschitz_bound, freeze, lambda model, shape: RoundingAnalysis(model, shape).at(1.0)):
        before = state()
        result: Any = work(model, (1, 2, 2))
        assert seen
        assert all(found == before for found in seen)
        seen.clear()
        model = result.double() if work is freeze else model


def test_a_twin_shares_tensors_and_effective_weights_and_nothing_else():
    model = classifier()
    model.parts = [model[2], {"scale": model[0]}]  # type: ignore[assignment]
    model(inputs().float())
    other: Any = twin(model)
    assert not set(model.modules()) & set(other.modules())
    assert other.parts[0] is other[2]
    assert other.parts[1]["scale"] is other[0]
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        assert other[2].effective() is model[2].effective()


def paused(layer: Any) -> tuple[threading.Event, threading.Event]:
    """The first computation of the weight says that it has begun, and goes on when it may (or in half a second)."""
    begun, may_go_on, compute = threading.Event(), threading.Event(), type(layer).map_weight

    class Paused(type(layer)):  # type: ignore[misc]
        def map_weight(self, *raw: Any) -> Any:
            first = not begun.is_set()
            begun.set()
            weight = compute(self, *raw)
            if first:
                may_go_on.wait(0.5)
            return weight

    layer.__class__ = Paused
    return begun, may_go_on


def test_a_weight_that_was_computed_while_the_parameters_changed_is_not_kept_for_the_new_ones():
    torch.manual_seed(0)
    layer, other, eye = lp.CayleyLinear(4, 4).eval(), lp.CayleyLinear(4, 4).eval(), torch.eye(4)
    begun, may_go_on = paused(layer)
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        old = pool.submit(torch.no_grad()(layer), eye)
        assert begun.wait(60)
        for own, value in zip(layer.parameters(), other.parameters(), strict=True):
            own.copy_(value)
        new = pool.submit(torch.no_grad()(layer), eye)
        may_go_on.set() if new.done() else new.exception(60)
        old.result(60)
        assert torch.equal(new.result(60), other(eye))
        assert torch.equal(layer(eye), other(eye))


def test_a_weight_is_computed_from_parameters_of_one_moment():
    """Another thread may write between two of them."""
    torch.manual_seed(0)
    layer = lp.BjorckLinear(4, 4).eval()
    expected, compute = layer.weight.detach().clone(), type(layer).raw_values
    layer._kept.weights.clear()

    class Disturbed(lp.BjorckLinear):
        def raw_values(self) -> tuple[Tensor, ...]:
            layer.raw.data.mul_(-1)
            return compute(self)

    layer.__class__ = Disturbed
    with torch.no_grad():
        assert torch.equal(layer.weight, expected)


# Reports --------------------------------------------------------------------------------------------------------------


def reported(mode: str = "proof", last_bias: float = 0.0) -> tuple[Any, list[str], Tensor]:
    """A network with two equal rows in its head, certified on samples of which one is huge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), lp.AOLLinear(4, 8), lp.MaxMin(), nn.Linear(8, 4))
    with torch.no_grad():
        model[3].weight[2] = model[3].weight[1]
        model[3].bias[2] = model[3].bias[1] - 1
        model[3].bias[3] += last_bias
    x = torch.randn(40, 1, 2, 2, dtype=F64)
    x[7] *= 1e13
    network = CertifiedNetwork(model, (1, 2, 2), 4, mode=mode)
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(16)]
    certificates = certify(network, batches, input_range=None)
    data: Any = SimpleNamespace(eval_loader=lambda split: batches)
    fresh: Any = SimpleNamespace(
        network=network, data=data, certificates=certificates, report={"data": {"split": "test"}}
    )
    return fresh, report.csv_text(certificates).splitlines()[1:], x


def test_a_class_without_hope_makes_no_room_for_lies():
    fresh, lines, _ = reported("fast", last_bias=-1e13)
    _compare_certificates(Path("report.json"), lines, fresh)
    index, *others, radius = lines[0].split(",")
    assert float(radius) > 0
    lie = ",".join([index, *others, repr(1.01 * float(radius))])
    with pytest.raises(VerificationError, match="sample 0 has radius"):
        _compare_certificates(Path("report.json"), [lie, *lines[1:]], fresh)


@pytest.mark.parametrize("column", ["margin", "radius"])
@pytest.mark.parametrize("lie", [lambda v: 1000 * v, lambda v: v + 0.01, lambda v: v * (1 + 1e-3), lambda v: v * 0.999])
@MODES
def test_every_lie_about_one_sample_is_seen(column: str, lie: Callable[[float], float], mode: str):
    fresh, lines, _ = reported(mode)
    position, path = report.CSV_HEADER.index(column), Path("report.json")
    _compare_certificates(path, lines, fresh)
    tried = 0
    for i, line in enumerate(lines):
        fields = line.split(",")
        value = float(fields[position])
        if i == 7 or value < 0.05:
            continue
        fields[position] = repr(lie(value))
        with pytest.raises(VerificationError, match=f"sample {i} has {column}"):
            _compare_certificates(path, [*lines[:i], ",".join(fields), *lines[i + 1 :]], fresh)
        tried += 1
    assert tried > 20


def test_radii_of_another_order_of_summation_verify():
    """Logits moved by what is proven that rounding may move them."""
    fresh, _, x = reported()
    network, own = fresh.network, fresh.certificates
    logits, radius = network.logits_and_radius(x)
    error = network.logit_error(x, radius)[:, None]
    moved = logits + error / 2 * torch.randn(logits.shape, dtype=F64).clamp(-1, 1)
    elsewhere = certified_radius(moved, network.margin_lipschitz, error.expand_as(moved)).clamp_max(LARGEST_RADIUS)
    best = moved.topk(2, 1).values
    there = Certificates(own.label, own.prediction, best[:, 0] - best[:, 1], elsewhere)
    assert (there.radius != own.radius).sum() > 30
    _compare_certificates(Path("report.json"), report.csv_text(there).splitlines()[1:], fresh)


def test_one_large_weight_makes_no_room_for_other_small_ones():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].bias[0] = 1e6
    weights = certified(model=model).weights()
    weights["1.bias"][1:] += 1.0
    with pytest.raises(CheckpointError, match=r"1\.bias: differs by 1"):
        CertifiedNetwork(model, (1, 2, 2), 3, weights=weights)
