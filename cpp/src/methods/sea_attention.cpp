#include "subquad/sea_attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "methods/composition.h"
#include "subquad/block_pool.h"
#include "subquad/running_mean.h"
#include "subquad/sparse_attention.h"
#include "subquad/visible_keys.h"

namespace subquad {
namespace {

constexpr const char* kOp = "sea_attention";
constexpr const char* kOpBwd = "sea_attention_bwd";

/// What bounds the number of selected entries, whatever the probabilities are.
struct EntryBound {
  double top_k;
  int64_t heads, columns, cap;
  Group group;
  BudgetRule rule;

  /// Entries of `budget` columns with n visible keys, of which `rows` rows of n mod K have one key more than the others.
  double entries(double budget, double rows, int64_t n) const {
    const int64_t width = n / columns;
    const double narrow = double(std::min(width, cap)), wide = double(std::min(width + 1, cap));
    return budget * narrow + (wide - narrow) * std::min(budget, rows * double(n % columns));
  }

  /// Of one row of all heads, or with the groups head and batch of all rows, with n visible keys.
  double at(int64_t n, int64_t seq_q) const {
    const bool whole = group == Group::head || group == Group::batch;
    const double rows = double(heads) * (whole ? double(seq_q) : 1.0), all = double(columns);
    // Rounding adds at most half a column, for each head where every head rounds for itself.
    const double alone = group == Group::query || rule == BudgetRule::paper ? double(heads) : 1.0;
    double budget = alone * std::max(1.0, double(heads) / alone * top_k * all / double(n) + 0.5);
    if (whole) budget = rule == BudgetRule::paper ? budget * double(seq_q) : double(heads) * (top_k * all + 1.0);
    return std::ceil(entries(std::min(budget, rows * all), rows, n));
  }
};

/// One call: the checked arguments, and the steps that both passes share.
class Sea : public Composition {
 public:
  Sea(const char* op, const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, ConstTensor probs,
      const SeaAttentionOptions& options, const Workspace* workspace)
      : Composition(op, queue, q, k, v, workspace), probs_(probs), o_(options) {
    check();
  }

  void forward(Tensor out, Tensor lse, const SeaPattern& made) {
    check_results(out, lse,
                  {&probs_, &o_.row_scale, &o_.mix, &o_.context, &o_.key_mask, &o_.query_mask, &made.bits,
                   &made.visible, &made.positions});
    check_made(made);
    select(made);
    make_context();
    const SparseAttentionOptions options = sparse_options();
    step([&] { return sparse_attention_workspace_bytes(queue_, q_, k_, v_, pattern_, options, out, lse); },
         [&](Workspace w) { sparse_attention(queue_, q_, k_, v_, pattern_, options, out, lse, w); });
  }

  void backward(ConstTensor dout, ConstTensor dlse, const SeaAttentionGradients& g) {
    check_gradients(dout, {}, {},
                    {{"dq", g.dq, q_}, {"dk", g.dk, k_}, {"dv", g.dv, v_}, {"dprobs", g.dprobs, pooled_probs()}},
                    {&probs_, &o_.row_scale, &o_.mix, &o_.context, &o_.key_mask, &o_.query_mask, &dlse});
    // Where the context is pooled, the operators behind this call see scratch memory in the place of dv.
    for (const auto& [name, gradient] : {std::pair("dv", &g.dv), {"dprobs", &g.dprobs}})
      core::check_output(op_, name, *gradient, {&g.drow_scale, &g.dmix, &g.dcontext});
    select({});
    make_context();
    SparseAttentionOptions options = sparse_options();
    options.max_entries = max_entries();
    SparseAttentionGradients sparse = {g.dq, g.dk, g.dv, g.drow_scale, g.dmix, g.dcontext};
    if (own_context()) {
      if (g.dcontext.defined()) core::invalid(op_, "dcontext", "none without context", "an array");
      sparse.dv = scratch<float>({batch(), heads(), seq_k(), dim_v()});
      sparse.dcontext = scratch<float>({batch(), heads(), context_rows(), dim_v()});
    }
    step(
        [&] { return sparse_attention_bwd_workspace_bytes(queue_, dout, dlse, q_, k_, v_, pattern_, options, sparse); },
        [&](Workspace w) { sparse_attention_bwd(queue_, dout, dlse, q_, k_, v_, pattern_, options, sparse, w); });
    if (own_context()) backward_context(sparse.dcontext, sparse.dv, g);
  }

 private:
  int64_t columns() const { return probs_.shape[3]; }
  bool own_context() const { return o_.mix.defined() && !o_.context.defined(); }
  int64_t context_rows() const { return o_.is_causal ? seq_q() : 1; }
  /// What has a gradient through the pooled context.
  ConstTensor pooled_probs() const { return own_context() && !o_.is_causal ? probs_ : ConstTensor{}; }

  void check() {
    core::check_array(op_, "k", queue_, k_, {{"B", batch()}, {"H", heads()}, {"M", seq_k()}, {"D", dim()}}, {q_.dtype});
    core::check_array(op_, "probs", queue_, probs_, {{"B", batch()}, {"H", heads()}, {"N", seq_q()}, {"K", core::kAny}},
                      {DType::f32});
    check_mask("key_mask", o_.key_mask, "M", seq_k());
    check_mask("query_mask", o_.query_mask, "N", seq_q());
    scale_ = scale_of(op_, o_.scale, dim());
    check_per_row("row_scale", o_.row_scale);
    check_per_row("mix", o_.mix);
    if (o_.context.defined()) {
      if (!o_.mix.defined()) core::invalid(op_, "context", "mix with it", "none");
      const int64_t rows = o_.context.rank == 4 && o_.context.shape[2] == 1 ? 1 : seq_q();
      core::check_array(op_, "context", queue_, o_.context,
                        {{"B", batch()}, {"H", heads()}, {"N", rows}, {"E", dim_v()}}, {q_.dtype, DType::f32});
    }
    if (!(o_.select.top_k >= 1) || std::isinf(o_.select.top_k))
      core::invalid(op_, "top_k", "a finite number of at least 1", std::to_string(o_.select.top_k));
    const bool per_row = o_.select.group == Group::query || o_.select.group == Group::row_heads;
    if (o_.is_causal && !per_row)
      core::invalid(op_, "group", "\"query\" or \"row_heads\" with is_causal=True",
                    o_.select.group == Group::head ? "\"head\"" : "\"batch\"");
    core::check_range(op_, "block_cap", o_.block_cap, 0, INT32_MAX);
    cap_ = o_.block_cap ? o_.block_cap : int64_t(std::ceil(std::min(o_.select.top_k, double(INT32_MAX))));
  }

  void check_per_row(const char* name, const ConstTensor& t) const {
    if (t.defined())
      core::check_array(op_, name, queue_, t, {{"B", batch()}, {"H", heads()}, {"N", seq_q()}}, {DType::f32});
  }

  void check_made(const SeaPattern& made) const {
    if (made.bits.defined() != made.visible.defined() || made.positions.defined() > made.bits.defined())
      core::invalid(op_, "pattern", "all of its arrays or none", "some of them");
    if (made.bits.defined() && made.positions.defined() != o_.key_mask.defined())
      core::invalid(op_, "pattern", "positions where there is a key_mask", "another");
    for (const auto& [name, array] :
         {std::pair("bits", &made.bits), {"visible", &made.visible}, {"positions", &made.positions}})
      core::check_output(op_, name, *array,
                         {&q_, &k_, &v_, &probs_, &o_.row_scale, &o_.mix, &o_.context, &o_.key_mask, &o_.query_mask});
  }

  /// The selected blocks, in `made` or in scratch.
  void select(const SeaPattern& made) {
    const Tensor bits =
        made.bits.defined() ? made.bits : scratch<uint8_t>({batch(), heads(), seq_q(), (columns() + 7) / 8});
    const Tensor visible = made.visible.defined() ? made.visible : scratch<int32_t>({batch(), seq_q()});
    Tensor positions = made.positions;
    if (o_.key_mask.defined() && !positions.defined()) positions = scratch<int32_t>({batch(), seq_k()});
    step([&] { visible_keys(queue_, o_.key_mask, o_.query_mask, o_.is_causal, seq_k(), visible, positions); });
    step([&] { return select_blocks_workspace_bytes(queue_, probs_, visible, o_.select, bits); },
         [&](Workspace w) { select_blocks(queue_, probs_, visible, o_.select, bits, w); });
    pattern_.bits = bits, pattern_.visible = visible, pattern_.positions = positions;
    pattern_.num_columns = columns(), pattern_.block_cap = cap_;
  }

  /// The default context.
  void make_context() {
    if (!own_context()) return;
    const Tensor context = scratch<float>({batch(), heads(), context_rows(), dim_v()});
    if (o_.is_causal)
      step([&] { return running_mean_workspace_bytes(queue_, v_, o_.key_mask, {}, context, {}); },
           [&](Workspace w) { running_mean(queue_, v_, o_.key_mask, {}, context, {}, w); });
    else
      step([&] { return block_pool_workspace_bytes(queue_, v_, probs_, o_.key_mask, o_.query_mask, context); },
           [&](Workspace w) { block_pool(queue_, v_, probs_, o_.key_mask, o_.query_mask, context, w); });
    context_ = context;
  }

  void backward_context(ConstTensor dcontext, ConstTensor dv, const SeaAttentionGradients& g) {
    if (o_.is_causal)
      step([&] { return running_mean_bwd_workspace_bytes(queue_, dcontext, dv, o_.key_mask, {}, g.dv); },
           [&](Workspace w) { running_mean_bwd(queue_, dcontext, dv, o_.key_mask, {}, g.dv, w); });
    else
      step(
          [&] {
            return block_pool_bwd_workspace_bytes(queue_, dcontext, dv, v_, probs_, o_.key_mask, o_.query_mask, g.dv,
                                                  g.dprobs);
          },
          [&](Workspace w) {
            block_pool_bwd(queue_, dcontext, dv, v_, probs_, o_.key_mask, o_.query_mask, g.dv, g.dprobs, w);
          });
  }

  SparseAttentionOptions sparse_options() const {
    SparseAttentionOptions options;
    options.scale = scale_;
    options.row_scale = o_.row_scale, options.mix = o_.mix;
    options.context = own_context() ? context_ : o_.context;
    options.query_mask = o_.query_mask;
    return options;
  }

  /// At least the number of selected entries, from the shapes alone: a row may see any number of keys up to its limit.
  int64_t max_entries() const {
    const EntryBound bound = {o_.select.top_k, heads(), columns(), cap_, o_.select.group, o_.select.budget};
    const bool whole = o_.select.group == Group::head || o_.select.group == Group::batch;
    double most = 0, total = 0;
    for (int64_t n = 1; n <= seq_k(); ++n) {
      most = std::max(most, bound.at(n, seq_q()));
      if (o_.is_causal && n > seq_k() - seq_q()) total += most;  // row n - 1 - (M - N) sees n keys at most
    }
    if (!o_.is_causal) total = whole ? most : most * double(seq_q());
    return int64_t(total) * batch();
  }

  ConstTensor probs_;
  SeaAttentionOptions o_;
  double scale_ = 0;
  int64_t cap_ = 0;
  SparsePattern pattern_;
  ConstTensor context_;
};

}  // namespace

void sea_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, ConstTensor probs,
                   const SeaAttentionOptions& options, Tensor out, Tensor lse, const SeaPattern& pattern,
                   Workspace workspace) {
  core::check_workspace(kOp, workspace,
                        sea_attention_workspace_bytes(queue, q, k, v, probs, options, out, lse, pattern));
  Sea(kOp, queue, q, k, v, probs, options, &workspace).forward(out, lse, pattern);
}

int64_t sea_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                      ConstTensor probs, const SeaAttentionOptions& options, Tensor out, Tensor lse,
                                      const SeaPattern& pattern) {
  Sea call(kOp, queue, q, k, v, probs, options, nullptr);
  call.forward(out, lse, pattern);
  return call.bytes();
}

void sea_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q, ConstTensor k,
                       ConstTensor v, ConstTensor probs, const SeaAttentionOptions& options,
                       const SeaAttentionGradients& gradients, Workspace workspace) {
  core::check_workspace(kOpBwd, workspace,
                        sea_attention_bwd_workspace_bytes(queue, dout, dlse, q, k, v, probs, options, gradients));
  Sea(kOpBwd, queue, q, k, v, probs, options, &workspace).backward(dout, dlse, gradients);
}

int64_t sea_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor dlse, ConstTensor q,
                                          ConstTensor k, ConstTensor v, ConstTensor probs,
                                          const SeaAttentionOptions& options, const SeaAttentionGradients& gradients) {
  Sea call(kOpBwd, queue, q, k, v, probs, options, nullptr);
  call.backward(dout, dlse, gradients);
  return call.bytes();
}

}  // namespace subquad
