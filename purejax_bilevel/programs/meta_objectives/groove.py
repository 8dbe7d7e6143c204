"""GROOVE: LPG whose agents live on levels that there is something to learn on.

    the agents live on for some updates, and the objective learns from it, as LPG does
    beside each of them lives an antagonist, an A2C agent on the same level
    at the end of a life its level gets a score (scores.py): for one, how much more the antagonist earns
    the next life is on a level replayed by its score, or on a new random one (curriculum.py)

Source: Jackson et al. 2023, "Discovering general reinforcement learning algorithms with adversarial environment
design".
"""

from typing import Any

import jax
import jax.numpy as jnp

from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, own_individuals, population_gather
from purejax_bilevel.programs.meta_objectives import (
    agents,
    antagonist,
    curriculum,
    endings,
    learners,
    network,
    population,
)
from purejax_bilevel.programs.meta_objectives.agents import Learning, MetaAgent
from purejax_bilevel.programs.meta_objectives.antagonist import Antagonist
from purejax_bilevel.programs.meta_objectives.curriculum import Curriculum, Ended, Lot
from purejax_bilevel.programs.meta_objectives.level_buffer import LevelBuffer, Prior
from purejax_bilevel.programs.meta_objectives.population import Life, Lived
from purejax_bilevel.programs.meta_objectives.scores import SCORES, Evidence, Score
from purejax_bilevel.programs.meta_objectives.settings import LevelTraining, defects
from purejax_bilevel.programs.meta_objectives.worlds import World

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
OWN = ("lives", "slot", "number", "highest", "antagonists")  # what each individual has
BEST = 16  # levels whose numbers are measured


class Schooling(Learning):
    """What a member has learned, the lives that it learns from, and the levels that they are on."""

    buffer: LevelBuffer | None
    time: jax.Array  # [], meta-steps
    slot: jax.Array  # [agents], of the level in the buffer
    number: jax.Array  # [agents], of the level
    highest: jax.Array  # [agents], return of the life's episodes
    antagonists: Antagonist | None  # leaves [agents, ...]

    def individuals(self) -> "Schooling":
        shared = jax.tree.map(lambda leaf: False, self)
        own = {name: jax.tree.map(lambda leaf: True, getattr(self, name)) for name in OWN}
        return shared.replace(**own)


def score_of(config: LevelTraining) -> Score:
    """What levels are chosen by."""
    return SCORES[config.score_function]


def curriculum_of(world: World, config: LevelTraining) -> Curriculum:
    """How levels are chosen."""
    draw = curriculum.lottery(world, config)
    return Curriculum(score_of(config), config.num_agents, config.buffer_size, draw, "B5" in defects(config.compat))


def has_antagonists(config: LevelTraining) -> bool:
    """Whether antagonists live beside the agents."""
    return "antagonist_return" in score_of(config).asks


def init(world: World, config: LevelTraining, key: jax.Array) -> Schooling:
    """New weights, the first levels, and room for lives; the key is consumed."""
    weights_key, buffer_key = jax.random.split(key)
    weights = network.init(weights_key, agents.weight_shapes(config))
    buffer, slots, numbers = curriculum_of(world, config).begin(buffer_key)
    lives = population.nobody(world, config, key)
    antagonists = None
    if has_antagonists(config):
        unborn = lambda life: antagonist.born(world, config, life, jax.random.key(0))  # noqa: E731
        shapes = jax.eval_shape(jax.vmap(unborn), lives)
        antagonists = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return Schooling(
        weights=weights,
        optimizer=agents.adam(config).init(weights),
        lives=lives,
        buffer=buffer,
        time=jnp.int32(0),
        slot=slots,
        number=numbers,
        highest=jnp.full(slots.shape, -jnp.inf),
        antagonists=antagonists,
    )


# --- a meta-step ------------------------------------------------------------------------------------------------------


def step(world: World, config: LevelTraining, learning: Schooling, key: jax.Array) -> tuple[Schooling, Metrics]:
    """New lives for those that are over, a meta-step of LPG and of the antagonists, scores; the key is consumed."""
    birth_key, renew_key, *streams = (jax.random.fold_in(key, stream) for stream in range(5))
    live_keys, train_keys, play_keys = (agents.each_own(stream, config.num_agents) for stream in streams)
    learning = _reborn(world, config, learning, birth_key)
    learning, lived, metrics = agents.live_on(world, config, learning, live_keys)
    learning = learning.replace(
        antagonists=_trained(world, config, learning, train_keys),
        highest=jnp.maximum(learning.highest, lived.returns.highest),
        time=learning.time + 1,
    )
    evidence = _evidence(world, config, learning, lived, play_keys)
    measure = score_of(config).measure
    scored = jax.vmap(measure)(evidence) if measure else (jnp.full_like(learning.highest, jnp.nan),) * 2
    ended = Ended(learning.lives.is_over, learning.slot, learning.number, *scored)
    prior = Prior(config.score_transform, config.score_temperature, config.staleness_coeff)
    given = (renew_key, learning.buffer, ended, config.p_replay, prior, learning.time)
    buffer, slots, numbers, replays = curriculum_of(world, config).renew(*given)
    learning = learning.replace(buffer=buffer, slot=slots, number=numbers)
    return learning, metrics | _metrics(ended, replays, evidence)


def _reborn(world: World, config: LevelTraining, learning: Schooling, key: jax.Array) -> Schooling:
    """New lives on their levels for those that are over, and antagonists beside them; the key is consumed."""
    finished = learning.lives.is_over
    lots = curriculum_of(world, config).lots(learning.buffer, learning.slot, learning.number, finished)
    data = jax.random.key_data(key)

    def born(given: tuple[jax.Array, Lot]) -> tuple[Life, Antagonist | None]:
        number, lot = given
        keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(data), number))
        life = population.born_in(world, config, keys[0], lot.params, lot.lifetime)
        return life, antagonist.born(world, config, life, keys[1]) if has_antagonists(config) else None

    fresh, others = endings.of_finished(born, (own_individuals(config.num_agents), lots), finished)
    lives = population.renewed(config, learning.lives, fresh)
    if others is not None:  # as old as the agents
        others = others.replace(agent=others.agent.replace(step=lives.judged.agent.step))
    return learning.replace(
        lives=lives,
        antagonists=endings.replaced(finished, learning.antagonists, others),
        highest=jnp.where(finished, -jnp.inf, learning.highest),
    )


def _trained(world: World, config: LevelTraining, learning: Schooling, keys: jax.Array) -> Antagonist | None:
    if learning.antagonists is None:
        return None
    own_steps = "B2" not in defects(config.compat)

    def train(old: Antagonist, params: Any, key: jax.Array) -> Antagonist:
        return antagonist.train(world, config, old, params, key, own_steps)

    return jax.vmap(train)(learning.antagonists, learning.lives.params, keys)


def _evidence(world: World, config: LevelTraining, learning: Schooling, lived: Lived, keys: jax.Array) -> Evidence:
    """What is known of the agents `[agents, ...]` whose lives have ended; the keys are consumed."""
    asks, lives, finished = score_of(config).asks, learning.lives, learning.lives.is_over
    unknown = jnp.full(finished.shape, jnp.nan)
    returns = [unknown, unknown]
    if "agent_return" in asks:
        actors = [lives.judged.agent.actor.network]
        actors += [learning.antagonists.agent.actor.network] if learning.antagonists is not None else []
        policies = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *actors)
        found = endings.last_returns(world, policies, lives.params, finished, keys, config.env_workers)
        returns = [*found.T, unknown]
    optimum = endings.last_optima(lives.params, finished) if "optimum" in asks else unknown
    value = jax.vmap(lambda judged, rollout: learners.values(judged.value.network, rollout))(
        lives.judged, lived.rollout
    )
    advantage = jax.vmap(lambda *given: learners.advantages(config, *given))(lived.rollout, value)
    reference, visits = jnp.zeros_like(unknown), jnp.zeros(unknown.shape, jnp.int32)
    if learning.buffer is not None:
        reference, visits = learning.buffer.reference[learning.slot], learning.buffer.visits[learning.slot]
    own, other, *_ = returns
    return Evidence(own, other, optimum, learning.highest, advantage, value[..., :-1], reference, visits)


def _metrics(ended: Ended, replays: jax.Array, evidence: Evidence) -> Metrics:
    """Means over the lives that have ended, on all devices."""
    lasts = {"last_return": evidence.agent_return, "antagonist_return": evidence.antagonist_return}
    values = {"level_score": ended.score, "replay_share": replays.astype(ended.score.dtype), **lasts}
    known = {name: ended.finished & jnp.isfinite(value) for name, value in values.items()}
    pairs = {name: (jnp.where(known[name], value, 0.0), known[name]) for name, value in values.items()}
    everyone = population_gather(pairs)
    return {name: (value.sum(), count.sum().astype(value.dtype)) for name, (value, count) in everyone.items()}


# --- measures ---------------------------------------------------------------------------------------------------------


def evaluate(config: LevelTraining, learning: Schooling, is_last: jax.Array) -> dict[str, jax.Array]:
    """The scores of the levels kept, and which are the best."""
    buffer, nothing = (
        learning.buffer,
        {"score_quantile": jnp.full(len(QUANTILES), jnp.nan), "kept_levels": jnp.zeros(())},
    )
    if buffer is None:
        return nothing | {name: jnp.full(BEST, jnp.nan) for name in ("best_level", "best_score", "best_visits")}
    scores = jnp.where(buffer.scored, buffer.score, jnp.nan)
    best = jax.lax.top_k(jnp.where(buffer.scored, buffer.score, -jnp.inf), min(BEST, config.buffer_size))[1]
    best = jnp.pad(best, (0, BEST - best.shape[0]), mode="edge")
    whether = is_last & buffer.scored[best]
    show = lambda values: jnp.where(whether, values[best].astype(scores.dtype), jnp.nan)  # noqa: E731
    return {
        "score_quantile": jnp.nanquantile(scores, jnp.array(QUANTILES)),
        "kept_levels": buffer.scored.sum().astype(scores.dtype),
        "best_level": show(buffer.levels.number),
        "best_score": show(buffer.score),
        "best_visits": show(buffer.visits),
    }


def check(config: LevelTraining, world: World) -> None:
    """Refuses environments without levels, and buffers that are too small.

    Raises:
        UserError: naming the setting and what is allowed.
    """
    agents.check_lifetimes(config, world)
    if world.params is not None:
        raise UserError(
            f"--agent_type groove needs levels to choose among: --env_name GridWorld-<mode>, got {config.env_name}."
        )
    if config.score_function == "optimal_regret" and not world.is_tabular:
        raise UserError(f"--score_function optimal_regret needs a tabular mode, got --env_name {config.env_name}.")
    least = 2 * config.num_agents + 1
    if score_of(config).measure and config.buffer_size < least:
        raise UserError(
            f"--buffer_size {config.buffer_size} must be at least {least}: one more than twice --num_agents "
            f"{config.num_agents}."
        )


PLACES = ("place",)
GROOVE = MetaAgent(
    name="groove",
    text="LPG on levels that are replayed by score",
    step=step,
    init=init,
    settings=(*agents.META_GRADIENT_SETTINGS, "score_function", "buffer_size", "score_transform"),
    measures=(
        *agents.MEASURES,
        Measure("last_return", "return of the last policies of the lives that ended", better="higher"),
        Measure("antagonist_return", "return of their antagonists"),
        Measure("level_score", "score of the levels of the lives that ended"),
        Measure("replay_share", "share of new lives on replayed levels"),
        Measure("kept_levels", "levels with a score in the buffer"),
        Measure(
            "score_quantile", f"quantiles {QUANTILES} of the scores in the buffer", dims=("quantile",), logged=False
        ),
        Measure("best_level", "numbers of the levels of highest scores", dims=PLACES, when="end", logged=False),
        Measure("best_score", "their scores", dims=PLACES, when="end", logged=False),
        Measure("best_visits", "lives that ended on them", dims=PLACES, when="end", logged=False),
    ),
    evaluate=evaluate,
    check=check,
)
