"""Predict image files with a trained classifier, through the code that training decoded them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tlauto.contracts import ImageInput, Task
from tlauto.errors import DataError
from tlauto.training.batches import normalise
from tlauto.training.model import Classifier
from tlauto.training.pixels import centre_crop, decode

NAMED = 5  # unreadable files that an error names


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
        device: str = "cpu",
    ) -> None:
        self.classifier = classifier.to(device).eval()
        self.input = image_input
        self.task = task
        self.classes = tuple(classes)
        self.device = torch.device(device)

    def predict_files(self, paths: Sequence[str | Path], batch_size: int = 32) -> np.ndarray:
        """Probabilities (N, K), or values (N,) for regression, of N >= 1 image files, in order.

        Raises: DataError naming the files that cannot be read, or when there are none.
        """
        if not paths:
            raise DataError("no image to predict")
        with torch.inference_mode():
            logits = [self._logits(crops) for crops in self._batches(paths, batch_size)]
        return self.task.predict(torch.cat(logits).numpy())

    def _logits(self, crops: np.ndarray) -> torch.Tensor:
        images = normalise(torch.from_numpy(crops).permute(0, 3, 1, 2), self.input, self.device)
        logits: torch.Tensor = self.classifier(images)
        return logits.float().cpu()

    def _batches(self, paths: Sequence[str | Path], batch_size: int) -> Iterator[np.ndarray]:
        """Centre crops (N, size, size, 3) of the files."""
        unreadable: list[str] = []
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for start in range(0, len(paths), batch_size):
                crops = list(threads.map(self._crop, paths[start : start + batch_size]))
                unreadable += [str(crop) for crop in crops if isinstance(crop, DataError)]
                if not unreadable:
                    yield np.stack([crop for crop in crops if not isinstance(crop, DataError)])
        if unreadable:
            more = f" and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
            raise DataError(f"cannot predict: {'; '.join(unreadable[:NAMED])}{more}")

    def _crop(self, path: str | Path) -> np.ndarray | DataError:
        try:
            return centre_crop(decode(Path(path), self.input), self.input)
        except DataError as error:
            return error
