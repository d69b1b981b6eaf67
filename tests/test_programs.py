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


def compiled(rule, grad_dtype=jnp.float32, dtype=jnp.float32):
    params = {str(i): jnp.ones(SHAPE, dtype) for i in range(LEAVES)}
    grads = jax.tree.map(lambda p: p.astype(grad_dtype), params)

    def step(params, state, grads):
        return rule.apply(grads, state, params)

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


def test_parameters_in_bfloat16_need_none_either():
    program = compiled(jr.chain(CLIP, jr.adamw()), jnp.bfloat16, jnp.bfloat16)
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB
    assert copies(program) == 0


def test_the_probe_sees_temporaries_where_there_are_some():
    """Decay in front of the norm: the decayed gradient feeds both the norm and the update, and is kept."""
    program = compiled(jr.chain(DECAY, CLIP, jr.adamw()))
    assert program.memory_analysis().temp_size_in_bytes >= LEAF


def test_an_outer_program_holds_a_leaf_function_once_per_shape():
    params = {str(i): jnp.ones(SHAPE) for i in range(LEAVES)}
    rule = jr.adamw()
    text = jax.jit(rule.update).lower(params, rule.init(params), params).as_text()
    assert len(re.findall(r"func\.func private @adam\b", text)) == 1
    assert len(re.findall(r"call @adam\b", text)) == LEAVES


@pytest.mark.x64
def test_float32_parameters_meet_no_float64_array_among_64_bit_types():
    program = compiled(jr.chain(CLIP, DECAY, jr.adamw()))
    assert not re.findall(r"f64\[\d", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes <= FEW_KB
