"""Read, check, split and fingerprint a dataset. No torch here."""

from tlauto.data.checks import memory_file
from tlauto.data.dataset import Dataset, Item
from tlauto.data.doctor import examine
from tlauto.data.fingerprint import fingerprint
from tlauto.data.images import IMAGE_SUFFIXES, open_rgb
from tlauto.data.load import load_dataset
from tlauto.data.raw import RawDataset, Record
from tlauto.data.readers import read
from tlauto.data.report import DoctorReport
from tlauto.data.split import make_dataset

__all__ = [
    "IMAGE_SUFFIXES",
    "Dataset",
    "DoctorReport",
    "Item",
    "RawDataset",
    "Record",
    "examine",
    "fingerprint",
    "load_dataset",
    "make_dataset",
    "memory_file",
    "open_rgb",
    "read",
]
