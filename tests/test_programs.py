"""What XLA makes of a step: bytes of temporaries and copies of parameters. Facts of the program, not timings.

They hold for leaves of 4,096 elements and more; of a smaller leaf XLA keeps the gradient. They are those of the newest
jax, and CI leaves this file out where it runs the oldest.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import as_shipped
from table import ROWS, Row

import jaxopt_rules as jr

SHAPE, LEAVES = (64, 64), 16
FEW_KB = 4096
LEAF = SHAPE[0] * SHAPE[1] * 4


PARAMS = {str(i): jnp.ones(SHAPE) for i in range(LEAVES)}


def compiled(rule, grad_dtype=jnp.float32, dtype=jnp.float32, by_pair=False, **extra):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    grads = jax.tree.map(lambda p: p.astype(grad_dtype), params)

    def step(params, state, grads):
        if not by_pair:
            return rule.apply(grads, state, params, **extra)
        updates, state = rule.update(grads, state, params, **extra)
        return jr.apply_updates(params, updates), state

    return as_shipped(step, donate_argnums=(0, 1)).lower(params, rule.init(params), grads).compile()


def copies(program) -> int:
    """Copies of whole leaves; those of scalars do not count."""
    return len(re.findall(r"= \w+\[64,64\]\S* copy\(", program.as_text()))


CLIP = jr.clip_by_global_norm(1.0)
DECAY = jr.weight_decay(1e-4)
NO_COPY = [
    jr.sgd(0.1),
    jr.sgd(0.1, momentum=0.9),
    jr.sgd(0.1, momentum=0.9, nesterov=True),
    jr.momentum(0.1),
    jr.adam(),
    jr.adam(bias_correction="step"),
    jr.adamw(jr.Warmup(jr.Cosine(1e-3, 100), 10)),
    jr.adamw(bias_correction="step"),
    jr.chain(CLIP, jr.adamw()),
    jr.chain(DECAY, jr.sgd(0.1, momentum=0.9)),
    jr.chain(CLIP, DECAY, jr.adamw()),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("rule", NO_COPY, ids=repr)
def test_no_temporaries_and_no_copies(rule, dtype):
    program = compiled(rule, grad_dtype=dtype)
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB
    assert copies(program) == 0


def test_a_norm_of_ones_own_beside_the_step_needs_none():
    rule = jr.adamw()

    def step(params, state, grads):
        return *rule.apply(grads, state, params), jr.global_norm(grads)

    program = as_shipped(step, donate_argnums=(0, 1)).lower(PARAMS, rule.init(PARAMS), PARAMS).compile()
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB


def test_parameters_in_bfloat16_need_none_either():
    program = compiled(jr.chain(CLIP, jr.adamw()), jnp.bfloat16, jnp.bfloat16)
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB
    assert copies(program) == 0


def modes(rule):
    return [jr.accumulate(rule, 4, reduce=r, nonfinite=n) for r in ("mean", "sum") for n in ("drop", "keep")]


CLIPPED = jr.chain(CLIP, jr.adamw())
GATES = [
    *modes(jr.adamw()),
    *modes(CLIPPED),
    jr.accumulate(jr.skip_nonfinite(jr.adamw()), 4),
    jr.accumulate(jr.average(jr.adamw()), 4),
    jr.skip_nonfinite(jr.adamw()),
    jr.skip_nonfinite(CLIPPED),
    jr.skip_spikes(jr.adamw()),
    jr.skip_spikes(CLIPPED),
    jr.skip_spikes(CLIPPED, of="value"),
]
AVERAGES = [
    jr.average(jr.adamw()),
    jr.average(jr.adamw(), 0.99, warmup=True, debias=False, start=2, every=3),
    jr.average(jr.adamw(), None),
    jr.average(jr.adamw(), window=3),
    jr.average(CLIPPED, window=3, every=4),
]
BEHIND = [jr.chain(jr.adamw(), jr.reduce_on_plateau()), jr.chain(jr.adamw(), jr.project(jax.nn.relu))]
PARTS = [
    jr.partition({"a": jr.sgd(0.1, 0.9), "b": jr.adamw()}, by={"a": ["1", "2"]}),
    jr.freeze(CLIPPED, "1"),
]


@pytest.mark.parametrize("rule", [*GATES, *AVERAGES, *BEHIND, *PARTS], ids=repr)
def test_around_a_rule_there_are_no_temporaries_and_no_copies(rule):
    program = compiled(rule, value=1.0)
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB
    assert copies(program) == 0


@pytest.mark.parametrize("rule", GATES, ids=repr)
def test_through_the_pair_a_gate_needs_less_than_its_slots(rule):
    slots = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(rule.init, PARAMS)) if x.ndim)
    assert compiled(rule, by_pair=True, value=1.0).memory_analysis().temp_size_in_bytes <= slots


def test_lookahead_copies_the_slow_weights_into_the_fast_ones_and_nothing_else():
    program = compiled(jr.lookahead(jr.adamw()))
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB
    assert copies(program) <= LEAVES


# What a sum is over and the update needs as well is computed for each of them: what is kept is kept for the sum alone.
# That is a leaf or a few at a time with the XLA of jax 0.10, and with that of 0.12, whose sums take in nothing but the
# square, what a hook gives of all leaves.
ALL_AT_ONCE = jax.__version_info__ >= (0, 11)
HOOKED = {
    "decay": (jr.chain(DECAY, CLIP, jr.adamw()), 2),
    "centralize": (jr.chain(jr.centralize(), CLIP, jr.adamw()), 1),
    "clip by value": (jr.chain(jr.clip_by_value(0.1), CLIP, jr.adamw()), 3),
    "clip by leaf norm": (jr.chain(jr.clip_by_leaf_norm(1.0), CLIP, jr.adamw()), 1),
    "clip twice": (jr.chain(CLIP, DECAY, CLIP, jr.adamw()), 3),
    "mean of gradients": (jr.chain(jr.ema(0.9), CLIP, jr.adamw()), 3),
    "clip the update": (jr.chain(jr.adam_direction(), jr.clip_by_block_rms(1.0), jr.step(0.1)), 7),
    "trust ratio": (jr.chain(CLIP, jr.adam_direction(), jr.trust_ratio(), jr.step(0.1)), 8),
    "normalize the update": (jr.chain(jr.adam_direction(), jr.normalize(), jr.step(0.1)), 7),
    "record a norm": (jr.chain(DECAY, jr.record("norm", jr.global_norm), jr.adamw()), 2),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("rule", "leaves"), HOOKED.values(), ids=HOOKED)
def test_in_front_of_a_norm_what_is_kept_is_kept_for_the_norm_alone(rule, leaves, dtype):
    program = compiled(rule, grad_dtype=dtype)
    most = max(leaves, LEAVES + 1) if ALL_AT_ONCE else leaves
    assert program.memory_analysis().temp_size_in_bytes <= most * LEAF
    assert copies(program) == 0


# What XLA keeps in the rows of the table, in leaves, of which there are 16, and the leaves that it copies. Nothing in
# all others.
OLD_SLOT = "the update needs a slot as it was before, and XLA writes the new one before it"
TWO_READERS = "two loops read the same root or quotient, which XLA keeps rather than computes twice"
OF_ITSELF = "the algorithm itself needs it"
KEPT = {
    "centralize": (1, 0, "a mean for each column"),
    "adaptive_grad_clip": (1, 0, "a norm for each column"),
    "lars_direction": (2, 0, "one leaf at a time, for its norm"),
    "lars_trust_clip": (2, 0, "one leaf at a time, for its norm"),
    "lamb": (8, 0, "some leaves at a time, for their norms"),
    "lamb_warmup": (8, 0, "some leaves at a time, for their norms"),
    "lamb_direction": (7, 0, "some leaves at a time, for their norms"),
    "lamb_decoupled": (7, 0, "some leaves at a time, for their norms"),
    "stable_adamw": (4, 0, "some leaves at a time, for their norms"),
    "stable_adamw_direction": (4, 0, "some leaves at a time, for their norms"),
    "cautious": (17, 0, "the mask as numbers, for its mean: XLA reduces no comparison without keeping it"),
    "adafactor": (17, 0, TWO_READERS),
    "adafactor_direction": (17, 0, TWO_READERS),
    "adafactor_warmup": (17, 0, TWO_READERS),
    "adafactor_pytorch": (18, 0, TWO_READERS),
    "adafactor_transformers": (17, 0, TWO_READERS),
    "adan": (17, 32, OLD_SLOT),
    "adan_direction": (17, 32, OLD_SLOT),
    "adopt": (17, 16, OLD_SLOT),
    "adopt_direction": (16, 16, OLD_SLOT),
    "adadelta": (17, 16, OLD_SLOT),
    "adadelta_direction": (16, 16, OLD_SLOT),
    "rprop": (5, 16, OLD_SLOT + "; a byte for each parameter"),
    "rprop_warmup": (5, 16, OLD_SLOT + "; a byte for each parameter"),
    "rmsprop": (17, 0, TWO_READERS),
    "rmsprop_centered": (17, 0, TWO_READERS),
    "schedule_free": (17, 0, TWO_READERS),
    "schedule_free_adamw": (17, 0, TWO_READERS),
    "schedule_free_adamw_warmup": (17, 0, TWO_READERS),
    "sm3_direction": (16, 0, "ν, of which the maxima are taken and which the update reads"),
    "sm3_warmup": (17, 0, "ν, of which the maxima are taken and which the update reads"),
    "prodigy_l2": (17, 0, "the decayed gradient, for its sums"),
    "prodigy_slice": (6, 0, "the parts of the gradients that are looked at"),
    "dog_direction": (17, 0, "the decayed gradient, for its norm"),
    "when_clip": (17, 16, "what comes out of a branch"),
    "asam": (17, 0, "the parameters of the second gradient"),
    "lookahead": (1, 16, "the fast weights are the slow ones, which are kept"),
    "nested": (1, 16, "lookahead, inside of others"),
    "add_noise": (35, 32, OF_ITSELF),
    "noisy_sgd": (35, 32, OF_ITSELF),
    "muon": (19, 0, OF_ITSELF),
    "muon_direction": (19, 0, OF_ITSELF),
    "muon_moonshot": (19, 0, OF_ITSELF),
    "muon_pytorch": (19, 0, OF_ITSELF),
    "lbfgs": (115, 96, OF_ITSELF),
    "lbfgs_fixed": (49, 96, OF_ITSELF),
    "lbfgs_direction": (49, 96, OF_ITSELF),
    "strong_wolfe": (113, 0, OF_ITSELF),
    "backtracking": (97, 0, OF_ITSELF),
}


@pytest.mark.thorough
@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in KEPT], ids=lambda row: row.name)
def test_rows_without_temporaries_and_copies(row: Row):
    program = compiled(with_step(row), **row.extra)
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB
    assert copies(program) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("row", [row for row in ROWS if row.name in KEPT], ids=lambda row: row.name)
def test_rows_keep_what_is_said_of_them(row: Row):
    program = compiled(with_step(row), **row.extra)
    leaves, copied, _ = KEPT[row.name]
    assert math.ceil(program.memory_analysis().temp_size_in_bytes / LEAF) == leaves
    assert copies(program) == copied


def with_step(row: Row) -> jr.Rule:
    return row.make() if row.rate is not None else jr.chain(row.make(), jr.step(0.1))


def test_an_outer_program_holds_a_leaf_function_once_per_shape():
    params = {str(i): jnp.ones(SHAPE) for i in range(LEAVES)}
    rule = jr.adamw()
    text = as_shipped(rule.update).lower(params, rule.init(params), params).as_text()
    assert len(re.findall(r"func\.func private @adam_decoupled\b", text)) == 1
    assert len(re.findall(r"call @adam_decoupled\b", text)) == LEAVES


@pytest.mark.x64
def test_float32_parameters_meet_no_float64_array_among_64_bit_types():
    program = compiled(jr.chain(CLIP, DECAY, jr.adamw()))
    assert not re.findall(r"f64\[\d", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB


LARGE = {str(i): jax.ShapeDtypeStruct((64, 64), jnp.float32) for i in range(8)}


@pytest.mark.parametrize(
    "rule",
    [
        jr.partition({"a": jr.accumulate(jr.adamw(), 4), "b": jr.sgd(0.1, 0.9)}, {"a": ["0", "1", "2"]}),
        jr.partition(
            {"a": jr.skip_nonfinite(jr.adamw()), "b": jr.accumulate(jr.chain(jr.clip_grad(1.0), jr.adamw()), 2)},
            {"a": ["0", "1", "2"]},
        ),
        jr.freeze(jr.accumulate(jr.chain(jr.clip_grad(1.0), jr.adamw()), 4), ["0", "1"]),
        jr.partition({"a": jr.freeze(jr.skip_nonfinite(jr.adamw()), "0"), "b": jr.sgd(0.1)}, {"a": ["0", "1"]}),
    ],
    ids=repr,
)
def test_gates_inside_groups_stay_branches_without_temporaries(rule):
    state = jax.eval_shape(rule.init, LARGE)
    step = as_shipped(lambda params, state, grads: rule.apply(grads, state, params), donate_argnums=(0, 1))
    program = step.lower(LARGE, state, LARGE).compile()
    assert "conditional(" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB


def test_the_history_of_lbfgs_is_written_in_place():
    rule, m = jr.lbfgs_direction(10), 10
    params = {"x": jnp.zeros(1 << 16)}
    state = jax.eval_shape(rule.init, params)
    compiled = as_shipped(rule.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * params["x"].nbytes < m * params["x"].nbytes
