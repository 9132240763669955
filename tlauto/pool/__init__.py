"""Slots and the worker processes that fill them."""
