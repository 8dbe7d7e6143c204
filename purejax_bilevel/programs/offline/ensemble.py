"""An ensemble of dynamics models: pure functions of its arrays, which any program may use.

    architecture = Architecture(obs_dim=3, action_dim=1)
    networks = init(architecture, key)
    networks, optimizer, losses = train_step(architecture, networks, normaliser, optimizer, batch, lr, weight_decay)
    prediction = predict(architecture, networks, normaliser, obs, action)   # of every network
    prediction = chosen(prediction, elite_of_row)                           # of one network per row
    next_obs_and_reward = sampled(prediction, noise)

Every network predicts the change of the observation in the data's units and the reward, and for each number the
logarithm of a variance, softly kept between two bounds that are learned. Inputs are normalised. Where targets are
normalised too (`normalise_targets`) the loss sees observations in units of the data's standard deviation, and so are
the variances: `Prediction.scale` brings the noise back to the data's units. (In the code of the reference the noise
stays in normalised units; `with_reference_noise` gives that.)

Arrays are batch first: `[network, batch, number]`, of which the last number is the reward.
Sources: PETS, Chua et al. 2018 (arXiv 1805.12114); MBPO, Janner et al. 2019 (1906.08253); MOPO, Yu et al. 2020
(2005.13239).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

MAX_LOG_VAR, MAX_LOG_VAR_REWARD, MIN_LOG_VAR = 0.5, 1.0, -10.0  # where the bounds start
BOUND_WEIGHT = 0.01  # of the bounds' distance in the loss
SMALLEST_STD = 1e-6  # of a column of the data; one that varies less is left as it is
LAYER_NORM_EPSILON = 1e-6
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
}


# --- arrays -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What an ensemble is made of; not traced.

    Args:
        obs_dim: entries of an observation.
        action_dim: entries of an action.
        networks: number of networks.
        hidden: units of the hidden layers of the trunk of observations.
        reward_hidden: the same for the trunk of the reward; (): one trunk for both.
        probabilistic: whether variances are learned.
        activation: of the hidden layers, one of `ACTIVATIONS`.
        layer_norm: whether every hidden layer is normalised over its units, before the activation, without a scale of
            its own.
        normalise_targets: whether loss and variances are in units of the data's standard deviation.
        trainable_bounds: whether the bounds of the log-variances are learned.
        terminal_hidden: units of the hidden layers of a trunk that predicts terminals; None: there is none.
    """

    obs_dim: int
    action_dim: int
    networks: int = 7
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    reward_hidden: tuple[int, ...] = (64, 64, 64)
    probabilistic: bool = True
    activation: Literal["leaky_relu", "relu", "swish"] = "leaky_relu"
    layer_norm: bool = False
    normalise_targets: bool = True
    trainable_bounds: bool = True
    terminal_hidden: tuple[int, ...] | None = None

    @property
    def trunks(self) -> dict[str, tuple[int, ...]]:
        """Sizes of each trunk, from inputs to outputs."""
        inputs, numbers = self.obs_dim + self.action_dim, self.obs_dim + 1
        if self.reward_hidden:
            sizes = {"obs": (*self.hidden, 2 * self.obs_dim), "reward": (*self.reward_hidden, 2)}
        else:
            sizes = {"obs": (*self.hidden, 2 * numbers)}
        if self.terminal_hidden is not None:
            sizes["terminal"] = (*self.terminal_hidden, 1)
        return {name: (inputs, *layers) for name, layers in sizes.items()}


class Layer(NamedTuple):
    """The same dense layer of all networks."""

    kernel: jax.Array  # [network, in, out]
    bias: jax.Array  # [network, 1, out]


class Bounds(NamedTuple):
    """Soft bounds of the log-variances, of each network and number."""

    max_obs: jax.Array  # [network, obs]
    max_reward: jax.Array  # [network, 1]
    min: jax.Array  # [network, obs + 1]


class Networks(NamedTuple):
    """All that is learned."""

    trunks: dict[str, tuple[Layer, ...]]  # as in `Architecture.trunks`
    bounds: Bounds


class Normaliser(NamedTuple):
    """Mean and standard deviation of the columns of the data."""

    mean: jax.Array  # [obs + action]
    std: jax.Array  # [obs + action]

    def __call__(self, columns: jax.Array) -> jax.Array:
        """Normalises the first columns, as many as there are: `[..., obs]` or `[..., obs + action]`."""
        count = columns.shape[-1]
        return (columns - self.mean[:count]) / self.std[:count]


class Transitions(NamedTuple):
    """Rows to learn from, `[batch, ...]`, or `[network, batch, ...]` where each network has its own."""

    obs: jax.Array  # [..., obs]
    action: jax.Array  # [..., action]
    reward: jax.Array  # [...]
    next_obs: jax.Array  # [..., obs], before any reset
    terminated: jax.Array  # [...], 0.0 or 1.0; 0 at a time limit


class Prediction(NamedTuple):
    """What networks say of an observation and an action; the last number is the reward.

    `[network, batch, ...]`; after `chosen` `[batch, ...]`.
    """

    mean: jax.Array  # [..., obs + 1], next observation and reward in the data's units
    log_var: jax.Array  # [..., obs + 1], within the bounds, in the units that were learned; 0 if deterministic
    scale: jax.Array  # [obs + 1], size of these units in the data's; 0 if deterministic
    terminal_logit: jax.Array | None  # [...]; None without the trunk

    @property
    def std(self) -> jax.Array:
        """Standard deviations `[..., obs + 1]` in the data's units."""
        return self.scale * jnp.exp(0.5 * self.log_var)


class Losses(NamedTuple):
    """Of a batch."""

    loss: jax.Array  # [], what is minimised: the mean of
    per_network: jax.Array  # [network]


# --- construction -----------------------------------------------------------------------------------------------------


def init(architecture: Architecture, key: jax.Array) -> Networks:
    """Fresh networks; the key is consumed.

    Biases are 0. Kernels are normal with variance 2 / out, the last one's 2 / (in + out) (the reference's, whose
    rule for hidden layers is He's with rows and columns exchanged).
    """
    trunks = {}
    for number, (name, sizes) in enumerate(architecture.trunks.items()):
        trunks[name] = _init_trunk(jax.random.fold_in(key, number), architecture.networks, sizes)
    count, obs_dim = architecture.networks, architecture.obs_dim
    bounds = Bounds(
        jnp.full((count, obs_dim), MAX_LOG_VAR, float),
        jnp.full((count, 1), MAX_LOG_VAR_REWARD, float),
        jnp.full((count, obs_dim + 1), MIN_LOG_VAR, float),
    )
    return Networks(trunks, bounds)


def _init_trunk(key: jax.Array, count: int, sizes: Sequence[int]) -> tuple[Layer, ...]:
    layers = []
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        is_last = number == len(sizes) - 2
        std = math.sqrt(2.0 / (fan_in + fan_out if is_last else fan_out))
        kernel = std * jax.random.normal(jax.random.fold_in(key, number), (count, fan_in, fan_out))
        layers.append(Layer(kernel, jnp.zeros((count, 1, fan_out))))
    return tuple(layers)


def fit_normaliser(obs: jax.Array, action: jax.Array) -> Normaliser:
    """Mean and standard deviation (of a sample: n - 1) of `[rows, obs]` and `[rows, action]`.

    Columns that do not vary have 1 as standard deviation. Works on numpy arrays too.
    """
    mean = [columns.mean(0) for columns in (obs, action)]
    std = [columns.std(0, ddof=1) for columns in (obs, action)]
    joined = jnp.concatenate(std)
    return Normaliser(jnp.concatenate(mean), jnp.where(joined > SMALLEST_STD, joined, 1.0))


def no_normaliser(architecture: Architecture) -> Normaliser:
    """One that leaves everything as it is."""
    size = architecture.obs_dim + architecture.action_dim
    return Normaliser(jnp.zeros(size), jnp.ones(size))


# --- prediction -------------------------------------------------------------------------------------------------------


def predict(
    architecture: Architecture, networks: Networks, normaliser: Normaliser, obs: jax.Array, action: jax.Array
) -> Prediction:
    """What every network predicts.

    Args:
        architecture: of the ensemble.
        networks: its arrays.
        normaliser: of the inputs, and of the targets if the architecture says so.
        obs: `[batch, obs]`, or `[network, batch, obs]` where each network has its own.
        action: `[batch, action]` or `[network, batch, action]`.

    Returns:
        Arrays `[network, batch, ...]`.
    """
    inputs = normaliser(jnp.concatenate([obs, action], -1))
    outputs = {name: _apply(architecture, layers, inputs) for name, layers in networks.trunks.items()}
    if "reward" in outputs:
        means, raws = zip(*(jnp.split(outputs[name], 2, -1) for name in ("obs", "reward")), strict=True)
        change, raw = jnp.concatenate(means, -1), jnp.concatenate(raws, -1)
    else:
        change, raw = jnp.split(outputs["obs"], 2, -1)
    mean = change + jnp.concatenate([obs, jnp.zeros_like(obs[..., :1])], -1)
    terminal = outputs["terminal"][..., 0] if "terminal" in outputs else None
    if not architecture.probabilistic:
        return Prediction(mean, jnp.zeros_like(mean), jnp.zeros_like(normaliser.std, shape=mean.shape[-1]), terminal)
    maximum = jnp.concatenate([networks.bounds.max_obs, networks.bounds.max_reward], -1)
    log_var = softly_bounded(raw, networks.bounds.min[:, None], maximum[:, None])
    return Prediction(mean, log_var, _scale(architecture, normaliser), terminal)


def _apply(architecture: Architecture, layers: Sequence[Layer], inputs: jax.Array) -> jax.Array:
    """Outputs `[network, batch, out]` of a trunk of all networks."""
    activations = inputs
    for layer in layers[:-1]:
        hidden = jnp.matmul(activations, layer.kernel) + layer.bias
        if architecture.layer_norm:
            hidden = hidden - hidden.mean(-1, keepdims=True)
            hidden = hidden * jax.lax.rsqrt(jnp.square(hidden).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
        activations = ACTIVATIONS[architecture.activation](hidden)
    return jnp.matmul(activations, layers[-1].kernel) + layers[-1].bias


def _scale(architecture: Architecture, normaliser: Normaliser) -> jax.Array:
    """Size `[obs + 1]` of a unit of the loss in the data's units."""
    std = normaliser.std[: architecture.obs_dim]
    std = std if architecture.normalise_targets else jnp.ones_like(std)
    return jnp.concatenate([std, jnp.ones_like(std[:1])])


def softly_bounded(raw: jax.Array, minimum: jax.Array | float, maximum: jax.Array | float) -> jax.Array:
    """`raw` between bounds that it approaches but does not reach, from above first (PETS, appendix A.1)."""
    below = maximum - jax.nn.softplus(maximum - raw)
    return minimum + jax.nn.softplus(below - minimum)


def chosen(prediction: Prediction, network: jax.Array) -> Prediction:
    """The prediction of one network per row.

    Args:
        prediction: of all networks.
        network: number of the network of each row, `[batch]`.
    """

    def pick(numbers: jax.Array) -> jax.Array:
        index = network.reshape(1, -1, *(1,) * (numbers.ndim - 2))
        return jnp.take_along_axis(numbers, index, 0)[0]

    logit = prediction.terminal_logit
    return prediction._replace(
        mean=pick(prediction.mean),
        log_var=pick(prediction.log_var),
        terminal_logit=None if logit is None else pick(logit),
    )


def sampled(prediction: Prediction, noise: jax.Array) -> jax.Array:
    """Next observation and reward `[..., obs + 1]` with standard normal noise of the same shape."""
    return prediction.mean + prediction.std * noise


def with_reference_noise(prediction: Prediction) -> Prediction:
    """With the noise of the reference's code, whose standard deviations are in the units of the loss whatever it is."""
    return prediction._replace(scale=jnp.where(prediction.scale > 0, 1.0, 0.0))


def elites(key: jax.Array, ranking: jax.Array, count: jax.Array | int, rows: int) -> jax.Array:
    """Number of a network for each of `[rows]`, drawn among the best ones.

    Args:
        key: consumed.
        ranking: numbers of the networks `[network]`, the best first.
        count: how many of them; may be traced.
        rows: how many to draw.
    """
    return ranking[jax.random.randint(key, (rows,), 0, count)]


def elite_mask(ranking: jax.Array, count: jax.Array | int) -> jax.Array:
    """Booleans `[network]`: the best `count`, which may be traced."""
    return jnp.zeros(ranking.shape, bool).at[ranking].set(jnp.arange(ranking.shape[0]) < count)


# --- learning ---------------------------------------------------------------------------------------------------------


def losses(architecture: Architecture, networks: Networks, normaliser: Normaliser, batch: Transitions) -> Losses:
    """The loss of a batch and that of each network.

    Probabilistic: mean of (m - t)^2 exp(-l) + l over networks, rows and numbers, plus 0.01 of the mean distance of the
    bounds. Deterministic: mean of (m - t)^2. Targets are next observation, in normalised units if the architecture says
    so, and reward. With a trunk for terminals, the mean of their cross-entropy is added.
    """
    prediction = predict(architecture, networks, normaliser, batch.obs, batch.action)
    square = _squared_errors(architecture, prediction, normaliser, batch)
    if architecture.probabilistic:
        square = square * jnp.exp(-prediction.log_var) + prediction.log_var
    per_network = square.mean((1, 2))
    if architecture.probabilistic:
        maximum = jnp.concatenate([networks.bounds.max_obs, networks.bounds.max_reward], -1)
        per_network = per_network + BOUND_WEIGHT * (maximum - networks.bounds.min).mean(1)
    if prediction.terminal_logit is not None:
        target = jnp.broadcast_to(batch.terminated, prediction.terminal_logit.shape)
        per_network = per_network + optax.sigmoid_binary_cross_entropy(prediction.terminal_logit, target).mean(1)
    return Losses(per_network.mean(), per_network)


def _squared_errors(
    architecture: Architecture, prediction: Prediction, normaliser: Normaliser, batch: Transitions
) -> jax.Array:
    """`[network, batch, obs + 1]`, in the units of the loss."""
    target = jnp.concatenate([batch.next_obs, batch.reward[..., None]], -1)
    return jnp.square((prediction.mean - target) / _scale(architecture, normaliser))


def validation_errors(
    architecture: Architecture, networks: Networks, normaliser: Normaliser, batch: Transitions
) -> jax.Array:
    """Mean squared error `[network]` of the means on held-out rows, in the units of the loss."""
    prediction = predict(architecture, networks, normaliser, batch.obs, batch.action)
    return _squared_errors(architecture, prediction, normaliser, batch).mean((1, 2))


def optimizer(lr: jax.Array | float, weight_decay: jax.Array | float) -> optax.GradientTransformation:
    """AdamW; both numbers may be traced."""
    return optax.adamw(lr, weight_decay=weight_decay)


def train_step(
    architecture: Architecture,
    networks: Networks,
    normaliser: Normaliser,
    state: optax.OptState,
    batch: Transitions,
    lr: jax.Array | float,
    weight_decay: jax.Array | float,
) -> tuple[Networks, optax.OptState, Losses]:
    """One step on a batch; `state` is that of `optimizer(lr, weight_decay).init(networks)`.

    Bounds that are not learned, or that nothing depends on (deterministic), stay, without decay too.
    """

    def loss_of(networks: Networks) -> tuple[jax.Array, Losses]:
        found = losses(architecture, networks, normaliser, batch)
        return found.loss, found

    (_, found), gradient = jax.value_and_grad(loss_of, has_aux=True)(networks)
    updates, state = optimizer(lr, weight_decay).update(gradient, state, networks)
    stepped: Networks = optax.apply_updates(networks, updates)
    if not (architecture.probabilistic and architecture.trainable_bounds):
        stepped = stepped._replace(bounds=networks.bounds)
    return stepped, state, found


def bootstrapped(
    key: jax.Array, networks: int, batch_size: int, rows: jax.Array | int, seed_key: jax.Array
) -> jax.Array:
    """Numbers of rows `[network, batch]`, for each network drawn from its own resample of the data.

    The resample of a network is `rows` rows drawn with replacement once and for all: its j-th is a random function of j
    and the network, which nothing has to store (the bootstrap of PETS).

    Args:
        key: of this draw, consumed.
        networks: number of networks.
        batch_size: rows per network.
        rows: of the data to learn from; may be traced.
        seed_key: of the resamples, the same at every call, so never drawn from itself.
    """
    place = jax.random.randint(key, (networks, batch_size), 0, rows)
    own_keys = jax.vmap(lambda network: jax.random.fold_in(seed_key, network))(jnp.arange(networks))

    def row(own_key: jax.Array, place: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(own_key, place), (), 0, rows)

    return jax.vmap(jax.vmap(row, (None, 0)))(own_keys, place)
