"""The fused ops: one function each, for every backend."""

from .absorbing import absorbing_score_loss, absorbing_step
from .alignment_calibration import alignment_calibration_loss
from .attention import cross_attention
from .attention_rows import merge_attention, qk_norm_rotary, rotary_embedding
from .attention_varlen import cross_attention_varlen
from .codebooks import EmaCodebook as EmaCodebook  # what they return, and no ops themselves
from .codebooks import KMeans as KMeans
from .codebooks import ema_codebook_update, kmeans
from .contrastive import info_nce_loss, lorentz_contrastive_loss, siglip_loss
from .ctc import collapse_repeats, ctc_greedy_decode
from .ctc_align import CtcAligned as CtcAligned
from .ctc_align import ctc_forced_align
from .ctc_beam import Lexicon as Lexicon
from .ctc_beam import ctc_beam_decode
from .decoding import sample_tokens
from .denoising_loss import add_noise, denoising_loss, velocity
from .diffusion import Coefficients as Coefficients  # what steps take, and no ops themselves
from .diffusion import Known as Known
from .diffusion import StepOptions as StepOptions
from .diffusion import Threshold as Threshold
from .diffusion import (
    ddim_step,
    ddpm_step,
    dpm_solver_pp_2m_step,
    dpm_solver_pp_3m_step,
    euler_ancestral_step,
    euler_step,
    flow_match_euler_step,
    heun_step,
    lcm_step,
    unipc_step,
)
from .edit_distance import edit_distance
from .ego_nce import ego_nce_loss
from .ego_nce import pack_labels as pack_labels  # what a loss takes, and no op itself
from .gated import bias_gelu, film, gated_residual, geglu, swiglu
from .group_norm import group_norm_act
from .guidance import Guidance as Guidance
from .hyperbolic import (
    lorentz_centroid,
    lorentz_distance,
    lorentz_entailment_loss,
    lorentz_exp_map,
    lorentz_exp_map0,
    lorentz_exterior_angle,
    lorentz_half_aperture,
    lorentz_log_map,
    lorentz_log_map0,
    lorentz_pairwise_distance,
    lorentz_pairwise_inner,
    lorentz_parallel_transport,
    lorentz_to_poincare,
    mobius_add,
    mobius_scalar_mul,
    poincare_distance,
    poincare_exp_map,
    poincare_exp_map0,
    poincare_log_map,
    poincare_log_map0,
    poincare_pairwise_distance,
    poincare_to_lorentz,
)
from .masked_decode import MaskedDecoded as MaskedDecoded
from .masked_decode import error_gate, masked_decode_step
from .modulation import ada_layer_norm, dual_ada_layer_norm, layer_norm, rms_norm
from .multi_source import Source as Source  # what an op takes, and none itself
from .multi_source import multi_source_attention
from .probabilities import Verified as Verified
from .probabilities import renormalize_top_k, renormalize_top_p, token_log_prob, verify_draft_tokens
from .quantization import Projections as Projections  # what ops take, and no op itself
from .quantization import codes_embedding_mean, nearest_code, residual_dequantize, residual_quantize
from .retrieval import linear_topk, pairwise_topk
from .timestep_embedding import timestep_embedding
from .vocabulary import linear_cross_entropy, linear_log_prob

__all__ = [
    "absorbing_score_loss",
    "absorbing_step",
    "ada_layer_norm",
    "add_noise",
    "alignment_calibration_loss",
    "bias_gelu",
    "codes_embedding_mean",
    "collapse_repeats",
    "cross_attention",
    "cross_attention_varlen",
    "ctc_beam_decode",
    "ctc_forced_align",
    "ctc_greedy_decode",
    "ddim_step",
    "ddpm_step",
    "denoising_loss",
    "dpm_solver_pp_2m_step",
    "dpm_solver_pp_3m_step",
    "dual_ada_layer_norm",
    "edit_distance",
    "ego_nce_loss",
    "ema_codebook_update",
    "error_gate",
    "euler_ancestral_step",
    "euler_step",
    "film",
    "flow_match_euler_step",
    "gated_residual",
    "geglu",
    "group_norm_act",
    "heun_step",
    "info_nce_loss",
    "kmeans",
    "layer_norm",
    "lcm_step",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_topk",
    "lorentz_centroid",
    "lorentz_contrastive_loss",
    "lorentz_distance",
    "lorentz_entailment_loss",
    "lorentz_exp_map",
    "lorentz_exp_map0",
    "lorentz_exterior_angle",
    "lorentz_half_aperture",
    "lorentz_log_map",
    "lorentz_log_map0",
    "lorentz_pairwise_distance",
    "lorentz_pairwise_inner",
    "lorentz_parallel_transport",
    "lorentz_to_poincare",
    "masked_decode_step",
    "merge_attention",
    "mobius_add",
    "mobius_scalar_mul",
    "multi_source_attention",
    "nearest_code",
    "pairwise_topk",
    "poincare_distance",
    "poincare_exp_map",
    "poincare_exp_map0",
    "poincare_log_map",
    "poincare_log_map0",
    "poincare_pairwise_distance",
    "poincare_to_lorentz",
    "qk_norm_rotary",
    "renormalize_top_k",
    "renormalize_top_p",
    "residual_dequantize",
    "residual_quantize",
    "rms_norm",
    "rotary_embedding",
    "sample_tokens",
    "siglip_loss",
    "swiglu",
    "timestep_embedding",
    "token_log_prob",
    "unipc_step",
    "velocity",
    "verify_draft_tokens",
]
