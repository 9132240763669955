"""Providers, strategies, heads and tasks that come with tlauto, registered as any plugin is."""
