"""What is left when a search ends: refit, test, bundle."""
