"""Bad inputs of the sparse family: each gives one clear sentence, before any work, in the grammar of the library."""

import inspect
from dataclasses import replace

import numpy as np
import pytest

import subquad
from sparse_cases import sea_weights
from subquad import BlockPattern, CsrPattern
from test_errors_softmax import QKV, F, ones, refuse

I = np.int32  # noqa: E741
IDX = np.zeros((2, 4, 5, 3), I)
CSR = CsrPattern(np.arange(41), np.zeros(40, I), (2, 4, 5, 6))
BLOCKS = BlockPattern(ones(2, 4, 5, 1, dtype=np.uint8), 8, np.full((2, 5), 6, I), 2)
SEA = dict(q=ones(2, 4, 5, 8), k=ones(2, 4, 6, 8), v=ones(2, 4, 6, 3), probs=ones(2, 4, 5, 16))
TEACHER = dict(q=QKV["q"], k=QKV["k"], num_columns=8)
PAIR = dict(q=QKV["q"], k=QKV["k"], q_teacher=ones(2, 4, 5, 3), k_teacher=ones(2, 1, 6, 3))
TOKENS = dict(q=ones(2, 4, 5, 8), k=ones(2, 4, 5, 8), v=ones(2, 4, 5, 8))
PAST = (ones(2, 4, 5, 16), ones(2, 4, 5), ones(2, 8, 4, 2), ones(2, 8, 4, 2), np.ones(2, I))
CAUSAL, WHOLE = ({name: np.ones_like(x) for name, x in sea_weights(4, 8, 5, 8, c, 20).items()} for c in (True, False))

# function (and what tells two tables of it apart): a good call, and what is wrong with changes of it
TABLES = {
    "sparse_attention": (QKV | dict(pattern=IDX), [
        (TypeError, "pattern: expected an array of indices, a pair (indices, log_weights)", dict(pattern=None)),
        (TypeError, "pattern: expected an array of indices, a pair (indices, log_weights)", dict(pattern=3)),
        (ValueError, "pattern: expected a pair (indices, log_weights), got 1 values", dict(pattern=[1])),
        (TypeError, "pattern: expected an array of indices, a pair (indices, log_weights)", dict(pattern="x")),
        (ValueError, "pattern: expected a pair (indices, log_weights), got 1 values", dict(pattern=(IDX,))),
        (TypeError, "pattern log_weights: expected an array, got NoneType", dict(pattern=(IDX, None))),
        (TypeError, "indices: expected dtype int32, got int64", dict(pattern=IDX.astype(np.int64))),
        (ValueError, "indices: expected shape [B, heads, N, S], got [4, 5, 3]", dict(pattern=IDX[0])),
        (ValueError, "indices: expected 1, Hkv = 2 or H = 4 heads, got 3", dict(pattern=IDX[:, :3])),
        (ValueError, "indices: expected keys in [0, 6), or -1 for none, got 6 at [0, 0, 0, 0]", dict(pattern=IDX + 6)),
        (ValueError, "indices: expected keys in [0, 6), or -1 for none, got -2 at [0, 0, 0, 0]", dict(pattern=IDX - 2)),
        (ValueError, "log_weights: expected shape [B, heads, N, S] = [2, 4, 5, 3], got [2, 4, 5, 4]",
         dict(pattern=(IDX, ones(2, 4, 5, 4)))),
        (TypeError, "log_weights: expected dtype float32, got int32", dict(pattern=(IDX, IDX))),
        (TypeError, "indices: expected dtype int32, got float32", dict(pattern=np.zeros((2, 4, 5, 3), F))),
        (TypeError, "pattern indptr: expected an array, got NoneType", dict(pattern=replace(CSR, indptr=None))),
        (ValueError, "pattern: expected shape [B, H, N, M] = [2, 4, 5, 6], got [2, 4, 5, 7]",
         dict(pattern=replace(CSR, shape=(2, 4, 5, 7)))),
        (TypeError, "indices: expected dtype int32, got int64",
         dict(pattern=replace(CSR, indices=np.zeros(40, np.int64)))),
        (ValueError, "indices: expected keys in [0, 6), got 6 at [0]",
         dict(pattern=replace(CSR, indices=np.full(40, 6, I)))),
        (ValueError, "indices: expected keys in [0, 6), got -1 at [0]",
         dict(pattern=replace(CSR, indices=np.full(40, -1, I)))),
        (ValueError, "indptr: expected shape [B H N + 1] = [41], got [40]",
         dict(pattern=replace(CSR, indptr=np.arange(40)))),
        (ValueError, "indptr: expected 0 as its first value, got 40",
         dict(pattern=replace(CSR, indptr=np.arange(41)[::-1].copy()))),
        (ValueError, "indptr: expected 0 as its first value, got 1",
         dict(pattern=replace(CSR, indptr=np.arange(1, 42)))),
        (ValueError, "indptr: expected the length of indices, 40, as its last value, got 80",
         dict(pattern=replace(CSR, indptr=np.arange(0, 82, 2)))),
        (ValueError, "indices: expected keys that ascend inside a row, got 1 after 1 at [1]",
         dict(pattern=CsrPattern(np.arange(0, 81, 2), np.tile(np.array([1, 1], I), 40), (2, 4, 5, 6)))),
        (ValueError, "indices: expected keys that ascend inside a row, got 1 after 2 at [1]",
         dict(pattern=CsrPattern(np.arange(0, 81, 2), np.tile(np.array([2, 1], I), 40), (2, 4, 5, 6)))),
        (ValueError, "log_weights: expected shape [nnz] = [40], got [39]",
         dict(pattern=replace(CSR, log_weights=ones(39)))),
        (TypeError, "log_weights: expected dtype float32",
         dict(pattern=replace(CSR, log_weights=ones(40, dtype=float)))),
        (ValueError, "bits: expected shape [B, H, N, ceil(K / 8)] = [2, 4, 5, 1], got [2, 4, 5, 2]",
         dict(pattern=replace(BLOCKS, bits=ones(2, 4, 5, 2, dtype=np.uint8)))),
        (ValueError, "K: expected a value of at least 1, got 0", dict(pattern=replace(BLOCKS, K=0))),
        (ValueError, "bits: expected shape [B, H, N, ceil(K / 8)] = [2, 4, 5, 3], got [2, 4, 5, 1]",
         dict(pattern=replace(BLOCKS, K=17))),
        (TypeError, "K: expected an integer, got float", dict(pattern=replace(BLOCKS, K=8.0))),
        (TypeError, "pattern visible: expected an array, got NoneType", dict(pattern=replace(BLOCKS, visible=None))),
        (ValueError, "visible: expected values in [0, 6], got 7 at [0, 0]",
         dict(pattern=replace(BLOCKS, visible=np.full((2, 5), 7, I)))),
        (ValueError, "visible: expected values in [0, 6], got -1 at [0, 0]",
         dict(pattern=replace(BLOCKS, visible=np.full((2, 5), -1, I)))),
        (ValueError, "block_cap: expected a value of at least 1, got 0", dict(pattern=replace(BLOCKS, block_cap=0))),
        (TypeError, "block_cap: expected an integer, got NoneType", dict(pattern=replace(BLOCKS, block_cap=None))),
        (ValueError, "positions: expected ascending keys in [0, 6) for the first 6 ranks, got 0 after 0 at [0, 1]",
         dict(pattern=replace(BLOCKS, positions=np.zeros((2, 6), I)))),
        (ValueError, "positions: expected ascending keys in [0, 6) for the first 6 ranks, got 6 after 5 at [0, 5]",
         dict(pattern=replace(BLOCKS, positions=np.tile(np.arange(1, 7, dtype=I), (2, 1))))),
        (ValueError, "positions: expected shape [B, M] = [2, 6], got [2, 5]",
         dict(pattern=replace(BLOCKS, positions=np.zeros((2, 5), I)))),
        (TypeError, "bits: expected dtype uint8, got float32", dict(pattern=replace(BLOCKS, bits=ones(2, 4, 5, 1)))),
        (TypeError, "pattern bits: expected an array, got NoneType", dict(pattern=replace(BLOCKS, bits=None))),
        (TypeError, "visible: expected dtype int32, got float32", dict(pattern=replace(BLOCKS, visible=ones(2, 5)))),
        (ValueError, "row_scale: expected shape [B, H, N] = [2, 4, 5], got [2, 4, 6]", dict(row_scale=ones(2, 4, 6))),
        (TypeError, "row_scale: expected dtype float32, got float16", dict(row_scale=ones(2, 4, 5, dtype="f2"))),
        (TypeError, "row_scale: expected an array (numpy, torch, cupy or jax), got float", dict(row_scale=1.0)),
        (TypeError, "return_lse: expected True or False, got int", dict(return_lse=1)),
        (ValueError, "scale: expected a finite number above 0, got 0", dict(scale=0)),
        (TypeError, "scale: expected a number, got str", dict(scale="x")),
        (ValueError, "out: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 5, 8]", dict(out=ones(2, 4, 5, 8))),
    ]),
    "sparse_attention_bwd": (QKV | dict(pattern=IDX, dout=ones(2, 4, 5, 3)), [
        (TypeError, "dout: expected an array, got none", dict(dout=None)),
        (ValueError, "dout: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 5, 4]", dict(dout=ones(2, 4, 5, 4))),
        (ValueError, "dlse: expected shape [B, H, N] = [2, 4, 5], got [2, 4]", dict(dlse=ones(2, 4))),
        (ValueError, "lse: expected shape [B, H, N] = [2, 4, 5], got [2, 4, 6]", dict(lse=ones(2, 4, 6))),
        (ValueError, "out: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 5, 2]", dict(out=ones(2, 4, 5, 2))),
        (ValueError, "row_scale: expected shape [B, H, N] = [2, 4, 5], got [2, 4, 6]", dict(row_scale=ones(2, 4, 6))),
    ]),
    "sea_attention": (SEA, [
        (ValueError, "k: expected shape [B, H, M, D] = [2, 4, 6, 8], got [2, 2, 6, 8]",
         dict(k=ones(2, 2, 6, 8), v=ones(2, 2, 6, 3))),
        (ValueError, "probs: expected K in [1, 1048576], got 0", dict(probs=ones(2, 4, 5, 0))),
        (ValueError, "probs: expected shape [B, H, N, K], got [2, 4, 6, 8]", dict(probs=ones(2, 4, 6, 8))),
        (TypeError, "probs: expected dtype float32, got float16", dict(probs=ones(2, 4, 5, 8, dtype="f2"))),
        (TypeError, "probs: expected an array (numpy, torch, cupy or jax), got NoneType", dict(probs=None)),
        (ValueError, "top_k: expected a finite number of at least 1, got 0.000000", dict(top_k=0)),
        (ValueError, "top_k: expected a finite number of at least 1, got 0.500000", dict(top_k=0.5)),
        (ValueError, "top_k: expected a finite number of at least 1, got nan", dict(top_k=np.nan)),
        (ValueError, "top_k: expected a finite number of at least 1, got inf", dict(top_k=np.inf)),
        (TypeError, "top_k: expected a number, got str", dict(top_k="3")),
        (TypeError, "top_k: expected a number, got bool", dict(top_k=True)),
        (ValueError, 'group: expected "query" or "head" or "batch" or "row_heads", got "heads"', dict(group="heads")),
        (TypeError, 'group: expected "query" or "head" or "batch" or "row_heads", got int', dict(group=3)),
        (ValueError, 'group: expected "query" or "row_heads" with is_causal=True, got "head"',
         dict(group="head", is_causal=True)),
        (ValueError, 'group: expected "query" or "row_heads" with is_causal=True, got "batch"',
         dict(group="batch", is_causal=True)),
        (ValueError, 'budget: expected "code" or "paper", got "x"', dict(budget="x")),
        (ValueError, "block_cap: expected None or a value of at least 1, got 0", dict(block_cap=0)),
        (TypeError, "block_cap: expected an integer, got float", dict(block_cap=2.5)),
        (ValueError, "mix: expected shape [B, H, N] = [2, 4, 5], got [2, 4, 6]", dict(mix=ones(2, 4, 6))),
        (ValueError, "context: expected mix with it, got none", dict(context=ones(2, 4, 5, 3))),
        (ValueError, "context: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 2, 3]",
         dict(mix=ones(2, 4, 5), context=ones(2, 4, 2, 3))),
        (TypeError, "context: expected dtype float32", dict(mix=ones(2, 4, 5), context=ones(2, 4, 5, 3, dtype=float))),
        (ValueError, "row_scale: expected shape [B, H, N] = [2, 4, 5], got [2, 4]", dict(row_scale=ones(2, 4))),
        (TypeError, "key_mask: expected dtype bool, got float32", dict(key_mask=ones(2, 5))),
        (ValueError, "key_mask: expected shape [B, M] = [2, 6], got [2, 5]", dict(key_mask=ones(2, 5, dtype=bool))),
        (ValueError, "query_mask: expected shape [B, N] = [2, 5], got [2, 6]", dict(query_mask=ones(2, 6, dtype=bool))),
        (TypeError, "is_causal: expected True or False, got int", dict(is_causal=1)),
        (TypeError, "return_pattern: expected True or False, got int", dict(return_pattern=1)),
        (TypeError, "return_lse: expected True or False, got str", dict(return_lse="y")),
        (ValueError, "out: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 5, 4]", dict(out=ones(2, 4, 5, 4))),
        (ValueError, "scale: expected a finite number above 0, got -1", dict(scale=-1)),
    ]),
    "sea_attention_bwd": (SEA | dict(dout=ones(2, 4, 5, 3)), [
        (ValueError, "dout: expected shape [B, H, N, E] = [2, 4, 5, 3], got [2, 4, 5, 4]", dict(dout=ones(2, 4, 5, 4))),
        (ValueError, "dlse: expected shape [B, H, N] = [2, 4, 5], got [2, 4]", dict(dlse=ones(2, 4))),
        (ValueError, "mix: expected shape [B, H, N] = [2, 4, 5], got [2, 4, 6]", dict(mix=ones(2, 4, 6))),
        (ValueError, "lse: expected shape [B, H, N] = [2, 4, 5], got [1]", dict(lse=ones(1))),
    ]),
    "topk_select": (dict(scores=ones(2, 4, 5, 6), k=2), [
        (ValueError, "k: expected a value of at least 1, got 0", dict(k=0)),
        (TypeError, "k: expected an integer, got float", dict(k=1.5)),
        (TypeError, "k: expected an integer, got bool", dict(k=True)),
        (ValueError, "k: expected a value below 2^31, got 1099511627776", dict(k=2 ** 40)),
        (ValueError, 'group: expected "query" or "row_heads" or "head" or "batch", got "rows"', dict(group="rows")),
        (TypeError, 'group: expected "query" or "row_heads" or "head" or "batch", got NoneType', dict(group=None)),
        (TypeError, "key_mask: expected dtype bool, got float32", dict(key_mask=ones(2, 6))),
        (ValueError, "key_mask: expected shape [B, M] = [2, 6], got [2, 5]", dict(key_mask=ones(2, 5, dtype=bool))),
        (TypeError, "is_causal: expected True or False, got int", dict(is_causal=0)),
        (ValueError, "scores: expected shape [B, H, N, M], got [4, 5, 6]", dict(scores=ones(4, 5, 6))),
        (TypeError, "scores: expected dtype float32", dict(scores=ones(2, 4, 5, 6, dtype=float))),
        (TypeError, "scores: expected an array (numpy, torch, cupy or jax), got NoneType", dict(scores=None)),
        (ValueError, "out: expected shape [B, H, N, k] = [2, 4, 5, 2], got [2, 4, 5, 3]",
         dict(out=np.zeros((2, 4, 5, 3), I))),
        (TypeError, "out: expected dtype int32, got int64", dict(out=np.zeros((2, 4, 5, 2), np.int64))),
    ]),
    "select_blocks": (dict(probs=ones(2, 4, 5, 16)), [
        (ValueError, "top_k: expected a finite number of at least 1, got 0.000000", dict(top_k=0)),
        (ValueError, 'group: expected "query" or "head" or "batch" or "row_heads", got "x"', dict(group="x")),
        (TypeError, 'budget: expected "code" or "paper", got int', dict(budget=3)),
        (ValueError, "num_keys: expected a value of at least 0, got -1", dict(num_keys=-1)),
        (TypeError, "num_keys: expected an integer, got float", dict(num_keys=2.0)),
        (TypeError, "skip_dead: expected True or False, got int", dict(skip_dead=1)),
        (ValueError, "block_cap: expected a value of at least 1, got -1", dict(block_cap=-1)),
        (ValueError, "key_mask: expected shape [B, M] = [2, 5], got [2, 6]",
         dict(key_mask=ones(2, 6, dtype=bool), num_keys=5)),
        (ValueError, "query_mask: expected shape [B, N] = [2, 5], got [2, 6]", dict(query_mask=ones(2, 6, dtype=bool))),
        (ValueError, "probs: expected shape [B, H, N, K], got [2, 4, 5]", dict(probs=ones(2, 4, 5))),
        (TypeError, "is_causal: expected True or False, got int", dict(is_causal=3)),
        (TypeError, "top_k: expected a number, got NoneType", dict(top_k=None)),
    ]),
    "expand_blocks": ({}, [
        (TypeError, "pattern: expected a BlockPattern, got NoneType", dict(pattern=None)),
        (TypeError, "pattern: expected a BlockPattern, got ndarray", dict(pattern=IDX)),
        (TypeError, "pattern: expected a BlockPattern, got CsrPattern", dict(pattern=CSR)),
        (ValueError, "bits: expected shape [B, H, N, K/8], got [4, 5, 1]",
         dict(pattern=replace(BLOCKS, bits=ones(4, 5, 1, dtype=np.uint8)))),
        (ValueError, "visible: expected values in [0, 5], got 6 at [0, 0]", dict(pattern=replace(BLOCKS, num_keys=5))),
        (ValueError, "visible: expected shape [B, N] = [2, 5], got [2, 4]",
         dict(pattern=replace(BLOCKS, visible=np.full((2, 4), 6, I)))),
        (TypeError, "num_keys: expected an integer, got str", dict(pattern=replace(BLOCKS, num_keys="x"))),
    ]),
    "transpose_pattern": ({}, [
        (TypeError, "pattern: expected a CsrPattern, got NoneType", dict(pattern=None)),
        (TypeError, "pattern: expected a CsrPattern, got BlockPattern", dict(pattern=BLOCKS)),
        (ValueError, "indices: expected keys in [0, 6), got 6 at [0]",
         dict(pattern=replace(CSR, indices=np.full(40, 6, I)))),
        (ValueError, "indptr: expected shape [B H N + 1] = [41], got [40]",
         dict(pattern=replace(CSR, indptr=np.arange(40)))),
    ]),
    "CsrPattern": (dict(indptr=CSR.indptr, indices=CSR.indices), [
        (ValueError, "shape: expected (B, H, N, M), got None", dict(shape=None)),
        (ValueError, "shape: expected (B, H, N, M), got (1, 2, 3)", dict(shape=(1, 2, 3))),
        (ValueError, "shape: expected (B, H, N, M), got (2, 4, 5, -1)", dict(shape=(2, 4, 5, -1))),
        (ValueError, "shape: expected (B, H, N, M), got 'abcd'", dict(shape="abcd")),
    ]),
    "running_mean": (dict(v=ones(2, 4, 6, 3)), [
        (TypeError, "v: expected an array (numpy, torch, cupy or jax), got NoneType", dict(v=None)),
        (ValueError, "v: expected shape [B, H, M, E], got [4, 6, 3]", dict(v=ones(4, 6, 3))),
        (ValueError, "num_queries: expected a value of at least 0, got -1", dict(num_queries=-1)),
        (TypeError, "num_queries: expected an integer, got float", dict(num_queries=1.0)),
        (TypeError, "key_mask: expected dtype bool, got float32", dict(key_mask=ones(2, 6))),
        (TypeError, "state: expected None or a tuple (sum, count), got int", dict(state=1)),
        (TypeError, "state sum: expected an array, got None", dict(state=(None, None))),
        (TypeError, "state.count: expected dtype int32, got float32", dict(state=(ones(2, 4, 3), ones(2)))),
        (ValueError, "state.sum: expected shape [B, H, E] = [2, 4, 3], got [2, 4, 4]",
         dict(state=(ones(2, 4, 4), np.ones(2, I)))),
        (TypeError, "return_state: expected True or False, got int", dict(return_state=1)),
        (ValueError, "out: expected shape [B, H, N, E] = [2, 4, 6, 3], got [2, 4, 5, 3]", dict(out=ones(2, 4, 5, 3))),
        (subquad.UnsupportedError, "for a head dimension above 512", dict(v=ones(2, 4, 6, 600))),
        (ValueError, "state.count: expected values of at least 0, got -1 at [0]",
         dict(state=(ones(2, 4, 3), -np.ones(2, I)))),
    ]),
    "running_mean_bwd": (dict(v=ones(2, 4, 6, 3), dout=ones(2, 4, 6, 3)), [
        (ValueError, "dout: expected shape [B, H, N, E], got [2, 4, 6, 4]", dict(dout=ones(2, 4, 6, 4))),
        (ValueError, "num_queries: expected N = 6 of dout, got 5", dict(num_queries=5)),
        (TypeError, "dout: expected an array (numpy, torch, cupy or jax), got NoneType", dict(dout=None)),
    ]),
    "block_pool": (dict(v=ones(2, 4, 6, 3), probs=ones(2, 4, 5, 8)), [
        (ValueError, "probs: expected K of at least 1, got 0", dict(probs=ones(2, 4, 5, 0))),
        (ValueError, "probs: expected shape [B, H, N, K], got [2, 3, 5, 8]", dict(probs=ones(2, 3, 5, 8))),
        (TypeError, "probs: expected an array (numpy, torch, cupy or jax), got NoneType", dict(probs=None)),
        (ValueError, "key_mask: expected shape [B, M] = [2, 6], got [2, 5]", dict(key_mask=ones(2, 5, dtype=bool))),
        (ValueError, "query_mask: expected shape [B, N] = [2, 5], got [2, 6]", dict(query_mask=ones(2, 6, dtype=bool))),
        (ValueError, "out: expected shape [B, H, 1, E] = [2, 4, 1, 3], got [2, 4, 5, 3]", dict(out=ones(2, 4, 5, 3))),
    ]),
    "expand_values": (dict(x=ones(2, 4, 5, 8), num_keys=6), [
        (ValueError, "num_keys: expected a value of at least 0, got -1", dict(num_keys=-1)),
        (TypeError, "num_keys: expected an integer, got NoneType", dict(num_keys=None)),
        (ValueError, "x: expected shape [B, H, N, K], got [5, 8]", dict(x=ones(5, 8))),
        (TypeError, "x: expected dtype float32, got float16", dict(x=ones(2, 4, 5, 8, dtype="f2"))),
        (ValueError, "key_mask: expected shape [B, M] = [2, 6], got [2, 5]", dict(key_mask=ones(2, 5, dtype=bool))),
        (TypeError, "is_causal: expected True or False, got str", dict(is_causal="x")),
    ]),
    "block_sum": (dict(y=ones(2, 4, 5, 6), num_columns=8), [
        (ValueError, "num_columns: expected a value of at least 1, got 0", dict(num_columns=0)),
        (TypeError, "y: expected an array (numpy, torch, cupy or jax), got NoneType", dict(y=None)),
    ]),
    "teacher_blocks": (TEACHER, [
        (ValueError, "num_columns: expected a value of at least 1, got 0", dict(num_columns=0)),
        (ValueError, "k: expected a number of heads that divides the 4 query heads, got 3", dict(k=ones(2, 3, 6, 8))),
        (ValueError, "scale: expected a finite number above 0, got 0", dict(scale=0)),
        (ValueError, "k: expected shape [B, Hkv, M, D], got [2, 2, 6, 9]", dict(k=ones(2, 2, 6, 9))),
        (subquad.UnsupportedError, "for a head dimension above 512", dict(q=ones(2, 4, 5, 600), k=ones(2, 2, 6, 600))),
        (ValueError, "key_mask: expected shape [B, M] = [2, 6], got [2, 5]", dict(key_mask=ones(2, 5, dtype=bool))),
    ]),
    "attention_divergence": (PAIR, [
        (ValueError, "k_teacher: expected shape [B, Ht, M, Dt], got [2, 1, 5, 3]", dict(k_teacher=ones(2, 1, 5, 3))),
        (TypeError, "q_teacher: expected an array, got none", dict(q_teacher=None)),
        (ValueError, "scale_teacher: expected a finite number above 0, got -1", dict(scale_teacher=-1)),
        (ValueError, "k_teacher: expected shape [B, Ht, M, Dt], got [2, 1, 6, 3]", dict(q_teacher=ones(2, 4, 5, 4))),
        (ValueError, "k_teacher: expected a number of heads that divides the 4 query heads, got 3",
         dict(k_teacher=ones(2, 3, 6, 3))),
        (TypeError, "k: expected dtype float16, got float32", dict(q=ones(2, 4, 5, 8, dtype="f2"))),
    ]),
    "attention_divergence_bwd": (PAIR | dict(dkl=ones(2, 4, 5), dsse=ones(2, 4, 5)), [
        (ValueError, "dkl: expected shape [B, H, N] = [2, 4, 5], got [2, 4, 6]", dict(dkl=ones(2, 4, 6))),
        (TypeError, "dsse: expected dtype float32", dict(dsse=ones(2, 4, 5, dtype=float))),
    ]),
    "sea_estimate causal": (TOKENS | dict(weights=CAUSAL, is_causal=True), [
        (TypeError, "weights: expected a mapping of names to arrays, got NoneType", dict(weights=None)),
        (ValueError, "weights: expected position among them with is_causal=True, got none", dict(weights=WHOLE)),
        (ValueError, "weights: expected only projection, encoder_weight", dict(weights=CAUSAL | dict(foo=ones(3)))),
        (ValueError, "weights: expected only projection, encoder_weight", dict(is_causal=False)),
        (ValueError, "projection: expected shape [m, d], got [5, 9]",
         dict(weights=CAUSAL | dict(projection=ones(5, 9)))),
        (ValueError, "projection: expected m in [1, 4096], got 0", dict(weights=CAUSAL | dict(projection=ones(0, 8)))),
        (ValueError, "probs: expected K a multiple of 4 in [4, 4096], got 9",
         dict(weights=CAUSAL | dict(norm_weight=ones(9)))),
        (ValueError, "probs: expected K a multiple of 4 in [4, 4096], got 6",
         dict(weights=CAUSAL | dict(norm_weight=ones(6), norm_bias=ones(6)))),
        (ValueError, "position: expected at least 5 rows, the tokens of item 0, got 4",
         dict(weights=CAUSAL | dict(position=ones(4, 8)))),
        (ValueError, "conv1_weight: expected shape [C, C, 3, 3] = [8, 8, 3, 3], got [8, 8, 5, 3]",
         dict(weights=CAUSAL | dict(conv1_weight=ones(8, 8, 5, 3)))),
        (ValueError, "encoder_bias: expected shape [2d] = [16], got [3]",
         dict(weights=CAUSAL | dict(encoder_bias=ones(3)))),
        (TypeError, "encoder_bias: expected dtype float32",
         dict(weights=CAUSAL | dict(encoder_bias=ones(16, dtype=float)))),
        (TypeError, "encoder_bias: expected an array (numpy, torch, cupy or jax), got list",
         dict(weights=CAUSAL | dict(encoder_bias=[1.0]))),
        (ValueError, "k: expected shape [B, H, N, D] = [2, 4, 5, 8], got [2, 4, 6, 8]", dict(k=ones(2, 4, 6, 8))),
        (ValueError, "v: expected shape [B, H, N, D] = [2, 4, 5, 8], got [2, 4, 5, 7]", dict(v=ones(2, 4, 5, 7))),
        (ValueError, "k: expected shape [B, H, N, D] = [2, 4, 5, 8], got [2, 2, 5, 8]", dict(k=ones(2, 2, 5, 8))),
        (ValueError, "key_mask: expected shape [B, N] = [2, 5], got [2, 6]", dict(key_mask=ones(2, 6, dtype=bool))),
        (TypeError, "state: expected None or a tuple (s, z, rows1, rows2, count), got int", dict(state=3)),
        (TypeError, "state s: expected an array (numpy, torch, cupy or jax), got int", dict(state=(1, 2, 3, 4, 5))),
        (TypeError, "state s: expected an array, got None", dict(state=(None,) * 5)),
        (TypeError, "state.count: expected dtype int32, got float32", dict(state=(*PAST[:4], ones(2)))),
        (ValueError, "state.rows2: expected shape [B, C, 4, w] = [2, 8, 4, 2], got [2, 8, 3, 2]",
         dict(state=(*PAST[:3], ones(2, 8, 3, 2), PAST[4]))),
        (ValueError, "position: expected at least 23 rows, the tokens of item 0, got 20",
         dict(state=(*PAST[:4], np.full(2, 18, I)))),
        (ValueError, "state.count: expected values of at least 0, got -1", dict(state=(*PAST[:4], np.full(2, -1, I)))),
        (TypeError, "return_state: expected True or False, got int", dict(return_state=1)),
    ]),
    "sea_estimate": (TOKENS | dict(weights=WHOLE), [
        (ValueError, "return_state: expected is_causal=True with it, got False", dict(return_state=True)),
        (ValueError, "state: expected none unless is_causal, got a state", dict(state=PAST)),
        (ValueError, "probs: expected K a multiple of 2 in [4, 4096], got 7",
         dict(weights=WHOLE | dict(row_bias=ones(15)))),
        (ValueError, "out_weight: expected shape [H, C, 3, 3] = [4, 16, 3, 3], got [4, 16]",
         dict(weights=WHOLE | dict(out_weight=ones(4, 16)))),
    ]),
}  # fmt: skip
CALLS = [
    (key.split()[0], error, message, base | changes)
    for key, (base, entries) in TABLES.items()
    for error, message, changes in entries
]
ON_PATTERNS = [
    (error, message, changes) for error, message, changes in TABLES["sparse_attention"][1] if "pattern" in changes
]


@pytest.mark.parametrize(("name", "error", "message", "arguments"), CALLS, ids=[f"{c[0]} {c[2]}"[:64] for c in CALLS])
def test_what_a_function_refuses(name, error, message, arguments):
    refuse(name, error, message, arguments)


@pytest.mark.parametrize(("error", "message", "changes"), ON_PATTERNS, ids=[c[1][:64] for c in ON_PATTERNS])
def test_the_backward_pass_refuses_the_same_patterns(error, message, changes):
    refuse("sparse_attention_bwd", error, message, QKV | dict(dout=ones(2, 4, 5, 3)) | changes)


@pytest.mark.parametrize("key", ["sparse_attention", "sea_attention", "topk_select", "running_mean", "block_pool"])
def test_a_failed_call_leaves_out_alone(key):
    base, entries = TABLES[key]
    shape, dtype = np.shape(getattr(subquad, key)(**base)), getattr(subquad, key)(**base).dtype
    for error, _, changes in entries:
        out = np.full(shape, 7, dtype)
        if changes.keys() & {"out", "num_queries", "k", "group", "v"}:
            continue
        with pytest.raises(error):
            getattr(subquad, key)(**base | changes | dict(out=out))
        assert (out == 7).all(), changes.keys()


@pytest.mark.parametrize("key", [key for key, (base, _) in TABLES.items() if len(base) > 1 and key != "CsrPattern"])
def test_frameworks_do_not_mix(key):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    base = TABLES[key][0]
    for name in [name for name, x in base.items() if isinstance(x, np.ndarray) and name != "pattern"][1:]:
        other = f"{name}: expected an array of the same framework as "
        refuse(key.split()[0], TypeError, other, base | {name: torch.from_numpy(base[name])})
    if "key_mask" in inspect.signature(getattr(subquad, key.split()[0])).parameters:
        other = "key_mask: expected an array of the same framework as "
        refuse(key.split()[0], TypeError, other, base | dict(key_mask=torch.ones(2, 6, dtype=torch.bool)))


def test_patterns_of_another_framework():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    refused = "expected an array of the same framework as q, got torch.Tensor"
    refuse("sparse_attention", TypeError, f"indices: {refused}", QKV | dict(pattern=torch.from_numpy(IDX)))
    csr = replace(CSR, indptr=torch.from_numpy(CSR.indptr))
    refuse("sparse_attention", TypeError, f"indptr: {refused}", QKV | dict(pattern=csr))
    blocks = replace(BLOCKS, visible=torch.from_numpy(BLOCKS.visible))
    refuse("sparse_attention", TypeError, f"visible: {refused}", QKV | dict(pattern=blocks))
    refuse("expand_blocks", TypeError, "visible: expected an array of the same framework as bits",
           dict(pattern=blocks))  # fmt: skip


def test_sparse_matrices_are_no_patterns_by_themselves():
    """A scipy or torch matrix [B H N, M] does not say its B, H and N."""
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    matrix = sparse.csr_array(np.eye(40, 6, dtype=F))
    for given in (matrix, matrix.tocoo()):
        refuse("sparse_attention", TypeError, "expected an array", QKV | dict(pattern=given))


def test_jax_tracers_are_sent_to_subquad_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x, pattern = jax.numpy.ones((1, 2, 5, 8)), np.zeros((1, 2, 5, 3), I)
    with pytest.raises(TypeError, match=r"use subquad\.jax"):
        jax.jit(lambda a: subquad.sparse_attention(a, a, a, jax.numpy.asarray(pattern)))(x)
    with pytest.raises(TypeError, match=r"use subquad\.jax"):
        jax.jit(lambda a: subquad.sea_attention(a, a, a, a))(x)
    refuse("sea_attention", TypeError, "out: expected None for jax arrays", dict(q=x, k=x, v=x, probs=x, out=x))


@pytest.mark.parametrize("name", ["sparse_attention", "sea_attention"])
def test_tensors_of_other_devices_and_with_gradients(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {key: torch.from_numpy(x) for key, x in TABLES[name][0].items()}
    with pytest.raises((TypeError, subquad.UnsupportedError), match=rf"^\[{name}\] q: "):
        getattr(subquad, name)(**tensors | dict(q=torch.ones(2, 4, 5, 8, device="meta")))
    tensors["k"].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^\[{name}\] k: .*subquad\.torch"):
        getattr(subquad, name)(**tensors)
    with torch.no_grad():
        assert getattr(subquad, name)(**tensors).shape == (2, 4, 5, 3)
