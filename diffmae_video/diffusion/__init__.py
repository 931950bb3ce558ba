"""Noise schedules and samplers, independent of any network."""
