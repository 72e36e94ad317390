"""What a checkpoint's record says, by layer and kind."""

from __future__ import annotations

from fewbit.report.record import bits_by_kind, by_kind, errors_by_kind, method, ranges, tables, tuning_gain


def test_errors_are_grouped_by_kind_and_ordered_by_layer():
    def entry(name: str, kind: str, error: float) -> dict:
        return {"name": name, "kind": kind, "format": "trellis", "relative_error": error}

    tensors = [
        entry("model.layers.10.mlp.up_proj.weight", "body", 0.3),
        entry("model.layers.2.mlp.up_proj.weight", "body", 0.2),
        entry("model.layers.2.self_attn.q_proj.weight", "body", 0.1),
        entry("model.embed_tokens.weight", "embed", 0.5),
        {"name": "model.layers.2.input_layernorm.weight", "kind": "plain", "format": ""},
    ]
    assert errors_by_kind(tensors) == {"up": [(2, 0.2), (10, 0.3)], "q": [(2, 0.1)]}


def test_experts_of_a_layer_count_as_their_mean_and_plain_linears_with_the_bits_they_take():
    def entry(name: str, bits: int, stored: str = "trellis") -> dict:
        return {"name": f"model.layers.{name}.weight", "kind": "body", "format": stored, "bits": bits,
                "bytes": 128, "weights": 64, "relative_error": 0.1 * bits}  # fmt: skip

    tensors = [
        entry("0.mlp.experts.0.down_proj", 2),
        entry("0.mlp.experts.1.down_proj", 4),
        entry("0.self_attn.o_proj", 0, ""),
        {"name": "lm_head.weight", "kind": "head", "format": "trellis", "bits": 4, "bytes": 1, "weights": 2},
    ]
    assert bits_by_kind(tensors) == {"down": [(0, 3.0)], "o": [(0, 16.0)]}
    assert list(errors_by_kind(tensors)) == ["down"]
    assert by_kind([], lambda entry: 1.0) == {}
    assert tables(tensors) == {"head": 4}


def test_runs_of_layers_with_equal_bits_are_joined():
    series = [(0, 3.0), (1, 3.0), (2, 4.0), (3, 3.0), (5, 3.0), (6, 3.0)]
    assert ranges(series) == [(3.0, [(0, 1), (3, 3), (5, 6)]), (4.0, [(2, 2)])]
    assert ranges([]) == []


def test_the_gain_of_tuning_is_the_best_look_and_absent_without_tuning():
    history = [{"step": 0, "held": 0.4}, {"step": 16, "held": 0.2}, {"step": 32, "held": 0.3}]
    report = {"rounded": 0.5, "steps": 32, "history": history}
    assert tuning_gain({"tuning": report}) == {"before": 0.5, "after": 0.2, "steps": 32}
    assert tuning_gain({}) is None


def test_options_are_told_in_words():
    trellis = {"format": "itq3_s", "code": "trellis", "bits": 3.25, "rounding": "ldlq", "calib_tokens": 4096,
               "calib_window": 32, "tune": True}  # fmt: skip
    tensors = [{"name": "a", "tokens": 64.0}, {"name": "b"}]
    words = "trellis, 3.25 bits, error feedback from 64 tokens in windows of 32, "
    assert method({"options": trellis, "tensors": tensors, "tuning": {"steps": 1}}) == words + "tuned"
    # A text too short to be tuned on.
    assert method({"options": trellis, "tensors": tensors}) == words + "not tuned"
    twin = {
        "format": "twinquant",
        "code": "twin",
        "rank": 8,
        "act_bits": 4,
        "bits": 4,
        "rounding": "nearest",
        "learn": True,
    }
    words = "twin, rank 8, inputs in 4 bits, 4 bits, rounded to nearest, not tuned"
    assert method({"options": twin, "tensors": [], "learning": {"steps": 1}}) == f"{words}, axes learned"
    assert "bits chosen for 800 MB" in method({"options": {"target_bytes": 800_000_000}, "tensors": []})
