"""A task whose images worker processes read and augment ahead of the steps, in passes over the data."""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Dataset

from ..run.loop import Amounts, Task
from ..run.schedules import Budget
from .image_batches import Batches, load_batches


class ReadAheadTask(Task):
    """What tasks of images share.

    Attributes:
        arguments: Of the run: `steps_of`, `eval_steps` and `dataloader_num_workers` are among them.
        accelerator: The processes that share it.
    """

    unit = "images"
    arguments: Any
    accelerator: Accelerator
    _batches: Iterator[Any] | None = None

    def amounts_of(self, images: int) -> Amounts:
        """How much a run does with this many training images."""
        arguments = self.arguments
        micro_batch = arguments.per_device_train_batch_size * self.accelerator.num_processes
        batch = micro_batch * arguments.gradient_accumulation_steps
        one_pass = max(1, round(images / batch))
        eval_steps = one_pass if arguments.eval_steps is None else arguments.eval_steps
        budget = Budget(steps=arguments.steps_of(images, batch))
        return Amounts(budget, micro_batch, arguments.gradient_accumulation_steps, eval_steps)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        assert self.amounts.budget.steps is not None
        return self.amounts.budget.steps

    @abstractmethod
    def training_examples(self) -> Dataset:
        """Batches of augmented images with their targets, by the places in the stream that they hold."""

    def micro_batches(self, position: int, micro_steps: int, step: int) -> Iterator[Any]:
        if self._batches is None:  # one loader, which reads ahead, from the first step on
            self._batches = self._load(step - 1)
        return islice(self._batches, micro_steps)

    def _load(self, first_step: int) -> Iterator[Any]:
        """This process's batches of each forward pass to the last step."""
        accelerator, arguments = self.accelerator, self.arguments
        rank, processes = accelerator.process_index, accelerator.num_processes
        size = arguments.per_device_train_batch_size
        keys = Batches(first_step, self.steps, self.amounts.accumulation, rank, processes, size)
        on_gpu = accelerator.device.type == "cuda"
        return iter(load_batches(self.training_examples(), keys, arguments.dataloader_num_workers, pin_memory=on_gpu))
