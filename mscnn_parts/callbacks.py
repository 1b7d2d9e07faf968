"""What happens between the steps and epochs of a training."""

from __future__ import annotations

import time

import keras

from mscnn_parts.layers import RandomFlipCrop
from mscnn_parts.output import ipython_shell

SMALL_CROP = 0.75  # of height and width: little more than half of the work


def in_notebook() -> bool:
    """Whether a kernel runs this, which can show a bar."""
    return hasattr(ipython_shell(), "kernel")


class EpochTimer(keras.callbacks.Callback):
    """Records how long each epoch takes, its validation included, in seconds."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.begun)


class ProgressBar:
    """In a notebook a bar with the time left, one output that is replaced as the work goes on; elsewhere nothing.

    Args:
        title: of the work. total: its steps.
    """

    def __init__(self, title: str, total: int):
        self.title, self.total, self.begun, self.shown, self.output = title, total, time.time(), 0.0, None

    def advance(self, done: int) -> None:
        """Shows that so many steps are done, twice a second at most."""
        if not in_notebook() or (time.time() < self.shown + 0.5 and done < self.total):
            return
        from IPython.display import HTML, display

        passed, self.shown = time.time() - self.begun, time.time()
        left = f"{passed * (self.total / done - 1):.0f} s left" if done < self.total else f"{passed:.0f} s"
        bar = HTML(f'{self.title} <progress value="{done}" max="{self.total}"></progress> {left}')
        if self.output is None:
            self.output = display(bar, display_id=True)
        else:
            self.output.update(bar)


class ShowProgress(keras.callbacks.Callback):
    """Shows the steps of a training by a `ProgressBar`."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(self, logs=None):
        self.bar = ProgressBar(self.title, self.params["epochs"] * self.params["steps"])

    def on_epoch_begin(self, epoch, logs=None):
        self.earlier = epoch * self.params["steps"]

    def on_train_batch_end(self, batch, logs=None):
        self.bar.advance(self.earlier + batch + 1)


class EpochLines(keras.callbacks.Callback):
    """Prints what an epoch has brought, in a line: of the first, the last, and at most one each ten seconds.

    Args:
        small: so many epochs see small crops, see `ProgressiveCrops`, and take less time than the others.
    """

    def __init__(self, small: int = 0):
        super().__init__()
        self.small = small

    def on_train_begin(self, logs=None):
        self.printed = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.time()

    def on_epoch_end(self, epoch, logs=None):
        last, now = self.params["epochs"], time.time()
        if epoch + 1 < last and now < self.printed + 10:
            return
        self.printed, splits = now, {"train": "", "calibration": "val_"}
        told = [f"{name} {logs[f'{k}accuracy']:.1%}, loss {logs[f'{k}loss']:.3f}" for name, k in splits.items()]
        print(f"Epoch {epoch + 1}/{last}: {'; '.join(told)}; {now - self.begun:.1f} s", flush=True)
        if epoch == 0:
            work = [SMALL_CROP**2 if i < self.small else 1.0 for i in range(last)]
            if (minutes := (now - self.begun) * sum(work[1:]) / work[0] / 60) > 2:
                print(f"About {minutes:.0f} more minutes.", flush=True)


class AlternatingFlip(keras.callbacks.Callback):
    """Tells the augmentation which epoch it is, so that it mirrors each image in every second one."""

    def __init__(self, augmentation: RandomFlipCrop):
        super().__init__()
        self.augmentation = augmentation

    def on_epoch_begin(self, epoch, logs=None):
        self.augmentation.epoch.assign(epoch)


class ProgressiveCrops(keras.callbacks.Callback):
    """Lets the first epochs see a random three quarters of each image's height and width, the others all of it.

    A network that ends in a mean over its area takes images of any size, and what it learns of their parts first,
    at half of the work, serves it in the whole. Source: progressive learning (Tan & Le 2021, section 4.2), which
    shrinks the images instead.
    """

    def __init__(self, augmentation: RandomFlipCrop, epochs: int):
        super().__init__()
        self.augmentation, self.epochs = augmentation, epochs

    def on_epoch_begin(self, epoch, logs=None):
        self.augmentation.crop_fraction.assign(SMALL_CROP if epoch < self.epochs else 1.0)


class RestoreBestWeights(keras.callbacks.Callback):
    """Puts back the weights of the epoch with the best accuracy on the calibration split (the later of equals)."""

    def on_train_begin(self, logs=None):
        self.best, self.weights, self.epoch = -1.0, None, 0

    def on_epoch_end(self, epoch, logs=None):
        if logs["val_accuracy"] >= self.best:
            self.best, self.weights, self.epoch = logs["val_accuracy"], self.model.get_weights(), epoch + 1

    def on_train_end(self, logs=None):
        if self.weights is not None:
            self.model.set_weights(self.weights)
            print(f"Best on the calibration split: {self.best:.1%} after epoch {self.epoch}; its weights are kept.")
