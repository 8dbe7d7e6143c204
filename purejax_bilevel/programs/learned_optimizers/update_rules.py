"""The optimisers of PPO as optax transformations with one signature: fixed ones with their rates, and learned ones.

`update(gradients, state, params, **Clues)` takes what any of them may read.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax

from purejax_bilevel.configuration import replace, values_of
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.learned_optimizers import tuned
from purejax_bilevel.programs.learned_optimizers.optimizer import (
    ALL_ON,
    NO_FEATURES,
    Switches,
    Vector,
    open_optimizer,
)
from purejax_bilevel.programs.learned_optimizers.settings import PPO, UpdateRule
from purejax_bilevel.programs.learned_optimizers.weights import ARTEFACT_KIND, check_weights, load_weights
from purejax_bilevel.runtime import artefacts

C = TypeVar("C", bound=UpdateRule)
GivenWeights = Vector | Mapping[str, Vector] | None
LEARNED = ("open", "no_features")


UNUSED = 1.0  # stands for a rate that an optimiser does not have: fields are numbers
PUBLISHED = Path(__file__).parent / "published"  # the vectors of OPEN's authors (Apache-2.0)
TRAINED = Path(__file__).parent / "trained"  # artefacts of this project's own meta-training


def with_rates(config: C) -> C:
    """The configuration with the optimiser's rates where none are given.

    Raises:
        UserError: a rate is given that the optimiser does not have.
    """
    own = tuned.rates(config.optimizer, getattr(config, "env_name", ""))  # another optimiser is refused later
    given = {name: value for name in own._fields if (value := getattr(config, name)) is not None}
    for name, value in given.items():
        if getattr(own, name) is None and values_of(value) != (UNUSED,) and config.optimizer in tuned.GENERAL:
            users = ", ".join(other for other, rates in tuned.GENERAL.items() if getattr(rates, name) is not None)
            text = " ".join(map(str, values_of(value)))
            raise UserError(f"--{name} {text} is for --optimizer {users}, not {config.optimizer}.")
    missing = {name: value for name, value in own._asdict().items() if name not in given}
    return replace(config, **{name: UNUSED if value is None else value for name, value in missing.items()})


def with_model(config: C) -> C:
    """The configuration with the published weights of its environment, where open has no others."""
    name = tuned.family(getattr(config, "env_name", ""))
    return (
        replace(config, model=name) if config.optimizer == "open" and not config.model and published(name) else config
    )


def published(name: str) -> Path | None:
    """The file of published weights: ant, asterix, breakout, freeway, gridworld, multi or spaceinvaders."""
    path = PUBLISHED / f"{name}_OPEN.npy"
    return path if name.isidentifier() and path.is_file() else None


def _trained(name: str) -> Path | None:
    """The file of this project's own weights: cartpole."""
    path = TRAINED / f"{name}.safetensors"
    return path if name.isidentifier() and path.is_file() else None


def check(config: PPO) -> None:
    """Refuses what a learned optimiser cannot work with.

    Raises:
        UserError: there are no weights, a clock would divide by zero, or a setting is for other optimisers.
    """
    if config.optimizer not in LEARNED:
        for name, default in (("model", ""), ("without", "none"), ("zero_mean", "agent")):
            if getattr(config, name) != default:
                raise UserError(
                    f"--{name} {getattr(config, name)} is for --optimizer {', '.join(LEARNED)}, not {config.optimizer}."
                )
        return
    load(config.model)
    for clock, field in (("training_clock", "horizon"), ("batch_clock", "num_epochs")):
        if getattr(switches(config), clock) and getattr(config, field) < 2:
            named = "num_train_steps" if field == "horizon" else field
            raise UserError(
                f"--{named} {getattr(config, field)} is too few for --optimizer open, whose clock divides by one less: "
                f"at least 2, or --without {clock}."
            )


def make(config: UpdateRule, weights: GivenWeights = None) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a (resolved) configuration.

    Args:
        config: of one member; its rates may be traced.
        weights: of a learned optimiser, see `open_optimizer`; may be traced.
    """
    if config.optimizer in LEARNED:
        assert weights is not None, "a learned optimiser has weights"
        return open_optimizer(weights, switches(config))
    return optax.chain(_direction(config), _annealed(config.lr, config.anneal))


def _direction(config: UpdateRule) -> optax.GradientTransformation:
    if config.optimizer == "adam":
        return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.optimizer == "rmsprop":
        return optax.scale_by_rms(config.beta2, config.epsilon)
    if config.optimizer == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2)
    return optax.trace(config.beta1)


def _annealed(lr: Any, anneal: Any) -> optax.GradientTransformationExtraArgs:
    """Times minus the learning rate, which falls linearly with `progress` in [0, 1]."""

    def update(updates: Any, state: Any, params: Any = None, *, progress: jax.Array, **others: Any) -> tuple[Any, Any]:
        del params, others
        rate = lr * (1.0 - anneal * progress)
        return jax.tree.map(lambda leaf: -rate.astype(leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def switches(config: UpdateRule) -> Switches:
    """What a learned optimiser sees and may do."""
    chosen = NO_FEATURES if config.optimizer == "no_features" else ALL_ON
    chosen = chosen._replace(zero_mean=config.zero_mean)
    off: dict[str, Any] = {} if config.without == "none" else {config.without: False}
    return chosen._replace(**off)


# --- weights ----------------------------------------------------------------------------------------------------------


@functools.cache  # the same object each time, so that sub-programs share it
def load(place: str) -> GivenWeights:
    """Reads the weights that `--model` names.

    Args:
        place: the name of published weights, a `.npy` file, or an artefact: one that comes with the project
            (`cartpole`, `cartpole#1`) or that of a run (`runs/x`, `runs/x#3`).

    Raises:
        UserError: they are not there, or of another kind or length.
    """
    if not place:
        names = ", ".join(sorted(path.stem.removesuffix("_OPEN") for path in PUBLISHED.glob("*.npy")))
        own = ", ".join(sorted(path.stem for path in TRAINED.glob("*.safetensors")))
        raise UserError(
            f"--optimizer open and no_features need --model, their weights: published ones ({names}), own ones "
            f"({own}), a .npy file, or a run."
        )
    known = published(place)
    if known is not None:
        return load_weights(known)
    if place.endswith(".npy"):
        return load_weights(place)
    path, member = artefacts.place_and_member(place)
    found = artefacts.load(_trained(path) or path, ARTEFACT_KIND).member(member)
    for vector in found.values():
        check_weights(vector)
    return found.get("weights", found)
