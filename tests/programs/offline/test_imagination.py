"""Rollouts in an ensemble: how long they are, what is stored of them, and what ends them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.programs.offline import buffers, ensemble, imagination, termination
from purejax_bilevel.programs.offline.imagination import Pessimism, World, imagined
from purejax_bilevel.programs.offline.pessimism import pessimise
from tests.programs.offline.test_ensemble import (
    architecture_of,
    beside,
    close,
    doubled,
    files,
    networks_of,
    normaliser_of,
)

OBS, ACTION, ROLLOUTS = 2, 1, 100


# --- whole predictions of the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["plain", "norm", "deterministic"])
@pytest.mark.parametrize("path", files("offline_predictions*.npz"))
def test_predictions_of_the_reference(path: Path, tag: str, float64: None) -> None:
    """From weights to what an agent sees: prediction, noise, termination, the means of all networks."""
    arrays = np.load(path)
    architecture = architecture_of(arrays, probabilistic=tag != "deterministic")
    normaliser = normaliser_of(arrays, architecture, "plain" if tag == "plain" else "norm")
    obs, action = jnp.split(doubled(arrays["in/obs_act"]), [architecture.obs_dim], -1)
    networks = networks_of(beside(path, "ensemble"))
    prediction = ensemble.with_reference_noise(ensemble.predict(architecture, networks, normaliser, obs, action))
    used = jnp.ones(architecture.networks, bool)
    world = World(architecture, networks, normaliser, jnp.arange(architecture.networks), architecture.networks, None)
    doubt = world.uncertainty("max_distance", prediction)
    terminates, checked = termination.of(str(arrays["config/termination"])), 0
    for number in range(architecture.networks):
        chosen = jnp.full(obs.shape[0], number)
        plain = imagined(prediction, doubled(arrays["in/eps"]), chosen, used, terminates)
        if tag != "deterministic":
            close(plain.next_obs, arrays[f"{tag}/mode_none"][number, :, :-2], rtol=5e-9)
            close(plain.reward, arrays[f"{tag}/mode_none"][number, :, -2], rtol=5e-9)
            close(plain.terminated, arrays[f"{tag}/mode_none"][number, :, -1])
        penalised = f"{tag}/net{number}/epistemic-penalty"
        for coefficient, expected in zip(arrays["lambda"], arrays.get(penalised, ()), strict=False):
            seen = pessimise(plain, doubt, "epistemic-penalty", coefficient, 0.0, float(arrays["config/R_max"]))
            close(seen.reward, expected[:, -2], rtol=5e-9)
            close(seen.next_obs, expected[:, :-2], rtol=5e-9)
            checked += 1
    assert checked


def test_messages_of_the_reference_have_a_place_here() -> None:
    """An unknown mode is refused where it is used; variances of a deterministic ensemble in `test_program`."""
    with pytest.raises(ValueError, match="--mode must be one of"):
        imagination.kind_of("epistemi", "mode")


# --- rollouts ---------------------------------------------------------------------------------------------------------


def world_of(terminates: Any = termination.never, bias: float = 0.1) -> World:
    """Three networks that differ in their biases; the observation grows by about `bias` a step."""
    architecture = ensemble.Architecture(OBS, ACTION, networks=3, hidden=(4,), reward_hidden=(4,))
    networks = jax.tree.map(jnp.zeros_like, ensemble.init(architecture, jax.random.key(0)))
    grows = jnp.array([0.0, bias, 2 * bias])[:, None, None] * jnp.array([1.0, 1.0, 0.0, 0.0])
    trunk = (networks.trunks["obs"][0], networks.trunks["obs"][1]._replace(bias=grows))
    quiet = ensemble.Bounds(*(jnp.full_like(bound, -30.0) for bound in networks.bounds))
    networks = ensemble.Networks({**networks.trunks, "obs": trunk}, quiet)
    return World(architecture, networks, ensemble.no_normaliser(architecture), jnp.arange(3), 3, terminates)


def walk(world: World, pessimism: Pessimism, steps: int, *lengths: int) -> Any:
    """Of each largest length: lengths of rollouts and which go on after each step, and the ring."""
    starts = jnp.zeros((ROLLOUTS, OBS))
    act = lambda obs, key: jax.random.uniform(key, (obs.shape[0], ACTION), minval=-1.0)  # noqa: E731

    @jax.jit
    def run(length: jax.Array, threshold: jax.Array) -> Any:
        own = pessimism._replace(threshold=threshold)

        def step(carry: tuple, key: jax.Array) -> tuple:
            moving, ring, _ = imagination.advance(world, act, own, *carry, starts, key, length)
            return (moving, ring), (moving.length, moving.goes_on)

        start = (imagination.no_rollouts(ROLLOUTS, OBS), buffers.empty(20_000, 2 * OBS + ACTION + 2))
        (_, ring), found = jax.lax.scan(step, start, jax.random.split(jax.random.key(1), steps))
        return jax.tree.map(jnp.asarray, (*found, ring))

    thresholds = pessimism.threshold if isinstance(pessimism.threshold, tuple) else (pessimism.threshold,)
    return [run(length, threshold) for length in lengths for threshold in thresholds]


PLAIN = Pessimism("none", "", 0.0, 0.0, 1.0)


def test_rollouts_are_cut_at_their_length_which_may_be_traced() -> None:
    for most, (lengths, goes_on, ring) in zip((1, 10), walk(world_of(), PLAIN, 25, 1, 10), strict=True):
        assert lengths.min() == 1
        assert lengths.max() == most
        np.testing.assert_array_equal(goes_on, lengths < most)
        rows = np.asarray(ring.rows)[: int(ring.size)]
        assert len(rows) == 25 * ROLLOUTS
        assert not rows[:, -1].any()  # a cut is not terminal


def test_nothing_is_stored_after_the_end() -> None:
    """Episodes end beyond 0.35: what is stored begins before it, and what ends beyond is terminal."""
    [(_, _, ring)] = walk(world_of(lambda obs: obs[:, 0] > 0.35), PLAIN, 25, 1000)
    rows = np.asarray(ring.rows)[: int(ring.size)]
    before, after, ends = rows[:, 0], rows[:, OBS], rows[:, -1] > 0
    assert before.max() <= 0.35
    np.testing.assert_array_equal(ends, after > 0.35)
    assert 0 < ends.sum() < len(rows)


def test_truncated_rollouts_leave_nothing_and_begin_anew() -> None:
    """All predictions are as uncertain as the networks' biases differ."""
    doubt = 0.2 * 2**0.5
    cut = Pessimism("truncation", "max_distance", 0.0, (0.9 * doubt, 1.1 * doubt), 1.0)  # type: ignore[arg-type]
    for stored, (lengths, _, ring) in zip((0, 25 * ROLLOUTS), walk(world_of(), cut, 25, 1000), strict=True):
        assert int(ring.size) == stored
        assert lengths.max() == (25 if stored else 1)


def test_what_is_not_finite_is_not_stored() -> None:
    [(_, _, ring)] = walk(world_of(bias=1e37), PLAIN, 40, 1000)
    assert 0 < int(ring.size) < 40 * ROLLOUTS
    assert np.isfinite(np.asarray(ring.rows)).all()


def test_elites_alone_predict() -> None:
    world = world_of()

    @jax.jit
    def found(count: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = World(world.architecture, world.networks, world.normaliser, world.ranking, count, world.terminates)
        prediction = own.predict(jnp.zeros((50, OBS)), jnp.zeros((50, ACTION)))
        return own.imagined(prediction, jax.random.key(3)).next_obs, own.uncertainty("max_distance", prediction)

    for count, largest in ((1, 0.0), (2, 0.1), (3, 0.2)):
        next_obs, doubt = found(count)
        np.testing.assert_allclose(np.asarray(next_obs).max(), largest, atol=1e-4)
        np.testing.assert_allclose(doubt, largest * 2**0.5, rtol=1e-3, atol=1e-6)


def test_predicted_return_counts_rewards_until_the_end() -> None:
    """A reward of 1 a step for 20 steps, or until the observation is beyond 0.35 (all elites grow by 0.1)."""
    world = world_of()
    head = world.networks.trunks["reward"][-1]
    one = head._replace(bias=jnp.broadcast_to(jnp.array([1.0, 0.0]), head.bias.shape))
    networks = world.networks._replace(
        trunks={**world.networks.trunks, "reward": (world.networks.trunks["reward"][0], one)}
    )
    still = lambda obs, key: jnp.zeros((obs.shape[0], ACTION))  # noqa: E731
    for terminates, expected in ((termination.never, 20.0), (lambda obs: obs[:, 0] > 0.35, 4.0)):
        own = World(world.architecture, networks, world.normaliser, jnp.array([1, 0, 2]), 1, terminates)
        found = jax.jit(lambda: imagination.expected_return(own, still, jnp.zeros((3, OBS)), jax.random.key(0), 20))()  # noqa: B023
        np.testing.assert_allclose(found, expected, rtol=1e-3)
