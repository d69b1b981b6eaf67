"""Rules on matrices: Muon."""
