# SPDX-License-Identifier: MIT
r"""ADV2 and StADV2: one image that fools a classifier and the interpreter coupled to it (§3).

.. math:: \min_x \; \ell_{prd}(f(x), c_t) + \lambda \, \ell_{int}(g(x; f), m_t)
          \quad \text{s.t.} \; \|x - x_0\|_\infty \le \epsilon \qquad (3)

Both are attacks of torchattacks: they have its modes, normalisation and ``save``, and work inside
``MultiAttack``. They differ in the attack framework only: `ADV2` changes pixels (Eq. 3), `StADV2`
moves them (Eq. 21). ``ADV2.from_preset`` gives the paper's and the official settings.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from captum_adv2.attacks.dual import DualAttack
from captum_adv2.attacks.frameworks import Flow, Framework, LinfBall
from captum_adv2.attacks.loop import Step
from captum_adv2.attacks.steps import AdamDescent, SignDescent
from captum_adv2.attacks.terms import Linear, MapDistance
from captum_adv2.spec import Change, Count, NonNegative, Positive


@dataclass(eq=False, repr=False)
class ADV2(DualAttack):
    r"""ADV2 on pixels: fool the classifier and its interpreter within an L-infinity ball.

    [https://www.usenix.org/conference/usenixsecurity20/presentation/zhang-xinyang]

    Distance Measure : Linf

    In torchattacks' default mode the warm start is untargeted, and the class it reaches is the
    target class from then on. By default the target map is the clean image's own map.

    Args:
        model: Model to attack; from images in [0, 1] (or see ``set_normalization_used``) to logits.
        interpreter: Interpreter to fool, built on ``model``; or a class or function that builds one
            from a model, such as ``CAM``, and does so again in ``set_model``. Default:
            ``Gradient(model)``.
        eps: Maximum perturbation, in units of the images' range [0, 1]; so is ``alpha``.
        alpha: Step size.
        steps: Number of steps, the warm start's included; each is one gradient evaluation
            (`TwoPhase`: two).
        random_start: Start at a random point of the ball.
        warmup: Number of warm start steps: constant sign steps of ``alpha`` on the prediction,
            whatever ``step`` is. Default: a twentieth of ``steps``, none below 20.
        target_map: Chooses the target maps; see `TargetMap`.
        prediction: Prediction loss; the default smooths labels by rho from 0.05 to 0.01.
        interpretation: Interpretation loss, with its weight; default: `MapDistance`, without its
            ``shape`` part where maps are not min-max scaled, and with a ``gate`` of 30 where the
            target map is not `Benign`.
        terms: Further terms of the loss, each a function from a `Candidate` to ``(B,)``; the choice
            of the best iterate counts them too.
        step: Step rule after the warm start.
        surrogate: What to differentiate in place of the interpreter; default: the interpreter's.
        keep: ``"best"`` returns each image's best iterate: of the target class with enough
            confidence, with the least distance of the surrogate's map; or the last iterate where
            that is better on the reported map after 8-bit rounding. A number n does the same, and
            also judges up to n iterates on the reported map, evenly spaced from 60 % of the steps
            after the warm start on, and kept until the end. This pays off on MASK, whose reported
            map differs from the surrogate's. ``"final"`` returns the last.
        confidence: Probability of the target class that is enough. An image that never reaches it
            is returned at its most confident.
        stop: Map distance (L1) at which an image is finished: it is taken out of the batch once it
            is classified as the target class with enough confidence and its map is this near. The
            results of the other images are unaffected. Default: every image takes all steps.
        generator: Source of the random start and of random target classes. Default: a fixed seed
            for the former, torch's global generator (as in torchattacks) for the latter.
        callback: Called with a `Progress` after each step.
        verbose: Show a progress bar.

    Shape:
        - images: ``(N, C, H, W)``, floating, in [0, 1].
        - labels: ``(N,)``, integer; default: the model's predictions.
        - target_maps (keyword of the call): ``(N, 1, h, w)`` in [0, 1]; default: ``target_map``'s.
        - output: ``(N, C, H, W)``.

    >>> import torch
    >>> from torch import nn
    >>> from captum_adv2.interpreters import CAM
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                       nn.Linear(4, 3))
    >>> attack = ADV2(model, CAM(model), eps=8/255, alpha=2/255, steps=10)
    >>> attack.set_mode_targeted_random(quiet=True)
    >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """

    eps: Change = 8 / 255
    alpha: Change = 2 / 255
    steps: Count = 100
    _: KW_ONLY
    random_start: bool = False
    step: Step = SignDescent()

    _regular = SignDescent(momentum=0.0, final=1.0)
    _distance = MapDistance()

    def _framework(self) -> Framework:
        return LinfBall(self.eps, self.random_start, self.generator)


@dataclass(eq=False, repr=False)
class StADV2(DualAttack):
    r"""ADV2 by spatial transformation: pixels are displaced smoothly, by fractions of a pixel.

    .. math:: \min_r \; \ell_{prd}(f(x + r), c_t) + \lambda \, \ell_{int}(g(x + r; f), m_t)
              + \tau \, \ell_{flow}(r) \qquad (21)

    where x + r is the image sampled at places displaced by the flow r. With ``warmup=steps`` there
    is no map term: the attack is stAdv, the regular attack of Xiao et al.

    Distance Measure : total variation of the flow

    Args:
        model, interpreter: See `ADV2`.
        flow_weight: tau of Eq. 21: weight of the flow loss, a sum over pixels.
        steps: As in `ADV2`.
        alpha: Learning rate of Adam, in pixels.
        bound: Largest displacement along either axis, in pixels; default: none.
        **options: See `ADV2`. The default interpretation loss has a weight rising from 30 to 150.
    """

    flow_weight: NonNegative = 5e-4
    steps: Count = 200
    _: KW_ONLY
    alpha: Positive = 0.1
    bound: Positive | None = None
    step: Step = AdamDescent()

    _regular = AdamDescent(final=1.0)
    # Moving pixels reaches the class later than changing them does: the map's weight rises.
    _distance = MapDistance(Linear(30.0, 150.0))

    def _framework(self) -> Framework:
        return Flow(self.flow_weight, self.bound)
