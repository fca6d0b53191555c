"""The checks that ``worker.py`` runs, for those who may not import Triton's interpreter: each op, then these."""

from tests.cases.hyperbolic import OPS

PROPERTIES = (
    "harness",
    "chunked",
    "rounding_of_a_device",
    "nan_stays_in_its_row",
    "same_bits",
    "coinciding_points",
    "expanded_gradient",
)
ATTENTION = "cross_attention"
PACKED = "cross_attention_varlen"
ATTENTION_CHECKS = (
    "attention_masks",
    "attention_shapes",
    "attention_dropout",
    "attention_many_tiles",
    "attention_in_one_pass",
    "attention_beyond_the_last_query",
    "attention_same_bits",
    "attention_expanded_gradient",
    "packed_attention",
    "packed_attention_many_tiles",
    "packed_attention_out_of_bounds",
    "sources_in_one_launch",
)
ROWS_CHECKS = ("attention_rows", "attention_rows_of_any_layout", "attention_rows_same_bits")
DIFFUSION_CHECKS = (
    "diffusion",
    "diffusion_in_small_tiles",
    "denoising_loss",
    "loss_of_any_target",
    "narrow_outputs",
    "nan_stays_in_its_place",
    "normal_numbers",
)
GATED_CHECKS = (
    "gated",
    "gated_in_small_tiles",
    "gated_with_rounding_of_a_device",
    "far_arguments",
    "nan_stays_in_its_element",
    "gated_same_bits",
    "gated_expanded_gradient",
)
GROUP_NORM_CHECKS = (
    "group_norm",
    "group_norm_in_small_tiles",
    "group_norm_gradients_alone",
    "nan_stays_in_its_group",
)
CONTRASTIVE_CHECKS = (
    "contrastive",
    "contrastive_in_small_tiles",
    "contrastive_with_rounding_of_a_device",
    "positives_of_any_layout",
    "nan_stays_in_its_pairs",
    "contrastive_same_bits",
)
VOCABULARY_CHECKS = (
    "vocabulary",
    "vocabulary_in_small_tiles",
    "tokens_that_are_none",
    "tokens_ruled_out",
    "rows_without_a_target",
    "vocabulary_same_bits",
)
DECODING_CHECKS = (
    "decoding",
    "decoding_in_small_tiles",
    "absorbing",
    "absorbing_in_small_tiles",
    "masked_decoding",
    "masked_decoding_in_small_tiles",
    "token_probabilities",
    "token_probabilities_in_small_tiles",
)
CTC_CHECKS = ("ctc_paths", "ctc_paths_in_small_tiles", "beams", "beams_in_small_tiles", "alignments", "edits")
QUANTIZATION_CHECKS = (
    "nearest_code",
    "nearest_code_in_small_tiles",
    "nearest_code_of_odd_numbers",
    "two_codes_that_float32_takes_for_one",
    "residual_quantize",
    "residual_quantize_of_clustered_codes",
    "code_tables",
)
RETRIEVAL_CHECKS = ("retrieval", "retrieval_in_small_tiles", "order_of_ties_and_nan")
CHECKS = (
    *ATTENTION_CHECKS,
    *ROWS_CHECKS,
    "modulation",
    *GATED_CHECKS,
    *GROUP_NORM_CHECKS,
    *CONTRASTIVE_CHECKS,
    *DECODING_CHECKS,
    *CTC_CHECKS,
    *QUANTIZATION_CHECKS,
    *RETRIEVAL_CHECKS,
    *VOCABULARY_CHECKS,
    *DIFFUSION_CHECKS,
    *PROPERTIES,
    *OPS,
)
