"""How many neurons each layer keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.errors import ConfigError
from corematching.policies.amounts import count_of, layers_of
from corematching.policies.check import check_count, check_depth, check_ratio
from corematching.policies.component import Component


@dataclass(frozen=True, kw_only=True)
class Schedule(Component, kind="neuron schedule"):
    """Base class: override `ratios`."""

    multiple: int = field(
        default=8,
        metadata={"help": "round the number of kept neurons to a multiple of this"},
    )

    def __post_init__(self) -> None:
        check_count("multiple", self.multiple)

    def ratios(self, num_layers: int) -> tuple[float, ...]:
        """The ratio of neurons that each layer keeps.

        Parameters
        ----------
        num_layers : int
            Decoder layers of the model.

        Returns
        -------
        tuple of float
            One per layer, in (0, 1]; 1 leaves the layer dense.

        Raises
        ------
        ConfigError
            The schedule does not fit a model of so many layers.
        """
        raise NotImplementedError

    def counts(self, num_layers: int, width: int) -> tuple[int, ...]:
        """The number of neurons that each layer keeps.

        The nearest multiple of ``multiple`` (half up), at least one multiple, at most ``width``.

        Parameters
        ----------
        num_layers : int
            Decoder layers of the model.
        width : int
            Neurons of each layer's FFN.
        """
        return tuple(self._count(ratio, width) for ratio in self.ratios(num_layers))

    def _count(self, ratio: float, width: int) -> int:
        if ratio == 1:
            return width
        exact = count_of(ratio, width)
        return min(
            width, max(1, (2 * exact + self.multiple) // (2 * self.multiple)) * self.multiple
        )


@dataclass(frozen=True)
class Uniform(Schedule, name="uniform"):
    """The same ratio in every layer."""

    ratio: float = field(default=0.4, metadata={"help": "ratio of neurons kept, in (0, 1]"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("ratio", self.ratio)

    def ratios(self, num_layers: int) -> tuple[float, ...]:
        return (self.ratio,) * num_layers


@dataclass(frozen=True)
class DenseEnds(Schedule, name="dense-ends"):
    """The same ratio in every layer but the first and the last ones, which stay dense.

    CoreInfer (arXiv:2410.18311) thins out layers 6 to 26 of 32: ``first=6/32, last=5/32``.
    """

    ratio: float = field(default=0.4, metadata={"help": "ratio of neurons kept, in (0, 1]"})
    first: int | float = field(
        default=6 / 32, metadata={"help": "dense layers at the start: an int, or a ratio of depth"}
    )
    last: int | float = field(
        default=5 / 32, metadata={"help": "dense layers at the end: an int, or a ratio of depth"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("ratio", self.ratio)
        check_depth("first", self.first)
        check_depth("last", self.last)
        if isinstance(self.first, float) and isinstance(self.last, float):
            self._check_room(self.first + self.last < 1)

    def ratios(self, num_layers: int) -> tuple[float, ...]:
        first, last = layers_of(self.first, num_layers), layers_of(self.last, num_layers)
        sparse = num_layers - first - last
        self._check_room(sparse > 0)
        return (1.0,) * first + (self.ratio,) * sparse + (1.0,) * last

    def _check_room(self, room: bool) -> None:
        if not room:
            raise ConfigError(
                f"first={self.first!r} and last={self.last!r} leave no layer to thin out: "
                "lower one of them"
            )


@dataclass(frozen=True)
class PerLayer(Schedule, name="per-layer"):
    """A ratio for each layer, such as ratios that follow each layer's measured error."""

    layer_ratios: tuple[float, ...] = field(
        default=(), metadata={"help": "one ratio in (0, 1] for each decoder layer"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer_ratios", tuple(self.layer_ratios))
        if not self.layer_ratios:
            raise ConfigError("layer_ratios is empty: give one ratio for each decoder layer")
        for layer, ratio in enumerate(self.layer_ratios):
            check_ratio(f"layer_ratios[{layer}]", ratio)

    def ratios(self, num_layers: int) -> tuple[float, ...]:
        if len(self.layer_ratios) != num_layers:
            raise ConfigError(
                f"layer_ratios has {len(self.layer_ratios)} entries, the model has {num_layers} "
                "decoder layers: give one for each"
            )
        return self.layer_ratios
