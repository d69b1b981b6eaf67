"""Rules that evaluate elsewhere than they train: schedule-free, SAM."""
