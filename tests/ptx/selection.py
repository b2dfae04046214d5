"""The tests of the kernels that `make test-ptx` runs in the emulator.

Each kernel runs in bf16, fp16 and fp32, through each of its branches, at sizes that take seconds.
"""

import re
from collections.abc import Iterable

import pytest

NODE_IDS = pytest.StashKey[list[str]]()
"""In pytest's config: the ids of all tests that were collected, chosen or not."""
SELECTED: dict[str, dict[str, int]] = {
    "test_attention": {
        r"test_parity\[triton-.*-bf16\]": 12,
        r"test_parity\[triton-B1-H2-Tq63-Tk63-D64-fp(16|32)\]": 2,
        r"test_parity\[triton-B3-H2-Tq1-Tk65-D64-fp(16|32)\]": 2,
        r"test_parity\[triton-B1-H2-Tq33-Tk33-D7-fp32\]": 1,
        r"test_kv_len\[triton-bf16-.*\]": 3,
        r"test_dropout\[triton-(bf16-T129|fp32-T20|fp16-T20)\]": 3,
        r"test_packed_parity\[triton-B2-T63-H3-D16-.*\]": 3,
        r"test_nonfinite_reaches_only_visible_pairs\[triton-(1-7-3|20-23-12)-.*-nan\]": 8,
        r"test_scores_of_minus_infinity_give_zeros\[triton-0\.5-fp16-Tq9\]": 1,
        r"test_packed_scores_of_minus_infinity_give_zeros\[triton-T9\]": 1,
        r"test_triton_scores_beyond_fp32\[many-.*-torch\.bfloat16-.*\]": 4,
        r"test_triton_scores_beyond_fp32\[few-\(1, 9, 5\)-torch\.bfloat16-overflow-.*\]": 1,
        r"test_triton_scores_beyond_fp32\[many-\(9, 9, 5\)-torch\.float32-minus-.*\]": 1,
        r"test_triton_decoding_in_chunks_of_keys\[.*\]": 3,
        r"test_triton_groups_of_heads\[2\]": 1,
    },
    "test_cross_entropy": {
        r"test_parity\[triton-bf16-.*\]": 5,
        r"test_parity\[triton-fp(16|32)-smoothing.*\]": 4,
        r"test_parity_odd_sizes\[triton-5-63-.*\]": 3,
        r"test_linear_parity\[triton-bf16-.*\]": 10,
        r"test_linear_parity\[triton-fp(16|32)-.*-smoothing.*\]": 8,
        r"test_linear_parity_under_autocast\[triton-.*-mean\]": 2,
        r"test_scale\[triton-3-2500-4-.*\]": 2,
        r"test_special_values_are_pytorchs\[triton-bf16-.*\]": 2,
        r"test_triton_rows_off_16_bytes\[.*\]": 3,
        r"test_triton_chunks\[one-.*\]": 3,
    },
    "test_adamw": {
        r"test_equals_torch\[triton-.*\]": 2,
        r"test_operator_(parity|layouts)\[triton.*\]": 4,
        r"test_grad_norm\[triton-.*\]": 3,
        r"test_non_finite_norm_skips_the_step\[triton-.*\]": 2,
        r"test_stochastic_rounding_equals_the_reference\[contiguous\]": 1,
        r"test_masters_equal_fp32_parameters\[.*\]": 2,
    },
    "test_sampling": {
        r"test_same_tokens_at_odd_sizes\[triton-V(1|17|257|4099)-.*\]": 12,
        r"test_greedy_is_the_first_maximum\[triton-V1009-.*\]": 3,
        r"test_misaligned_rows_keep_exactly_k\[.*\]": 2,
        r"test_top_k_is_exact_and_ties_go_to_the_lowest_id\[triton-k(31|130)\]": 2,
        r"test_top_p_is_the_smallest_set\[triton-0\.(41-2|89-3)\]": 2,
        r"test_min_p_is_relative_to_the_largest\[triton-0\.26-3\]": 1,
        r"test_a_gpu_reports_rows_by_minus_one\[16\]": 1,
    },
    "test_sampling_split": {
        r"test_cuts_are_exact\[bins256-list64\]": 1,
        r"test_extreme_temperatures_and_logits": 1,
    },
    "test_embedding": {
        r"test_parity\[triton-.*\]": 21,
        r"test_many_equal_tokens_are_summed_in_fp32\[triton-.*\]": 2,
        r"test_runs_at_the_edges_of_segments": 1,
        r"test_ids_out_of_range_write_nothing": 1,
    },
    "test_decode_linear": {
        r"test_parity\[.*-triton\]": 48,
        r"test_parts\[.*-triton\]": 24,
        r"test_an_fp32_result_is_not_rounded\[.*-triton\]": 6,
        r"test_layouts_and_dimensions\[.*-triton\]": 2,
    },
    "test_linear": {
        r"test_triton_without_parts\[.*\]": 3,
        r"test_triton_norm\[\(1, 48\)-.*\]": 3,
        r"test_triton_norm\[\(129, 48\)-bf16\]": 1,
        r"test_triton_norm_of_one_channel": 1,
        r"test_triton_sums_of_many_programs": 1,
    },
    "test_mlp": {
        r"test_triton_parity\[\(3, 129, 24, 7\)-.*\]": 3,
        r"test_triton_residual\[fp16\]": 1,
        r"test_triton_gelu\[.*\]": 3,
        r"test_triton_gelu_far_out\[.*\]": 3,
        r"test_triton_sums_are_those_of_what_was_stored": 1,
    },
}
"""By module: patterns of the names of tests, and how many tests each matches."""


def selected(nodeid: str) -> bool:
    """Return whether a test belongs to the selection, by its id as pytest prints it."""
    module, name = _parts(nodeid)
    return any(re.fullmatch(pattern, name) for pattern in SELECTED.get(module, {}))


def _parts(nodeid: str) -> tuple[str, str]:
    path, _, name = nodeid.partition("::")
    return path.rpartition("/")[2].removesuffix(".py"), name


def differences(nodeids: Iterable[str]) -> list[str]:
    """Return, a line each, the patterns that match another number of tests than SELECTED says.

    nodeids: all tests of some modules; only these modules are compared.
    """
    names: dict[str, list[str]] = {}
    for nodeid in nodeids:
        module, name = _parts(nodeid)
        names.setdefault(module, []).append(name)
    found = []
    for module in SELECTED.keys() & names.keys():
        for pattern, wanted in SELECTED[module].items():
            n = sum(bool(re.fullmatch(pattern, name)) for name in names[module])
            if n != wanted:
                found.append(f"{module}: {pattern} matches {n} tests, not {wanted}")
    return sorted(found)
