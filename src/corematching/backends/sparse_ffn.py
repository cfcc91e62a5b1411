"""FFNs that compute only the chosen neurons in decode steps.

`SparseFFN` replaces the forward of one FFN on its instance. Prompts run through the original
forward. Decode steps read the chosen neurons' weights only: their rows of the dense weights where a
kernel reads them in place, else compact copies. Neurons are never masked.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corematching.backends.buffers import count_sets, refill
from corematching.backends.choice_checks import check_materialized, check_neurons, limits_of
from corematching.backends.kernels import (
    CompactWeights,
    FFNWeights,
    IndexedKernel,
    NeuronSets,
    Thresholds,
    copy_neurons,
    find_kernel,
    sparse_ffn,
)
from corematching.errors import ConfigError, InputError
from corematching.model.ffn import FFNParts
from corematching.model.hooks import may_run_late
from corematching.model.patching import Patches
from corematching.protocol import NeuronChoice

log = logging.getLogger(__name__)


def no_gate(mlp: nn.Module) -> str:
    """The message for thresholds of the gate and an FFN without one."""
    return (
        f"{type(mlp).__name__} has no gate to compare with a threshold: use a method without a "
        "rule on the gate, such as CoreMatching(neurons=TopNeurons()), or a policy that gives "
        "output_threshold, such as TEAL()"
    )


class SparseFFN:
    """An FFN with all neurons for prompts, and only the chosen ones for decode steps.

    Parameters
    ----------
    mlp : nn.Module
        ``act(gate(x)) * up(x)`` or ``act(up(x))``, then ``down``; gate and up may be one fused
        linear layer (gate first), and every linear layer may have a bias.
    count : int
        Neurons of each choice, in [1, width].
    in_place : bool
        Whether to use a kernel that reads the dense weights in place, if there is one. It needs
        the down projection stored by neuron: `install` changes the layout, `remove` restores it.

    Attributes
    ----------
    active : bool
        Whether decode steps now run on the chosen neurons.
    count : int
        Neurons of each choice.
    checked : NeuronChoice or None
        The last choice that `check_materialized` has checked.
    plan : Any
        The choice as the kernel prepared it; None where compact copies are used.

    Raises
    ------
    ConfigError
        ``count`` is out of range.
    UnsupportedModelError
        The weights cannot be gathered, or the FFN computes something else.
    """

    def __init__(self, mlp: nn.Module, count: int, in_place: bool = False) -> None:
        self.mlp, self.parts = mlp, FFNParts(mlp)
        self.active = False
        self.count = count
        self.plan: Any = None
        self._kernel: IndexedKernel | None = None
        self._in_place = in_place
        self._warned = False
        self._patches = Patches()
        self._original: Callable[..., Tensor] = mlp.forward
        self._sets: NeuronSets | None = None
        self._rows: FFNWeights | None = None
        self._weights: CompactWeights | None = None
        self._copied = False
        self._batch = 1
        self._bias: Tensor | None = None
        self._limits: Thresholds = Thresholds()
        self._taken: NeuronChoice | None = None
        self.checked: NeuronChoice | None = None
        if not 1 <= count <= self.width:
            raise ConfigError(
                f"an FFN of {self.width} neurons cannot keep {count}: "
                f"choose a count from 1 to {self.width}"
            )
        self.check()

    @property
    def kernel_name(self) -> str:
        """The name of the kernel that reads the weights in place; empty where there is none."""
        return "" if self._kernel is None else self._kernel.name

    @property
    def runs_uncounted(self) -> bool:
        """Whether decode steps run on a kernel that does not count the bytes it reads."""
        return self.active and self.plan is not None and not hasattr(self.plan, "bytes_read")

    @property
    def is_fixed(self) -> bool:
        """Whether decode steps use tensors with stable addresses until the next choice."""
        if self.active and self.plan is not None:
            return self._kernel is not None and self._kernel.traceable
        return not self.active or self._copied

    @property
    def addresses(self) -> tuple[int, ...]:
        """The addresses of the tensors that decode steps read, to validate captured code."""
        holders: list[Any] = [self.plan, self._rows] if self.plan else [self._weights, self._limits]
        tensors = [x for holder in holders if holder for x in vars(holder).values()]
        pointers = [x.data_ptr() for x in [*tensors, self._bias] if isinstance(x, Tensor)]
        return (int(self.active), *pointers)

    @property
    def taken(self) -> NeuronChoice | None:
        """The choice that the next `gather` activates, or None."""
        return self._taken

    @property
    def width(self) -> int:
        """F, the intermediate neurons of the dense FFN."""
        return self.parts.width

    def install(self) -> None:
        """Replace the FFN's forward on its instance."""
        self._original = self.mlp.forward
        self._patches.wrap(self.mlp, "forward", lambda _, *args, **kw: self.forward(*args, **kw))
        if self._in_place:
            self._choose_kernel()

    def remove(self) -> None:
        """Put the FFN's own forward and the layout of its weights back; free the copies."""
        self._patches.undo()
        self.clear()
        self._weights = self._bias = self._rows = self.plan = self._kernel = None

    def check(self) -> None:
        """Compare the weights as found with the FFN's own forward; see `FFNParts.check`."""
        self.parts.check()

    def weights_present(self) -> AbstractContextManager[None]:
        """A context in which all neurons' weights are in memory; here they always are."""
        return nullcontext()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, d) to (B, T, d), on the chosen neurons where T is 1 and a choice is set."""
        if not self.active or x.dim() != 3 or x.shape[1] != 1:
            return self._original(x, *args, **kwargs)
        self.check_batch(x.shape[0])
        if self.plan is not None and self._runs_in_place(x):
            assert self._kernel is not None and self._rows is not None
            return self._kernel.run(x[:, 0], self._rows, self.plan)[:, None]
        if not self._copied:
            self._copy_neurons()
        weights = self._weights
        assert weights is not None
        out = sparse_ffn(x[:, 0], weights, self._bias, self.parts.activation, self._limits)
        return out[:, None]

    def take(self, choice: NeuronChoice) -> None:
        """Take a choice; the FFN is dense until the next `gather` activates it.

        Raises
        ------
        ConfigError
            See `check_choice`.
        """
        if choice.indices is not None:
            self.check_choice(choice)
        self.clear()
        limited = any(x is not None for x in limits_of(choice))
        if self.count < self.width or choice.later or limited:
            self._taken = choice

    def gather(self, copies: bool = False) -> None:
        """Activate the choice that was taken: decode steps run on its neurons from now on.

        Neighbouring samples with equal choices share one copy (beams, one choice for all). A choice
        of every neuron leaves the FFN dense. Does nothing without a new choice.

        Parameters
        ----------
        copies : bool
            Also make compact copies where a kernel reads the weights in place, for compiled code;
            unless that kernel runs in compiled code too.
        """
        if self._taken is not None:
            check_materialized([self])
            choice, self._taken, self.checked = self._taken, None, None
            assert choice.indices is not None
            with torch.inference_mode(False), torch.no_grad():
                self._materialize(choice.indices, choice)
            self.active = True
            self._warn_of_hooks()
        copies = copies and not (self._kernel is not None and self._kernel.traceable)
        if self.active and not self._copied and (copies or self.plan is None):
            self._copy_neurons()

    def _warn_of_hooks(self) -> None:
        """Warn once that decode steps do not call hooks on the linear layers."""
        hooked = any(x._forward_hooks or not may_run_late(x) for x in self.parts.list_linears())
        if hooked and not self._warned:
            self._warned = True
            log.warning(
                "hooks on the linear layers of %s are called for prompts only: decoding computes "
                "the chosen neurons without calling these layers",
                type(self.mlp).__name__,
            )

    def check_choice(self, choice: NeuronChoice) -> None:
        """Check a choice for this FFN; see `check_neurons`.

        Raises
        ------
        ConfigError
            A shape or a dtype is wrong, the indices do not ascend in [0, width), or the choice has
            a gate threshold and the FFN has no gate.
        """
        check_neurons(choice, self.count, self.width)
        if choice.gate_threshold is not None and not self.parts.gated:
            raise ConfigError(no_gate(self.mlp))

    def check_batch(self, batch: int) -> None:
        """Check that ``batch`` rows are a multiple of the choice's samples.

        Raises
        ------
        InputError
            They are not.
        """
        if batch % self._batch:
            raise InputError(
                f"neurons were chosen for {self._batch} samples, and tokens of {batch} rows do not "
                "fit: decode as many rows as the prompt had, or change the cache's rows with "
                "cache.batch_select_indices() or cache.batch_repeat_interleave()"
            )

    def clear(self) -> None:
        """Make the FFN dense until the next choice; keeps the buffers for reuse."""
        self.active, self._taken = False, None

    def bytes_read(self, batch: int) -> int:
        """Bytes of weights that one decode step of ``batch`` samples reads; waits for the device.

        In place, the union of the samples' rows is read once, an upper bound under thresholds. Of
        compact copies, each shared set of neurons is read once.
        """
        if not self.active or self._sets is None:
            dense = [*self.parts.dense().values(), self.parts.down.bias]
            return sum(p.numel() * p.element_size() for p in dense if p is not None)
        sets, count = self._sets.indices.shape
        if self.runs_uncounted and sets > 1:
            width = self.width
            chosen = torch.zeros(width, dtype=torch.bool, device=self._sets.indices.device)
            sets, count = 1, int(chosen.index_fill(0, self._sets.indices.flatten(), True).sum())
        row = self.parts.down.out_features
        size = self.parts.down.weight.element_size()
        each = sum(
            (row if tensor.dim() == 2 else 1) * count for tensor in self.parts.dense().values()
        )
        bias = 0 if self._bias is None else self._bias.shape[1] * min(batch, self._bias.shape[0])
        return (each * min(batch, sets) + bias) * size

    def bytes_counted(self) -> int:
        """Bytes of weights that the kernel has read so far, by its own counter; 0 without one."""
        count = getattr(self.plan, "bytes_read", None)
        return 0 if count is None else count()

    def _choose_kernel(self) -> None:
        """Find the kernel for these weights, and store the down projection in its layout."""
        rows = self.parts.by_neuron()
        down = rows.down_t
        rows = dataclasses.replace(rows, down_t=down.new_empty(0).expand(0, 0))
        self._kernel = find_kernel(rows)
        if self._kernel is not None and not self.parts.down.weight.t().is_contiguous():
            self._patches.then(self.parts.store_down_as_usual)
            self.parts.store_down_by_neuron()

    def _runs_in_place(self, x: Tensor) -> bool:
        """Whether the kernel supports this decode step."""
        kernel, sets = self._kernel, self._sets
        if kernel is None or sets is None or (torch.is_grad_enabled() and x.requires_grad):
            return False
        if torch.compiler.is_compiling():
            return kernel.traceable
        fits = kernel.max_batch is None or x.shape[0] <= kernel.max_batch
        return fits and x.dtype == self.parts.down.weight.dtype

    def _materialize(self, indices: Tensor, choice: NeuronChoice) -> None:
        """Turn a choice into sets of neurons, and prepare the kernel with them."""
        device = self.parts.down.weight.device
        limits = [None if x is None else x.to(device, torch.float32) for x in limits_of(choice)]
        indices = indices.to(device)
        self._batch = indices.shape[0]
        step = indices.shape[0] // count_sets([indices, *(x for x in limits if x is not None)])
        own = (None if x is None else x[::step] for x in limits)
        self._limits = Thresholds(
            *(
                None if x is None else refill(old, x)
                for old, x in zip(_fields(self._limits), own, strict=True)
            )
        )
        self._fold(choice.mean)
        self._sets = NeuronSets(indices[::step], self._bias, self._limits)
        self._copied = False
        self.plan, previous = None, self.plan
        if self._kernel is not None:
            self._rows = self.parts.by_neuron()
            if self._kernel.why_unsupported(self._rows) is None:
                self.plan = self._kernel.prepare(self._rows, self._sets, previous)

    def _copy_neurons(self) -> None:
        """Fill the buffers of compact copies, in place where their shapes match."""
        assert self._sets is not None
        with torch.inference_mode(False), torch.no_grad():
            self._weights = copy_neurons(self.parts.dense(), self._sets.indices, self._weights)
        self._copied = True

    def _fold(self, mean: Tensor | None) -> None:
        """Fold means of dropped neurons, (B, F) or None, into one bias vector per sample."""
        down = self.parts.down
        if mean is None:
            bias = self.parts.bias()
        else:
            bias = F.linear(mean.to(down.weight), down.weight, down.bias)
        self._bias = None if bias is None else refill(self._bias, bias)


def _fields(limits: Thresholds) -> tuple[Tensor | None, ...]:
    return limits.input, limits.gate, limits.output
