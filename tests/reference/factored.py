"""Rules whose slots are smaller than the parameters: Adafactor, SM3."""
