"""Settings of reinforcement learning from a dataset, in groups; functions take the narrowest one that they need.

Where the meaning is the same, names are those of Mr-Pepe's code: `mode`, `pessimism`, `ood_threshold`.
"""

from typing import Literal

from purejax_bilevel.configuration import (
    FEW,
    FINITE,
    FRACTION,
    NONNEGATIVE,
    POSITIVE,
    Check,
    at_least,
    configuration,
    static,
    traced,
)
from purejax_bilevel.programs.offline import KINDS
from purejax_bilevel.programs.offline.modes import MODES

GROUP = "dynamics ensemble"
MODE = Check(f"one of {', '.join(MODES)}", lambda name: isinstance(name, str) and name in MODES)
ASKED = ("mode", *KINDS)
UNCERTAINTY = Check(f"one of {', '.join(ASKED)}", lambda name: isinstance(name, str) and name in ASKED)
BOUND = Check("a finite number above 0", lambda x: 0 < x < float("inf"))
SHARE = Check("a number above 0 and below 1", lambda x: 0 < x < 1)
THRESHOLD = Check("a number (inf: none)", lambda x: x == x)


@configuration
class Data:
    """What is learned from."""

    agent_type: str = static("", "who learns", group="agent")
    dataset: str = static("", "file of transitions: .npz, or D4RL's or Minari's .hdf5", group="data", task=True)
    dataset_rows: int = static(0, "rows of it that are used, drawn at random (0: all)", at_least(0), "data")
    action_bound: float = static(1.0, "what the dataset's actions are divided by to be in [-1, 1]", BOUND, "data")


@configuration
class TwoDatasets(Data):
    """And what else errors are measured on."""

    test_dataset: str = static("", "another one, for errors and uncertainties outside of the first", group="data")


@configuration
class Fitting:
    """The ensemble and how it is fitted."""

    model_networks: int = static(7, "networks of the ensemble", at_least(1), GROUP)
    model_type: Literal["probabilistic", "deterministic"] = static(
        "probabilistic", "whether networks predict variances too", group=GROUP
    )
    model_hidden_dim: int = static(200, "units in each hidden layer of a network", at_least(1), GROUP)
    model_layers: int = static(4, "hidden layers of a network", FEW, GROUP)
    model_joint: bool = static(
        False, "one trunk for observation and reward, as in MBPO (default: one of its own, 3 x 64, for the reward)",
        group=GROUP,
    )  # fmt: skip
    model_activation: Literal["leaky_relu", "relu", "swish"] = static("leaky_relu", "of the hidden layers", group=GROUP)
    model_layer_norm: bool = static(False, "layer norm in every hidden layer", group=GROUP)
    model_terminals: Literal["auto", "rule", "learned", "never"] = static(
        "auto",
        "what ends imagined episodes: the environment's rule, a learned trunk or nothing (auto: the rule where it is "
        "known, else learned, and nothing where the dataset has no terminals)",
        group=GROUP,
    )
    raw_inputs: bool = static(False, "do not normalise inputs and targets", group=GROUP)
    raw_targets: bool = static(False, "loss and variances in the data's units", group=GROUP)
    fixed_bounds: bool = static(False, "do not learn the bounds of the log-variances", group=GROUP)
    no_bootstrap: bool = static(False, "the same batches for all networks", group=GROUP)
    model_lr: float = traced(1e-3, "AdamW rate of the networks", POSITIVE, GROUP)
    model_weight_decay: float = traced(2.5e-5, "decay of AdamW (Mr-Pepe's code: 0.01)", NONNEGATIVE, GROUP)
    model_batch_size: int = static(256, "rows per network and step", at_least(1), GROUP)
    model_epochs: int = static(200, "most epochs", at_least(1), GROUP)
    model_epoch_steps: int = static(0, "steps of an epoch (0: as many as the rows have batches)", at_least(0), GROUP)
    model_patience: int = traced(5, "epochs without improvement that end it", at_least(1), GROUP)
    model_improvement: float = traced(0.01, "share by which an error must fall to count", FRACTION, GROUP)
    held_out: float = static(0.2, "share of the rows that only measures the error", SHARE, GROUP)
    most_held_out: int = static(5000, "most rows of it", at_least(1), GROUP)


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
    num_layers: int = static(2, "hidden layers of critics and policy", FEW, "agent")
    num_critics: int = static(2, "critics, of whose values the lowest counts", FEW, "agent")
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
class Offline(Fitting, Learning, Task):
    """All that an agent needs to learn from a dataset, with an ensemble or without."""


@configuration
class Online(Offline):
    """And what it needs to learn in the environment itself, beside what is imagined."""

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
