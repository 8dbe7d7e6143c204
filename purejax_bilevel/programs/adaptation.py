"""Settings that are adapted while a run goes on, by hypergradients of the agent's own validation loss.

With eta the settings, U one update of what is learned (theta) and L the validation loss on fresh data, the outer
problem of step t is

    minimise over eta   L(theta_K),   theta_k = U(eta, theta_{k-1}, fresh batch),   theta_0 = what is learned at t,

and every `adapt_every` steps one Adam step of rate `adapt_lr` is taken along dL(theta_K)/d eta, through all K updates
(`bilevel.iterated_hypergradient`). L is the objective at the first values of the settings: otherwise a smaller discount
would be better only because it makes errors smaller. A setting moves as its logarithm, one between 0 and 1 as its
logit, so that it stays where it may be. It begins at its value in the configuration.

The program's own step is as without adaptation, with the settings as they are then. Any program of one stage can be
wrapped that can tell what it learns at a step (`Adaptable`).

Sources: Xu, van Hasselt and Silver 2018, "Meta-gradient reinforcement learning" (the objective, one update ahead);
Baydin et al. 2018, "Online learning rate adaptation with hypergradient descent"; Wu et al. 2018, "Understanding
short-horizon bias in stochastic meta-optimization" (why small K makes rates too small).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel import bilevel
from purejax_bilevel.agents import Agent
from purejax_bilevel.configuration import (
    FRACTION,
    POSITIVE,
    adapted_of,
    at_least,
    configuration,
    fields,
    replace,
    static,
    traced,
    values_of,
)
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Tree, Wrapper

GROUP = "adaptation"
ADAPT = 1_000_003  # stream of random numbers of a member, far from those of the programs
VALIDATION_LOSS = "validation_loss"


@configuration
class Adaptation:
    """Which settings are adapted while the run goes on, and how."""

    adapt: str = static(
        "",
        "settings that hypergradients of the validation loss adapt while the run goes on; their values are the first",
        group=GROUP,
        listed=True,
    )
    adapt_lr: float = traced(
        1e-2, "Adam rate of the logarithms (fractions: logits) of the settings that are adapted", POSITIVE, GROUP
    )
    adapt_steps: int = static(1, "updates that a hypergradient of settings goes through", at_least(1), GROUP)
    adapt_every: int = static(1, "steps between two changes of the settings that are adapted", at_least(1), GROUP)


class Lookahead(NamedTuple):
    """What is learned from a step on, apart from the environment, as functions to be differentiated.

    Args:
        start: all that is learned so far.
        update: `(config, learned, number) -> learned`, one update on data of its own; `number` counts from 0.
        loss: `learned -> scalar`, the validation loss on fresh data; settings are the first ones.
    """

    start: Tree
    update: Callable[[Any, Tree, jax.Array], Tree]
    loss: Callable[[Tree], jax.Array]


class Adaptable(Protocol):
    """What a program offers whose settings may be adapted."""

    def lookahead(self, state: Any, config: Any, t: jax.Array, key: jax.Array) -> Lookahead:
        """What would be learned after step `t`; the key is consumed."""


class State(flax.struct.PyTreeNode):
    """A member and its settings."""

    key: jax.Array  # []
    inner: Tree  # state of the wrapped program
    positions: dict[str, jax.Array]  # logarithms or logits of the settings, [] each
    optimizer: optax.OptState


class Adapted(Wrapper[Any]):
    """A program whose members adapt some of their settings.

    Args:
        inner: what is trained; it must be `Adaptable`, with one stage and no population.
        config: resolved; only its static fields matter here.
    """

    def __init__(self, inner: Program, config: Any):
        super().__init__(inner)
        (stage,) = inner.stages
        self.names, self._stage = config.adapt.split(), stage
        self.measures = (*inner.measures, *_measures(config))
        self._scales = scales(config)
        self._num_steps, self._every = config.adapt_steps, config.adapt_every
        self.stages = (
            dataclasses.replace(
                stage, update=self.update, collect=self._collect, evaluate=self._evaluate, cycle=self._cycle()
            ),
        )
        if hasattr(inner, "episode"):  # else there is no policy to show
            self.episode = self._episode

    def init(self, key: jax.Array, config: Any, shared: Tree = ()) -> State:
        """State of a member before its first step, with the random numbers that it has without adaptation."""
        positions = {name: self._scales[name].position(jnp.asarray(getattr(config, name))) for name in self.names}
        return State(
            key=jax.random.fold_in(key, ADAPT),
            inner=self.inner.init(key, config, shared),
            positions=positions,
            optimizer=optax.adam(config.adapt_lr).init(positions),
        )

    def artefact(self, state: State) -> Tree:
        return self.inner.artefact(state.inner)

    def write(self, states: State, members: Sequence[dict[str, Any]], folder: Path) -> None:
        self.inner.write(states.inner, members, folder)

    def is_finite(self, state: State) -> jax.Array:
        return self.inner.is_finite(state.inner)

    def update(self, state: State, config: Any, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One step of the program, and a step of the settings where it is time."""
        if self._every == 1:
            return self._moving(state, config, t, shared)
        state, metrics = self._plain(state, config, t, shared)
        moved = lambda state: self._moved(state, config, t)  # noqa: E731
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(moved, state)[1])
        kept = lambda state: ((state.positions, state.optimizer), nothing)  # noqa: E731
        # Not the whole state: a branch would copy the buffer.
        (positions, optimizer), own = jax.lax.cond((t + 1) % self._every == 0, moved, kept, state)
        return state.replace(positions=positions, optimizer=optimizer), metrics | own

    def settings(self, positions: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Values of the settings at these logarithms or logits."""
        return {name: self._scales[name].value(position) for name, position in positions.items()}

    # --- steps --------------------------------------------------------------------------------------------------------

    def _own(self, state: State, config: Any) -> Any:
        """The configuration with the settings as they are now."""
        return replace(config, **self.settings(state.positions))

    def _plain(self, state: State, config: Any, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        inner, metrics = self._stage.update(state.inner, self._own(state, config), t, shared)
        return state.replace(inner=inner), metrics

    def _collect(self, state: State, config: Any, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        assert self._stage.collect is not None, "a stage with a warm-up collects"
        inner, metrics = self._stage.collect(state.inner, self._own(state, config), t, shared)
        return state.replace(inner=inner), metrics

    def _moving(self, state: State, config: Any, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        state, metrics = self._plain(state, config, t, shared)
        (positions, optimizer), own = self._moved(state, config, t)
        return state.replace(positions=positions, optimizer=optimizer), metrics | own

    def _cycle(self) -> tuple[tuple[int, Callable], ...]:
        """Steps without a change of settings, then one with, where the wrapped program has no cycle of its own."""
        if self._every == 1 or self._stage.cycle:
            return ()
        return ((self._every - 1, self._plain), (1, self._moving))

    def _moved(self, state: State, config: Any, t: jax.Array) -> tuple[tuple[Any, optax.OptState], Metrics]:
        """The settings' positions and optimiser after a step along their hypergradient, and what was measured."""
        loss, gradient = self.hypergradient(state, config, t)
        usable = jnp.isfinite(optax.tree.norm(gradient))  # one overflow must not end the adaptation
        steered = jax.tree.map(lambda leaf: jnp.where(usable, leaf, 0), gradient)
        step, optimizer = optax.adam(config.adapt_lr).update(steered, state.optimizer)
        measured = {VALIDATION_LOSS: loss} | {hypergradient_of(name): gradient[name] for name in self.names}
        metrics = {name: (jnp.where(usable, each, 0), usable.astype(each.dtype)) for name, each in measured.items()}
        return (optax.apply_updates(state.positions, step), optimizer), metrics

    def hypergradient(self, state: State, config: Any, t: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Validation loss after the updates ahead of step `t`, and its gradient in the settings' positions."""
        ahead = self.inner.lookahead(state.inner, config, t, jax.random.fold_in(state.key, t))  # type: ignore[attr-defined]

        def step(positions: dict[str, jax.Array], carry: tuple[Tree, jax.Array]) -> tuple[Tree, jax.Array]:
            learned, number = carry
            return ahead.update(replace(config, **self.settings(positions)), learned, number), number + 1

        value, gradient, _ = bilevel.iterated_hypergradient(
            step,
            lambda positions, carry: ahead.loss(carry[0]),
            state.positions,
            (ahead.start, jnp.int32(0)),
            self._num_steps,
            checkpoint=self._num_steps > 1,
        )
        return value, gradient

    # --- what is measured ---------------------------------------------------------------------------------------------

    def _evaluate(
        self, state: State, config: Any, t: jax.Array, is_last: jax.Array, shared: Tree = ()
    ) -> dict[str, jax.Array]:
        found = self._stage.evaluate(state.inner, self._own(state, config), t, is_last, shared)
        return found | {adapted_of(name): value for name, value in self.settings(state.positions).items()}

    def _episode(self, state: State, config: Any, t: jax.Array) -> Any:
        return self.inner.episode(state.inner, self._own(state, config), t)  # type: ignore[attr-defined]


# --- how settings move ------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Where a setting lies as a number without bounds, and back."""

    words: str
    position: Callable[[jax.Array], jax.Array]
    value: Callable[[jax.Array], jax.Array]


SCALES = {  # by what a field allows
    POSITIVE: Scale("logarithm", jnp.log, jnp.exp),
    FRACTION: Scale("logit", jax.scipy.special.logit, jax.nn.sigmoid),
}


def scales(config: Any) -> dict[str, Scale]:
    """How each setting that is adapted moves."""
    checks = {field.name: field.metadata["check"] for field in fields(config, is_traced=True)}
    return {name: SCALES[checks[name]] for name in config.adapt.split()}


def hypergradient_of(name: str) -> str:
    """What the mean hypergradient of a setting is called in results."""
    return f"hypergradient_{name}"


def _measures(config: Any) -> list[Measure]:
    helps = {field.name: field.metadata["help"].split(" (default")[0] for field in fields(config)}
    found = [
        Measure(VALIDATION_LOSS, "validation loss after the updates that the hypergradient of settings goes through")
    ]
    for name, scale in scales(config).items():
        found.append(Measure(adapted_of(name), helps[name]))
        found.append(
            Measure(hypergradient_of(name), f"hypergradient of the validation loss in the {scale.words} of {name}")
        )
    return found


# --- which settings may be adapted ------------------------------------------------------------------------------------


def adapted(program: Program, config: Any) -> Program:
    """The program, whose members adapt the settings that the configuration names; itself where it names none."""
    return Adapted(program, config) if config.adapt else program


def check(config: Any, agent: Agent, why_not: Mapping[str, str]) -> None:
    """Refuses settings that cannot be adapted.

    Args:
        config: with everything filled in.
        agent: whose settings they are.
        why_not: what else stands against settings that the agent could adapt, in words, by name.

    Raises:
        UserError: naming the setting and what is allowed.
    """
    names = config.adapt.split()
    for field in fields(type(config)):
        if not names and field.name in ADAPTATION and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name} needs --adapt: which settings are adapted?")
    declared = {field.name: field for field in fields(config)}
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(f"--adapt names {name} twice.")
        if name not in declared or name not in agent.adaptable:
            _refuse(name, agent, declared)
        if name in why_not:
            raise UserError(f"--adapt {name}: {why_not[name]}.")
        if config.adapt_steps < agent.adaptable[name]:
            raise UserError(
                f"--adapt {name} needs --adapt_steps {agent.adaptable[name]} or more with {agent.name}: it does not "
                f"reach the validation loss through fewer updates, got {config.adapt_steps}."
            )
        for value in values_of(getattr(config, name)):
            if declared[name].metadata["check"] is FRACTION and not 0 < value < 1:
                raise UserError(f"--adapt {name}: its first value must lie between 0 and 1, got {value!r}.")


ADAPTATION = tuple(field.name for field in fields(Adaptation) if field.name != "adapt")


def _refuse(name: str, agent: Agent, declared: Mapping[str, Any]) -> None:
    if not agent.adaptable:
        raise UserError(f"--adapt {name}: the agent {agent.name} has no settings that hypergradients could adapt.")
    allowed = f"{agent.name} can adapt {', '.join(agent.adaptable)}"
    if name not in declared:
        raise UserError(f"--adapt {name}: there is no such setting; {allowed}.")
    raise UserError(f"--adapt {name}: its validation loss has no derivative in it; {allowed}.")
