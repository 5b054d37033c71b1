# SPDX-License-Identifier: MIT
"""Several threads on one model at once: each gets what it would have got alone."""

import copy
import sys
import threading
import time
import warnings

import pytest
import torch
from conftest import ATTACKS, INTERPRETERS, mixed, untrained
from torch import nn

from captum_adv2.interpreters import base
from captum_adv2.interpreters.base import eval_mode
from captum_adv2.interpreters.tap import own_hook, tapped
from captum_adv2.testing import unchanged

# Captum's InternalInfluence is piecewise constant on a ReLU network, and attacks say so.
pytestmark = pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")


class Restless(nn.Module):
    """An identity that lets another thread run: races of one switch in thousands become likely."""

    def forward(self, x):
        time.sleep(0)
        return x


@pytest.fixture
def net(trained):
    """A model in a mix of modes, with a switch between its parts."""
    clone = mixed(trained)
    # After the features, where every hook is in place, and before what depends on the mode.
    clone.dropout = nn.Sequential(Restless(), clone.dropout)
    return clone


@pytest.fixture
def restless():
    """Let the interpreter of Python switch threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(jobs):
    """Run functions at once, a thread each; return what they return."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(number, job):
        barrier.wait()
        try:
            results[number] = job()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def held_together(jobs, net, repetitions=1):
    """Hold that jobs at once give the bytes that they give one after the other."""
    alone = [job() for job in jobs]
    filters = list(warnings.filters)
    for _ in range(repetitions):
        with unchanged(net):
            found = together(jobs)
        assert all(map(torch.equal, found, alone))
    assert warnings.filters == filters


def jobs_of(builds, net, data):
    """Return attacks of one model, on different images, as functions without arguments."""
    jobs = []
    for number, build in enumerate(builds):
        # Each its own image: a tensor of another thread is seen in the result.
        images, labels = (part[number : number + 1].clone() for part in data)
        attack = build(net)
        jobs.append(lambda attack=attack, given=(images, labels): attack(*given))
    return jobs


NAMED = {attacked.name.removeprefix("ADV2 "): attacked for attacked in ATTACKS}
# Each leaves something else on the model, or on the process, for a moment.
PAIRS = [
    ("CAM", "MASK"),  # the mode alone, and many passes
    ("CAM of a layer", "RTS"),  # taps of the same module
    ("LayerGradCam", "LayerGradCam"),  # hooks of Captum's own
    ("GuidedBackprop", "Gradient"),  # hooks that change a backward pass, and one to be left alone
    ("DeepLift", "DeepLift"),  # and filters of warnings
    ("Ensemble", "GradCAM in two phases"),
    ("Gradient with a stop", "KernelShap"),
    ("StADV2 Gradient", "BitDepthADV2 GradCAM"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_an_attack_beside_another(one, other, net, data, restless):
    builds = [NAMED[name].build for name in (one, other)]
    held_together(jobs_of(builds, net, data), net, repetitions=2)


@pytest.mark.slow
@pytest.mark.parametrize("one", ATTACKS, ids=lambda a: a.name)
@pytest.mark.parametrize("other", ATTACKS, ids=lambda a: a.name)
def test_every_attack_beside_every_other(one, other, net, data, restless):
    held_together(jobs_of([one.build, other.build, one.build], net, data), net, repetitions=3)


@pytest.mark.slow
def test_one_interpreter_in_two_threads(row, net, data, restless):
    interpreter, labels = row.build(net), data[1][:2]
    interpreter(data[0][:2], labels)  # what is checked at the first call is
    jobs = [lambda x=x: interpreter(x, labels).detach() for x in (data[0][:2], data[0][2:4])]
    held_together(jobs, net, repetitions=3)


class Wrapper(nn.Module):
    """Another model of the same modules."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    stem = property(lambda self: self.inner.stem)
    body = property(lambda self: self.inner.body)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("name", ["CAM", "RTS", "DeepLift"])
def test_two_models_of_the_same_modules(name, net, data, restless):
    # What is kept for a model has to be kept for each of its modules.
    wrapped = Wrapper(net)
    builds = [lambda _: NAMED[name].build(net), lambda _: NAMED[name].build(wrapped)]
    held_together(jobs_of(builds, wrapped, data), wrapped, repetitions=3)


def test_a_masking_model_is_laid_out_beside_other_passes(trained, data):
    """Its own pass of the encoder says of what shapes the features are, and no other does."""
    net = copy.deepcopy(trained)

    def meanwhile(module, args):
        if threading.current_thread() is threading.main_thread():
            together([lambda: net.stem(data[0]), lambda: net.body(torch.rand(1, 8, 3, 3))])

    handle = net.fc.register_forward_pre_hook(meanwhile)
    with torch.random.fork_rng():
        assert untrained(net).stride == 2  # body has 8 of 16 pixels
    handle.remove()


class TestEvalMode:
    def test_the_last_to_leave_puts_modes_back(self, trained):
        net = mixed(trained)
        modes = [module.training for module in net.modules()]
        first, second = eval_mode(net), eval_mode(nn.Sequential(net.dropout, net.body))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not net.dropout.training
        assert net.fc.training
        second.__exit__(None, None, None)
        assert [module.training for module in net.modules()] == modes

    def test_a_thread_that_fails_leaves_the_mode_to_the_others(self, trained):
        net = mixed(trained)
        with eval_mode(net):
            with pytest.raises(KeyError), eval_mode(net):
                raise KeyError
            assert not any(module.training for module in net.modules())
        assert net.dropout.training

    def test_nothing_is_kept_of_a_model(self, trained):
        with eval_mode(mixed(trained)):
            assert base._held
        assert not base._held


class TestHooks:
    @pytest.mark.parametrize("side", ["input", "output"])
    def test_only_the_own_thread_is_seen(self, trained, data, side):
        net, seen = copy.deepcopy(trained), []
        handle = own_hook(net.body, side, lambda *_: seen.append(threading.get_ident()))
        together([lambda: net(data[0])])
        assert not seen
        net(data[0])
        assert seen == [threading.get_ident()]
        handle.remove()

    def test_a_tap_keeps_the_own_threads_features(self, trained, data):
        net = copy.deepcopy(trained)
        with tapped(net.body, "output") as tap:
            net(data[0][:1])
            together([lambda: net(data[0])])
        assert len(tap.features) == 1


def test_filters_of_warnings_are_nobodys_to_swap(net, data, restless):
    """A filter that one thread sets while another explains stays."""
    explain = next(row for row in INTERPRETERS if row.name == "DeepLift").build(net)
    started, done = threading.Event(), threading.Event()

    def see(module, args):
        started.set()
        done.wait(10)

    handle = net.fc.register_forward_pre_hook(see)
    with warnings.catch_warnings():
        thread = threading.Thread(target=lambda: explain(data[0][:1], data[1][:1]))
        thread.start()
        assert started.wait(10)
        warnings.filterwarnings("ignore", message="one of my own")
        done.set()
        thread.join()
        assert any("one of my own" in str(entry[1]) for entry in warnings.filters)
        assert not any("Setting" in str(entry[1]) for entry in warnings.filters)
    handle.remove()
