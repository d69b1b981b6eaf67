"""Rules with a norm for each array: LAMB, LARS, NovoGrad, StableAdamW."""
