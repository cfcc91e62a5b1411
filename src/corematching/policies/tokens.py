"""Named sets of tokens, such as those that neurons are ranked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corematching.policies.check import check_choice
from corematching.protocol import PrefillView


def select_question(view: PrefillView) -> Tensor:
    """(B, T) bool, the text after the last image token; all text where there is none."""
    positions = torch.arange(view.valid.shape[1], device=view.valid.device)
    last_image = torch.where(view.image, positions, -1).amax(1, keepdim=True)
    question = view.text & (positions > last_image)
    return torch.where(question.any(1, keepdim=True), question, view.text)


def select_kept(view: PrefillView) -> Tensor:
    """(B, T) bool, the tokens that go on to the last layer; all where none is dropped."""
    return view.valid if view.kept is None else view.valid & view.kept


TOKEN_SETS: dict[str, Callable[[PrefillView], Tensor]] = {
    "all": lambda view: view.valid,
    "kept": select_kept,
    "text": lambda view: view.text,
    "image": lambda view: view.image,
    "question": select_question,
}


Masks = tuple[Tensor, Tensor, Tensor | None]


@dataclass
class ListedTokens:
    """The token sets of one prompt, as far as they were listed.

    Attributes
    ----------
    most : dict
        By name and number of tokens present, the largest number of them in a sample.
    rows : dict
        By name, the view's masks and what `list_rows` gave for them.
    """

    most: dict[tuple[str, int], int] = field(default_factory=dict)
    rows: dict[str, tuple[Masks, tuple[Tensor, Tensor]]] = field(default_factory=dict)


def select_tokens(view: PrefillView, token_set: str) -> Tensor:
    """The (B, T) bool mask of a set by its name in `TOKEN_SETS`."""
    return TOKEN_SETS[token_set](view)


def list_chosen(view: PrefillView, token_set: str) -> tuple[Tensor, Tensor]:
    """`list_rows` of a set by its name, found once for all layers that see the same masks.

    A prompt's tokens are counted once for all its layers, since that waits for the device.
    """
    masks = view.valid, view.image, view.kept
    listed = view.recall(ListedTokens)
    known = listed.rows.get(token_set)
    if known is None or any(mask is not seen for mask, seen in zip(masks, known[0], strict=True)):
        tokens = select_tokens(view, token_set)
        key = token_set, tokens.shape[1]
        if key not in listed.most:
            listed.most[key] = count_most(tokens)
        known = listed.rows[token_set] = masks, list_rows(tokens, listed.most[key])
    return known[1]


def count_most(tokens: Tensor) -> int:
    """The largest number of tokens in a sample, of (B, T) bool; waits for the device."""
    counts = tokens.sum(1)
    return int(counts.max()) if counts.numel() else 0


def list_rows(tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The indices of some tokens, in their order.

    Parameters
    ----------
    tokens : Tensor
        (B, T) bool.
    most : int
        `count_most` of them.

    Returns
    -------
    rows : Tensor
        (B, R) long; R is ``most``.
    present : Tensor
        (B, R) bool, False on the filler behind a sample with fewer of them.
    """
    counts = tokens.sum(1, keepdim=True)
    rows = (~tokens).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return rows, torch.arange(most, device=tokens.device) < counts


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """The values (B, T, d) of some tokens, by their indices (B, R): (B, R, d)."""
    if len(rows) == 1:
        return values.index_select(1, rows[0])
    return values.gather(1, rows.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def check_token_set(token_set: str) -> None:
    """Check the name of a token set."""
    check_choice("token_set", token_set, TOKEN_SETS)
