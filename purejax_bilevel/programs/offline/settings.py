"""Settings of reinforcement learning from a dataset, in groups; functions take the narrowest one that they need.

Where the meaning is the same, names are those of Mr-Pepe's code: `mode`, `pessimism`, `ood_threshold`.
"""

from typing import Literal

from purejax_bilevel.configuration import (
    FINITE,
    FRACTION,
    LAYERS,
    NONNEGATIVE,
    POSITIVE,
    Check,
    at_least,
    configuration,
    static,
    traced,
)
from purejax_bilevel.programs.offline import uncertainty
from purejax_bilevel.programs.offline.ensemble_program import Data
from purejax_bilevel.programs.offline.fitting import GROUP
from purejax_bilevel.programs.offline.pessimism import MODES

MODE = Check(f"one of {', '.join(MODES)}", lambda name: isinstance(name, str) and name in MODES)
KINDS = ("mode", *uncertainty.UNCERTAINTIES)
UNCERTAINTY = Check(f"one of {', '.join(KINDS)}", lambda name: isinstance(name, str) and name in KINDS)
THRESHOLD = Check("a number (inf: none)", lambda x: x == x)


@configuration
class Task(Data):
    """What runs, and on which data."""

    env_name: str = static("", "environment of the evaluations (default: the dataset's)", group="environment")
    model: str = static(
        "",
        "run that fitted an ensemble to this dataset, runs/x or runs/x#3; {dataset} in it stands for the name of the "
        "dataset's file (default: each member fits its own first)",
        group="dynamics ensemble",
    )
    policy: str = static(
        "",
        "run that left a policy to begin from with its critics, runs/x or runs/x#3 (default: fresh networks)",
        group="agent",
    )
    num_train_steps: int = static(100_000, "updates of each member", at_least(1), "schedule")
    eval_frequency: int = static(5000, "updates between evaluations (0: only at the end)", at_least(0), "schedule")
    eval_episodes: int = static(10, "episodes of an evaluation", at_least(1), "schedule")
    final_eval_episodes: int = static(50, "episodes of the last evaluation", at_least(1), "schedule")


@configuration
class Networks:
    """Policy and critics."""

    hidden_dim: int = static(256, "units in each hidden layer of critics and policy", at_least(1), "agent")
    num_layers: int = static(2, "hidden layers of critics and policy", LAYERS, "agent")
    num_critics: int = static(2, "critics, of whose values the lowest counts", at_least(1), "agent")
    layer_norm: bool = static(False, "layer norm in the critics", group="agent")
    normalise_observations: bool = static(True, "agents see observations in units of the dataset", group="agent")


@configuration
class ActorCritic(Networks):
    """How policy and critics learn."""

    batch_size: int = static(256, "transitions per update", at_least(1), "agent")
    q_lr: float = traced(3e-4, "Adam rate of the critics", POSITIVE, "agent")
    policy_lr: float = traced(3e-4, "Adam rate of the policy", POSITIVE, "agent")
    weight_decay: float = traced(0.0, "decay of both (AdamW; the original: 0.01)", NONNEGATIVE, "agent")
    tau: float = traced(0.005, "target network's step", FRACTION, "agent")
    discount: float = traced(0.99, "discount factor", FRACTION, "agent")
    init_temperature: float = traced(0.2, "weight of the entropy at the start", POSITIVE, "agent")
    temperature_lr: float = traced(
        3e-4, "Adam rate of the temperature's logarithm (0: fixed, as in the original)", NONNEGATIVE, "agent"
    )
    target_entropy: float = traced(-1.0, "entropy aimed at, per dimension of the action", FINITE, "agent")


@configuration
class Conservative(ActorCritic):
    """What single agents add to the losses of policy or critics."""

    cloning_weight: float = traced(2.5, "td3_bc: weight of the value beside the cloning", POSITIVE, "agent")
    policy_noise: float = traced(0.2, "td3_bc: noise of the target's action", NONNEGATIVE, "agent")
    noise_clip: float = traced(0.5, "td3_bc: bound of that noise", NONNEGATIVE, "agent")
    policy_delay: int = static(2, "td3_bc: updates of the critics for one of the policy", at_least(1), "agent")
    conservatism: float = traced(0.5, "combo: weight of the values of imagined states", NONNEGATIVE, "agent")


@configuration
class Imagination:
    """Rollouts of the policy in the model, and what is learned from them."""

    mode: str | None = static(
        None,
        f"pessimism: {', '.join(MODES)} (default: of the agent)",
        MODE,
        "pessimism",
        particular=True,
    )
    uncertainty: str = static(
        "mode",
        f"whose uncertainty counts: {', '.join(KINDS)} (default: what the mode says)",
        UNCERTAINTY,
        "pessimism",
        particular=True,
    )
    pessimism: float | None = traced(
        None, "lambda, weight of the uncertainty (default: tuned per agent)", NONNEGATIVE, "pessimism"
    )
    ood_threshold: float | None = traced(
        None, "tau, largest uncertainty that is trusted (default: tuned per agent)", THRESHOLD, "pessimism"
    )
    units: Literal["relative", "absolute"] = static(
        "relative",
        "of pessimism and ood_threshold: r_max / u_max and u_max of the dataset, or the plain numbers of the original",
        group="pessimism",
    )
    halt_reward: Literal["magnitude", "maximum", "minimum"] = static(
        "magnitude",
        "reward of a halted rollout: minus the largest size or (the original) the largest of the dataset's rewards, or "
        "the smallest of them",
        group="pessimism",
    )
    rollout_length: int | None = traced(
        None, "steps of a rollout at most (default: tuned per agent)", at_least(1), "model"
    )
    real_ratio: float | None = traced(
        None, "share of the dataset in a batch (default: tuned per agent)", FRACTION, "model"
    )
    num_elites: int = traced(5, "networks that predict, the best of the ensemble", at_least(1), "model")
    num_rollouts: int = static(50, "rollouts at a time, each of which goes one step per update", at_least(1), "model")
    capacity: int = static(100_000, "imagined transitions kept", at_least(1), "model")


@configuration
class Learning(Imagination, Conservative):
    """All that agents learn by."""


@configuration
class Online:
    """Learning in the environment itself, beside what is imagined."""

    num_envs: int = static(1, "copies of the environment of each member", at_least(1), "environment")
    updates_per_step: int = static(
        10, "updates, each with a step of all rollouts, after each step of all copies", at_least(1), "schedule"
    )
    init_steps: int = static(500, "steps before learning starts", at_least(0), "schedule")
    random_steps: int | None = static(
        None, "first steps with uniform actions (default: init_steps, with a policy 0)", at_least(0), "schedule"
    )
    model_every: int = static(250, "steps between fits of the ensemble", at_least(1), GROUP)
    fresh_model: bool = static(False, "each fit starts from new networks, not from the last ones", group=GROUP)
    last_rollout_length: int = traced(
        0, "steps of a rollout at the end of its schedule (0: rollout_length at all times)", at_least(0), "model"
    )
    lengthening_start: int = traced(0, "step at which rollouts begin to get longer", at_least(0), "model")
    lengthening_end: int = traced(0, "step from which on they have their last length", at_least(0), "model")
    real_capacity: int = static(0, "real transitions kept (0: all, at most a million)", at_least(0), "data")
