"""Adam's family."""
