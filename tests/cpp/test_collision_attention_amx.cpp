// The AMX kernel of collision_attention on emulated tile registers, against the equations in double.
#include "collision_attention_reference.h"

#if defined(__x86_64__)
#include "amx_emulation.h"
#include "core/check.h"
#define SUBQUAD_ISA x86_64_amx_emulated
#include "cpu/amx/collision_attention.cpp"

using namespace collision;

namespace {

CollisionAttentionArgs args_of(const Problem& p) {
  CollisionAttentionArgs args = {};
  args.batch = p.s.batch, args.heads_q = p.s.heads, args.heads_kv = p.s.heads_kv, args.seq_q = p.s.n;
  args.seq_k = p.s.m, args.dim_qk = p.s.d, args.dim_v = p.s.e;
  args.hash_bits = int32_t(p.s.bits), args.causal = p.s.causal;
  args.q = core::operand(p.q.view), args.k = core::operand(p.k.view), args.v = core::operand(p.v.view);
  args.key_mask = core::operand(p.options.key_mask), args.query_mask = core::operand(p.options.query_mask);
  args.out = core::operand(p.out.view);
  return args;
}

void run_emulated(Problem& p, int threads) {
  const Slot<CollisionAttentionArgs>& slot = cpu::SUBQUAD_ISA::collision_attention_slot;
  const CollisionAttentionArgs args = args_of(p);
  const Queue queue = Queue::cpu(threads);
  std::vector<char> workspace(size_t(slot.workspace_bytes(queue, args)), char(0xff));
  CHECK(slot.supports(args) == nullptr);
  CHECK(slot.run(queue, args, workspace.data()) == nullptr);
}

/// Values of one sign add up to the sum of their magnitudes, so that a bound on the rounding of the weights (2^-8) and
/// of the output (2^-8) is a bound on the relative error.
void check_emulated(const Sizes& sizes) {
  Problem p(sizes);
  for (int64_t i = 0; i < p.v.view.numel(); ++i) p.v.set(i, std::fabs(p.v.values[size_t(i)]));
  const Reference<double> exact(p, GradientRule::exact, false);
  run_emulated(p, 2);
  for (size_t i = 0; i < exact.out.size(); ++i)
    CHECK_NEAR(p.out.get(int64_t(i)), exact.out[i], 1.1 * 0x1p-7 * exact.out[i]);
}

}  // namespace

TEST(sizes) {
  for (int64_t d : {1, 31, 32, 33, 64, 100})
    for (int64_t e : {1, 16, 17, 64}) check_emulated({1, 1, 1, 19, 70, d, e, 8, false, false, false, DType::bf16});
  for (int64_t n : {8, 16, 17, 70})
    for (int64_t m : {1, 63, 64, 65, 130})
      for (bool causal : {false, true}) check_emulated({1, 1, 1, n, m, 16, 8, 4, causal, false, false, DType::bf16});
}

TEST(groups_masks_and_strides) {
  for (bool causal : {false, true})
    for (int64_t heads_kv : {1, 2, 4})
      check_emulated({2, 4, heads_kv, 40, 90, 24, 20, 8, causal, true, true, DType::bf16});
}

TEST(lengths_beyond_f32_squares) {
  for (double factor : {0x1p100, 0x1p-100, 0x1p-130}) {
    Problem p({1, 1, 1, 20, 70, 9, 9, 8, false, false, false, DType::bf16}), scaled(p.s);
    // Few bits, so that scaling is exact even where bfloat16 is subnormal.
    for (Array Problem::* x : {&Problem::q, &Problem::k}) {
      for (int64_t i = 0; i < (p.*x).view.numel(); ++i) {
        const double value = std::ceil((p.*x).values[size_t(i)] * 2);
        (p.*x).set(i, value), (scaled.*x).set(i, value * factor);
      }
    }
    run_emulated(p, 1), run_emulated(scaled, 1);
    bool same = true;
    for (int64_t i = 0; i < p.out.view.numel(); ++i) same &= p.out.get(i) == scaled.out.get(i);
    CHECK(same);
  }
}

TEST(later_tokens_and_threads) {
  Problem one({1, 2, 1, 90, 90, 10, 10, 8, true, false, false, DType::bf16}), other(one.s);
  for (int64_t i = 50 * 10; i < 51 * 10; ++i) other.k.set(i, NAN), other.v.set(i, NAN);
  run_emulated(one, 1), run_emulated(other, 3);
  for (int64_t head = 0; head < 2; ++head)
    for (int64_t i = 0; i < 90 * 10; ++i)
      CHECK(i < 50 * 10 ? one.out.get(head * 900 + i) == other.out.get(head * 900 + i)
                        : std::isnan(other.out.get(head * 900 + i)));
}

TEST(other_dtypes_go_to_v4) {
  const std::vector<std::string> rows = cpu::available();
  if (std::find(rows.begin(), rows.end(), "x86_64_v4") == rows.end()) SKIP("this machine cannot run x86_64_v4");
  Problem p({1, 2, 1, 33, 40, 7, 5});
  const Reference<double> exact(p, GradientRule::exact, false);
  const Reference<float> plain(p, GradientRule::exact, false);
  run_emulated(p, 2);
  check_budget("out", p.s, p.out, exact.out, plain.out);
}

#else

TEST(amx) { SKIP("tile registers belong to x86-64"); }

#endif
