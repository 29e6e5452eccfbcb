"""HAQ: an agent that goes over the layers and gives each its bits (Wang et al., CVPR 2019)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._extra import require
from hawq_lightning.selection._request import Request
from hawq_lightning.selection._search import Trials
from hawq_lightning.selection._selectors import register_selector

_SCALE = 0.1  # of the reward, lambda in the paper
_NOISE = 0.5  # of actions at first
_RANDOM = 0.2  # share of the trials before the agent learns
_DECAY = 0.99  # of the noise, a trial
_LAYERS = [400, 300]  # of actor and critic, as in the paper's code
_FEATURES = 10


@register_selector("haq", needs=("budget", "loss"), offers=("without_traces",))
def haq(request: Request) -> list[int]:
    """HAQ's search: DDPG over the layers, bits stepped down until the budget is met (extra ``search``).

    A trial goes over the groups of sites. The agent sees ten numbers of each, from 0 to 1 (equation 1 and 2 of the
    paper: number of the layer, channels in and out, kernel, elements, products, depthwise, weight or activation, the
    action before; strides and feature maps are not in a problem, and widths on offer stand in their place) and answers
    with a number from 0 to 1, its bits (equation 3). After the last group the plan is measured. The reward is the loss
    above that of the most bits, times -0.1: the paper's is the accuracy after an epoch of training, which a selector
    has not.
    """
    baselines, gymnasium = require("stable_baselines3"), require("gymnasium")
    trials = Trials(request, "haq")
    steps = len(trials.widths)
    environment = _environment(gymnasium, trials, features(request))
    noise = _Decaying(request.seed, steps)
    agent = baselines.DDPG(
        "MlpPolicy", environment, gamma=1.0, learning_rate=1e-3, tau=0.01, batch_size=64, seed=request.seed,
        buffer_size=max(1000, request.trials * steps), learning_starts=math.ceil(_RANDOM * request.trials) * steps,
        action_noise=noise, policy_kwargs={"net_arch": _LAYERS}, device="cpu",
    )  # fmt: skip
    agent.learn(request.trials * steps)
    return trials.best()


def features(request: Request) -> NDArray[np.float32]:
    """What the agent sees of every group, ``[groups, 9]``, each column from 0 to 1; the action before comes on top."""
    problem = request.problem
    macs: dict[str, int] = {}
    for layer in problem.layers:
        for name in (layer.weight, layer.activation):
            if name is not None:
                macs[name] = macs.get(name, 0) + layer.macs
    rows = []
    for g, group in enumerate(problem.groups):
        members = [problem.sites[i] for i in group.members]
        shape = members[0].shape
        weight = group.kind == "weight"
        rows.append([
            float(g), float(weight), float(shape[0]) if shape else 0.0, float(shape[1]) if len(shape) > 1 else 0.0,
            float(math.prod(shape[2:])) if weight else 0.0, float(weight and len(shape) > 2 and shape[1] == 1),
            float(sum(s.numel for s in members)), float(sum(macs.get(s.name, 0) for s in members)),
            float(len(group.bits)),
        ])  # fmt: skip
    table = np.asarray(rows)
    low, span = table.min(0), np.ptp(table, axis=0)
    scaled: NDArray[np.float32] = ((table - low) / np.where(span > 0, span, 1.0)).astype(np.float32)
    return scaled


class _Decaying:
    """Normal noise that becomes less from trial to trial, for stable-baselines3."""

    def __init__(self, seed: int, steps: int) -> None:
        self._generator, self._steps, self._count = np.random.default_rng(seed), steps, 0

    def __call__(self) -> NDArray[np.float32]:
        sigma = _NOISE * _DECAY ** (self._count // self._steps)
        self._count += 1
        return self._generator.normal(0.0, 2 * sigma, 1).astype(np.float32)  # actions there are from -1 to 1

    def reset(self) -> None:
        """Trials follow one another."""


def _environment(gymnasium: Any, trials: Trials, seen: NDArray[np.float32]) -> Any:
    class Layers(gymnasium.Env):  # type: ignore[misc]
        """One trial: a step a group."""

        observation_space = gymnasium.spaces.Box(0.0, 1.0, (_FEATURES,))
        action_space = gymnasium.spaces.Box(0.0, 1.0, (1,))

        def reset(
            self, *, seed: int | None = None, options: object = None
        ) -> tuple[NDArray[np.float32], dict[str, Any]]:
            super().reset(seed=seed)
            self.wanted: list[int] = []
            return self._see(1.0), {}

        def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
            share = float(np.clip(action[0], 0.0, 1.0))
            self.wanted.append(trials.at(len(self.wanted), share))
            done = len(self.wanted) == len(trials.widths)
            reward = -_SCALE * (trials(self.wanted) - trials.reference) if done else 0.0
            return self._see(share), reward, done, False, {}

        def _see(self, action: float) -> NDArray[np.float32]:
            row = seen[min(len(self.wanted), len(seen) - 1)]
            return np.concatenate([row, np.asarray([action], np.float32)])

    return Layers()
