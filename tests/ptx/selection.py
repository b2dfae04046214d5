"""The tests of the kernels that `make test-ptx` runs in the emulator.

Each kernel runs in bf16, fp16 and fp32, through each of its branches, at sizes that take seconds.
"""

import re

SELECTED = {
    "test_attention": [
        r"test_parity\[triton-.*-bf16\]",
        r"test_parity\[triton-B1-H2-Tq63-Tk63-D64-fp(16|32)\]",
        r"test_parity\[triton-B3-H2-Tq1-Tk65-D64-fp(16|32)\]",
        r"test_parity\[triton-B1-H2-Tq33-Tk33-D7-fp32\]",
        r"test_kv_len\[triton-bf16-.*\]",
        r"test_dropout\[triton-(bf16-T129|fp32-T20|fp16-T20)\]",
        r"test_packed_parity\[triton-B2-T63-H3-D16-.*\]",
        r"test_nonfinite_reaches_only_visible_pairs\[triton-(1-7-3|20-23-12)-.*-nan\]",
        r"test_scores_of_minus_infinity_give_zeros\[triton-0\.5-fp16-Tq9\]",
        r"test_packed_scores_of_minus_infinity_give_zeros\[triton-T9\]",
        r"test_triton_scores_beyond_fp32\[many-.*-torch\.bfloat16-.*\]",
        r"test_triton_scores_beyond_fp32\[few-\(1, 9, 5\)-torch\.bfloat16-overflow-.*\]",
        r"test_triton_scores_beyond_fp32\[many-\(9, 9, 5\)-torch\.float32-minus-.*\]",
        r"test_triton_decoding_in_chunks_of_keys",
        r"test_triton_groups_of_heads\[2\]",
    ],
    "test_cross_entropy": [
        r"test_parity\[triton-bf16-.*\]",
        r"test_parity\[triton-fp(16|32)-smoothing.*\]",
        r"test_parity_odd_sizes\[triton-5-63-.*\]",
        r"test_linear_parity\[triton-bf16-.*\]",
        r"test_linear_parity\[triton-fp(16|32)-.*-smoothing.*\]",
        r"test_linear_parity_under_autocast\[triton-.*-mean\]",
        r"test_scale\[triton-3-2500-4-.*\]",
        r"test_special_values_are_pytorchs\[triton-bf16-.*\]",
        # Not fp32: its error is PyTorch's single rounding, below what 2 ulp of ex2.approx allow.
        r"test_triton_rows_off_16_bytes\[(bf16|fp16)\]",
        r"test_triton_chunks\[one-.*\]",
    ],
    "test_adamw": [
        r"test_equals_torch\[triton-.*\]",
        r"test_operator_(parity|layouts)\[triton.*\]",
        r"test_grad_norm\[triton-.*\]",
        r"test_non_finite_norm_skips_the_step\[triton-.*\]",
        r"test_stochastic_rounding_equals_the_reference\[contiguous\]",
        r"test_masters_equal_fp32_parameters",
    ],
    "test_sampling": [
        r"test_same_tokens_at_odd_sizes\[triton-V(1|17|257|4099)-.*\]",
        r"test_greedy_is_the_first_maximum\[triton-V1009-.*\]",
        r"test_misaligned_rows_keep_exactly_k",
        r"test_top_k_is_exact_and_ties_go_to_the_lowest_id\[triton-k(31|130)\]",
        r"test_top_p_is_the_smallest_set\[triton-0\.(41-2|89-3)\]",
        r"test_min_p_is_relative_to_the_largest\[triton-0\.26-3\]",
        r"test_a_gpu_reports_rows_by_minus_one\[16\]",
    ],
    "test_sampling_split": [
        r"test_cuts_are_exact\[bins256-list64\]",
        r"test_extreme_temperatures_and_logits",
    ],
    "test_embedding": [
        r"test_parity\[triton-.*\]",
        r"test_many_equal_tokens_are_summed_in_fp32\[triton-.*\]",
        r"test_runs_at_the_edges_of_segments",
        r"test_ids_out_of_range_write_nothing",
    ],
    "test_decode_linear": [
        r"test_parity\[.*-triton\]",
        r"test_parts\[.*-triton\]",
        r"test_an_fp32_result_is_not_rounded\[.*-triton\]",
        r"test_layouts_and_dimensions\[.*-triton\]",
    ],
    "test_linear": [
        r"test_triton_without_parts\[.*\]",
        r"test_triton_norm\[\(1, 48\)-.*\]",
        r"test_triton_norm\[\(129, 48\)-bf16\]",
        r"test_triton_norm_of_one_channel",
        r"test_triton_sums_of_many_programs",
    ],
    "test_mlp": [
        r"test_triton_parity\[\(3, 129, 24, 7\)-.*\]",
        r"test_triton_residual\[fp16\]",
        r"test_triton_gelu\[.*\]",
        r"test_triton_gelu_far_out\[.*\]",
        r"test_triton_sums_are_those_of_what_was_stored",
    ],
}


def selected(nodeid: str) -> bool:
    """Return whether a test belongs to the selection, by its id as pytest prints it."""
    path, _, name = nodeid.partition("::")
    patterns = SELECTED.get(path.rpartition("/")[2].removesuffix(".py"), [])
    return any(re.match(pattern, name) for pattern in patterns)
