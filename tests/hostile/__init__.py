"""Inputs that are hurt on purpose, and processes that are killed: what the campaign and its share in the tests use."""
