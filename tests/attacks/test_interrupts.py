# SPDX-License-Identifier: MIT
"""Exceptions and Ctrl-C at every step of an attack: all is left as it was, and it runs again.

Two things are interrupted: what an attack calls (every function of torch, every module forward and
backward, callbacks, progress bars), and the lines of the package itself.
"""

import ast
import functools
import signal
import subprocess
import sys
import textwrap
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, mixed
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

import captum_adv2
from captum_adv2.attacks import adaptive
from captum_adv2.attacks import base as attacks_base
from captum_adv2.interpreters import base, mask
from captum_adv2.testing import unchanged

# MASK's map of one image is constant after few iterations, and attacks say so.
pytestmark = pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")

PACKAGE = str(Path(captum_adv2.__file__).parent)
ERRORS = (RuntimeError, KeyboardInterrupt)


class Fuse:
    """Counts events, and raises at one of them, once."""

    def __init__(self):
        self.count, self.blows_at, self.error = None, None, None

    def tick(self, *_):
        if self.count is None:
            return
        self.count += 1
        if self.count == self.blows_at:
            self.blows_at = None
            raise self.error("tripped")

    @contextmanager
    def counting(self, blows_at=None, error=RuntimeError):
        self.count, self.blows_at, self.error = 0, blows_at, error
        try:
            with self.watching():
                yield
        finally:
            self.count = None


class Calls(Fuse):
    """Events are what an attack calls."""

    def __init__(self, attack, monkeypatch):
        super().__init__()
        for module in attack.model.modules():
            module.register_forward_pre_hook(self.tick)
            module.register_forward_hook(self.ran)
        fuse = self

        class Bar(tqdm):  # not while one is made: nobody but the traceback would have it
            def __iter__(self):
                for value in super().__iter__():
                    fuse.tick()
                    yield value

            def update(self, n=1):
                fuse.tick()
                return super().update(n)

        for place in (attacks_base, adaptive, mask):
            monkeypatch.setattr(place, "tqdm", Bar)
        self.bars = Bar
        for part in (attack, *attack._attacks.values(), attack_interpreter(attack)):
            if hasattr(part, "verbose"):
                part.verbose = True
            if hasattr(part, "_callback"):
                part._callback = self.tick

    def ran(self, module, inputs, output):
        self.tick()
        if self.count is not None and isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(self.tick)

    def watching(self):
        fuse = self

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                fuse.tick()
                return func(*args, **(kwargs or {}))

        return Watch()


@functools.cache
def untouchable(path):
    """Return the lines of a file at which Python itself cannot clean up.

    They are what cleans up, and lines of ``with``, which run a second time to leave the context.
    """
    found = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try) and node.finalbody:
            found |= set(range(node.finalbody[0].lineno, node.finalbody[-1].end_lineno + 1))
        elif isinstance(node, ast.FunctionDef) and node.name == "__exit__":
            found |= set(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.With):
            found |= set(range(node.lineno, node.body[0].lineno))
    return found


class Lines(Fuse):
    """Events are the lines of the package that run, but those at which Python cannot clean up."""

    def __init__(self, attack, monkeypatch):
        super().__init__()
        self.bars = tqdm

    def trace(self, frame, event, arg):
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE):
            return None
        if event == "line" and frame.f_lineno not in untouchable(path):
            self.tick()
        return self.trace

    @contextmanager
    def watching(self):
        before = sys.gettrace()  # a debugger's, or that of a measurement of coverage
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)


def attack_interpreter(attack):
    return getattr(attack, "second", attack).interpreter


def state(attack):
    """Return what an attack and the process have, beside what `unchanged` looks at."""
    parts = (attack, *attack._attacks.values(), attack_interpreter(attack))
    return {
        "settings": [{k: v for k, v in vars(part).items() if k != "model"} for part in parts],
        "modules held in eval mode": dict(base._held),
        "filters": list(warnings.filters),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": (torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
    }


def interrupted(attacked, trained, data, monkeypatch, kind, chosen, every_time):
    """Interrupt an attack at chosen ones of its events, given how many there are."""
    attack = attacked.build(mixed(trained))
    attack.set_normalization_used([0.25] * 3, [0.5] * 3)
    images, labels = attack.normalize(data[0][:1]), data[1][:1]
    fuse = kind(attack, monkeypatch)
    expected = attack(images, labels)
    with fuse.counting():
        adversarial = attack(images, labels)
        total = fuse.count
    assert torch.equal(adversarial, expected)
    assert total > 100
    before = state(attack)
    for turn, number in enumerate(chosen(total)):
        error = ERRORS[turn % 2]
        with unchanged(attack.model, images, labels):
            with pytest.raises(error, match="tripped") as caught, fuse.counting(number, error):
                attack(images, labels)
            assert state(attack) == before, (number, total)
            # Bars are closed although the traceback still holds what used them.
            assert not getattr(fuse.bars, "_instances", ()), (number, total)
        del caught
        if every_time:
            assert torch.equal(attack(images, labels), expected), (number, total)
    assert torch.equal(attack(images, labels), expected)


def some(total):
    """Return the first, the last, and some between, at places that share no rhythm with a loop."""
    between = {1 + int(total * (0.618034 * n % 1)) for n in range(1, 6)}
    return [1, *sorted(between - {1, total}), total]


@pytest.mark.parametrize("kind", [Calls, Lines])
def test_some_events(attacked, trained, data, monkeypatch, kind):
    interrupted(attacked, trained, data, monkeypatch, kind, some, every_time=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Calls, Lines])
def test_all_events(attacked, trained, data, monkeypatch, kind):
    def most(total):
        return range(1, total + 1, 1 + total // 1000)

    interrupted(attacked, trained, data, monkeypatch, kind, most, every_time=True)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from conftest import TinyNet, blobs, mixed
from captum_adv2 import ADV2, testing
from captum_adv2.interpreters import GradCAM, base

torch.manual_seed(0)
net = mixed(TinyNet())
images, labels = blobs(2)
attack = ADV2(net, lambda model: GradCAM(model, layer="body"), steps=100_000,
              callback=lambda progress: progress.step == 5 and print("running", flush=True))
with testing.unchanged(net, images, labels):
    try:
        attack(images, labels)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
assert not base._held
attack.steps = 4
expected = ADV2(mixed(net), lambda model: GradCAM(model, layer="body"), steps=4)(images, labels)
print("same", torch.equal(attack(images, labels), expected), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_a_signal(tmp_path):
    script = tmp_path / "attack.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT))))
    # A shell may have told its children to ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        assert process.stdout.readline() == "running\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert out.splitlines() == ["interrupted", "same True"], errors
    assert process.returncode == 0
