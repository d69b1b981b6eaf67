"""Rules that differ in their momenta: Lion, Adan, ADOPT, AdEMAMix."""
