"""A hash of what a dataset holds, so that a changed folder is noticed."""

from __future__ import annotations

import hashlib
import json

from tlauto.data.raw import RawDataset
from tlauto.data.report import DoctorReport


def fingerprint(raw: RawDataset, report: DoctorReport) -> str:
    """32 hex digits over task and, of every usable image, path, contents, label, split and group.

    Not of the root, of unusable files, of file times or of the split that tlauto makes.
    """
    digest = hashlib.sha256(raw.task.encode())
    for record in sorted(raw.records, key=lambda record: record.path):
        check = report.checks[record.path]
        if not check.problem:
            line = json.dumps([record.path, check.sha256, record.label, record.split, record.group])
            digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:32]
