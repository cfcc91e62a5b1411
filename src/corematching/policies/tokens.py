"""Named sets of tokens, such as those that neurons are ranked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from corematching import devices
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
    present : dict
        By their values, masks of filler on the device.
    """

    most: dict[tuple[str, int], int] = field(default_factory=dict)
    rows: dict[str, tuple[Masks, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    present: dict[tuple[bytes, torch.device], Tensor] = field(default_factory=dict)


def select_tokens(view: PrefillView, token_set: str) -> Tensor:
    """The (B, T) bool mask of a set by its name in `TOKEN_SETS`."""
    known = find_on_host(view, token_set) if token_set in ("text", "question") else None
    return TOKEN_SETS[token_set](view) if known is None else upload(view, known)


def find_on_host(view: PrefillView, token_set: str) -> np.ndarray | None:
    """`select_tokens` from what the host knows of the view; None where it knows too little."""
    host = view.host
    if host is None or host.valid is None or host.image is None:
        return None
    if token_set in ("all", "image"):
        return host.valid if token_set == "all" else host.image
    if token_set not in ("text", "question"):
        return None
    text: np.ndarray = host.valid & ~host.image
    if token_set == "text":
        return text
    positions = np.arange(text.shape[1])
    last = np.where(host.image, positions, -1).max(1, keepdims=True)
    question = text & (positions > last)
    return np.where(question.any(1, keepdims=True), question, text)


def upload(view: PrefillView, values: np.ndarray) -> Tensor:
    """Values of the host on the view's device, which is not waited for."""
    return devices.upload(values, view.valid.device)


def list_chosen(view: PrefillView, token_set: str) -> tuple[Tensor, Tensor]:
    """`list_rows` of a set by its name, found once for all layers that see the same masks.

    A prompt's tokens are counted once for all its layers, since that waits for the device.
    """
    masks = view.valid, view.image, view.kept
    listed = view.recall(ListedTokens)
    known = listed.rows.get(token_set)
    if known is None or any(mask is not seen for mask, seen in zip(masks, known[0], strict=True)):
        known = listed.rows[token_set] = masks, _list(view, token_set, listed)
    return known[1]


def _list(view: PrefillView, token_set: str, listed: ListedTokens) -> tuple[Tensor, Tensor]:
    found = find_on_host(view, token_set)
    if found is not None:
        counts = found.sum(1, keepdims=True)
        most = int(counts.max(initial=0))
        rows = np.argsort(~found, axis=1, kind="stable")[:, :most]
        present = np.arange(most) < counts
        key = present.tobytes(), view.valid.device
        if key not in listed.present:
            listed.present[key] = upload(view, present)
        return upload(view, rows), listed.present[key]
    tokens = select_tokens(view, token_set)
    name = token_set, tokens.shape[1]
    if name not in listed.most:
        listed.most[name] = count_most(tokens)
    return list_rows(tokens, listed.most[name])


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
