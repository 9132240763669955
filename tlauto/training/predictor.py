"""Predict image files with a trained classifier, through the code that training decoded them with."""

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
    ) -> None:
        self.classifier = classifier.to(device).eval()
        self.input = image_input
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
                crops: dict[int, np.ndarray] = {}
                for place, crop in enumerate(threads.map(self._crop, batch)):
                    if not isinstance(crop, DataError):
                        crops[place] = crop
                    elif on_unreadable is None:
                        raise crop
                    else:
                        on_unreadable(batch[place], str(crop))
                if crops:
                    answers = self._predict(np.stack(list(crops.values())))
                    yield from zip((batch[place] for place in crops), answers, strict=True)

    def _predict(self, crops: np.ndarray) -> np.ndarray:
        """Predictions of centre crops (N, size, size, 3)."""
        images = torch.from_numpy(crops).permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits = self.classifier(normalise(images, self.input, self.device))
        return self.task.predict(logits.float().cpu().numpy())

    def _crop(self, path: str) -> np.ndarray | DataError:
        try:
            return centre_crop(decode(Path(path), self.input), self.input)
        except DataError as error:
            return error
