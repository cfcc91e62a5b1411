"""The planned and the measured memory of a model under a cap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from corematching.errors import MemoryCapError
from corematching.report import MemoryReport
from corematching.sizes import format_size


@dataclass
class MemoryPlan:
    """The memory plan of a model under a cap, in bytes.

    Attributes
    ----------
    cap : int
        The cap.
    resident : int
        Weights that stay in memory: all but the FFNs of the layers with chosen neurons.
    slots : int
        Buffers for two layers' weights, for the prompt.
    chosen : int
        The chosen neurons of one sample.
    """

    cap: int
    resident: int
    slots: int
    chosen: int

    def check(self, samples: int = 1, cache: int = 0, work: int = 0) -> int:
        """The bytes that a prompt needs.

        Parameters
        ----------
        samples : int
            Samples of the batch; each chooses its own neurons.
        cache : int
            Bytes of keys and values.
        work : int
            Bytes of the largest layer's activations.

        Raises
        ------
        MemoryCapError
            They exceed the cap; the message lists the parts and ways to lower them.
        """
        chosen = samples * self.chosen
        need = self.resident + self.slots + chosen + cache + work
        if need <= self.cap:
            return need
        parts = {
            "weights that stay": self.resident,
            "two layers on their way": self.slots,
            f"chosen neurons of {samples} sample(s)": chosen,
            "KV cache": cache,
            "the prompt's work": work,
        }
        listed = ", ".join(f"{format_size(n)} {name}" for name, n in parts.items() if n)
        raise MemoryCapError(
            f"{format_size(need)} do not fit under memory={format_size(self.cap)} ({listed}): "
            + self._advice(need, chosen, cache + work)
        )

    def _advice(self, need: int, chosen: int, prompt: int) -> str:
        excess = need - self.cap
        hints = [f"raise the cap to at least {format_size(need)}"]
        if excess < chosen:
            ratio = 1 - excess / chosen
            hints.append(f"keep at most {ratio:.0%} of as many neurons (a lower ratio)")
        hints.append("leave fewer end layers dense")
        if prompt:
            hints.append("ask with fewer samples or a shorter prompt")
        return ", ".join(hints) + ", or load the model in a smaller dtype"


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, without meta tensors; the same tensor counts once."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        if not tensor.is_meta:
            seen.setdefault(id(tensor), tensor.numel() * tensor.element_size())
    return sum(seen.values())


@dataclass
class MemoryUse:
    """The memory of one run.

    Attributes
    ----------
    plan : MemoryPlan
        The model's plan.
    planned : int
        Bytes that the prompt needs by this plan.
    cache : int
        Estimated bytes of keys and values.
    streamed_before, streamed : int
        Bytes streamed before the run, and by the run.
    chosen : int
        Bytes of copied neurons.
    peak : int
        Measured peak in bytes.
    """

    plan: MemoryPlan
    planned: int
    cache: int
    streamed_before: int
    streamed: int = 0
    chosen: int = 0
    peak: int = 0

    def report(self) -> MemoryReport:
        """The memory section of the report."""
        return MemoryReport(
            cap_bytes=self.plan.cap,
            resident_bytes=self.plan.resident,
            slot_bytes=self.plan.slots,
            chosen_bytes=self.chosen,
            cache_bytes=self.cache,
            planned_bytes=self.planned,
            streamed_bytes=self.streamed,
            peak_bytes=self.peak,
        )
