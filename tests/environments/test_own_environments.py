"""Environments of users' own: registered objects, and functions named on the command line."""

import gymnax
import pytest

from purejax_bilevel import RLConfig, environments
from purejax_bilevel.environments import probes
from purejax_bilevel.errors import UserError
from purejax_bilevel.studies import command_line
from purejax_bilevel.studies import run as runs


class FiveValues(type(gymnax.make("CartPole-v1")[0])):
    """An environment as gymnax had them before 1.0."""

    def step(self, key, state, action, params=None):
        obs, state, reward, terminated, _, info = super().step(key, state, action, params)
        return obs, state, reward, terminated, info


def pendulum():
    return gymnax.make("Pendulum-v1")


def cart_pole():
    return gymnax.make("CartPole-v1")[0]


def five_values():
    return FiveValues()


def fails():
    raise RuntimeError("no licence")


def nothing():
    return None


HERE = __name__


def test_a_registered_environment_goes_by_its_name(monkeypatch):
    monkeypatch.setattr(environments, "_REGISTERED", {})
    environment, params = gymnax.make("CartPole-v1")
    environments.register("Short", environment, params.replace(max_steps_in_episode=7))
    task = environments.make("Short")
    assert (task.environment, task.obs_dim, task.num_actions, task.max_steps) == (environment, 4, 2, 7)
    assert not environments.is_continuous("Short")
    config = RLConfig(env_name="Short", num_train_steps=8, init_steps=4, batch_size=4, capacity=8, hidden_dim=2)
    found = runs.run(config, quiet=True, devices=1)
    assert float(found.final_return.max()) <= 7


@pytest.mark.parametrize("name", ["CartPole-v1", "ant", probes.NAMES[0]])
def test_a_name_that_is_taken_cannot_be_registered(name):
    with pytest.raises(UserError, match=f"{name} is an environment already"):
        environments.register(name, cart_pole())


def test_a_function_can_be_named():
    assert environments.make(f"{HERE}:cart_pole").obs_dim == 4
    assert environments.is_continuous(f"{HERE}:pendulum")
    assert environments.make_continuous(f"{HERE}:pendulum").action_dim == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:make", "the module no_such_module cannot be imported .*No module named"),
        (f"{HERE}:make", "has no function 'make'"),
        (":make", "has no function 'make'"),
        (f"{HERE}:", "has no function ''"),
        (f"{HERE}:HERE", "must name a function that returns an environment"),
        (f"{HERE}:fails", "the function fails .RuntimeError: no licence"),
        (f"{HERE}:nothing", "must be an Environment of gymnax >= 1.0.* got NoneType"),
        (f"{HERE}:five_values", "step must return observation, state, reward, terminated, truncated and info"),
    ],
)
def test_what_is_no_environment_gets_one_sentence(name, sentence, capsys):
    with pytest.raises(UserError, match=sentence):
        environments.make(name)
    assert command_line.main(RLConfig, "", ["--env_name", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
