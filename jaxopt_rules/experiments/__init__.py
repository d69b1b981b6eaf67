"""Experiments that the command line runs. They need more than jax: `pip install "jaxopt_rules[experiments]"`."""
