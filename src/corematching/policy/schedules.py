"""How many neurons each layer keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.errors import ConfigError
from corematching.policy.amounts import count_of, layers_of
from corematching.policy.check import check_count, check_depth, check_share
from corematching.policy.component import Component


@dataclass(frozen=True, kw_only=True)
class Schedule(Component, kind="neuron schedule"):
    """Base class: override `shares`."""

    multiple: int = field(
        default=8,
        metadata={"help": "round the number of kept neurons to a multiple of this"},
    )

    def __post_init__(self) -> None:
        check_count("multiple", self.multiple)

    def shares(self, num_layers: int) -> tuple[float, ...]:
        """The share of neurons that each layer keeps, in (0, 1]; 1 leaves the layer dense."""
        raise NotImplementedError

    def average(self, num_layers: int) -> float:
        """The mean share over the layers."""
        return sum(self.shares(num_layers)) / num_layers

    def counts(self, num_layers: int, width: int) -> tuple[int, ...]:
        """The number of neurons that each layer keeps.

        The nearest multiple of ``multiple`` (half up), at least one multiple, at most ``width``.
        """
        return tuple(self._count(share, width) for share in self.shares(num_layers))

    def _count(self, share: float, width: int) -> int:
        if share == 1:
            return width
        exact = count_of(share, width)
        return min(
            width, max(1, (2 * exact + self.multiple) // (2 * self.multiple)) * self.multiple
        )


@dataclass(frozen=True)
class Uniform(Schedule, name="uniform"):
    """The same share in every layer."""

    share: float = field(default=0.4, metadata={"help": "share of neurons kept, in (0, 1]"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("share", self.share)

    def shares(self, num_layers: int) -> tuple[float, ...]:
        return (self.share,) * num_layers


@dataclass(frozen=True)
class DenseEnds(Schedule, name="dense-ends"):
    """The same share in every layer but the first and the last ones, which stay dense.

    CoreInfer (arXiv:2410.18311) thins out layers 6 to 26 of 32: ``first=6/32, last=5/32``.
    """

    share: float = field(default=0.4, metadata={"help": "share of neurons kept, in (0, 1]"})
    first: int | float = field(
        default=6 / 32, metadata={"help": "dense layers at the start: an int, or a share of depth"}
    )
    last: int | float = field(
        default=5 / 32, metadata={"help": "dense layers at the end: an int, or a share of depth"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("share", self.share)
        check_depth("first", self.first)
        check_depth("last", self.last)
        if isinstance(self.first, float) and isinstance(self.last, float):
            self._check_room(self.first + self.last < 1)

    def shares(self, num_layers: int) -> tuple[float, ...]:
        first, last = layers_of(self.first, num_layers), layers_of(self.last, num_layers)
        sparse = num_layers - first - last
        self._check_room(sparse > 0)
        return (1.0,) * first + (self.share,) * sparse + (1.0,) * last

    def _check_room(self, room: bool) -> None:
        if not room:
            raise ConfigError(
                f"first={self.first!r} and last={self.last!r} leave no layer to thin out: "
                "lower one of them"
            )


@dataclass(frozen=True)
class PerLayer(Schedule, name="per-layer"):
    """A share for each layer, such as shares that follow each layer's measured error."""

    layer_shares: tuple[float, ...] = field(
        default=(), metadata={"help": "one share in (0, 1] for each decoder layer"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer_shares", tuple(self.layer_shares))
        if not self.layer_shares:
            raise ConfigError("layer_shares is empty: give one share for each decoder layer")
        for layer, share in enumerate(self.layer_shares):
            check_share(f"layer_shares[{layer}]", share)

    def shares(self, num_layers: int) -> tuple[float, ...]:
        if len(self.layer_shares) != num_layers:
            raise ConfigError(
                f"layer_shares has {len(self.layer_shares)} entries, the model has {num_layers} "
                "decoder layers: give one for each"
            )
        return self.layer_shares
