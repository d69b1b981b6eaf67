"""The commands of `python -m jaxopt_rules`, a file each: `add_to(commands)` describes one, and its `run(args)` runs it.

What they need besides jax is imported when they run, so that `--help` needs nothing.
"""
