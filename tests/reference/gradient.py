"""Rules without a direction of their own, and those that scale by sums and means of squares."""
