"""What does not fit the memory is refused, in one sentence, before it is built."""

import jax
import pytest

import train_regression
import train_rl
from purejax_bilevel.errors import UserError
from purejax_bilevel.runtime import devices, loop, sizes
from purejax_bilevel.runtime.arrays import largest_array
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.studies import command_line, sweep_command
from purejax_bilevel.studies import run as runs
from tests import toy

GIB = 2**30


@pytest.fixture(autouse=True)
def _a_machine_of_16_gib(monkeypatch):
    monkeypatch.setattr(devices, "free_host_memory", lambda: 16 * GIB)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--capacity 1000000000", "1 member does not fit: the state alone would need 44.7 GiB"),
        ("--hidden_dim 100000", "this machine has 16 GiB free. Not even one fits: lower its capacity, widths and"),
        ("--hidden_dim 2147483647", "does not fit"),
        ("--num_seeds 30000", "30000 members do not fit: the state alone would need 28."),
        ("--num_seeds 1000000000", "1,000,000,000 members (1,000,000,000) are more than the 1,000,000"),
        ("--num_train_steps 2147483648", "--num_train_steps must be a whole number of at least 1 and at most 21474836"),
        ("--agent_type smoothfbo --smoothing_window 1000000000", "1 member does not fit"),
        ("--num_train_steps 2000000000 --eval_frequency 1", "the results would need about 134 GiB"),
        ("--env_name Pendulum-v1 --capacity 2000000000", "1 member does not fit"),
        ("--agent_type ppo --num_envs 10000000 --num_train_steps 1", "a single array of a step would need "),
        ("--agent_type open_training --hidden_dim 100000", "lower widths, batches, rollouts or copies of the"),
    ],
)
def test_what_is_too_large_gets_one_sentence(words: str, sentence: str, tmp_path, capsys):
    arguments = [*words.split(), "--output_dir", str(tmp_path), "--quiet"]
    assert command_line.main(lambda: train_rl.configuration(arguments), "", arguments) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_other_scripts_refuse_it_too(tmp_path, capsys):
    place = ["--output_dir", str(tmp_path)]
    words = ["--hidden_dim", "100000", *place]
    assert command_line.main(train_regression.configuration, "", words) == 2
    assert "1 member does not fit" in capsys.readouterr().err
    assert sweep_command.main(["omd_capacity", "--num_seeds", "2000000000", *place]) == 2
    assert "members (2,000,000,000) are more than the 1,000,000" in capsys.readouterr().err


def test_the_estimate_is_the_size_of_a_state():
    part = runs.make_part(toy.Config(width=(2, 50)).resolved(), 1, 0)
    state = jax.eval_shape(part.program.init, jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], part.config))
    assert state.cells.shape == (50,)
    assert sizes.state_bytes(part) == 8 + 4 + 4 * 50


def test_the_number_of_members_that_fit_is_told():
    part = runs.make_part(toy.Config().resolved(), 1000, 0)
    sizes.check([part], lambda device: 1000 * 20 / 0.9)
    with pytest.raises(UserError, match=r"1000 members do not fit.* About 999 members fit: take fewer seeds"):
        sizes.check([part], lambda device: 1000 * 20 / 0.9 - 20)


def test_the_compiled_program_counts_too():
    part = runs.make_part(toy.Config().resolved(), 1, 0)
    program = CompiledProgram([part], devices.make_mesh(1), 1)
    program.compile()
    assert program.device_bytes
    fits = sizes.Limits(lambda device: 2 * program.device_bytes)
    assert fits.compiled(program, "state", 0, 16) == "state"
    with pytest.raises(UserError, match="1 member does not fit: the compiled program would need"):
        sizes.Limits(lambda device: program.device_bytes).compiled(program, None, 0, 16)


def test_the_largest_array_is_found_in_whatever_loop_it_is():
    def step(carry, _):
        wide = jax.lax.cond(carry[0] > 0, lambda x: jax.numpy.outer(x, x), lambda x: x[:, None] + x, carry)
        return jax.numpy.broadcast_to(wide.sum(0), (1000, 7))[0], None

    def program(start):
        return jax.jit(lambda start: jax.lax.scan(step, start, length=3))(start)

    traced = jax.jit(program).trace(jax.ShapeDtypeStruct((7,), "float32"))
    assert largest_array(traced.jaxpr) == 4 * 49  # what is only repeated is not stored


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 GiB"),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore"),
    ],
)
def test_memory_that_ends_in_a_run_is_told_in_one_sentence(error, monkeypatch):
    def train(*_, **__):
        raise error

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(UserError, match=r"^the memory is used up \(.*\): take fewer seeds .*windows\)\.$"):
        runs.run(toy.Config(), quiet=True)


def test_other_errors_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError), sizes.explained():
        raise jax.errors.JaxRuntimeError("INTERNAL: no")
