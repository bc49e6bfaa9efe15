#include "subquad/eva_attention.h"

#include "core/philox.h"
#include "core/registry.h"
#include "methods/composition.h"
#include "subquad/segment_mean.h"
#include "subquad/sum_arrays.h"

namespace subquad {
namespace {

constexpr const char* kOp = "eva_attention";
constexpr const char* kOpBwd = "eva_attention_bwd";

/// One call: the checked arguments, and the steps that both passes share. Both softmaxes go to the kernels directly:
/// the public softmax_attention has neither blocks nor several sets of keys.
class Eva : public Composition {
 public:
  Eva(const char* op, const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const EvaOptions& options,
      const EvaChunks& past, const Workspace* workspace)
      : Composition(op, queue, q, k, v, workspace), o_(options), past_(past) {
    check();
  }

  void forward(Tensor out, Tensor lse, const EvaChunks& made) {
    check_results(out, lse, {&o_.key_mask, &o_.k_bar, &o_.mu, &o_.noise});
    if (made.k_bar.defined()) check_chunks("chunks", made, num_chunks());
    condense(made);
    attend(out, lse);
  }

  void backward(ConstTensor dout, ConstTensor out, ConstTensor lse, const EvaGradients& g) {
    check_gradients(
        dout, out, lse,
        {{"dq", g.dq, q_}, {"dk", g.dk, k_}, {"dv", g.dv, v_}, {"dk_bar", g.dk_bar, o_.k_bar}, {"dmu", g.dmu, o_.mu}},
        {&o_.key_mask, &o_.k_bar, &o_.mu, &o_.noise});
    condense({});
    if (!out.defined() || !lse.defined()) {
      const Tensor own_out = scratch<float>({batch(), heads(), seq_q(), dim_v()});
      const Tensor own_lse = scratch<float>({batch(), heads(), seq_q()});
      attend(own_out, own_lse);
      out = own_out, lse = own_lse;
    }
    SoftmaxAttentionArgs args = read_args();
    args.out = core::operand(out), args.lse = core::operand(lse);
    args.dout = core::operand(dout), args.dq = core::operand(g.dq);
    const Tensor dk_block = like_keys(dim()), dv_block = like_keys(dim_v());
    args.sweeps[0].dk = core::operand(dk_block), args.sweeps[0].dv = core::operand(dv_block);
    Tensor dk_bar[2], dbeta[2];
    const int own = past_.k_bar.defined() ? args.num_sweeps - 2 : args.num_sweeps - 1;  // sweeps over chunks of k
    for (int i = 0; i < own; ++i) {
      dk_bar[i] = per_chunk(dim()), dbeta[i] = per_chunk(dim_v());
      args.sweeps[1 + i].dk = core::operand(dk_bar[i]), args.sweeps[1 + i].dv = core::operand(dbeta[i]);
    }
    launch(&Kernels::softmax_attention_bwd, args);
    if (own == 2)
      step([&] {
        sum_arrays(queue_, {{dk_bar[0]}, {dk_bar[1]}}, dk_bar[0]);
        sum_arrays(queue_, {{dbeta[0]}, {dbeta[1]}}, dbeta[0]);
      });
    backward_condense(dk_bar[0], dbeta[0], dk_block, dv_block, g);
  }

 private:
  int64_t num_chunks() const { return seq_k() / o_.chunk_size + (seq_k() % o_.chunk_size > 0); }
  bool given() const { return given_; }

  void check() {
    check_mask("key_mask", o_.key_mask, "M", seq_k());
    scale_ = scale_of(op_, o_.scale, dim());
    core::check_range(op_, "window", o_.window, 1, int64_t(1) << 40);
    core::check_range(op_, "chunk_size", o_.chunk_size, 1, int64_t(1) << 40);
    const bool nested = o_.window % o_.chunk_size == 0 || o_.chunk_size % o_.window == 0;
    if ((o_.partition || o_.is_causal) && !nested)
      core::invalid(op_, "chunk_size", "a divisor or a multiple of window = " + std::to_string(o_.window),
                    std::to_string(o_.chunk_size));
    given_ = o_.k_bar.defined();
    if (given_ != o_.mu.defined()) core::invalid(op_, "landmarks", "k_bar and mu, or neither", "one of them");
    const std::initializer_list<core::Axis> landmark = {
        {"B", batch()}, {"Hkv", heads_kv()}, {"C", num_chunks()}, {"D", dim()}};
    if (given_) {
      core::check_array(op_, "landmarks k_bar", queue_, o_.k_bar, landmark, {DType::f32, q_.dtype});
      core::check_array(op_, "landmarks mu", queue_, o_.mu, landmark, {DType::f32, q_.dtype});
    }
    if (o_.noise.defined()) core::check_array(op_, "noise", queue_, o_.noise, landmark, {DType::f32});
    if (!past_.k_bar.defined()) return;
    if (!o_.is_causal) core::invalid(op_, "state", "is_causal=True with it", "False");
    check_chunks("state", past_, past_.k_bar.rank == 4 ? past_.k_bar.shape[2] : 0);
  }

  void check_chunks(const std::string& name, const EvaChunks& chunks, int64_t count) const {
    core::check_array(op_, (name + " k_bar").c_str(), queue_, chunks.k_bar,
                      {{"B", batch()}, {"Hkv", heads_kv()}, {"C", count}, {"D", dim()}}, {DType::f32});
    core::check_array(op_, (name + " beta").c_str(), queue_, chunks.beta,
                      {{"B", batch()}, {"Hkv", heads_kv()}, {"C", count}, {"E", dim_v()}}, {DType::f32});
    core::check_array(op_, (name + " log_mass").c_str(), queue_, chunks.log_mass, {{"B", batch()}, {"C", count}},
                      {DType::f32});
  }

  Tensor like_keys(int64_t dim) { return scratch<float>({batch(), heads_kv(), seq_k(), dim}); }
  Tensor per_chunk(int64_t dim) { return scratch<float>({batch(), heads_kv(), num_chunks(), dim}); }

  void launch(Slot<SoftmaxAttentionArgs> Kernels::* slot, const SoftmaxAttentionArgs& args) {
    step([&] { return core::workspace_bytes(op_, queue_, slot, args); },
         [&](Workspace w) { core::launch(op_, queue_, slot, args, w); });
  }

  SegmentMeanOptions segments() const {
    SegmentMeanOptions options;
    options.segment_size = o_.chunk_size;
    options.mask = o_.key_mask;
    options.unit_counts = !o_.chunk_mass;
    return options;
  }

  /// The chunks of k: k_bar, the rows w that weigh their keys, beta and log_mass.
  void condense(const EvaChunks& made) {
    const bool out = made.k_bar.defined();
    chunks_.k_bar = out ? made.k_bar : per_chunk(dim());
    chunks_.beta = out ? made.beta : per_chunk(dim_v());
    chunks_.log_mass = out ? made.log_mass : scratch<float>({batch(), num_chunks()});
    if (num_chunks() == 0) return;
    const SegmentMeanOptions options = segments();
    step([&] { return segment_mean_workspace_bytes(queue_, k_, options, chunks_.k_bar, chunks_.log_mass); },
         [&](Workspace w) { segment_mean(queue_, k_, options, chunks_.k_bar, chunks_.log_mass, w); });
    if (given()) step([&] { sum_arrays(queue_, {{o_.k_bar}}, chunks_.k_bar); });
    take_rows();
    const SoftmaxAttentionArgs args = condense_args();
    launch(&Kernels::softmax_attention, args);
  }

  void take_rows() {
    rows_ = given() ? o_.mu : ConstTensor(chunks_.k_bar);
    if (!o_.noise.defined() && o_.draw) {
      const Tensor noise = scratch<float>({1, heads_kv(), num_chunks(), dim()});
      step([&] { random_normal(queue_, o_.seed, philox::kNoise, noise); });
      o_.noise = repeated(noise, 0, batch());
    }
    if (!o_.noise.defined()) return;
    const Tensor moved = per_chunk(dim());
    const double noise_std = 1 / std::sqrt(scale_);
    step([&] { sum_arrays(queue_, {{rows_}, {o_.noise, noise_std}}, moved); });
    rows_ = moved;
  }

  /// Rows w_c over the keys of their own chunks.
  SoftmaxAttentionArgs condense_args() {
    if (!beta_lse_.defined()) beta_lse_ = scratch<float>({batch(), heads_kv(), num_chunks()});
    SoftmaxAttentionArgs args = {};
    args.batch = batch(), args.heads_q = heads_kv(), args.heads_kv = heads_kv(), args.seq_q = num_chunks();
    args.dim_qk = dim(), args.dim_v = dim_v(), args.scale = float(scale_);
    args.q = core::operand(rows_);
    args.out = core::operand(chunks_.beta), args.lse = core::operand(beta_lse_);
    args.num_sweeps = 1;
    args.sweeps[0] = key_sweep();
    args.sweeps[0].key_norm_bias = float(-0.5 * scale_);
    args.sweeps[0].rule.kind = Visible::cell;
    args.sweeps[0].rule.chunk = o_.chunk_size;
    return args;
  }

  SoftmaxSweep key_sweep() const {
    SoftmaxSweep sweep = {};
    sweep.seq_k = seq_k();
    sweep.k = core::operand(k_), sweep.v = core::operand(v_);
    sweep.key_mask = core::operand(o_.key_mask);
    sweep.bias_group = 1;
    return sweep;
  }

  SoftmaxSweep chunk_sweep(const EvaChunks& chunks, Visible kind) const {
    SoftmaxSweep sweep = {};
    sweep.seq_k = chunks.k_bar.shape[2];
    sweep.k = core::operand(chunks.k_bar), sweep.v = core::operand(chunks.beta);
    sweep.key_bias = core::operand(with_axis(chunks.log_mass, 1));
    sweep.bias_group = heads();
    sweep.rule.kind = kind;
    sweep.rule.offset = seq_k() - seq_q();
    // Published: a causal query sees every chunk before its own, those of its block too.
    sweep.rule.block = o_.is_causal && !o_.partition ? o_.chunk_size : o_.window;
    sweep.rule.chunk = o_.chunk_size;
    return sweep;
  }

  /// Queries over the keys of their block and the chunks that they see.
  SoftmaxAttentionArgs read_args() const {
    SoftmaxAttentionArgs args = {};
    args.batch = batch(), args.heads_q = heads(), args.heads_kv = heads_kv(), args.seq_q = seq_q();
    args.dim_qk = dim(), args.dim_v = dim_v(), args.scale = float(scale_);
    args.q = core::operand(q_);
    SoftmaxSweep& block = args.sweeps[args.num_sweeps++];
    block = key_sweep();
    block.rule = {Visible::block, o_.is_causal, seq_k() - seq_q(), 0, 0, o_.window, 0};
    if (o_.is_causal || o_.partition) args.sweeps[args.num_sweeps++] = chunk_sweep(chunks_, Visible::before);
    if (!o_.is_causal && o_.partition) args.sweeps[args.num_sweeps++] = chunk_sweep(chunks_, Visible::after);
    if (!o_.is_causal && !o_.partition) args.sweeps[args.num_sweeps++] = chunk_sweep(chunks_, Visible::all);
    if (past_.k_bar.defined()) args.sweeps[args.num_sweeps++] = chunk_sweep(past_, Visible::all);
    return args;
  }

  void attend(Tensor out, Tensor lse) {
    SoftmaxAttentionArgs args = read_args();
    args.out = core::operand(out), args.lse = core::operand(lse);
    launch(&Kernels::softmax_attention, args);
  }

  /// From the gradients of k_bar and beta, and those of the keys and values of the blocks, to the caller's.
  void backward_condense(const Tensor& dk_bar, const Tensor& dbeta, const Tensor& dk_block, const Tensor& dv_block,
                         const EvaGradients& g) {
    if (num_chunks() == 0)
      return step([&] { sum_arrays(queue_, {{dk_block}}, g.dk), sum_arrays(queue_, {{dv_block}}, g.dv); });
    const Tensor drows = per_chunk(dim()), dk_chunk = like_keys(dim()), dv_chunk = like_keys(dim_v());
    SoftmaxAttentionArgs args = condense_args();
    args.dout = core::operand(dbeta), args.dq = core::operand(drows);
    args.sweeps[0].dk = core::operand(dk_chunk), args.sweeps[0].dv = core::operand(dv_chunk);
    launch(&Kernels::softmax_attention_bwd, args);
    step([&] { sum_arrays(queue_, {{dv_block}, {dv_chunk}}, g.dv); });
    if (given()) {
      step([&] {
        sum_arrays(queue_, {{dk_block}, {dk_chunk}}, g.dk);
        sum_arrays(queue_, {{dk_bar}}, g.dk_bar);
        sum_arrays(queue_, {{drows}}, g.dmu);
      });
      return;
    }
    step([&] {
      sum_arrays(queue_, {{dk_bar}, {drows}}, drows);
      sum_arrays(queue_, {{dk_block}, {dk_chunk}}, dk_block);
    });
    const SegmentMeanOptions options = segments();
    step([&] { return segment_mean_bwd_workspace_bytes(queue_, drows, dk_block, options, g.dk); },
         [&](Workspace w) { segment_mean_bwd(queue_, drows, dk_block, options, g.dk, w); });
  }

  EvaOptions o_;
  EvaChunks past_, chunks_;
  double scale_ = 0;
  bool given_ = false;
  ConstTensor rows_;  // w [B, Hkv, C, D]
  Tensor beta_lse_;   // [B, Hkv, C]
};

}  // namespace

int64_t eva_attention_workspace_bytes(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v,
                                      const EvaOptions& options, const EvaChunks& past, Tensor out, Tensor lse,
                                      const EvaChunks& chunks) {
  Eva call(kOp, queue, q, k, v, options, past, nullptr);
  call.forward(out, lse, chunks);
  return call.bytes();
}

void eva_attention(const Queue& queue, ConstTensor q, ConstTensor k, ConstTensor v, const EvaOptions& options,
                   const EvaChunks& past, Tensor out, Tensor lse, const EvaChunks& chunks, Workspace workspace) {
  core::check_workspace(kOp, workspace, eva_attention_workspace_bytes(queue, q, k, v, options, past, out, lse, chunks));
  Eva(kOp, queue, q, k, v, options, past, &workspace).forward(out, lse, chunks);
}

int64_t eva_attention_bwd_workspace_bytes(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k,
                                          ConstTensor v, const EvaOptions& options, const EvaChunks& past,
                                          ConstTensor out, ConstTensor lse, const EvaGradients& gradients) {
  Eva call(kOpBwd, queue, q, k, v, options, past, nullptr);
  call.backward(dout, out, lse, gradients);
  return call.bytes();
}

void eva_attention_bwd(const Queue& queue, ConstTensor dout, ConstTensor q, ConstTensor k, ConstTensor v,
                       const EvaOptions& options, const EvaChunks& past, ConstTensor out, ConstTensor lse,
                       const EvaGradients& gradients, Workspace workspace) {
  core::check_workspace(kOpBwd, workspace,
                        eva_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, past, out, lse, gradients));
  Eva(kOpBwd, queue, q, k, v, options, past, &workspace).backward(dout, out, lse, gradients);
}

}  // namespace subquad
