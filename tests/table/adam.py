"""Adam's family."""

from reference import adam as papers
from reference import core as ref

import jaxopt_rules as jr
from table.row import ADAM, WARMUP_COSINE, Row, chained, each, warmup_cosine

# With gradients of 1e-8 to 1e4, so large that its place is seen and so small that gradients are.
EPS = {"b1": 0.9, "b2": 0.999, "eps": 1e-3}
BELIEF = {"b1": 0.9, "b2": 0.999, "eps": 1e-16, "eps_root": 1e-16}


def rising(count):
    return 0.5 + 0.01 * (count % 40)


def falling(count):
    return 1.0 / (1.0 + count)


ROWS = [
    *(
        Row(
            f"adam_eps_{place}",
            lambda place=place: jr.adam_direction(eps=1e-3, eps_placement=place),
            each(papers.adam_epsilon, **EPS, place=place),
            "eps",
            laws=False,
        )
        for place in ("hat", "inside", "max")
    ),
    *(
        Row(
            f"adam_step_eps_{place}",
            lambda place=place: jr.adam_direction(eps=1e-3, bias_correction="step", eps_placement=place),
            each(papers.adam_epsilon, **EPS, place=place, corrected=False),
            "eps",
            laws=False,
        )
        for place in ("inside", "max")
    ),
    Row(
        "adamw_eps_max",
        lambda: jr.adamw(0.1, eps=1e-3, weight_decay=0.3, eps_placement="max"),
        chained(each(papers.adam_epsilon, **EPS, place="max"), each(ref.step, 0.1, 0.3)),
        "learning_rate",
        0.1,
    ),
    Row(
        "amsgrad",
        lambda: jr.amsgrad(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.amsgrad, **ADAM, maximum_of="corrected"), each(ref.step, warmup_cosine, 0.1)),
        "weight_decay",
        0.01,
    ),
    Row(
        "amsgrad_uncorrected",
        lambda: jr.descend(jr.amsgrad_direction(maximum_of="uncorrected"), 0.1),
        chained(each(papers.amsgrad, **ADAM, maximum_of="uncorrected"), each(ref.step, 0.1)),
        "learning_rate",
        0.1,
        laws=False,
    ),
    Row(
        "nadam",
        lambda: jr.nadam(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.nadam, **ADAM, momentum_decay=4e-3), each(ref.step, warmup_cosine, 0.1)),
        "momentum_decay",
        0.01,
    ),
    Row(
        "nadam_scheduled",
        lambda: jr.nadam_direction(b1=rising, momentum_decay=falling),
        each(papers.nadam, rising, 0.999, 1e-8, falling),
        "b2",
        laws=False,
    ),
    Row(
        "nadamw",
        lambda: jr.nadamw(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.nadamw, **ADAM, form="optax"), each(ref.step, warmup_cosine, 0.1)),
        "weight_decay",
        0.01,
        thorough=True,
    ),
    Row(
        "nadamw_timm",
        lambda: jr.descend(jr.nadamw_direction(form="timm"), 0.1),
        chained(each(papers.nadamw, **ADAM, form="timm"), each(ref.step, 0.1)),
        "learning_rate",
        0.1,
        laws=False,
    ),
    Row(
        "adamax",
        lambda: jr.adamax(0.1, eps=1e-3),
        chained(each(papers.adamax, **EPS), each(ref.step, 0.1)),
        "eps",
        0.1,
    ),
    Row(
        "adamaxw",
        lambda: jr.adamaxw(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.adamax, **ADAM), each(ref.step, warmup_cosine, 0.1)),
        "weight_decay",
        0.01,
        thorough=True,
    ),
    Row("adamax_direction", lambda: jr.adamax_direction(), each(papers.adamax, **ADAM), "b1", laws=False),
    Row(
        "radam",
        lambda: jr.radam(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.radam, **ADAM), each(ref.step, warmup_cosine, 0.1)),
        "weight_decay",
        0.01,
    ),
    Row(
        "radam_hat",
        lambda: jr.radam_direction(b2=0.9999, eps=1e-3, eps_placement="hat"),
        each(papers.radam, 0.9, 0.9999, 1e-3, "hat"),
        "b1",
        laws=False,
    ),
    Row(
        "radam_skip",
        lambda: jr.radam_direction(b2=0.99, threshold=20.0, silent="skip"),
        each(papers.radam, 0.9, 0.99, 1e-8, silent="skip", threshold=20),
        "threshold",
        laws=False,
    ),
    Row(
        "adabelief",
        lambda: jr.adabelief(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.adabelief, **BELIEF), each(ref.step, warmup_cosine, 0.1)),
        "weight_decay",
        0.01,
        thorough=True,
    ),
    Row(
        "adabelief_rectified",
        lambda: jr.adabelief_direction(rectify=True),
        each(papers.adabelief, **BELIEF, rectify=True),
        "b1",
        laws=False,
    ),
    Row(
        "yogi",
        lambda: jr.yogi(WARMUP_COSINE, weight_decay=0.1),
        chained(each(papers.yogi, 0.9, 0.999, 1e-3), each(ref.step, warmup_cosine, 0.1)),
        "weight_decay",
        0.01,
        thorough=True,
    ),
    Row(
        "yogi_paper",
        lambda: jr.yogi_direction(initial_accumulator_value=0.01, debias=False),
        each(papers.yogi, 0.9, 0.999, 1e-3, 0.01, False),
        "b1",
        laws=False,
    ),
]
