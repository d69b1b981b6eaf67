"""Rules that find their learning rate: Prodigy, DoG."""
