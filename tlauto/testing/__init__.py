"""Conformance suites for plugin authors: subclass one in three lines."""
