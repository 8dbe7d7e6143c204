"""Non-stationary regression as one pure program: which past data should a network be fitted to, when targets move?

Outline of a run (every line inside one compiled loop):

    for time in 1 .. T_max:
        targets of the last window_size times on the inner inputs, today's targets on the outer inputs
        agent (agents.py): Adam steps on the network with the past targets, lag s weighted by lambda_s;
            then the gradient of today's loss with respect to lambda
        lambda: Adam step (funcbo: along the mean of the last grad_buffer_size gradients), projection to lambda >= 0
        local regret; every regret_frequency times also the regret against the best constant lambda
        mean squared error on all inputs; every eval_frequency times: its mean since the last evaluation

Nothing grows with T_max or with the window (data.py).
Source: the problem of "SmoothFBO"/OFBO, with the names of its settings.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel import networks
from purejax_bilevel.bilevel import regret
from purejax_bilevel.configuration import changed, configuration, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Stage, Tree
from purejax_bilevel.programs.regression import agents, data, settings
from purejax_bilevel.programs.regression.settings import Learning, Samples, Schedule, Task, Window

# Named streams of random numbers; a constant each, so that adding one moves no other.
PROBLEM, LEARNER, STEPS = range(3)


@configuration
class Config(settings.Regret, Learning, Window, Schedule):
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    agent_type: str = changed(Task, "agent_type", "funcbo", choices=agents.AGENTS)

    def program(self) -> "Regression":
        """The training program of this (resolved) configuration."""
        return Regression(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{agents.AGENTS[self.agent_type].name}-{self.shift_type}"

    def resolved(self) -> Self:
        """Fills in what depends on the agent and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = validate(agents.AGENTS.tuned(self))
        _check_together(config)
        return config


def _check_together(config: Config) -> None:
    half = config.n_samples // 2
    if config.batch_size > half:
        raise UserError(
            f"--batch_size {config.batch_size} is larger than the {half} inputs of each half of --n_samples "
            f"{config.n_samples}; lower the one or raise the other."
        )
    agents.AGENTS.check_settings(config)


class RegretSums(NamedTuple):
    """Sums over time."""

    local: regret.LocalRegretState
    own: jax.Array  # [], outer loss at the times of comparison
    constant: jax.Array  # [grid], outer loss with constant weights at these times


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step."""

    # constant
    key: jax.Array
    problem: data.Problem
    # learning
    learner: agents.Learner
    # bookkeeping
    regret: RegretSums


class Regression(Program[Config]):
    """The program: three pure functions of a member's configuration.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "evaluation_mse"
    step_unit = "time steps"
    figures = "purejax_bilevel.programs.regression.figures"
    measures = (
        Measure(
            "evaluation_mse", "evaluation MSE (all inputs, mean since the last evaluation)", better="lower", tabled=True
        ),
        Measure("outer_loss", "mean outer loss", better="lower", tabled=True),
        Measure("inner_loss", "inner loss", better="lower"),
        Measure("hypergradient_norm", "norm of the hypergradient"),
        Measure(
            "local_regret", "cumulative local regret", better="lower", tabled=True, total_of="local_regret_increment"
        ),
        Measure("local_regret_increment", "local regret per time step", better="lower"),
        Measure("static_regret", "cumulative static regret", better="lower", tabled=True),
        Measure("best_constant", "best constant lambda so far"),
        Measure("lambda", "weight lambda of each lag", dims=("lag",)),
        Measure("prediction", "first output of the network", dims=("point",), logged=False),
        Measure("truth", "first output without noise", dims=("point",), logged=False),
    )

    def __init__(self, config: Config):
        self.agent = agents.AGENTS[config.agent_type]
        self.stages = (
            Stage(config.T_max, config.eval_frequency, self.update, self.evaluate, cycle=self._cycle(config)),
        )

    def _cycle(self, config: Config) -> tuple[tuple[int, Callable], ...]:
        """Steps without a comparison, then one with."""
        frequency = config.regret_frequency
        plain, comparing = (functools.partial(self._step, compares=which) for which in (False, True))
        if frequency == 0:
            return ((1, plain),)
        return ((frequency - 1, plain), (1, comparing)) if frequency > 1 else ((1, comparing),)

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key is consumed."""
        learner = self.agent.init(config, jax.random.fold_in(key, LEARNER))
        return State(
            key=jax.random.fold_in(key, STEPS),
            problem=data.init_problem(config, jax.random.fold_in(key, PROBLEM)),
            learner=learner,
            regret=RegretSums(
                local=_local_regret(config).init(learner.weights),
                own=jnp.zeros(()),
                constant=jnp.zeros(config.regret_grid_size),
            ),
        )

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One time step.

        Args:
            state: of one member.
            config: of that member.
            t: number of the step from 0, shared by all members, so that `cond` and buffer writes stay cheap under
                vmap; the problem's time is t + 1.
        """
        return self._step(state, config, t, shared)

    def _step(
        self, state: State, config: Config, t: jax.Array, shared: Tree, compares: bool | None = None
    ) -> tuple[State, Metrics]:
        weights = state.learner.weights
        batch, window = self._draw(state, config, t)
        summary = data.summarise(window, weights)
        step, learner = self.agent.step(config, state.learner, batch, summary)
        hypergradient = data.pull_back(window, step.gradient)
        _, local = _local_regret(config).update(hypergradient, state.regret.local, step=t)
        sums = self._compare(state, config, t, batch, window, step.outer_loss, compares)
        metrics = {
            "evaluation_mse": self._error(learner.inner, state.problem, config, t + 1),
            "outer_loss": step.outer_loss,
            "inner_loss": step.inner_loss + data.mean_square(window, weights),
            "hypergradient_norm": jnp.linalg.norm(hypergradient),
            "local_regret_increment": local.increment,
        }
        state = state.replace(
            learner=agents.outer_step(config, learner, hypergradient, t), regret=RegretSums(local, *sums)
        )
        return state, {name: (value, jnp.ones_like(value)) for name, value in metrics.items()}

    def _draw(self, state: State, config: Config, t: jax.Array) -> tuple[agents.Data, data.WindowData]:
        time, problem = t + 1, state.problem
        noise_key, inner_key, outer_key = jax.random.split(jax.random.fold_in(state.key, t), 3)
        x_inner, f_inner = _batch(config, inner_key, problem.x_inner, problem.f_inner)
        x_outer, f_outer = _batch(config, outer_key, problem.x_outer, problem.f_outer)
        # All noise of a step at once, that of the window last: a longer one changes no other number.
        count, exact = f_outer.size, self.agent.inner_targets
        noise = jax.random.normal(noise_key, ((1 + exact) * count + data.noise_size(config),))

        def observe(values: jax.Array, number: int) -> jax.Array:
            own = noise[number * count : (number + 1) * count].reshape(values.shape)
            return data.targets_without_noise(config, problem, values, time) + config.noise_level * own

        y_outer, y_inner = observe(f_outer, 0), observe(f_inner, 1) if exact else None
        rest = noise[(1 + exact) * count :]
        window = data.make_window(config, problem, f_inner, state.learner.weights, time, rest)
        return agents.Data(x_inner, x_outer, y_outer, y_inner), window

    def _error(self, inner: networks.Network, problem: data.Problem, config: Config, time: jax.Array) -> jax.Array:
        """MSE on all inputs, in expectation over the noise (so never below noise_level^2).

        Taken at every time, since it goes up and down with a periodic shift: single times show one phase of it.
        """
        inputs = jnp.concatenate([problem.x_inner, problem.x_outer], axis=1)
        values = jnp.concatenate([problem.f_inner, problem.f_outer], axis=1)
        truth = data.targets_without_noise(config, problem, values, time)
        return agents.outer_loss(agents.predict(inner, inputs), truth) + config.noise_level**2

    def _compare(
        self,
        state: State,
        config: Config,
        t: jax.Array,
        batch: agents.Data,
        window: data.WindowData,
        own: jax.Array,
        wanted: bool | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Sums of the outer loss, the agent's own and with constant weights: same data, same start, same number of
        inner steps; changed at the times of comparison, or as `wanted` where they are known.

        The start is the network before the agent's step, so that only the weights differ. The original starts from the
        network after it, and always takes `num_inner_steps` steps, for unroll1 too.
        """
        before = state.regret
        if wanted is False or config.regret_frequency == 0:
            return before.own, before.constant
        uniform = data.summarise(window, window.present)

        def compare() -> tuple[jax.Array, jax.Array]:
            losses = self._with_constant_weights(state, config, batch, uniform)
            return before.own + own, before.constant + losses

        if wanted:
            return compare()
        due = (t + 1) % config.regret_frequency == 0
        return jax.lax.cond(due, compare, lambda: (before.own, before.constant))

    def _with_constant_weights(
        self, state: State, config: Config, batch: agents.Data, uniform: agents.Summary
    ) -> jax.Array:
        """The outer loss after inner steps with each of the constant weights, `[grid]`; `uniform`: with weights 1."""
        start, optimizer_state = state.learner.inner, state.learner.inner_optimizer
        num_steps = self.agent.inner_steps(config)

        def loss_of(inner: networks.Network) -> jax.Array:
            return agents.outer_loss(agents.predict(inner, batch.x_outer), batch.y_outer)

        def loss_with(constant: jax.Array) -> jax.Array:
            summary = jax.tree.map(lambda x: constant * x, uniform)
            return loss_of(agents.solve_inner(config, start, optimizer_state, batch.x_inner, summary, num_steps)[0])

        if networks.together():  # on an accelerator all at once
            return jax.vmap(loss_with)(constant_weights(config))
        # the grid begins at 0
        first = loss_of(agents.solve_inner_without_data(config, start, optimizer_state, num_steps))
        return jnp.append(first, jax.lax.map(loss_with, constant_weights(config)[1:]))

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree = ()
    ) -> dict[str, jax.Array]:
        """What there is at this time.

        Returns:
            The static regret up to now (the local one is the sum of its increments, which the host makes); `lambda`
            `[lags]` (NaN beyond the window); `prediction` and `truth` `[points]`, first output.
        """
        del is_last
        time, problem, inner, sums = t + 1, state.problem, state.learner.inner, state.regret
        compared = config.regret_frequency > 0
        best = constant_weights(config)[sums.constant.argmin()]
        in_window = jnp.arange(config.max_window_size) < config.window_size
        points = data.plot_inputs(config, problem)
        shown = data.targets_without_noise(
            config, problem, networks.apply_network(problem.truth, points, networks.gelu), time
        )
        return {
            "static_regret": jnp.where(compared, sums.own - sums.constant.min(), jnp.nan),
            "best_constant": jnp.where(compared, best, jnp.nan),
            "lambda": jnp.where(in_window, state.learner.weights, jnp.nan),
            "prediction": agents.predict(inner, points)[0],
            "truth": shown[0],
        }

    def is_finite(self, state: State) -> jax.Array:
        """Whether network and weights of a member are finite numbers."""
        leaves = jax.tree.leaves((state.learner.inner, state.learner.weights))
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def constant_weights(config: settings.Regret) -> jax.Array:
    """The constant values of lambda that the static regret compares with, `[grid]`."""
    return config.regret_lambda_max * jnp.linspace(0.0, 1.0, config.regret_grid_size)


def _local_regret(config: settings.Regret) -> regret.LocalRegret:
    return regret.local_regret(config.regret_window, config.max_regret_window)


def _batch(config: Samples, key: jax.Array, inputs: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distinct samples of a pool `[features, pool]`; all of them where the batch is as large as the pool."""
    pool = inputs.shape[1]
    if config.batch_size == pool:
        return inputs, values
    chosen = jax.random.permutation(key, pool)[: config.batch_size]
    return inputs[:, chosen], values[:, chosen]
