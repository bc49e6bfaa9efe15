"""The table of operators with autograd: one entry each."""

from __future__ import annotations

from .. import _differentiable as plain
from .. import _differentiable_sparse as sparse
from ._register import Operator

_SEED = "SymInt seed=0, Tensor? seed_tensor=None"
_OPTIONAL_SEED = "SymInt? seed=None, Tensor? seed_tensor=None"
_NOISE_STD = "str noise_std='exact', float? noise_std_value=None"
_LINEAR = "bool is_causal=False, bool normalize=True, bool log_features=False"
_RFA = (
    "str features='positive', SymInt num_features=256, bool orthogonal=True, float? scale=None, bool is_causal=False, "
    + _SEED
)
_EVA = (
    "SymInt window=64, SymInt chunk_size=64, bool partition=True, bool chunk_mass=True, float? scale=None, "
    "bool is_causal=False, " + _OPTIONAL_SEED
)

YOSO_ATTENTION = Operator(
    plain.YOSO_ATTENTION,
    "int num_hashes=32, int hash_bits=8, str hashing='hadamard', str carving='strided', bool expectation=False, "
    f"bool is_causal=False, bool normalize=True, {_SEED}, str? grad=None",
)
COLLISION_ATTENTION = Operator(plain.COLLISION_ATTENTION, "int hash_bits, str grad='exact', bool is_causal=False")
SOFTMAX_ATTENTION = Operator(plain.SOFTMAX_ATTENTION, "float? scale=None, bool is_causal=False, SymInt[]? window=None")
MERGE_STATES = Operator(plain.MERGE_STATES, "")
SEGMENT_MEAN = Operator(plain.SEGMENT_MEAN, "SymInt? num_segments=None, SymInt? segment_size=None")
FEATURE_MAP = Operator(plain.FEATURE_MAP, "str features='positive', float? scale=None, bool log=False")
LINEAR_ATTENTION = Operator(plain.LINEAR_ATTENTION, _LINEAR)
LINEAR_ATTENTION_STATE = Operator(plain.LINEAR_ATTENTION_STATE, _LINEAR)
RFA_ATTENTION = Operator(plain.RFA_ATTENTION, _RFA)
RFA_ATTENTION_STATE = Operator(plain.RFA_ATTENTION_STATE, _RFA)
RANDOMIZED_ATTENTION = Operator(
    plain.RANDOMIZED_ATTENTION,
    f"SymInt num_samples=1, {_NOISE_STD}, float? scale=None, str grad='pathwise', {_SEED}",
)
LARA_ATTENTION = Operator(
    plain.LARA_ATTENTION,
    "SymInt num_landmarks=49, str mis='opt', float alpha_coeff=1.0, str t_norm='query', SymInt samples_per_landmark=1, "
    f"bool antithetic=False, {_NOISE_STD}, {_OPTIONAL_SEED}, float? scale=None",
)
EVA_ATTENTION = Operator(plain.EVA_ATTENTION, _EVA)
EVA_ATTENTION_STATE = Operator(plain.EVA_ATTENTION_STATE, _EVA)

_SEA = (
    "float top_k=64.0, str group='row_heads', float? scale=None, bool is_causal=False, str budget='code', "
    "SymInt? block_cap=None"
)
_CAUSAL = "bool is_causal=False"

SPARSE_ATTENTION = Operator(sparse.SPARSE_ATTENTION, "SymInt columns=0, SymInt block_cap=0, float? scale=None")
SEA_ATTENTION = Operator(sparse.SEA_ATTENTION, _SEA)
RUNNING_MEAN = Operator(sparse.RUNNING_MEAN, "SymInt? num_queries=None")
RUNNING_MEAN_STATE = Operator(sparse.RUNNING_MEAN_STATE, "SymInt? num_queries=None")
BLOCK_POOL = Operator(sparse.BLOCK_POOL, "")
EXPAND_VALUES = Operator(sparse.EXPAND_VALUES, f"SymInt num_keys, {_CAUSAL}")
BLOCK_SUM = Operator(sparse.BLOCK_SUM, f"SymInt num_columns, {_CAUSAL}")
ATTENTION_DIVERGENCE = Operator(sparse.ATTENTION_DIVERGENCE, f"float? scale=None, float? scale_teacher=None, {_CAUSAL}")
TEACHER_BLOCKS = Operator(sparse.TEACHER_BLOCKS, f"SymInt num_columns, float? scale=None, {_CAUSAL}")
SEA_ESTIMATE = Operator(sparse.SEA_ESTIMATE, _CAUSAL)
SEA_ESTIMATE_STATE = Operator(sparse.SEA_ESTIMATE_STATE, _CAUSAL)
