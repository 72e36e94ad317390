"""Rotations, rounding with error feedback, and what else is plain mathematics."""
