"""Curves out of a board's methods."""

from __future__ import annotations

import pytest

from corematching.evaluate.plot import draw_curves, group_curves, name_curve


def entry(method: str, tokens: float, neurons: float, accuracy: float) -> dict:
    return {
        "method": method,
        "tokens_kept": {"mean": tokens, "p5": tokens, "p95": tokens},
        "neurons_kept": neurons,
        "accuracy": {"value": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.01},
    }


ENTRIES = [
    entry("dense", 1, 1, 0.9),
    entry("ours:keep=0.3", 0.3, 0.6, 0.88),
    entry("ours:keep=0.1", 0.1, 0.6, 0.8),
    entry("random:keep=0.1,beta=1", 0.1, 1, 0.5),
]


@pytest.mark.parametrize(
    ("text", "share", "name"),
    [
        ("ours", "tokens_kept", "ours"),
        ("ours:keep=0.3", "tokens_kept", "ours"),
        ("ours:keep=0.3,beta=1", "tokens_kept", "ours:beta=1"),
        ("ours:keep=0.3,beta=1", "neurons_kept", "ours:keep=0.3"),
        ("ours:layer=[2,6], keep=0.3", "tokens_kept", "ours:layer=[2,6]"),
        ("ours:keep_ratio=0.3,neurons=top(0.4)", "tokens_kept", "ours:neurons=top(0.4)"),
        ("ours:keep_tokens=9,neurons=top(0.4)", "neurons_kept", "ours:keep_tokens=9,neurons=top"),
        (
            "ours:neurons=gate(0.5,among=top(ratio=0.4,dense_first=2))",
            "neurons_kept",
            "ours:neurons=gate(0.5,among=top(dense_first=2))",
        ),
        (
            "ours:budget=knee(max_ratio=0.5,strict=false)",
            "tokens_kept",
            "ours:budget=knee(strict=false)",
        ),
        ("cats:active_ratio=0.5,token_set=all", "neurons_kept", "cats:token_set=all"),
        (
            '{"name": "fastv", "keep_ratio": 0.5}',
            "tokens_kept",
            '{"name": "fastv", "keep_ratio": 0.5}',
        ),
    ],
)
def test_names(text, share, name):
    assert name_curve(text, share) == name


def test_one_curve_for_each_method():
    curves = group_curves(ENTRIES[1:], "tokens_kept")
    assert list(curves) == ["ours", "random:beta=1"]
    assert curves["ours"][0] == pytest.approx((10, 80, 2, 1))
    assert [point[0] for point in curves["ours"]] == pytest.approx([10, 30])


def test_what_keeps_all_has_no_place_on_the_axis():
    assert group_curves(ENTRIES[-1:], "neurons_kept") == {}


def test_what_only_moves_along_the_other_axis_has_no_place():
    fixed = [entry(f"ours:keep={keep}", keep, 0.6, 0.8) for keep in (0.1, 0.2)]
    moved = [entry(f"ours:keep=0.1,beta={beta}", 0.1, beta, 0.7) for beta in (0.4, 0.6)]
    alone = entry("theirs:keep=0.1", 0.1, 0.5, 0.6)
    assert list(group_curves([*fixed, alone], "neurons_kept")) == ["theirs:keep=0.1"]
    assert list(group_curves([*fixed, alone], "tokens_kept")) == ["ours", "theirs"]
    assert list(group_curves([*moved, alone], "tokens_kept")) == ["theirs"]
    assert len(group_curves(moved, "neurons_kept")["ours:keep=0.1"]) == 2


def test_a_method_with_its_own_amounts_stands_for_those_that_moved_elsewhere():
    plain = entry("ours", 0.3, 0.6, 0.9)
    moved = entry("ours:keep=0.2", 0.2, 0.6, 0.8)
    curves = group_curves([plain, moved], "neurons_kept")
    assert list(curves) == ["ours"]
    assert [point[1] for point in curves["ours"]] == pytest.approx([90])


@pytest.mark.parametrize("entries", [ENTRIES, ENTRIES[:1]])
def test_a_picture_comes_out(tmp_path, entries):
    draw_curves(entries, "neurons_kept", tmp_path / "a.png", "SceneVLM")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
