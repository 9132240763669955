"""Predict image files with trained classifiers, through the code that training decoded them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from tlauto.contracts import ImageInput, Task
from tlauto.errors import DataError
from tlauto.training.batches import normalise
from tlauto.training.model import Classifier
from tlauto.training.pixels import centre_crop, decode

BATCH = 64
NAMED = 5  # unreadable files that an error names

OnUnreadable = Callable[[str, str], None]
"""Told the path and the reason of an image that cannot be read."""


class Predictor:
    """A classifier with all it needs to answer for files.

    Args:
        beside: further classifiers, each with its input, whose raw outputs are added to the first one's:
            the parts of a head that reads several backbones.

    Attributes:
        classes: names of the classes, in the order of the predictions' columns.
    """

    def __init__(
        self,
        classifier: Classifier,
        image_input: ImageInput,
        task: Task,
        classes: Sequence[str],
        device: str | torch.device = "cpu",
        *,
        beside: Sequence[tuple[Classifier, ImageInput]] = (),
    ) -> None:
        self.parts = [(each.to(device).eval(), look) for each, look in ((classifier, image_input), *beside)]
        self.task = task
        self.classes = tuple(classes)
        self.device = torch.device(device)

    def predict_files(self, paths: Sequence[str | Path]) -> np.ndarray:
        """Probabilities (N, K), or values (N,) for regression, of N >= 1 image files, in order.

        Raises: DataError naming the files that cannot be read, or when there are none.
        """
        if not paths:
            raise DataError("no image to predict")
        reasons: list[str] = []
        rows = self.rows((str(path) for path in paths), on_unreadable=lambda _, why: reasons.append(why))
        answers = [row for _, row in rows]
        if reasons:
            more = f" and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
            raise DataError(f"cannot predict: {'; '.join(reasons[:NAMED])}{more}")
        return np.stack(answers)

    def rows(
        self, paths: Iterable[str], *, on_unreadable: OnUnreadable | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Each readable file's path with its probabilities (K,), or its value () for regression.

        Raises: DataError for a file that cannot be read, unless there is someone to tell.
        """
        remaining = iter(paths)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            while batch := list(islice(remaining, BATCH)):
                crops: dict[int, list[np.ndarray]] = {}
                for place, found in enumerate(threads.map(self._crops, batch)):
                    if not isinstance(found, DataError):
                        crops[place] = found
                    elif on_unreadable is None:
                        raise found
                    else:
                        on_unreadable(batch[place], str(found))
                if crops:
                    answers = self._predict(list(crops.values()))
                    yield from zip((batch[place] for place in crops), answers, strict=True)

    def _predict(self, crops: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Predictions of N images, each as the centre crops (size, size, 3) that the classifiers want."""
        outputs = []
        for (classifier, look), each in zip(self.parts, zip(*crops, strict=True), strict=True):
            images = torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2)
            with torch.inference_mode():
                outputs.append(classifier(normalise(images, look, self.device)).float().cpu().numpy())
        return self.task.predict(sum(outputs[1:], start=outputs[0]))

    def _crops(self, path: str) -> list[np.ndarray] | DataError:
        try:
            return [centre_crop(decode(Path(path), look), look) for _, look in self.parts]
        except DataError as error:
            return error
