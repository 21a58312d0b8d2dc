"""Measurements of the operators."""
