"""LPG against the numbers of GROOVE's released code: the network, one update of each kind, the meta-gradient.

Files are those of `tests/data/groove`, and of the folder named by PUREJAX_BILEVEL_REFERENCE_DATA where it has some.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from purejax_bilevel.environments.grid_world import Places
from purejax_bilevel.programs.meta_objectives import learners, meta_gradient, network
from purejax_bilevel.programs.meta_objectives.learners import Build, Layer, Learner, LivingAgent, Rollout
from purejax_bilevel.programs.meta_objectives.meta_gradient import Judged, Switches
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining

OWN = Path(__file__).parents[2] / "data" / "groove"
GIVEN = os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA")
GATES = ("r", "z", "n")
ALL_FIXED = {"own_steps": True, "trained_value": True}
VARIANTS = {
    "released": {"own_steps": False, "trained_value": False},
    "fix_axis": {"trained_value": False},
    "fix_critic": {"own_steps": False},
    "fix_both": {},
}
TERMS = {
    "meta_loss": "meta_loss",
    "policy_loss": "policy_loss",
    "value_loss": "value_loss",
    "policy_entropy": "policy_entropy",
    "y_entropy": "target_entropy",
    "pi_hat_l2": "policy_l2",
    "y_hat_l2": "target_l2",
    "kl": "divergence",
}


def files(pattern: str) -> list[Any]:
    given = sorted(Path(GIVEN).rglob(pattern)) if GIVEN else []
    found = {path.name: path for path in [*sorted(OWN.glob(pattern)), *given]}
    assert found, pattern
    return [pytest.param(path, id=path.stem) for path in found.values()]


def read(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def close(found: Any, expected: Any, rtol: float = 1e-10) -> None:
    expected = np.asarray(expected)
    size = float(np.abs(expected).max()) if expected.size else 0.0
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * size)


def quickly(function: Any, *given: Any, **options: Any) -> Any:
    """A function compiled for these arguments as tests of programs are (`tests/programs/conftest.py`)."""
    return jax.jit(function, **options).lower(*given).compile()


# --- names of the files -----------------------------------------------------------------------------------------------


def weights_of(data: dict[str, Any], prefix: str) -> network.Weights:
    """Weights of the objective, or their gradient, `[..., in, out]`."""
    get = lambda name: data[f"{prefix}{name}"]  # noqa: E731
    joined = lambda names: jnp.concatenate([get(name) for name in names], -1)  # noqa: E731
    return network.Weights(
        *(jnp.asarray(get(name)) for name in ("phi/0/w", "phi/0/b", "phi/1/w", "phi/1/b")),
        joined([f"gru/i{gate}/w" for gate in GATES]),
        joined([f"gru/i{gate}/b" for gate in GATES]),
        joined([f"gru/h{gate}/w" for gate in GATES]),
        *(jnp.asarray(get(name)) for name in ("gru/hn/b", "head_pi/w", "head_pi/b", "head_y/w", "head_y/b")),
    )


def inputs_of(data: dict[str, Any], prefix: str) -> network.Inputs:
    names = ("reward", "done", "pi", "y", "y_next")
    return network.Inputs(*(jnp.asarray(data[prefix + name]) for name in names))


def learner_of(build: Build, data: dict[str, Any], prefix: str) -> Learner:
    layers = layers_of(data, prefix)
    return Learner(layers, build.rule().init(layers))


def layers_of(data: dict[str, Any], prefix: str) -> learners.Network:
    numbers = sorted({name.removeprefix(prefix).split("/")[0] for name in data if name.startswith(prefix)})
    biases = [data.get(f"{prefix}{i}/b") for i in numbers]
    kernels = [jnp.asarray(data[f"{prefix}{i}/w"]) for i in numbers]
    return tuple(
        Layer(kernel, None if bias is None else jnp.asarray(bias)) for kernel, bias in zip(kernels, biases, strict=True)
    )


def rollout_of(data: dict[str, Any]) -> Rollout:
    """All rollouts of a file, `[..., workers, steps]`."""

    def whole(name: str) -> jax.Array:
        own, following = data[f"rollout/{name}"], data[f"rollout/next_{name}"]
        axis = _steps_axis(name, own.ndim)
        last = np.take(following, [-1], axis)
        np.testing.assert_array_equal(np.take(own, range(1, own.shape[axis]), axis), np.delete(following, -1, axis))
        return jnp.concatenate([own, last], axis)

    if "rollout/obs" in data:
        observations: Any = whole("obs")
    else:
        observations = Places(whole("obs_index")[..., None], 0.001 * whole("obs_time_step"))
    return Rollout(observations, *(jnp.asarray(data[f"rollout/{name}"]) for name in ("action", "reward", "done")))


def _steps_axis(name: str, dimensions: int) -> int:
    return dimensions - (2 if name == "obs" else 1)


def build_of(data: dict[str, Any]) -> Build:
    size = int(data["observation_size"]) if "observation_size" in data else data["rollout/obs"].shape[-1]
    name = str(data.get("optimizer", "SGD")).lower()
    hidden = tuple(layer.kernel.shape[-1] for layer in layers_of(data, "actor/")[:-1])
    return Build(size, data["actor/0/w"].shape[-1], hidden, "adam" if name == "adam" else "sgd")


def config_of(data: dict[str, Any], **others: Any) -> ObjectiveTraining:
    names = {
        "actor_lr": "actor_learning_rate",
        "critic_lr": "critic_learning_rate",
        "lpg_agent_target_coeff": "agent_target_coeff",
        "num_agent_updates": "num_updates",
        **{f"lpg_{name}_coeff": f"{name}_coeff" for name in ("policy_entropy", "target_entropy", "policy_l2")},
        "lpg_target_l2_coeff": "target_l2_coeff",
        **{name: name for name in ("max_grad_norm", "gamma", "gae_lambda", "entropy_coeff")},
    }
    values = {own: data[name].item() for own, name in names.items() if name in data}
    return ObjectiveTraining(**{"actor_lr": 0.0, "critic_lr": 0.0, **values, **others})


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "lifetime"])
@pytest.mark.parametrize("path", files("groove_lpg_forward_small*.npz"))
def test_the_network(path: Path, kind: str, float64: None) -> None:
    data = read(path)
    weights, inputs = weights_of(data, f"{kind}/lpg/"), inputs_of(data, f"{kind}/in/")
    for choice in ("",) if kind == "plain" else ("raw/", "relative/"):
        clocks = None
        if choice:
            clocks = jnp.stack([jnp.asarray(data[f"lifetime/in/{choice}{name}"]) for name in ("step", "lifetime")])
        pi_hat, y_hat = quickly(network.apply, weights, inputs, clocks)(weights, inputs, clocks)
        tolerance = 1e-10 if kind == "plain" else 1e-6  # the original casts these inputs to float32
        close(pi_hat, data[f"{kind}/out/{choice}pi_hat"], tolerance)
        close(y_hat, data[f"{kind}/out/{choice}y_hat"], tolerance)


@pytest.mark.parametrize("path", files("groove_lpg_forward_small*.npz"))
def test_the_network_backwards(path: Path, float64: None) -> None:
    data = read(path)

    def score(weights: network.Weights, inputs: network.Inputs) -> jax.Array:
        pi_hat, y_hat = network.apply(weights, inputs)
        return (data["plain/in/cotangent_pi_hat"] * pi_hat).sum() + (data["plain/in/cotangent_y_hat"] * y_hat).sum()

    inputs, weights = inputs_of(data, "plain/in/"), weights_of(data, "plain/lpg/")
    by_predictions = lambda weights, *y: score(weights, inputs._replace(prediction=y[0], next_prediction=y[1]))  # noqa: E731
    given = (weights, *inputs[-2:])
    found, *predictions = quickly(jax.grad(by_predictions, (0, 1, 2)), *given)(*given)
    jax.tree.map(close, found, weights_of(data, "plain/out/grad_lpg/"))
    for gradient, name in zip(predictions, ("grad_y", "grad_y_next"), strict=True):
        close(gradient, data[f"plain/out/{name}"])


@pytest.mark.parametrize("kind", ["plain", "lifetime"])
@pytest.mark.parametrize("path", files("groove_lpg_forward_full*.npz"))
def test_the_network_of_full_size(path: Path, kind: str, float64: None) -> None:
    data = read(path)
    wanted = network.shapes(8, 16, 256, kind == "lifetime")
    made = made_weights(data, kind)
    weights = weights_of(made, "")
    assert [leaf.shape for leaf in weights] == list(wanted)
    assert sum(leaf.size for leaf in weights) == data[f"{kind}/parameter_count"]
    clocks = None
    if kind == "lifetime":
        clocks = jnp.stack([jnp.asarray(data[f"lifetime/in/{name}"]) for name in ("step", "lifetime")])
    given = (weights, inputs_of(data, f"{kind}/in/"), clocks)
    pi_hat, y_hat = quickly(network.apply, *given)(*given)
    close(pi_hat, data[f"{kind}/out/pi_hat"], 1e-10 if kind == "plain" else 1e-6)
    close(y_hat, data[f"{kind}/out/y_hat"], 1e-10 if kind == "plain" else 1e-6)


def made_weights(data: dict[str, Any], kind: str) -> dict[str, np.ndarray]:
    inputs = 5 if kind == "plain" else 7
    sizes = {"phi/0/w": (8, 16), "phi/0/b": (16,), "phi/1/w": (16, 1), "phi/1/b": (1,)}
    sizes |= {f"gru/i{gate}/w": (inputs, 256) for gate in GATES} | {f"gru/i{gate}/b": (256,) for gate in GATES}
    sizes |= {f"gru/h{gate}/w": (256, 256) for gate in GATES} | {"gru/hn/b": (256,)}
    sizes |= {"head_pi/w": (256, 1), "head_pi/b": (1,), "head_y/w": (256, 8), "head_y/b": (8,)}
    made = {}
    for i, full_name in enumerate(data[f"{kind}/weight_names"]):
        name = str(full_name).removeprefix("lpg/")
        shape = sizes[name]
        j = np.arange(np.prod(shape))
        fan = shape[0] if len(shape) > 1 else 16
        made[name] = (1.5 / np.sqrt(fan) * np.sin(0.7 * (i + 1) + 1.3 * j + 0.01 * (j % 17))).reshape(shape)
        close(made[name].sum(), data[f"{kind}/weight_sum"][i], 1e-8)
    return made


# --- one update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "clipped"])
@pytest.mark.parametrize("path", files("groove_agent_update_*.npz"))
def test_an_update_under_an_objective(path: Path, case: str, float64: None) -> None:
    data = read(path)
    if f"{case}/pi_hat" not in data:
        assert case == "clipped"
        return
    build, rollout = build_of(data), rollout_of(data)
    config = config_of(data, lpg_agent_target_coeff=data[f"{case}/target_coeff"].item())
    actor, critic = (learner_of(build, data, f"{name}/") for name in ("actor", "critic"))
    observations = learners.first_observations(rollout)
    close(learners.probabilities(actor.network, observations), data["out/pi"])
    close(learners.probabilities(critic.network, observations), data["out/y"])
    told = jnp.asarray(data[f"{case}/pi_hat"]), jnp.asarray(data[f"{case}/y_hat"])
    loss = jax.jit(jax.value_and_grad(learners.agent_loss, (0, 1), has_aux=True))
    (value, divergence), gradients = loss(actor.network, critic.network, rollout, *told, config.lpg_agent_target_coeff)
    close(value, data[f"{case}/out/loss"])
    close(divergence, data[f"{case}/out/kl"])
    for name, gradient in zip(("actor", "critic"), gradients, strict=True):
        same_layers(gradient, layers_of(data, f"{case}/out/{name}_grad/"))
    agent = LivingAgent(actor, critic, jnp.int32(0), jnp.int32(250))
    push = jax.jit(learners.push, static_argnums=0)
    after, measured = push(build, config, agent, rollout, *told)
    changed(agent, after, data, f"{case}/out/", "critic")
    assert after.step == data[f"{case}/out/step"]
    for own, name in (("policy_l2", "pi_hat_l2"), ("target_l2", "y_hat_l2"), ("divergence", "kl")):
        close(getattr(measured, own), data[f"{case}/out/{name}"])
    over, _ = push(build, config, agent.replace(step=jnp.int32(250)), rollout, *told)
    assert over.step == data[f"{case}/out/step_after_lifetime"]
    jax.tree.map(np.testing.assert_array_equal, over.actor, agent.actor)


def same_layers(found: learners.Network, expected: learners.Network) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(close, found, expected)


def changed(before: LivingAgent, after: LivingAgent, data: dict[str, Any], prefix: str, critic: str) -> None:
    for name, own in (("actor", "actor"), (critic, "critic")):
        change = jax.tree.map(jnp.subtract, getattr(after, own).network, getattr(before, own).network)
        same_layers(change, layers_of(data, f"{prefix}{name}_change/"))


@pytest.mark.parametrize("path", files("groove_a2c_update_*.npz"))
def test_an_update_of_a2c(path: Path, float64: None) -> None:
    data = read(path)
    build, rollout, config = build_of(data), rollout_of(data), config_of(data)
    actor, critic = (learner_of(build, data, f"{name}/") for name in ("actor", "value"))
    estimates = learners.values(critic.network, rollout)
    close(estimates, data["out/value"])
    found = learners.advantages(config, rollout, estimates)
    close(found, data["out/advantage"])
    close(found + estimates[:, :-1], data["out/value_target"])
    agent = LivingAgent(actor, critic, jnp.int32(0), jnp.int32(250))
    actor_loss = jax.jit(jax.value_and_grad(learners.a2c_loss, 1))
    update = jax.jit(learners.a2c_update, static_argnums=0)
    for variant, own_steps in (("released", jnp.bool_(False)), ("fix_axis", jnp.bool_(True))):
        loss, gradient = actor_loss(config, actor.network, rollout, learners.standardised(found), own_steps)
        close(loss, data[f"{variant}/out/actor_loss"])
        same_layers(gradient, layers_of(data, f"{variant}/out/actor_grad/"))
        after, value_loss = update(build, config, agent, rollout, own_steps)
        close(value_loss, data[f"{variant}/out/value_loss"])
        changed(agent, after, data, f"{variant}/out/", "value")


# --- the meta-gradient ------------------------------------------------------------------------------------------------


def meta_case(data: dict[str, Any]) -> tuple[Any, network.Weights, Judged, Any]:
    """The loss `(switches, weights, judged, rollouts) -> loss, ...` of one agent of a file, the weights, all agents."""
    build, config = build_of(data), config_of(data)

    def loss(switches: dict[str, Any], weights: network.Weights, judged: Judged, rollouts: Rollout) -> Any:
        collect = lambda k, actor, place: (place, jax.tree.map(lambda leaf: leaf[k], rollouts))  # noqa: E731
        switched = Switches(has_clocks=bool(data["lifetime_conditioning"]), raw_clocks=True, **switches)
        return meta_gradient.meta_loss(build, switched, config, weights, judged, (), collect)

    actor, critic, value = (learner_of(build, data, f"{name}/") for name in ("actor", "critic", "value"))
    agents = LivingAgent(actor, critic, jnp.asarray(data["step"]), jnp.asarray(data["lifetime"]))
    return loss, weights_of(data, "lpg/"), Judged(agents, value), rollout_of(data)


@pytest.mark.parametrize("path", files("groove_meta_gradient_*.npz"))
def test_the_meta_gradient(path: Path, float64: None) -> None:
    """To 1e-7 of the largest number of an array: the original goes through float32 on its way."""
    data = read(path)
    loss, weights, judged, rollouts = meta_case(data)
    function = jax.vmap(jax.value_and_grad(loss, 1, has_aux=True), (None, None, 0, 0))
    each = quickly(function, dict.fromkeys(ALL_FIXED, jnp.bool_(True)), weights, judged, rollouts)
    for variant, changes in VARIANTS.items():
        switches = {name: jnp.bool_(value) for name, value in (ALL_FIXED | changes).items()}
        (_, (after, _, terms)), gradients = each(switches, weights, judged, rollouts)
        jax.tree.map(lambda a, b: close(a, b, 1e-7), gradients, weights_of(data, f"{variant}/agent_grad/"))
        for name, own in TERMS.items():
            if f"{variant}/{name}" in data:
                close(getattr(terms, own), data[f"{variant}/{name}"], 1e-7)
        for name, learner in (("actor", after.agent.actor), ("critic", after.agent.critic)):
            close(learner.network[0].kernel, data[f"{name}_after/0/w"], 1e-7)
        np.testing.assert_array_equal(after.agent.step, data["step_after"])
        change = after.value.network[0].kernel - judged.value.network[0].kernel
        close(change, data.get(f"{variant}/value_change/0/w", np.zeros(change.shape)))


FROZEN = [
    *(pytest.param(*case.values, 0, id=case.id) for case in files("groove_meta_gradient_k[0-9].npz")),
    pytest.param(OWN / "groove_meta_gradient_k3.npz", 5, id="five updates", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("path", "updates"), FROZEN)
def test_the_meta_gradient_is_that_of_finite_differences(path: Path, updates: int, float64: None) -> None:
    """With all that the objective reads held at what it is with the unperturbed weights; fact 11 of the list.

    Rollouts are frozen: those of the file, which start anew where there are more updates than rollouts.
    """
    data = read(path)
    number = updates or int(data["num_updates"])
    data["num_updates"] = np.asarray(number)
    loss, weights, judged, rollouts = meta_case(data)
    build, config = build_of(data), config_of(data)
    switches = Switches(has_clocks=bool(data["lifetime_conditioning"]), raw_clocks=True)
    judged, rollouts = jax.tree.map(lambda leaf: leaf[0], (judged, rollouts))
    repeated = np.arange(number + 1) % len(rollouts.action)
    one = judged, jax.tree.map(lambda leaf: leaf[repeated], rollouts)

    def held(weights: network.Weights, base: network.Weights) -> jax.Array:
        """The meta-loss written out, of agent 0, whose inputs are those of an agent under `base`."""
        (judged, rollouts), measured = one, []
        agent, value, shadow = judged.agent, judged.value, judged.agent
        for k in range(number):
            rollout = jax.tree.map(lambda leaf, k=k: leaf[k], rollouts)
            clocks = meta_gradient.clocks(switches, shadow)
            inputs = learners.network_inputs(shadow, rollout)
            shadow, _ = learners.push(build, config, shadow, rollout, *network.apply(base, inputs, clocks))
            agent, found = learners.push(build, config, agent, rollout, *network.apply(weights, inputs, clocks))
            value, _, _ = learners.judge(build, config, value, rollout)
            measured.append(found)
        last = jax.tree.map(lambda leaf: leaf[number], rollouts)
        _, advantages, _ = learners.judge(build, config, value, last)
        chances = learners.probabilities(agent.actor.network, learners.first_observations(last))
        policy, prediction, pi_hat, y_hat, _ = (sum(values) / number for values in zip(*measured, strict=True))
        c1, c2 = config.lpg_policy_entropy_coeff, config.lpg_target_entropy_coeff
        c3, c4 = config.lpg_policy_l2_coeff, config.lpg_target_l2_coeff
        regularisers = -c1 * policy - c2 * prediction + c3 * pi_hat + c4 * y_hat
        return learners.policy_loss(chances, last, advantages) + regularisers

    flat, unravel = ravel_pytree(weights)
    directions = jnp.asarray(np.random.default_rng(0).standard_normal((5, flat.size)))
    step = 1e-5 * directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    moved = jax.vmap(lambda point: held(unravel(point), weights))
    points = flat + jnp.concatenate([step, -step])
    ahead, behind = quickly(moved, points)(points).reshape(2, -1)
    value = functools.partial(loss, ALL_FIXED)
    gradient = quickly(jax.grad(value, has_aux=True), weights, *one)(weights, *one)[0]
    expected = step @ ravel_pytree(gradient)[0]
    np.testing.assert_allclose((ahead - behind) / 2, expected, rtol=1e-6, atol=1e-6 * float(jnp.abs(expected).max()))
