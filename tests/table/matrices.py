"""Rules on matrices: Muon, with another rule for what is no matrix."""

from collections.abc import Callable

from reference import core as ref
from reference import matrices as papers

import jaxopt_rules as jr
from table.row import ADAM, WARMUP_COSINE, Row, chained, each, warmup_cosine
from table.wrappers import by_matrix

# A singular value near 0 grows by 3.4445⁵ = 485, and with it float32's rounding errors, which are 2⁻²⁴ of the norm.
# Measured: 1e-6 to 1.4e-5; in float64 they stay under 1e-12.
SINGLE = 3.4445**5 * 2**-24
DEEPSEEK = [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2


def beside(matrix: jr.Rule, rest: jr.Rule) -> jr.Rule:
    return jr.partition({"matrix": matrix, "rest": rest}, by_matrix)


def beside_reference(matrix: Callable[[], ref.Reference], *rest: Callable[[], ref.Reference]) -> ref.Reference:
    return ref.partition({"matrix": matrix(), "rest": chained(*rest)()}, by_matrix)


def muon_reference(learning_rate, weight_decay, beta=0.95, **choices) -> ref.Reference:
    return beside_reference(
        chained(each(papers.muon_direction, beta, **choices), each(ref.step, learning_rate, weight_decay)),
        each(ref.adam_direction, **ADAM),
        each(ref.step, 0.01, 0.01),
    )


ROWS = [
    Row(
        "muon",
        lambda: beside(jr.muon(WARMUP_COSINE, weight_decay=0.1), jr.adamw(0.01)),
        lambda: muon_reference(warmup_cosine, 0.1),
        "beta",
        0.01,
        single=SINGLE,
    ),
    Row(
        "muon_moonshot",
        lambda: beside(jr.muon_moonshot(WARMUP_COSINE, beta=0.8), jr.adamw(0.01)),
        lambda: muon_reference(warmup_cosine, 0.1, 0.8, momentum="sum", scale="match_rms_adamw"),
        "beta",
        0.01,
        single=SINGLE,
        thorough=True,
    ),
    Row(
        "muon_pytorch",
        lambda: beside(jr.muon_pytorch(WARMUP_COSINE, nesterov=False), jr.adamw(0.01)),
        lambda: muon_reference(warmup_cosine, 0.1, nesterov=False, placement="max"),
        "beta",
        0.01,
        single=SINGLE,
        thorough=True,
    ),
    Row(
        "muon_direction",
        lambda: beside(jr.muon_direction(momentum="debiased", polar="deepseek", scale="spectral"), jr.adam_direction()),
        lambda: beside_reference(
            each(papers.muon_direction, 0.95, momentum="debiased", scale="spectral", triples=DEEPSEEK),
            each(ref.adam_direction, **ADAM),
        ),
        "beta",
        single=SINGLE,
        laws=False,
    ),
]
