"""What wrappers of gymnax environments have in common."""

from typing import Any

import jax

from purejax_bilevel.environments._gymnax import Environment, spaces


class Wrapped(Environment):
    """A gymnax environment around another one, with the same parameters; subclasses say what they change."""

    def __init__(self, environment: Environment):
        super().__init__()
        self.wrapped = environment

    @property
    def default_params(self) -> Any:
        return self.wrapped.default_params

    @property
    def name(self) -> str:
        return self.wrapped.name

    @property
    def num_actions(self) -> int:
        return self.wrapped.num_actions

    def is_truncated(self, state: Any, params: Any) -> jax.Array:
        return self.wrapped.is_truncated(state, params)

    def is_terminated(self, state: Any, params: Any) -> jax.Array:
        return self.wrapped.is_terminated(state, params)

    def action_space(self, params: Any = None) -> Any:
        return self.wrapped.action_space(params)

    def observation_space(self, params: Any) -> spaces.Box:
        return self.wrapped.observation_space(params)
