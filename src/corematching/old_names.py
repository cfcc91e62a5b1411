"""Parameter names of version 0.1, read for one version more, each with an `OldNameWarning`.

`RENAMED` is the table. The flat parameters of CoreMatching, which are grouped now, take the
function `group`. Removing this file and its two callers in ``policies.component`` ends them all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

from corematching.errors import ConfigError

Params = dict[str, Any]
Group = Callable[[Params, Collection[str]], tuple[str, Params]]

AMOUNT, LEAST, MOST = "keep_*", "min_*", "max_*"
"""``*`` is ``ratio`` for a float and ``tokens`` for an int, which one old parameter told apart."""
TOP, SET = {"rho": "top_ratio", "share": "top_ratio"}, {"over": "token_set"}
KEEP, RATIO, ACTIVE = {"keep": AMOUNT}, {"beta": "neuron_ratio"}, {"beta": "active_ratio"}
ANY = "*"

RENAMED: dict[tuple[str, str], dict[str, str]] = {
    ("token score", "core-overlap"): TOP | SET | {"beta": "core_ratio"},
    ("token score", "text-overlap"): TOP | SET,
    ("token score", "token-overlap"): TOP,
    ("token score", "stride"): {"first": AMOUNT},
    ("token score", "divprune"): {"first": AMOUNT},
    ("token score", "cdpruner"): SET | {"first": AMOUNT},
    ("neuron score", "coreinfer"): TOP | SET,
    ("neuron score", "griffin"): SET,
    ("neuron score", "magnitude"): TOP | SET,
    ("neuron score", "output-weighted"): SET,
    ("neuron score", "paper"): TOP | SET,
    ("budget", "ratio"): {"ratio": "keep_ratio"},
    ("budget", "count"): {"tokens": "keep_tokens"},
    ("budget", ANY): {"floor": LEAST, "ceiling": MOST},
    ("neuron schedule", "uniform"): {"share": "ratio"},
    ("neuron schedule", "dense-ends"): {"share": "ratio"},
    ("neuron schedule", "per-layer"): {"layer_shares": "layer_ratios"},
    ("token policy", "visionzip-rule"): KEEP,
    ("token policy", "prumerge-rule"): KEEP,
    ("neuron policy", "teal-rule"): ACTIVE | SET,
    ("neuron policy", "cats-rule"): ACTIVE | SET,
    ("method", "fastv"): KEEP,
    ("method", "pyramiddrop"): KEEP,
    ("method", "sparsevlm"): KEEP,
    ("method", "visionzip"): KEEP,
    ("method", "prumerge"): KEEP,
    ("method", "divprune"): KEEP,
    ("method", "cdpruner"): KEEP,
    ("method", "projection"): KEEP,
    ("method", "stride"): KEEP,
    ("method", "random"): KEEP | RATIO,
    ("method", "oracle"): KEEP | RATIO,
    ("method", "coreinfer"): RATIO | {"rho": "top_ratio"},
    ("method", "griffin"): RATIO,
    ("method", "teal"): ACTIVE | SET,
    ("method", "cats"): ACTIVE | SET,
}


class OldNameWarning(DeprecationWarning):
    """A parameter has a name of version 0.1; the next version does not know it."""


def modernize(kind: str, name: str, params: Params, known: Collection[str]) -> tuple[str, Params]:
    """The present name and parameters of a component that was described in the old ones.

    Parameters
    ----------
    kind, name : str
        Of the component.
    params : dict
        As they were given.
    known : collection of str
        The component's present parameters; an old name among them keeps its present meaning.

    Returns
    -------
    (str, dict)
        ``params`` itself where no old name is in it.

    Raises
    ------
    ConfigError
        An old parameter and its present one are both given.
    """
    if (kind, name) in GROUPED:
        new_name, made = GROUPED[kind, name](params, known)
    else:
        table = RENAMED.get((kind, ANY), {}) | RENAMED.get((kind, name), {})
        new_name, made = name, rename(params, table, known)
    if made is params:
        return name, params
    old = [f"{key}={value!r}" for key, value in params.items() if key not in known]
    now = ", ".join(f"{key}={show(value)}" for key, value in made.items() if key not in params)
    warnings.warn(
        f"{name}: {', '.join(old)} is written {new_name}: {now or 'without it'} now; the old names "
        "end with the next version",
        OldNameWarning,
        stacklevel=3,
    )
    return new_name, made


def rename(params: Params, table: Mapping[str, str], known: Collection[str]) -> Params:
    """Parameters with the table's old names replaced; ``params`` itself where there is none."""
    if not any(key in table and key not in known for key in params):
        return params
    made: Params = {}
    for key, value in params.items():
        new = table.get(key, key) if key not in known else key
        if new.endswith("*"):
            if value is None:
                continue
            new = new[:-1] + unit_of(value)
        if new in made or (new != key and new in params):
            raise ConfigError(f"{key} and {new} are the same parameter: give {new} alone")
        made[new] = value
    return made


def unit_of(amount: Any) -> str:
    """``ratio`` or ``tokens``, by the type of an old amount, or of several."""
    items = amount if isinstance(amount, list | tuple) else [amount]
    units = {"ratio" if isinstance(item, float) else "tokens" for item in items}
    if len(units) != 1:
        raise ConfigError(f"{amount!r} mixes ratios and counts: give keep_ratio or keep_tokens")
    return units.pop()


def show(value: Any) -> str:
    """A value as Python or the command writes it, components as ``name(param=value)``."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}={show(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']}({inner})"
    return repr(value)


FLAT: Params = {
    "token_score": "text-overlap",
    "neuron_score": "griffin",
    "rho": 0.2,
    "over": "all",
    "beta": 1.0,
    "layer": None,
    "keep": 0.3,
    "taper": 0.5,
    "cover": 0.9,
    "proportional": True,
    "floor": None,
    "ceiling": None,
    "dense_first": 4 / 32,
    "dense_last": 3 / 32,
    "compensate": True,
    "multiple": 8,
    "firing": 0.6,
}
"""Version 0.1's parameters of CoreMatching, with their defaults."""
FLAT_PAPER: Params = FLAT | {
    "token_score": "core-overlap",
    "neuron_score": "paper",
    "beta": 0.4,
    "layer": 6 / 32,
    "keep": None,
    "cover": 0.0,
    "proportional": False,
    "dense_first": 6 / 32,
    "dense_last": 5 / 32,
    "compensate": False,
    "multiple": 1,
    "firing": None,
}
SIDE = ("layer", "taper", "cover", "proportional")
"""Flat parameters of the tokens that keep their names."""
OLD_TOKENS = ("token_score", "keep", "floor", "ceiling")
NEW_TOKENS = ("score", "keep_ratio", "keep_tokens", "budget")
SAME_NEURONS = ("dense_first", "dense_last", "compensate", "multiple")
"""Flat parameters of the neurons that TopNeurons has under the same names."""
OLD_NEURONS = ("neuron_score", "over", "beta", "firing", *SAME_NEURONS)
FEW = 0.2
"""Version 0.1 dropped a smaller ratio than this in three stages, where no layer was given."""


def group_default(params: Params, known: Collection[str]) -> tuple[str, Params]:
    """CoreMatching's flat parameters, grouped."""
    if not any(key in FLAT and key not in known for key in params):
        return "corematching", params
    return "corematching", group(params, FLAT, whole=False)


def group_paper(params: Params, known: Collection[str]) -> tuple[str, Params]:
    """Those of the paper's preset; what is not the paper's rule any more is a CoreMatching."""
    if not any(key in FLAT and key not in known for key in params):
        return "paper", params
    table = {"keep": AMOUNT, "beta": "neuron_ratio", "rho": "top_ratio"}
    if set(params) <= known | table.keys() and not several_kinds(params.get("keep")):
        return "paper", rename(params, table, known)
    return "corematching", group(params, FLAT_PAPER, whole=True)


def several_kinds(amount: Any) -> bool:
    """Whether an old amount holds ratios as well as counts."""
    items = amount if isinstance(amount, list | tuple) else [amount]
    return len({type(item) for item in items}) > 1


def group(params: Params, defaults: Params, whole: bool) -> Params:
    """Grouped parameters that choose as the flat ones did.

    Parameters
    ----------
    params : dict
        As they were given; present names among them stay.
    defaults : dict
        Of the parameters that are not given.
    whole : bool
        Whether the defaults are others than CoreMatching's own, so that all have to be stated.
    """
    flat = defaults | {key: value for key, value in params.items() if key in FLAT}
    stated = set(FLAT) if whole else set(params)
    made = {key: value for key, value in params.items() if key not in FLAT}
    clash(params, made, OLD_TOKENS, NEW_TOKENS)
    clash(params, made, OLD_NEURONS, ("neurons",))
    if made.keys() & set(NEW_TOKENS):
        made |= {key: params[key] for key in SIDE if key in params}
    else:
        made |= group_tokens(flat, stated)
    if whole or stated & {*OLD_NEURONS, "rho"}:
        made.setdefault("neurons", group_neurons(flat, stated))
    return made


def clash(params: Params, made: Params, old: Collection[str], new: Collection[str]) -> None:
    """Refuse old names beside the present ones that stand for the same."""
    olds, news = [key for key in old if key in params], [key for key in new if key in made]
    if olds and news:
        raise ConfigError(f"{olds[0]} is an old name, {news[0]} a new one: use new names only")


def group_tokens(flat: Params, stated: Set[str]) -> Params:
    """Score, amount and layers; what did nothing is left out."""
    score = flat["token_score"]
    if score is None:
        return {"score": None}
    made: Params = {key: flat[key] for key in SIDE if key in stated}
    named = {"top_ratio": ("rho", "share", "top_ratio"), "core_ratio": ("beta", "core_ratio")}
    if isinstance(score, str) and stated & {"token_score", "rho"}:
        score = describe("token score", score, {"rho": flat["rho"], "beta": flat["beta"]}, named)
    if "token_score" in stated or isinstance(score, dict):
        made["score"] = score
    keep, layer = flat["keep"], flat["layer"]
    few = layer is None and isinstance(keep, float) and keep < FEW
    stages = len(layer) if isinstance(layer, list | tuple) else 3 if few else 1
    if keep is None or stages == 1 or isinstance(keep, list | tuple):
        made.pop("taper", None)
    bounds = rename({k: flat[k] for k in ("floor", "ceiling")}, RENAMED["budget", ANY], ())
    if keep is None:
        cover = made.pop("cover", flat["cover"])
        return made | {"budget": {"name": "knee", "cover": cover, **bounds}}
    if bounds or several_kinds(keep):
        made.pop("taper", None)
        cover = made.pop("cover", flat["cover"])
        amounts = list_amounts(keep, flat["taper"], stages)
        budgets = [budget(amount, cover, bounds) for amount in amounts]
        return made | {"budget": budgets if len(budgets) > 1 else budgets[0]}
    return made | ({f"keep_{unit_of(keep)}": keep} if "keep" in stated else {})


def list_amounts(keep: Any, taper: float, stages: int) -> list[Any]:
    """The amount of each stage."""
    if isinstance(keep, list | tuple):
        return list(keep)
    factors = [taper**stage / taper ** (stages - 1) for stage in range(stages)]
    if isinstance(keep, float):
        return [min(1.0, keep * factor) for factor in factors]
    return [round(keep * factor) for factor in factors]


def budget(amount: Any, cover: float, bounds: Params) -> Params:
    """A stage's budget."""
    name = "ratio" if isinstance(amount, float) else "count"
    return {"name": name, f"keep_{unit_of(amount)}": amount, "cover": cover, **bounds}


def group_neurons(flat: Params, stated: Set[str]) -> Any:
    """The rule for neurons; what did nothing is left out."""
    score, active = flat["neuron_score"], flat["firing"]
    if score is None:
        return None
    if active is not None and flat["beta"] == 1:
        return {"name": "gate", "active_ratio": active}
    if isinstance(score, str):
        named = {"top_ratio": ("rho", "share", "top_ratio"), "token_set": ("over", "token_set")}
        score = describe("neuron score", score, {"rho": flat["rho"], "over": flat["over"]}, named)
    core: Params = {"name": "top", "ratio": flat["beta"]}
    if stated & {"neuron_score", "over", "rho"}:
        core["score"] = score
    core |= {key: flat[key] for key in SAME_NEURONS if key in stated}
    return core if active is None else {"name": "gate", "active_ratio": active, "among": core}


def describe(kind: str, name: str, given: Params, named: Mapping[str, tuple[str, ...]]) -> Params:
    """A score by its name, with those of the flat parameters that it knows, under its own names."""
    from corematching.policies.component import find, parameters_of

    cls = find(kind, name)
    known = parameters_of(cls)
    made: Params = {"name": cls.name}
    for aliases in named.values():
        for key in set(aliases) & known.keys():
            made[key] = given[aliases[0]]
    return made


GROUPED: dict[tuple[str, str], Group] = {
    ("method", "corematching"): group_default,
    ("method", "paper"): group_paper,
}
