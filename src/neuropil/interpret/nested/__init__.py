r"""Networks and circuits as systems inside systems: one type language for weights that learn and for parts with memory.

A system has an *interface* $p = \sum_i y^{p[i]}$ (what it can show, and what it takes then) and is a *Moore machine*
on it: a state, a readout, an update. *Wiring* it up with others is a lens $p_1 \otimes \dots \otimes p_k \to q$. A
wiring that changes by what flows through it is a machine too, on the internal hom:
$$\text{organisation}: \quad [p_1 \otimes \dots \otimes p_k,\; q], \qquad
\text{learner}: \quad [A y^A, B y^B].$$
So a network that learns by gradient descent is a composite of machines on hom types, with backpropagation as the law of
composition; and an artificial neuron has the type of a synapse, not of a nerve cell.

With it one composes stateful modules with feedback, without writing the loop:

>>> import torch
>>> from torch import nn
>>> plant = lti(([[0.9]], [[0.5]], [[1.0]], [[0.0]]), dtype=torch.float32, name="plant")
>>> gain = Function(lambda ref, y: 0.8 * (ref - y), {"ref": Real(), "y": Real()}, Real(), "gain")
>>> loop = System(
...     {"plant": plant, "gain": gain},
...     [("in.ref", "gain.ref"), ("plant.y", "gain.y"), ("gain", "plant.u"), ("plant.y", "out.y")],
... )
>>> loop.run({"ref": torch.ones(4)}).outputs["y"]
tensor([0.0000, 0.4000, 0.6000, 0.7000])

trains networks of any torch modules as composed machines, to the weights that `torch.optim.SGD` gives:

>>> _ = torch.manual_seed(0)
>>> layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)]
>>> net = learner(layers[0], lr=0.1) >> learner(layers[1], inputs=Real(8)) >> learner(layers[2], lr=0.1)
>>> trainer = NestedSystem(net >> criterion(nn.functional.cross_entropy, Real(3), Finite(3)))
>>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
>>> for _ in range(5):
...     shown = trainer.step((x, y))
>>> print(trainer)
Linear >> Tanh >> Linear >> cross_entropy: [R^4 y^(R^4), R^3 y^3]
├─ 0: Linear: [R^4 y^(R^4), R^8 y^(R^8)]
├─ 1: Tanh: [R^8 y^(R^8), R^8 y^(R^8)]
├─ 2: Linear: [R^8 y^(R^8), R^3 y^(R^3)]
└─ 3: cross_entropy: [R^3 y^(R^3), R^3 y^3]
>>> trainer.to_module()
Sequential(...)

and lets the wires between boxes with a memory learn (`System(..., rule=hebbian(0.01))`). A learner where a nerve cell
is wanted is refused:

>>> System({"cell": learner(nn.Linear(1, 1))}, [])
Traceback (most recent call last):
    ...
neuropil.interpret.nested.spaces.TypeMismatch: box 'cell' has type [R^1 y^(R^1), R^1 y^(R^1)]: it puts out a wiring ...

| to | use |
| --- | --- |
| type | `Interface`, `Real`, `Finite`, `polynomial`, `hom`, `count_lenses` |
| wire up | `Lens`, `wiring`, `System`, `parallel`, `>>` (around), `@` (beside) |
| have boxes | `Machine`, `delay`, `integrator`, `lti`, `environment`, `Function`, `stream`, `constant` |
| learn | `learner`, `neurons`, `criterion`, `tie`; `plastic` with `gradient`, `hebbian`, `oja`, `reward_modulated` |
| run | `Machine.run`, `NestedSystem` |
| have many at once | `replicate` |

Chosen where the essay leaves it open: updates of a batch are the mean over its examples, requests are each example's
own. Wires with gains carry real numbers and add up; the gradient rule on them is local in time (the delta rule, towards
a teacher), since an organisation sees one step at a time. A loss other than e(x, y) by coordinates is a lens around the
last learner (`criterion`). The essay says no more of the formalism than its types; the constructions are those of
D. I. Spivak, "Learners' languages" (2021, arXiv:2103.01189) and B. Fong, D. I. Spivak and R. Tuyéras, "Backprop as
functor" (2019, arXiv:1711.10455).

Source: David I. Spivak and Timothy Hosgood, "Deep neural networks as nested dynamical systems", 2021,
arXiv:2111.01297.
"""

from neuropil.interpret.nested.boxes import constant, delay, environment, integrator, lti, stream
from neuropil.interpret.nested.learners import LOGISTIC, SQUARED, Error, copier, criterion, learner, neurons
from neuropil.interpret.nested.lenses import Lens, curry, identity, lenses, swap, uncurry
from neuropil.interpret.nested.machines import Machine, Run, fit, parallel
from neuropil.interpret.nested.organisations import Organisation, fan_out, replicate, restack, tie, unstack
from neuropil.interpret.nested.plastic import Plastic, gains, plastic
from neuropil.interpret.nested.rules import Flow, Rule, gradient, hebbian, oja, reward_modulated
from neuropil.interpret.nested.show import tree
from neuropil.interpret.nested.spaces import (
    UNIT,
    Finite,
    Interface,
    Product,
    Real,
    TypeMismatch,
    count_lenses,
    hom,
    polynomial,
)
from neuropil.interpret.nested.system import NestedSystem, System
from neuropil.interpret.nested.wiring import Function, InstantaneousLoop, Wiring, WiringError, wiring

__all__ = [
    "LOGISTIC",
    "SQUARED",
    "UNIT",
    "Error",
    "Finite",
    "Flow",
    "Function",
    "InstantaneousLoop",
    "Interface",
    "Lens",
    "Machine",
    "NestedSystem",
    "Organisation",
    "Plastic",
    "Product",
    "Real",
    "Rule",
    "Run",
    "System",
    "TypeMismatch",
    "Wiring",
    "WiringError",
    "constant",
    "copier",
    "count_lenses",
    "criterion",
    "curry",
    "delay",
    "environment",
    "fan_out",
    "fit",
    "gains",
    "gradient",
    "hebbian",
    "hom",
    "identity",
    "integrator",
    "learner",
    "lenses",
    "lti",
    "neurons",
    "oja",
    "parallel",
    "plastic",
    "polynomial",
    "replicate",
    "restack",
    "reward_modulated",
    "stream",
    "swap",
    "tie",
    "tree",
    "uncurry",
    "unstack",
    "wiring",
]
