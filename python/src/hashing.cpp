#include "call.h"
#include "subquad/bucket_attention.h"
#include "subquad/bucket_gradient.h"
#include "subquad/bucket_sort.h"
#include "subquad/collision_attention.h"
#include "subquad/l2_normalize.h"
#include "subquad/lsh_hash.h"
#include "subquad/random.h"
#include "values.h"

namespace subquad::python {
namespace {

using nb::handle;
using RandomFunction = void (*)(const Queue&, Seed, uint32_t, Tensor);

template <RandomFunction Function>
void random(handle seed_value, handle stream, handle out) {
  constexpr const char* op = Function == &random_uniform  ? "random_uniform"
                             : Function == &random_normal ? "random_normal"
                                                          : "random_signs";
  Border border(op);
  const Tensor tensor = border.out("out", out);
  const Seed key = border.seed(seed_value);
  const int64_t number = integer(op, "stream", stream);
  if (number < 0 || number > int64_t(UINT32_MAX))
    throw std::invalid_argument(sentence(op, "stream", "a value in [0, 4294967295]", std::to_string(number)));
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  Function(queue, key, uint32_t(number), tensor);
}

Carving carving_of(const char* op, handle value) {
  return choice<Carving>(op, "carving", value, {{"strided", Carving::strided}, {"published", Carving::published}});
}

GradientRule rule_of(const char* op, handle value) {
  return choice<GradientRule>(op, "grad", value,
                              {{"exact", GradientRule::exact}, {"lower_bound", GradientRule::lower_bound}});
}

void hash_planes(handle x_, handle planes_, handle codes_) {
  Border border("lsh_hash");
  const ConstTensor x = border.in("x", x_), planes = border.in("planes", planes_);
  const Tensor codes = border.out("codes", codes_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return lsh_hash_workspace_bytes(queue, x, planes, codes); },
      [&](Workspace w) { lsh_hash(queue, x, planes, codes, w); });
}

void hash_signs(handle x_, handle signs_, handle hash_bits_, handle carving_, handle codes_) {
  constexpr const char* op = "lsh_hash";
  Border border(op);
  const ConstTensor x = border.in("x", x_), signs = border.in("signs", signs_);
  const Tensor codes = border.out("codes", codes_);
  const int64_t hash_bits = integer(op, "hash_bits", hash_bits_);
  const Carving carving = carving_of(op, carving_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return lsh_hash_hadamard_workspace_bytes(queue, x, signs, hash_bits, carving, codes); },
      [&](Workspace w) { lsh_hash_hadamard(queue, x, signs, hash_bits, carving, codes, w); });
}

void sort(handle codes_, handle num_buckets_, handle mask_, handle order_, handle offsets_) {
  Border border("bucket_sort");
  const ConstTensor codes = border.in("codes", codes_), mask = border.in("mask", mask_);
  const Tensor order = border.out("order", order_), offsets = border.out("offsets", offsets_);
  const int64_t num_buckets = integer("bucket_sort", "num_buckets", num_buckets_);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return bucket_sort_workspace_bytes(queue, codes, num_buckets, mask, order, offsets); },
      [&](Workspace w) { bucket_sort(queue, codes, num_buckets, mask, order, offsets, w); });
}

BucketAttentionOptions bucket_options(const char* op, Border& border, handle num_buckets, handle scale, handle key_mask,
                                      handle query_mask, handle is_causal) {
  BucketAttentionOptions options;
  options.num_buckets = integer(op, "num_buckets", num_buckets);
  options.scale = number(op, "scale", scale);
  options.is_causal = boolean(op, "is_causal", is_causal);
  options.key_mask = border.in("key_mask", key_mask);
  options.query_mask = border.in("query_mask", query_mask);
  return options;
}

void bucket(handle codes_q_, handle codes_k_, handle v_, handle num_buckets, handle scale, handle key_mask,
            handle query_mask, handle is_causal, handle out_) {
  constexpr const char* op = "bucket_attention";
  Border border(op);
  const ConstTensor codes_q = border.in("codes_q", codes_q_), codes_k = border.in("codes_k", codes_k_);
  const ConstTensor v = border.in("v", v_);
  const Tensor out = border.out("out", out_);
  const auto options = bucket_options(op, border, num_buckets, scale, key_mask, query_mask, is_causal);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return bucket_attention_workspace_bytes(queue, codes_q, codes_k, v, options, out); },
      [&](Workspace w) { bucket_attention(queue, codes_q, codes_k, v, options, out, w); });
}

void bucket_bwd(handle dout_, handle codes_q_, handle codes_k_, handle num_buckets, handle scale, handle key_mask,
                handle query_mask, handle is_causal, handle dv_) {
  constexpr const char* op = "bucket_attention_bwd";
  Border border(op);
  const ConstTensor dout = border.in("dout", dout_);
  const ConstTensor codes_q = border.in("codes_q", codes_q_), codes_k = border.in("codes_k", codes_k_);
  const Tensor dv = border.out("dv", dv_);
  const auto options = bucket_options(op, border, num_buckets, scale, key_mask, query_mask, is_causal);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return bucket_attention_bwd_workspace_bytes(queue, dout, codes_q, codes_k, options, dv); },
      [&](Workspace w) { bucket_attention_bwd(queue, dout, codes_q, codes_k, options, dv, w); });
}

void gradient(handle dout_, handle q_, handle k_, handle v_, handle codes_q_, handle codes_k_, handle hash_bits,
              handle num_samples, handle grad, handle seed_value, handle key_mask, handle query_mask, handle is_causal,
              handle dq_, handle dk_) {
  constexpr const char* op = "bucket_gradient";
  Border border(op);
  const ConstTensor dout = border.in("dout", dout_), q = border.in("q", q_), k = border.in("k", k_),
                    v = border.in("v", v_);
  const ConstTensor codes_q = border.in("codes_q", codes_q_), codes_k = border.in("codes_k", codes_k_);
  const Tensor dq = border.out("dq", dq_), dk = border.out("dk", dk_);
  BucketGradientOptions options;
  options.hash_bits = integer(op, "hash_bits", hash_bits);
  options.num_samples = integer(op, "num_samples", num_samples);
  options.rule = rule_of(op, grad);
  options.seed = border.seed(seed_value);
  options.is_causal = boolean(op, "is_causal", is_causal);
  options.key_mask = border.in("key_mask", key_mask);
  options.query_mask = border.in("query_mask", query_mask);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return bucket_gradient_workspace_bytes(queue, dout, q, k, v, codes_q, codes_k, options, dq, dk); },
      [&](Workspace w) { bucket_gradient(queue, dout, q, k, v, codes_q, codes_k, options, dq, dk, w); });
}

CollisionAttentionOptions collision_options(const char* op, Border& border, handle hash_bits, handle key_mask,
                                            handle query_mask, handle is_causal) {
  CollisionAttentionOptions options;
  options.hash_bits = integer(op, "hash_bits", hash_bits);
  options.is_causal = boolean(op, "is_causal", is_causal);
  options.key_mask = border.in("key_mask", key_mask);
  options.query_mask = border.in("query_mask", query_mask);
  return options;
}

void collision(handle q_, handle k_, handle v_, handle hash_bits, handle key_mask, handle query_mask, handle is_causal,
               handle out_) {
  constexpr const char* op = "collision_attention";
  Border border(op);
  const ConstTensor q = border.in("q", q_), k = border.in("k", k_), v = border.in("v", v_);
  const Tensor out = border.out("out", out_);
  const auto options = collision_options(op, border, hash_bits, key_mask, query_mask, is_causal);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return collision_attention_workspace_bytes(queue, q, k, v, options, out); },
      [&](Workspace w) { collision_attention(queue, q, k, v, options, out, w); });
}

void collision_bwd(handle dout_, handle q_, handle k_, handle v_, handle hash_bits, handle grad, handle key_mask,
                   handle query_mask, handle is_causal, handle dq_, handle dk_, handle dv_) {
  constexpr const char* op = "collision_attention_bwd";
  Border border(op);
  const ConstTensor dout = border.in("dout", dout_), q = border.in("q", q_), k = border.in("k", k_),
                    v = border.in("v", v_);
  const Tensor dq = border.out("dq", dq_), dk = border.out("dk", dk_), dv = optional_out(border, "dv", dv_);
  const auto options = collision_options(op, border, hash_bits, key_mask, query_mask, is_causal);
  const GradientRule rule = rule_of(op, grad);
  const Queue queue = border.queue();
  run_with_workspace(
      border, [&] { return collision_attention_bwd_workspace_bytes(queue, dout, q, k, v, options, rule, dq, dk, dv); },
      [&](Workspace w) { collision_attention_bwd(queue, dout, q, k, v, options, rule, dq, dk, dv, w); });
}

void normalize(handle x_, handle y_, handle lse_) {
  Border border("l2_normalize");
  const ConstTensor x = border.in("x", x_);
  const Tensor y = border.out("y", y_), lse = optional_out(border, "lse", lse_);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  l2_normalize(queue, x, y, lse);
}

void normalize_bwd(handle dy_, handle y_, handle lse_, handle dx_) {
  Border border("l2_normalize_bwd");
  const ConstTensor dy = border.in("dy", dy_), y = border.in("y", y_), lse = border.in("lse", lse_);
  const Tensor dx = border.out("dx", dx_);
  const Queue queue = border.queue();
  nb::gil_scoped_release unlocked;
  l2_normalize_bwd(queue, dy, y, lse, dx);
}

int64_t parts(int64_t num_hashes, int64_t hash_bits, int64_t dim, handle carving) {
  return hadamard_parts(num_hashes, hash_bits, dim, carving_of("lsh_hash", carving));
}

}  // namespace

void bind_hashing(nb::module_& m) {
  define(m, "random_uniform", &random<random_uniform>);
  define(m, "random_normal", &random<random_normal>);
  define(m, "random_signs", &random<random_signs>);
  define(m, "hadamard_parts", &parts);
  define(m, "hadamard_padded", &hadamard_padded);
  define(m, "lsh_hash", &hash_planes);
  define(m, "lsh_hash_hadamard", &hash_signs);
  define(m, "bucket_sort", &sort);
  define(m, "bucket_attention", &bucket);
  define(m, "bucket_attention_bwd", &bucket_bwd);
  define(m, "bucket_gradient", &gradient);
  define(m, "collision_attention", &collision);
  define(m, "collision_attention_bwd", &collision_bwd);
  define(m, "l2_normalize", &normalize);
  define(m, "l2_normalize_bwd", &normalize_bwd);
}

}  // namespace subquad::python
