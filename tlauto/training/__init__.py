"""The only part that trains: pixels, features, model, fit loop. Imports torch."""
