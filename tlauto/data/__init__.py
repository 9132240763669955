"""Read, check, split and fingerprint a dataset. No torch here."""

from tlauto.data.dataset import Dataset, Item

__all__ = ["Dataset", "Item"]
