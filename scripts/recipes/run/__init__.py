"""A training run: its arguments, checkpoints, random numbers, schedules and record."""
