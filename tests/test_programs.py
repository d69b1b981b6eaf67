"""What XLA makes of a step: bytes of temporaries and copies of parameters. Facts of the program, not timings.

They hold for leaves of 4,096 elements and more; of a smaller leaf XLA keeps the gradient. They are those of the newest
jax, and CI leaves this file out where it runs the oldest.
"""

import re

import jax
import jax.numpy as jnp
import pytest

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

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, rule.init(params), grads).compile()


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


CATALOGUE = [
    jr.sgd(0.1, 0.9, True, form="ema"),
    jr.sgd(0.1, 0.9, True, form="tensorflow", weight_decay=0.1),
    jr.signum(0.1, weight_decay=0.1),
    jr.adagrad(0.1, weight_decay=0.1),
    jr.rmsprop(0.1, centered=True, momentum=0.9),
    jr.adam(eps_placement="max"),
    jr.amsgrad(0.1, weight_decay=0.1),
    jr.amsgrad(0.1, maximum_of="uncorrected"),
    jr.nadam(weight_decay=0.1),
    jr.nadamw(),
    jr.adamaxw(),
    jr.radam(weight_decay=0.1),
    jr.adabelief(weight_decay=0.1),
    jr.yogi(),
    jr.lion(0.1, weight_decay=0.1),
    jr.ademamix(0.1, warmup=100, weight_decay=0.1),
    jr.lars(0.1, weight_decay=0.1),
    jr.novograd(0.1),
    jr.prodigy(weight_decay=0.1),
    jr.dog(),
    jr.ldog(),
    jr.chain(CLIP, jr.nadamw()),
]


@pytest.mark.parametrize("rule", CATALOGUE, ids=repr)
def test_the_catalogue_needs_no_temporaries_and_no_copies(rule):
    program = compiled(rule)
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB
    assert copies(program) == 0


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


def test_the_probe_sees_temporaries_where_there_are_some():
    """Decay in front of the norm: the decayed gradient feeds both the norm and the update, and is kept."""
    program = compiled(jr.chain(DECAY, CLIP, jr.adamw()))
    assert program.memory_analysis().temp_size_in_bytes >= LEAF


def test_an_outer_program_holds_a_leaf_function_once_per_shape():
    params = {str(i): jnp.ones(SHAPE) for i in range(LEAVES)}
    rule = jr.adamw()
    text = jax.jit(rule.update).lower(params, rule.init(params), params).as_text()
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
    step = jax.jit(lambda params, state, grads: rule.apply(grads, state, params), donate_argnums=(0, 1))
    program = step.lower(LARGE, state, LARGE).compile()
    assert "conditional(" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB


def test_the_history_of_lbfgs_is_written_in_place():
    rule, m = jr.lbfgs_direction(10), 10
    params = {"x": jnp.zeros(1 << 16)}
    state = jax.eval_shape(rule.init, params)
    compiled = jax.jit(rule.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * params["x"].nbytes < m * params["x"].nbytes
