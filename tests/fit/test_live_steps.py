"""Steps over live channels: what the optimizer would have done with the whole parameters, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelPruning, live_steps, ops
from lightning_prune.live_steps import ELEMENTWISE, Lists, LiveSteps
from tests.fit.toys import ToyModule, loader, trainer

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")

ROWS, COLUMNS = torch.tensor([1, 2, 5]), torch.tensor([0, 4])
SHAPES: list[tuple[int, ...]] = [(8, 6, 3, 3), (8, 6, 2), (8, 6), (8,)]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_steps, "_LEAST", 0)


def parameters(dtype: torch.dtype = torch.float32, last: bool = False) -> list[nn.Parameter]:
    """Weights of which rows 1, 2, 5 and columns 0, 4 live, and a bias that is stepped as usual."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES:
        whole = torch.randn(shape, generator=generator, dtype=dtype)
        if len(shape) == 4 and last:
            whole = whole.contiguous(memory_format=torch.channels_last)
        found.append(nn.Parameter(whole * alive(whole) if len(shape) > 1 else whole))
    return found


def alive(whole: Tensor) -> Tensor:
    """1 where a weight lives, else 0."""
    rows, columns = torch.zeros(8), torch.zeros(6)
    rows[ROWS], columns[COLUMNS] = 1, 1
    return (rows[:, None] * columns).view(8, 6, *(1,) * (whole.dim() - 2)).to(whole.dtype)


def lists(params: list[nn.Parameter]) -> dict[Tensor, Lists]:
    return {p: (ROWS, COLUMNS) for p in params if p.dim() > 1}


def give_gradients(params: list[nn.Parameter], seed: int) -> Tensor:
    """Also to what is dead, as a reader of a dead channel may."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        # In the parameter's memory format, as autograd leaves it: fused steps take that for granted.
        p.grad = torch.empty_like(p.detach()).copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return torch.tensor(float(seed))


def zero(params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for p in params:
            if p.dim() > 1:
                p.mul_(alive(p))


OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 1e-2},
}


@pytest.mark.parametrize("how", ["plain", "foreach", "fused", "closure"])
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, True), (torch.float64, False)])
def test_live_weights_go_where_they_would_have_gone(
    name: str, how: str, dtype: torch.dtype, last: bool
) -> None:
    if how == "fused" and name not in ("SGD", "Adam", "AdamW", "Adagrad"):
        pytest.skip("has no fused form")
    options = OPTIONS.get(name, {"lr": 0.01}) | ({how: True} if how in ("foreach", "fused") else {})
    nets = [parameters(dtype, last), parameters(dtype, last)]
    optimizers = [getattr(torch.optim, name)(params, **options) for params in nets]
    steps = LiveSteps(lambda: [optimizers[0]])
    for number in range(5):
        if number == 1:  # the state is there and dense; from here on over live channels
            steps.set_lists({p: (torch.tensor([1, 2, 5, 7]), COLUMNS) for p in nets[0] if p.dim() > 1})
        elif number > 1:  # one more dies; the next time nothing does
            steps.set_lists(lists(nets[0]))
        for params, optimizer in zip(nets, optimizers, strict=True):
            if how == "closure":
                found = optimizer.step(lambda params=params, number=number: give_gradients(params, number))
                assert float(found) == number
            else:
                give_gradients(params, number)
                optimizer.step()
            zero(params)
        # Vectors and their ends round otherwise: a few units in the last place.
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        for own, twin in zip(*nets, strict=True):
            torch.testing.assert_close(own, twin, rtol=tolerance, atol=tolerance)
            state = optimizers[0].state[own]
            for key, expected in optimizers[1].state[twin].items():
                value = state[key]
                if isinstance(value, Tensor) and value.shape == own.shape and own.dim() > 1:
                    value, expected = value * alive(own), expected * alive(own)
                torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    assert len(optimizers[0].state) == len(SHAPES)  # nothing of the stand-ins is left
    assert optimizers[0].param_groups[0]["params"] == nets[0]
    assert "step" in optimizers[0].__dict__
    steps.detach()
    assert "step" not in optimizers[0].__dict__


def test_state_that_begins_while_channels_are_dead_has_full_size() -> None:
    params = parameters(last=True)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    LiveSteps(lambda: [optimizer]).set_lists(lists(params))
    give_gradients(params, 0)
    expected = [p.grad * alive(p) for p in params[:3] if p.grad is not None]
    optimizer.step()
    for p, grad in zip(params, expected, strict=False):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], grad)
    again = torch.optim.SGD(parameters(last=True), lr=0.1, momentum=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [len(s) for s in again.state.values()] == [1] * len(SHAPES)


def test_changed_and_loaded_state_is_taken_up() -> None:
    """The copies of the state's live parts are not trusted beyond what they were made of."""
    for change in ("in place", "loaded", "cleared"):
        nets = [parameters(), parameters()]
        optimizers = [torch.optim.SGD(params, lr=0.1, momentum=0.9) for params in nets]
        LiveSteps(lambda optimizers=optimizers: [optimizers[0]]).set_lists(lists(nets[0]))
        for number in range(4):
            for params, optimizer in zip(nets, optimizers, strict=True):
                if number == 2 and change == "in place":
                    for state in optimizer.state.values():
                        state["momentum_buffer"].mul_(-3)
                elif number == 2 and change == "loaded":
                    half = copy.deepcopy(optimizer.state_dict())
                    for state in half["state"].values():
                        state["momentum_buffer"] *= 0.5
                    optimizer.load_state_dict(half)
                elif number == 2:
                    optimizer.state.clear()
                give_gradients(params, number)
                optimizer.step()
                zero(params)
        for own, twin in zip(*nets, strict=True):
            torch.testing.assert_close(own, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_as_usual_in_between_is_taken_up(fused: bool) -> None:
    """Fused steps leave the versions of what they write as they are."""
    nets = [parameters(), parameters()]
    optimizers = [torch.optim.Adam(params, lr=0.01, fused=fused) for params in nets]
    LiveSteps(lambda: [optimizers[0]]).set_lists(lists(nets[0]))
    for number in range(6):
        for params, optimizer in zip(nets, optimizers, strict=True):
            hook = optimizer.register_step_pre_hook(lambda *_: None) if number == 3 else None
            give_gradients(params, number)
            optimizer.step()
            zero(params)
            if hook is not None:
                hook.remove()
    for own, twin in zip(*nets, strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-5, atol=1e-6)


def test_a_step_that_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]

    def fail(self: torch.optim.SGD, closure: Any = None) -> None:
        if closure is not None:
            closure()
        assert self.param_groups[0]["params"][0].shape == (3, 2, 3, 3)
        raise FloatingPointError("halfway")

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    LiveSteps(lambda: [optimizer]).set_lists(lists(params))
    give_gradients(params, 0)
    with pytest.raises(FloatingPointError, match="halfway"):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == params
    assert not optimizer.state
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))

    def refuse() -> Tensor:
        raise FloatingPointError("no loss")

    with pytest.raises(FloatingPointError):
        optimizer.step(refuse)
    assert optimizer.param_groups[0]["params"] == params


class OwnSGD(torch.optim.SGD):
    """May do anything with a parameter."""


@pytest.mark.parametrize("why", ["hooks", "class", "exchanged", "no gradient", "half"])
def test_steps_as_usual_where_somebody_could_notice(why: str) -> None:
    params = parameters()
    make = OwnSGD if why == "class" else torch.optim.SGD
    optimizer = make(params, lr=0.1)
    seen: list[tuple[int, ...]] = []
    step = optimizer.step
    if why == "hooks":
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0].shape))
    elif why == "exchanged":
        optimizer.step = lambda *a: (seen.append(params[0].shape), step(*a))  # type: ignore[method-assign]
    steps = LiveSteps(lambda: [optimizer])
    steps.set_lists(lists(params))
    give_gradients(params, 0)
    if why == "no gradient":
        params[0].grad = None
    elif why == "half":
        params[0].data = params[0].data.half()
        params[0].grad = torch.ones_like(params[0])
    steps.zeroed()
    before = params[0].detach().clone()
    optimizer.step()
    assert steps.still_zero() == set()
    dead = alive(before) == 0
    moved = not torch.equal(params[0] * dead, before * dead)
    assert moved == (why != "no gradient")
    assert all(shape == SHAPES[0] for shape in seen)


def test_a_differentiable_step_goes_over_everything() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1, differentiable=True)
    steps = LiveSteps(lambda: [optimizer])
    steps.set_lists(lists(params := optimizer.param_groups[0]["params"]))
    give_gradients(params, 0)
    with steps.narrow(optimizer):
        assert optimizer.param_groups[0]["params"][0] is params[0]


def test_what_is_still_zero_is_known() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    steps = LiveSteps(lambda: [optimizer])
    steps.set_lists(lists(params))
    give_gradients(params, 0)
    optimizer.step()
    assert steps.still_zero() == set()  # nobody has said that it was
    steps.zeroed()
    assert steps.still_zero() == {id(p) for p in params[:3]}
    optimizer.step()
    assert steps.still_zero() == {id(p) for p in params[:3]}
    with torch.no_grad():
        params[0].add_(1)
    assert steps.still_zero() == {id(p) for p in params[1:3]}
    steps.set_lists(lists(params))
    assert steps.still_zero() == set()


def test_who_saved_a_weight_sees_that_it_was_stepped() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    LiveSteps(lambda: [optimizer]).set_lists(lists(params))
    x = torch.randn(2, 6, requires_grad=True)
    y = (x @ params[2].t()).sum()
    give_gradients(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("scheduler", ["before", "after", "none"])
def test_schedulers_and_the_end(scheduler: str) -> None:
    """Schedulers exchange the step as well, before or behind; warnings are errors here."""
    params = parameters()
    optimizer: Any = torch.optim.SGD(params, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if scheduler == "before" else None
    steps: Any = LiveSteps(lambda given=(optimizer,): given)
    steps.set_lists(lists(params))
    if scheduler == "after":
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for number in range(3):
        before = params[0].detach().clone()
        give_gradients(params, number)
        assert params[0].grad is not None
        expected = before - 0.5 ** (number if schedule else 0) * params[0].grad * alive(before)
        optimizer.step()
        torch.testing.assert_close(params[0], expected)
        if schedule is not None:
            schedule.step()
    steps.detach()
    give_gradients(params, 9)
    dead = alive(params[0]) == 0
    optimizer.step()
    assert bool((params[0][dead.expand_as(params[0])] != 0).any())
    gone = weakref.ref(optimizer)
    optimizer = schedule = steps = None
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}])
def test_a_fit_ends_where_it_would_have_ended(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW, two parameter groups, a schedule; the same masks in both."""
    found, narrowed = [], []
    real = live_steps._Block.leave
    monkeypatch.setattr(
        live_steps._Block, "leave", lambda self, state: (narrowed.append(1), real(self, state))
    )
    for live in (True, False):
        if not live:
            monkeypatch.setattr(LiveSteps, "_exchange", lambda self: None)
        torch.manual_seed(0)
        module = ToyModule()
        pruning = ChannelPruning(
            target=0.3,
            method="l1",
            warmup_epochs=0,
            learn_epochs=3,
            finetune_epochs=3,
            reconfigure_every_n_epochs=0,
        )
        fit = trainer([pruning], 6, **options)
        fit.fit(module, loader(), loader(24))
        found.append((module, pruning, fit.optimizers[0]))
        assert bool(narrowed) == live
        narrowed.clear()
    (own, plan, optimizer), (twin, twin_plan, _) = found
    assert plan.plan is not None
    assert twin_plan.plan is not None
    assert plan.plan.to_json() == twin_plan.plan.to_json()
    for (name, p), q in zip(own.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    assert not hasattr(optimizer.step, "__wrapped__") or hasattr(optimizer.step, "_wrapped_by_lr_sched")
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in own.parameters())


@pytest.mark.parametrize(
    ("name", "live", "narrow"), [("SGD", 2, True), ("SGD", 4, False), ("Adam", 4, True), ("Adam", 7, False)]
)
def test_copying_has_to_be_worth_it(name: str, live: int, narrow: bool) -> None:
    """Of 8 rows and 6 columns 4 columns live, and some rows."""
    params = parameters()
    optimizer = getattr(torch.optim, name)(params, lr=0.1)
    steps = LiveSteps(lambda: [optimizer])
    steps.set_lists({params[0]: (torch.arange(live), torch.arange(4))})
    give_gradients(params, 0)
    with steps.narrow(optimizer):
        shape = optimizer.param_groups[0]["params"][0].shape
    assert shape == ((live, 4, 3, 3) if narrow else SHAPES[0])
