"""Find the labelled images of a path: class folders, split folders of them, or a manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tlauto.data.images import is_image_name
from tlauto.data.labels import Cell, check_task, read_labels
from tlauto.data.manifest import MANIFEST_SUFFIXES, SPLIT_NAMES, read_manifests
from tlauto.data.raw import RawDataset, Record
from tlauto.data.words import counted
from tlauto.errors import DataError

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
# Left by other programs, and our own workspace where the data lies in the current folder.
_HIDDEN = ("__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini", "tlauto-runs")


# What datasets of boxes and masks, or with a lost manifest, call their folders.
_NOT_CLASSES = frozenset(
    f(name) for name in ("images", "imgs", "masks", "labels", "annotations") for f in (str, str.capitalize)
) | {"JPEGImages"}


def read(
    path: str | Path,
    *,
    label_column: str | None = None,
    path_column: str | None = None,
    group_column: str | None = None,
    task: str = "auto",
) -> RawDataset:
    """The labelled images of a folder or manifest, sorted by path; no image is opened.

    Understood are a folder of class folders; a folder with `train/` and `val/` or `test/` folders of
    class folders; a CSV, TSV or JSONL manifest; and a folder with one manifest, or with train.csv and
    test.csv, beside its images.

    Args:
        path: folder or manifest file.
        label_column, path_column, group_column: columns of a manifest, where their names do not tell.
        task: `auto`, `multiclass`, `multilabel` or `regression`.

    Raises: DataError when nothing usable is there.
    """
    check_task(task)
    root = Path(os.path.abspath(os.path.expanduser(path)))
    if not os.path.exists(root):
        raise DataError(f"no dataset at '{path}': there is no such file or folder; check the path")
    columns = {"label_column": label_column, "path_column": path_column, "group_column": group_column}
    if not root.is_dir():
        _require_manifest(root)
        return read_manifests([(root, None)], root=root.parent, task=task, **columns)
    found = _look(root)
    if found.manifests and not found.split_folders and (len(found.classes) < 2 or found.flat_splits):
        return read_manifests(_chosen(found), root=root, task=task, **columns)
    asked = next((name for name, value in columns.items() if value is not None), None)
    if asked:
        flag = f"--{asked.replace('_', '-')}"
        raise DataError(
            f"'{root}' holds class folders, not a manifest; leave {flag} out or pass the CSV file"
        )
    return _read_folders(found, task)


# --- what lies in the folder -----------------------------------------------------------------------


@dataclass
class _Found:
    """The top of a dataset folder: `classes` are folders that hold images at some depth."""

    root: Path
    folders: list[Path] = field(default_factory=list)
    classes: list[Path] = field(default_factory=list)
    split_folders: list[Path] = field(default_factory=list)
    manifests: list[Path] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)

    @property
    def flat_splits(self) -> list[Path]:
        """Folders named train, val or test that hold images and no class folders, if no others do."""
        flat = [folder for folder in self.classes if folder.name.lower() in SPLIT_NAMES]
        return flat if not self.split_folders and len(flat) == len(self.classes) else []


def _look(root: Path) -> _Found:
    found = _Found(root)
    for entry in _entries(root):
        if _is_hidden(entry.name):
            found.hidden.append(entry.name)
        elif entry.is_dir():
            found.folders.append(entry)
        elif entry.suffix.lower() in MANIFEST_SUFFIXES:
            found.manifests.append(entry)
        elif is_image_name(entry.name):
            found.images.append(entry)
        else:
            found.strays.append(entry.name)
    found.classes = [folder for folder in found.folders if _holds_image(folder)]
    found.split_folders = _split_folders(found.folders)
    return found


def _split_folders(folders: Sequence[Path]) -> list[Path]:
    """The train, val and test folders, when these are splits and not classes of those names."""
    named = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    of_classes = [folder for folder in named if any(entry.is_dir() for entry in _entries(folder))]
    splits = {SPLIT_NAMES[folder.name.lower()] for folder in of_classes}
    # `train/` beside `bus/` and `car/` is a class of vehicles.
    is_split = len(splits) > 1 or (bool(splits) and len(folders) == len(of_classes))
    return of_classes if is_split else []


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot list folder '{folder}': {error.strerror}; change its permissions") from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _HIDDEN


def _holds_image(folder: Path) -> bool:
    return any(is_image_name(file.name) for file, is_hidden in _walk(folder) if not is_hidden)


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Files below a folder, in order, and hidden files and folders (True), not looked into."""
    seen: set[str] = set()
    pending = [folder]
    while pending:
        current = pending.pop()
        real = os.path.realpath(current)
        if real in seen:
            # A link back to a folder above it.
            continue
        seen.add(real)
        folders = []
        for entry in _entries(current):
            if _is_hidden(entry.name):
                yield entry, True
            elif entry.is_dir():
                folders.append(entry)
            else:
                yield entry, False
        pending += reversed(folders)


# --- manifests -------------------------------------------------------------------------------------


def _require_manifest(file: Path) -> None:
    suffix = file.suffix.lower()
    if suffix in MANIFEST_SUFFIXES:
        return
    if suffix in _ARCHIVES:
        advice = "unpack it and pass the folder"
    elif is_image_name(file.name):
        advice = "it is one image; pass a folder of class folders"
    else:
        advice = f"pass a folder, or a manifest ending in {', '.join(MANIFEST_SUFFIXES)}"
    raise DataError(f"'{file}' is not a dataset: {advice}")


def _chosen(found: _Found) -> list[tuple[Path, str | None]]:
    by_split: dict[str, Path] = {}
    for file in found.manifests:
        split = SPLIT_NAMES.get(file.stem.lower())
        if split in by_split:
            raise DataError(f"'{by_split[split]}' and '{file}' are both the {split} manifest; remove one")
        if split:
            by_split[split] = file
    if "train" in by_split:
        return [(by_split[split], split) for split in ("train", "val", "test") if split in by_split]
    if len(found.manifests) == 1:
        return [(found.manifests[0], None)]
    names = ", ".join(file.name for file in found.manifests[:6])
    raise DataError(f"'{found.root}' holds several manifests ({names}); pass the path of one")


# --- folders ---------------------------------------------------------------------------------------


def _read_folders(found: _Found, task: str) -> RawDataset:
    if found.flat_splits:
        raise DataError(
            f"'{found.flat_splits[0]}' holds images but no class folders; make one folder per class in it, "
            f"or list path,label,split in a CSV file"
        )
    notes: list[str] = []
    if found.split_folders:
        kind = "split folders"
        places = _split_places(found, notes)
    else:
        kind = "folder"
        places = [(folder, None) for folder in found.folders]
    if found.images and places:
        notes.append(f"{counted(len(found.images), 'image')} outside any class folder left out")
    found.strays += [file.name for file in found.manifests]
    notes += [
        f"{file.name} is not read because there are class folders; pass its path to use it"
        for file in found.manifests
    ]
    records = _class_records(found, places, notes)
    if not records:
        raise DataError(_nothing(found))
    names = {label for _, label, _ in records}
    if names <= _NOT_CLASSES:
        raise DataError(
            f"'{found.root}' has no class folders, only {', '.join(sorted(names))}; make one folder of "
            f"images per class, or list path,label in a CSV file"
        )
    cells = [Cell(f"folder '{label}'", label) for _, label, _ in records]
    task, labels, _ = read_labels(cells, task="multiclass" if task == "auto" else task)
    made = [Record(path, label, split) for (path, _, split), label in zip(records, labels, strict=True)]
    return RawDataset(
        root=str(found.root),
        kind=kind,
        task=task,
        records=tuple(sorted(made, key=lambda record: record.path)),
        strays=tuple(sorted(found.strays)),
        hidden=tuple(sorted(found.hidden)),
        notes=tuple(notes),
    )


def _split_places(found: _Found, notes: list[str]) -> list[tuple[Path, str | None]]:
    places: list[tuple[Path, str | None]] = []
    for folder in found.split_folders:
        split = SPLIT_NAMES[folder.name.lower()]
        loose = 0
        for entry in _entries(folder):
            name = entry.relative_to(found.root).as_posix()
            if _is_hidden(entry.name):
                found.hidden.append(name)
            elif entry.is_dir():
                places.append((entry, split))
            elif is_image_name(entry.name):
                loose += 1
            else:
                found.strays.append(name)
        if loose:
            notes.append(f"{counted(loose, 'image')} in {folder.name}/ outside any class folder left out")
    others = [folder.name for folder in found.folders if folder not in found.split_folders]
    if others:
        notes.append(f"folders beside the splits are not read: {', '.join(others[:6])}")
    return places


def _class_records(
    found: _Found, places: Sequence[tuple[Path, str | None]], notes: list[str]
) -> list[tuple[str, str, str | None]]:
    """(path, class, split) of every image in the class folders; subfolders belong to their class."""
    records: list[tuple[str, str, str | None]] = []
    for folder, split in places:
        before = len(records)
        for file, is_hidden in _walk(folder):
            path = file.relative_to(found.root).as_posix()
            if is_hidden:
                found.hidden.append(path)
            elif is_image_name(file.name):
                records.append((path, folder.name, split))
            else:
                found.strays.append(path)
        if len(records) == before:
            notes.append(f"folder {folder.relative_to(found.root).as_posix()} holds no image")
    return records


def _nothing(found: _Found) -> str:
    if found.images:
        return (
            f"'{found.root}' holds {counted(len(found.images), 'image')} but no class folders; put the "
            f"images of each class into a folder of its own, or list path,label in a CSV file"
        )
    kinds = Counter(Path(name).suffix.lower() or "no suffix" for name in found.strays).most_common(3)
    held = ", ".join(f"{count} {suffix}" for suffix, count in kinds)
    return (
        f"no images in '{found.root}'" + (f" (only {held} files)" if held else "") + "; it needs one folder "
        "of images per class, or a CSV file of path,label rows"
    )
