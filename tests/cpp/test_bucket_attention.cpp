// Values are small multiples of 1/8 and the scale is 1/4, so that every f32 sum is exact and results compare exactly
// with a brute-force sum in double.
#include <limits>
#include <memory>
#include <random>

#include "check.h"
#include "subquad/bucket_attention.h"
#include "subquad/error.h"

using namespace subquad;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Sizes {
  int64_t batch = 2, heads_q = 2, heads_kv = 2, num_hashes = 5, seq_q = 19, seq_k = 23, dim_v = 16;
  int64_t num_buckets = 8;
  bool causal = false, masked = false;
};

template <class Code, class T>
struct Problem {
  Sizes s;
  std::vector<Code> codes_q, codes_k;
  std::vector<T> v, dout, out, dv;
  std::vector<uint8_t> key_mask, query_mask;

  BucketAttentionOptions options() const {
    BucketAttentionOptions o;
    o.num_buckets = s.num_buckets, o.scale = 0.25, o.is_causal = s.causal;
    if (s.masked) {
      o.key_mask = make_tensor(reinterpret_cast<const bool*>(key_mask.data()), {s.batch, s.seq_k});
      o.query_mask = make_tensor(reinterpret_cast<const bool*>(query_mask.data()), {s.batch, s.seq_q});
    }
    return o;
  }
  ConstTensor q() const { return make_tensor(codes_q.data(), {s.batch, s.heads_q, s.num_hashes, s.seq_q}); }
  ConstTensor k() const { return make_tensor(codes_k.data(), {s.batch, s.heads_kv, s.num_hashes, s.seq_k}); }

  bool keeps_key(int64_t b, int64_t m) const { return !s.masked || key_mask[b * s.seq_k + m]; }
  bool keeps_query(int64_t b, int64_t n) const { return !s.masked || query_mask[b * s.seq_q + n]; }
};

template <class T>
T rounded(double x) {
  T y;
  from_float(float(x), &y);
  return y;
}

template <class Code, class T>
Problem<Code, T> make_problem(const Sizes& s, unsigned seed = 1) {
  Problem<Code, T> p = {s, {}, {}, {}, {}, {}, {}, {}, {}};
  std::mt19937 random(seed);
  // Half of the codes come from four values, so that tokens meet however many buckets there are.
  const auto code = [&] {
    const int64_t any = random() % s.num_buckets;
    return Code(random() % 2 ? any : any % 4 * (s.num_buckets - 1) / 3);
  };
  const auto fill = [&](std::vector<T>& x, int64_t heads, int64_t seq, const std::vector<uint8_t>& mask) {
    for (int64_t i = 0; i < s.batch * heads * seq * s.dim_v; ++i) {
      const int64_t token = i / s.dim_v % seq, b = i / (heads * seq * s.dim_v);
      const bool hidden = s.masked && !mask[b * seq + token];
      x.push_back(rounded<T>(hidden ? kNan : (int(random() % 33) - 16) / 8.0));
    }
  };
  for (int64_t i = 0; i < s.batch * s.heads_q * s.num_hashes * s.seq_q; ++i) p.codes_q.push_back(code());
  for (int64_t i = 0; i < s.batch * s.heads_kv * s.num_hashes * s.seq_k; ++i) p.codes_k.push_back(code());
  for (int64_t i = 0; i < s.batch * s.seq_k; ++i) p.key_mask.push_back(random() % 3 != 0);
  for (int64_t i = 0; i < s.batch * s.seq_q; ++i) p.query_mask.push_back(random() % 3 != 0);
  fill(p.v, s.heads_kv, s.seq_k, p.key_mask);
  fill(p.dout, s.heads_q, s.seq_q, p.query_mask);
  p.out.assign(p.dout.size(), rounded<T>(kNan));
  p.dv.assign(p.v.size(), rounded<T>(kNan));
  return p;
}

/// Scratch memory of exactly `bytes`, at an odd address, so that sanitizers see what goes past it.
struct Memory {
  explicit Memory(int64_t bytes) : block(new char[size_t(bytes) + 1]), view{block.get() + 1, bytes} {}
  std::unique_ptr<char[]> block;
  Workspace view;
};

template <class Code, class T>
void run(Problem<Code, T>& p, int threads = 1) {
  const Sizes& s = p.s;
  const Queue queue = Queue::cpu(threads);
  const auto of_queries = [&](T* data) { return make_tensor(data, {s.batch, s.heads_q, s.seq_q, s.dim_v}); };
  const auto of_keys = [&](T* data) { return make_tensor(data, {s.batch, s.heads_kv, s.seq_k, s.dim_v}); };
  const Tensor v = of_keys(p.v.data()), dv = of_keys(p.dv.data());
  const Tensor dout = of_queries(p.dout.data()), out = of_queries(p.out.data());
  const Memory forward(bucket_attention_workspace_bytes(queue, p.q(), p.k(), v, p.options(), out));
  bucket_attention(queue, p.q(), p.k(), v, p.options(), out, forward.view);
  const Memory backward(bucket_attention_bwd_workspace_bytes(queue, dout, p.q(), p.k(), p.options(), dv));
  bucket_attention_bwd(queue, dout, p.q(), p.k(), p.options(), dv, backward.view);
}

/// Elements of `out` and `dv` that differ from the definition.
template <class Code, class T>
int64_t wrong(const Problem<Code, T>& p) {
  const Sizes& s = p.s;
  std::vector<double> out(p.out.size()), dv(p.dv.size());
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads_q; ++h) {
      const int64_t g = h / (s.heads_q / s.heads_kv), row_q = b * s.heads_q + h, row_k = b * s.heads_kv + g;
      for (int64_t n = 0; n < s.seq_q; ++n)
        for (int64_t m = 0; m < s.seq_k; ++m) {
          if (!p.keeps_key(b, m) || !p.keeps_query(b, n) || (s.causal && m > n + s.seq_k - s.seq_q)) continue;
          int equal = 0;
          for (int64_t r = 0; r < s.num_hashes; ++r)
            equal += p.codes_q[(row_q * s.num_hashes + r) * s.seq_q + n] ==
                     p.codes_k[(row_k * s.num_hashes + r) * s.seq_k + m];
          for (int64_t e = 0; equal && e < s.dim_v; ++e) {
            const int64_t at_q = (row_q * s.seq_q + n) * s.dim_v + e, at_k = (row_k * s.seq_k + m) * s.dim_v + e;
            out[at_q] += 0.25 * equal * to_float(p.v[at_k]);
            dv[at_k] += 0.25 * equal * to_float(p.dout[at_q]);
          }
        }
    }
  int64_t count = 0;
  for (size_t i = 0; i < out.size(); ++i) count += !(to_float(p.out[i]) == to_float(rounded<T>(out[i])));
  for (size_t i = 0; i < dv.size(); ++i) count += !(to_float(p.dv[i]) == to_float(rounded<T>(dv[i])));
  return count;
}

template <class Code, class T>
void check_problem(const Sizes& s) {
  Problem<Code, T> p = make_problem<Code, T>(s);
  run(p);
  const int64_t count = wrong(p);
  if (count == 0) return;
  char text[200];
  std::snprintf(text, sizeof text, "%lld wrong: H %d/%d R %d N %d M %d E %d buckets %d causal %d masked %d",
                static_cast<long long>(count), int(s.heads_q), int(s.heads_kv), int(s.num_hashes), int(s.seq_q),
                int(s.seq_k), int(s.dim_v), int(s.num_buckets), s.causal, s.masked);
  check::fail(__FILE__, __LINE__, text);
}

/// Causal or not, masked or not, with equal and unequal lengths.
template <class Code, class T>
void check_visibilities(Sizes s) {
  const int64_t lengths[][2] = {{21, 21}, {13, 30}, {30, 13}};
  for (const auto& length : lengths)
    for (int mode = 0; mode < 4; ++mode) {
      s.seq_q = length[0], s.seq_k = length[1], s.causal = mode & 1, s.masked = mode & 2;
      check_problem<Code, T>(s);
    }
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// Values whose sums depend on the order.
template <class Code>
Problem<Code, float> rounding_problem(const Sizes& s) {
  Problem<Code, float> p = make_problem<Code, float>(s);
  std::mt19937 random(7);
  for (std::vector<float>* x : {&p.v, &p.dout})
    for (float& value : *x) value = float(random()) * 1e-9f - 2;
  return p;
}

/// The tables of few buckets, of many, and the ranks of more than that.
constexpr int64_t kBuckets[] = {1, 7, 256, 1100, 1 << 24};

}  // namespace

TEST(matches_the_definition_for_any_dim_v) {
  check::for_each_isa([](const std::string&) {
    for (int64_t dim_v : {1, 3, 7, 16, 17, 64, 100}) {
      Sizes s;
      s.dim_v = dim_v;
      check_visibilities<uint16_t, float>(s);
    }
  });
}

TEST(matches_the_definition_for_any_number_of_buckets) {
  check::for_each_isa([](const std::string&) {
    for (int64_t num_buckets : kBuckets) {
      Sizes s;
      s.num_buckets = num_buckets, s.dim_v = 20;
      check_visibilities<int32_t, float>(s);
      if (num_buckets < 65536) check_visibilities<uint16_t, float>(s);
    }
    for (int64_t num_buckets : {int64_t(40000), int64_t(65536)}) {
      Sizes s;
      s.num_buckets = num_buckets;
      check_visibilities<uint16_t, float>(s);
    }
  });
}

TEST(matches_the_definition_for_any_number_of_hashes) {
  check::for_each_isa([](const std::string&) {
    for (int64_t num_hashes : {1, 2, 3, 4, 8, 9}) {
      Sizes s;
      s.num_hashes = num_hashes;
      check_visibilities<uint16_t, float>(s);
    }
  });
}

TEST(query_heads_share_key_heads) {
  check::for_each_isa([](const std::string&) {
    for (int64_t num_buckets : kBuckets) {
      Sizes s;
      s.heads_q = 6, s.heads_kv = 2, s.num_buckets = num_buckets, s.dim_v = 33;
      check_visibilities<int32_t, float>(s);
    }
  });
}

TEST(many_queries_of_a_group_are_cut_into_chunks) {
  for (int64_t num_buckets : {int64_t(3), int64_t(1) << 24}) {
    Sizes s;
    s.batch = 1, s.heads_q = 5, s.heads_kv = 1, s.num_hashes = 1, s.seq_q = 15000, s.seq_k = 6, s.dim_v = 2;
    s.num_buckets = num_buckets;
    check_problem<int32_t, float>(s);
    s.causal = s.masked = true;
    check_problem<int32_t, float>(s);
  }
}

TEST(sixteen_bit_arrays) {
  check::for_each_isa([](const std::string&) {
    for (int64_t dim_v : {5, 32, 40}) {
      Sizes s;
      s.dim_v = dim_v;
      check_visibilities<uint16_t, half>(s);
      check_visibilities<uint16_t, bfloat16>(s);
    }
  });
}

TEST(all_keys_in_one_bucket) {
  for (int64_t num_buckets : kBuckets) {
    Sizes s;
    s.num_buckets = num_buckets, s.seq_q = s.seq_k = 300, s.causal = true;
    Problem<int32_t, float> p = make_problem<int32_t, float>(s);
    for (auto* codes : {&p.codes_q, &p.codes_k}) codes->assign(codes->size(), int32_t(num_buckets - 1));
    run(p);
    CHECK(wrong(p) == 0);
  }
}

TEST(codes_with_equal_leading_bits_keep_apart) {
  // Ranks descend through the bits of the codes; here every code but the last bits is the same.
  Sizes s;
  s.num_buckets = 1 << 24, s.seq_q = s.seq_k = 64;
  for (int shift : {0, 9, 18}) {
    Problem<int32_t, float> p = make_problem<int32_t, float>(s);
    int32_t next = 0;
    for (auto* codes : {&p.codes_q, &p.codes_k})
      for (int32_t& code : *codes) code = 0x800000 | (next++ * 37 % 61) << shift;
    run(p);
    CHECK(wrong(p) == 0);
  }
}

TEST(fully_masked_items_are_zero) {
  for (int64_t num_buckets : kBuckets) {
    Sizes s;
    s.masked = true, s.num_buckets = num_buckets;
    Problem<int32_t, float> p = make_problem<int32_t, float>(s);
    for (int64_t m = 0; m < s.seq_k; ++m) p.key_mask[size_t(m)] = 0;
    for (int64_t n = 0; n < s.seq_q; ++n) p.query_mask[size_t(s.seq_q + n)] = 0;
    p.v.assign(p.v.size(), kNan), p.dout.assign(p.dout.size(), kNan);
    run(p);
    CHECK(p.out == std::vector<float>(p.out.size()));
    CHECK(p.dv == std::vector<float>(p.dv.size()));
  }
}

TEST(nothing_to_sum_gives_zero) {
  const int64_t none[][3] = {{0, 5, 3}, {5, 0, 3}, {5, 4, 0}, {0, 0, 0}};
  for (const auto& [seq_q, seq_k, num_hashes] : none)
    for (int mode = 0; mode < 4; ++mode) {
      Sizes s;
      s.seq_q = seq_q, s.seq_k = seq_k, s.num_hashes = num_hashes, s.causal = mode & 1;
      s.num_buckets = mode & 2 ? 1 << 20 : 8;
      check_problem<int32_t, float>(s);
    }
  for (int64_t heads : {0, 2})
    for (int64_t batch : {0, 1}) {
      Sizes s;
      s.batch = batch, s.heads_q = heads, s.heads_kv = heads;
      if (batch * heads == 0) check_problem<uint16_t, float>(s);
    }
}

TEST(threads_do_not_change_the_bits) {
  check::for_each_isa([](const std::string&) {
    for (int64_t num_buckets : kBuckets) {
      Sizes s;
      s.heads_q = 6, s.heads_kv = 3, s.seq_q = s.seq_k = 200, s.dim_v = 70, s.num_buckets = num_buckets;
      s.causal = num_buckets == 7;
      Problem<int32_t, float> one = rounding_problem<int32_t>(s), more = one;
      run(one, 1);
      for (int threads : {2, 3}) {
        run(more, threads);
        CHECK(same_bits(one.out, more.out) && same_bits(one.dv, more.dv));
      }
    }
  });
}

TEST(a_batch_item_alone_has_the_same_bits) {
  for (int64_t num_buckets : kBuckets) {
    Sizes s;
    s.batch = 3, s.seq_q = s.seq_k = 50, s.num_buckets = num_buckets;
    Problem<int32_t, float> all = rounding_problem<int32_t>(s), one = all;
    run(all, 2);
    one.s.batch = 1;
    const auto keep = [](auto& x) { x = {x.begin() + x.size() / 3, x.begin() + 2 * (x.size() / 3)}; };
    keep(one.codes_q), keep(one.codes_k), keep(one.v), keep(one.dout), keep(one.out), keep(one.dv);
    run(one, 2);
    keep(all.out), keep(all.dv);
    CHECK(same_bits(all.out, one.out) && same_bits(all.dv, one.dv));
  }
}

TEST(later_tokens_do_not_change_earlier_rows) {
  for (int64_t num_buckets : kBuckets) {
    Sizes s;
    s.batch = s.heads_q = s.heads_kv = 1, s.seq_q = s.seq_k = 60, s.causal = true, s.num_buckets = num_buckets;
    Problem<int32_t, float> before = rounding_problem<int32_t>(s), after = before;
    const int64_t changed = 40;
    for (int64_t r = 0; r < s.num_hashes; ++r)
      for (int64_t m = changed; m < s.seq_k; ++m) after.codes_k[r * s.seq_k + m] = int32_t(m % num_buckets);
    for (size_t i = changed * s.dim_v; i < after.v.size(); ++i) after.v[i] = 3;
    run(before), run(after);
    CHECK(std::memcmp(before.out.data(), after.out.data(), changed * s.dim_v * sizeof(float)) == 0);
    CHECK(!same_bits(before.out, after.out));
  }
}

TEST(arrays_may_be_strided) {
  // [B, N, H, E] memory behind a [B, H, N, E] view, rows of v repeated by a stride of 0, and out written backwards.
  Sizes s;
  s.dim_v = 17;
  Problem<uint16_t, float> p = make_problem<uint16_t, float>(s);
  const int64_t pitch = s.dim_v + 5;
  std::vector<float> v(size_t(s.batch * s.heads_kv * s.dim_v));
  std::vector<float> out(size_t(s.batch * s.seq_q * s.heads_q * pitch), -77.0f);
  for (int64_t i = 0; i < int64_t(p.v.size()); ++i) {
    float& shared = v[size_t(i / (s.seq_k * s.dim_v) * s.dim_v + i % s.dim_v)];
    if (i / s.dim_v % s.seq_k == 0) shared = p.v[size_t(i)];
    p.v[size_t(i)] = shared;
  }
  ConstTensor v_view = make_tensor(p.v.data(), {s.batch, s.heads_kv, s.seq_k, s.dim_v});
  v_view.data = v.data();
  v_view.stride[0] = s.heads_kv * s.dim_v, v_view.stride[1] = s.dim_v, v_view.stride[2] = 0;
  Tensor out_view = make_tensor(p.out.data(), {s.batch, s.heads_q, s.seq_q, s.dim_v});
  out_view.data = out.data() + (s.seq_q - 1) * s.heads_q * pitch;
  out_view.stride[0] = s.seq_q * s.heads_q * pitch, out_view.stride[1] = pitch;
  out_view.stride[2] = -s.heads_q * pitch;
  const Queue queue = Queue::cpu(1);
  run(p);
  const Memory memory(bucket_attention_workspace_bytes(queue, p.q(), p.k(), v_view, p.options(), out_view));
  bucket_attention(queue, p.q(), p.k(), v_view, p.options(), out_view, memory.view);
  size_t written = 0;
  for (int64_t i = 0; i < int64_t(p.out.size()); ++i) {
    const int64_t e = i % s.dim_v, n = i / s.dim_v % s.seq_q, h = i / (s.dim_v * s.seq_q) % s.heads_q;
    const int64_t b = i / (s.dim_v * s.seq_q * s.heads_q);
    CHECK(static_cast<const float*>(
              out_view.data)[b * out_view.stride[0] + h * out_view.stride[1] + n * out_view.stride[2] + e] ==
          p.out[size_t(i)]);
  }
  for (float x : out) written += x != -77.0f;
  CHECK(written <= p.out.size());
}

TEST(errors_name_the_argument_and_the_rule) {
  Sizes s;
  Problem<uint16_t, float> p = make_problem<uint16_t, float>(s);
  const Queue queue = Queue::cpu(1);
  const Tensor v = make_tensor(p.v.data(), {s.batch, s.heads_kv, s.seq_k, s.dim_v});
  const Tensor out = make_tensor(p.out.data(), {s.batch, s.heads_q, s.seq_q, s.dim_v});
  const Memory memory(bucket_attention_workspace_bytes(queue, p.q(), p.k(), v, p.options(), out));
  const auto call = [&](const ConstTensor& values, const BucketAttentionOptions& o, const Tensor& result) {
    bucket_attention(queue, p.q(), p.k(), values, o, result, memory.view);
  };
  const BucketAttentionOptions good = p.options();
  BucketAttentionOptions bad = good;
  bad.num_buckets = 0;
  CHECK_THROWS_AS(std::invalid_argument, call(v, bad, out),
                  "[bucket_attention] num_buckets: expected a value in [1, 16777216], got 0");
  bad.num_buckets = (1 << 24) + 1;
  CHECK_THROWS(call(v, bad, out), "[bucket_attention] num_buckets: expected a value in [1, 16777216]");
  bad = good, bad.scale = std::numeric_limits<double>::infinity();
  CHECK_THROWS_AS(std::invalid_argument, call(v, bad, out), "[bucket_attention] scale: expected a finite");
  bad = good, bad.key_mask = make_tensor(reinterpret_cast<bool*>(p.key_mask.data()), {s.batch, s.seq_k - 1});
  CHECK_THROWS(call(v, bad, out), "[bucket_attention] key_mask: expected shape [B, M] = [2, 23], got [2, 22]");
  ConstTensor other = v;
  other.shape[1] = 1;
  CHECK_THROWS(call(other, good, out), "[bucket_attention] v: expected shape [B, Hkv, M, E], got [2, 1, 23, 16]");
  other = v, other.dtype = DType::i32;
  CHECK_THROWS_AS(TypeMismatch, call(other, good, out), "[bucket_attention] v: expected dtype float32");
  CHECK_THROWS(call(v, good, v), "[bucket_attention] out: expected shape [B, H, N, E] = [2, 2, 19, 16]");
  CHECK_THROWS(bucket_attention(queue, p.q(), p.k(), v, good, out, {memory.view.data, memory.view.bytes - 1}),
               "[bucket_attention] workspace: expected at least " + std::to_string(memory.view.bytes) + " bytes");
  const Tensor dv = make_tensor(p.dv.data(), {s.batch, s.heads_kv, s.seq_k, s.dim_v});
  CHECK_THROWS(bucket_attention_bwd(queue, v, p.q(), p.k(), good, dv, memory.view),
               "[bucket_attention_bwd] dout: expected shape [B, H, N, E], got [2, 2, 23, 16]");
  std::vector<float> shared(p.v.size() + p.out.size());
  const Tensor first = make_tensor(shared.data(), {s.batch, s.heads_kv, s.seq_k, s.dim_v});
  const Tensor second = make_tensor(shared.data() + 8, {s.batch, s.heads_q, s.seq_q, s.dim_v});
  CHECK_THROWS(call(first, good, second), "[bucket_attention] out: expected an output that shares no memory");
}

TEST(codes_outside_the_buckets_are_named) {
  Sizes s;
  s.num_buckets = 100;
  Problem<int32_t, float> p = make_problem<int32_t, float>(s);
  const Queue queue = Queue::cpu(1);
  const Tensor dout = make_tensor(p.dout.data(), {s.batch, s.heads_q, s.seq_q, s.dim_v});
  const Tensor dv = make_tensor(p.dv.data(), {s.batch, s.heads_kv, s.seq_k, s.dim_v});
  const Memory memory(bucket_attention_bwd_workspace_bytes(queue, dout, p.q(), p.k(), p.options(), dv));
  const auto call = [&] { bucket_attention_bwd(queue, dout, p.q(), p.k(), p.options(), dv, memory.view); };
  call();
  const int64_t place = ((1 * s.heads_kv + 0) * s.num_hashes + 3) * s.seq_k + 11;
  for (int32_t value : {100, -1, std::numeric_limits<int32_t>::min()}) {
    p.codes_k[size_t(place)] = value;
    CHECK_THROWS_AS(std::invalid_argument, call(),
                    "[bucket_attention_bwd] codes_k: expected values in [0, 100), got " + std::to_string(value) +
                        " at [1, 0, 3, 11]");
  }
  p.codes_k[size_t(place)] = 99;
  call();
}
