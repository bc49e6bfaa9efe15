#include "bucket_attention_problem.h"
#include "subquad/error.h"

using namespace check;

namespace {

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

/// The tables of few buckets, of many, and the ranks of more than that.
constexpr int64_t kBuckets[] = {1, 7, 256, 1100, 1 << 24};

}  // namespace

TEST(matches_the_definition_for_any_dim_v) {
  check::for_each_isa([](const std::string&) {
    Sizes s;
    for (int64_t dim_v : {1, 3, 7, 16, 17, 64, 100}) {
      s.dim_v = dim_v;
      check_visibilities<uint16_t, float>(s);
    }
  });
}

TEST(matches_the_definition_for_any_number_of_buckets_and_hashes) {
  check::for_each_isa([](const std::string&) {
    Sizes s;
    s.dim_v = 20;
    for (int64_t num_buckets : kBuckets) {
      s.num_buckets = num_buckets;
      check_visibilities<int32_t, float>(s);
    }
    for (int64_t num_buckets : {1, 256, 1100, 40000, 65536}) {
      s.num_buckets = num_buckets;
      check_visibilities<uint16_t, float>(s);
    }
    s.num_buckets = 8;
    for (int64_t num_hashes : {1, 2, 3, 4, 8, 9}) {
      s.num_hashes = num_hashes;
      check_visibilities<uint16_t, float>(s);
    }
  });
}

TEST(query_heads_share_key_heads) {
  check::for_each_isa([](const std::string&) {
    Sizes s;
    s.heads_q = 6, s.dim_v = 33;
    for (int64_t num_buckets : kBuckets) {
      s.num_buckets = num_buckets;
      check_visibilities<int32_t, float>(s);
    }
  });
}

TEST(few_tokens_against_many) {
  check::for_each_isa([](const std::string&) {
    for (int64_t few : {1, 3, 5, 9, 17, 33})
      for (int mode = 0; mode < 4; ++mode) {
        Sizes s;
        s.batch = 1, s.seq_q = mode & 1 ? few : 600, s.seq_k = mode & 1 ? 600 : few, s.causal = s.masked = mode & 2;
        s.num_hashes = mode & 2 ? 3 : 37, s.dim_v = mode & 2 ? 70 : 5, s.num_buckets = 30;
        check_problem<uint16_t, float>(s);
      }
  });
}

TEST(many_queries_of_a_group_are_cut_into_chunks) {
  check::for_each_isa([](const std::string&) {
    Sizes s;
    s.batch = 1, s.heads_q = 5, s.heads_kv = 1, s.num_hashes = 1, s.seq_q = 15000, s.seq_k = 6, s.dim_v = 2;
    for (int mode = 0; mode < 4; ++mode) {
      s.num_buckets = mode & 1 ? 3 : 1 << 24, s.causal = s.masked = mode & 2;
      check_problem<int32_t, float>(s);
    }
  });
}

TEST(sixteen_bit_arrays) {
  check::for_each_isa([](const std::string&) {
    Sizes s;
    for (int64_t dim_v : {5, 32, 40}) {
      s.dim_v = dim_v;
      check_visibilities<uint16_t, half>(s);
      check_visibilities<uint16_t, bfloat16>(s);
    }
  });
}

TEST(codes_may_be_distributed_in_any_way) {
  check::for_each_isa([](const std::string&) {
    // Ranks descend through the bits of the codes: all bits the same, or all but a few.
    Sizes s;
    s.seq_q = s.seq_k = check::emulated() ? 100 : 200, s.causal = true;
    for (int64_t num_buckets : kBuckets)
      for (int64_t step : {0, 1, 1 << 9, 1 << 18}) {
        s.num_buckets = num_buckets;
        Problem<int32_t, float> p = make_problem<int32_t, float>(s);
        int64_t next = 0;
        for (auto* codes : {&p.codes_q, &p.codes_k})
          for (int32_t& code : *codes) code = int32_t((num_buckets - 1 + next++ * 37 % 61 * step) % num_buckets);
        run(p);
        CHECK(wrong(p) == 0);
      }
  });
}

TEST(fully_masked_items_are_zero) {
  check::for_each_isa([](const std::string&) {
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
  });
}

TEST(nothing_to_sum_gives_zero) {
  check::for_each_isa([](const std::string&) {
    Sizes s;
    const int64_t none[][3] = {{0, 5, 3}, {5, 0, 3}, {5, 4, 0}, {0, 0, 0}};
    for (const auto& [seq_q, seq_k, num_hashes] : none)
      for (int mode = 0; mode < 4; ++mode) {
        s.seq_q = seq_q, s.seq_k = seq_k, s.num_hashes = num_hashes, s.causal = mode & 1;
        s.num_buckets = mode & 2 ? 1 << 20 : 8;
        check_problem<int32_t, float>(s);
      }
    s = Sizes(), s.batch = 0;
    check_problem<uint16_t, float>(s);
    s = Sizes(), s.heads_q = s.heads_kv = 0;
    check_problem<uint16_t, float>(s);
  });
}

TEST(threads_do_not_change_the_bits) {
  check::for_each_isa([](const std::string&) {
    for (int64_t num_buckets : kBuckets) {
      Sizes s;
      s.heads_q = 6, s.heads_kv = 3, s.dim_v = 70, s.num_buckets = num_buckets;
      s.seq_q = s.seq_k = check::emulated() ? 70 : 200;
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
  check::for_each_isa([](const std::string&) {
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
  });
}

TEST(later_tokens_do_not_change_earlier_rows) {
  check::for_each_isa([](const std::string&) {
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
  });
}

TEST(arrays_may_be_strided) {
  check::for_each_isa([](const std::string&) {
    // All keys of a head share a row of v by a stride of 0; out is [B, N, H, pitch] memory, written from its end.
    Sizes s;
    s.dim_v = 17;
    Problem<uint16_t, float> p = make_problem<uint16_t, float>(s);
    for (int64_t i = 0; i < int64_t(p.v.size()); ++i)
      p.v[size_t(i)] = p.v[size_t(i - i % (s.seq_k * s.dim_v) + i % s.dim_v)];
    run(p);
    const int64_t pitch = s.dim_v + 5;
    std::vector<float> memory(size_t(s.batch * s.seq_q * s.heads_q * pitch), -77.0f);
    ConstTensor v = p.of_keys(p.v.data());
    Tensor out = p.of_queries(memory.data() + (s.seq_q - 1) * s.heads_q * pitch);
    v.stride[2] = 0;
    out.stride[0] = s.seq_q * s.heads_q * pitch, out.stride[1] = pitch, out.stride[2] = -s.heads_q * pitch;
    const Queue queue = Queue::cpu(1);
    const Memory scratch(bucket_attention_workspace_bytes(queue, p.q(), p.k(), v, p.options(), out));
    bucket_attention(queue, p.q(), p.k(), v, p.options(), out, scratch.view);
    const float* expected = p.out.data();
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads_q; ++h)
        for (int64_t n = 0; n < s.seq_q; ++n, expected += s.dim_v) {
          const float* row = memory.data() + ((b * s.seq_q + s.seq_q - 1 - n) * s.heads_q + h) * pitch;
          CHECK(std::memcmp(row, expected, size_t(s.dim_v) * sizeof(float)) == 0);
          for (int64_t e = s.dim_v; e < pitch; ++e) CHECK(row[e] == -77.0f);
        }
  });
}

TEST(errors_name_the_argument_and_the_rule) {
  Sizes s;
  Problem<uint16_t, float> p = make_problem<uint16_t, float>(s);
  const Queue queue = Queue::cpu(1);
  const Tensor v = p.of_keys(p.v.data()), out = p.of_queries(p.out.data());
  const Memory memory(bucket_attention_workspace_bytes(queue, p.q(), p.k(), v, p.options(), out));
  const auto call = [&](const ConstTensor& values, const BucketAttentionOptions& o, const Tensor& result) {
    bucket_attention(queue, p.q(), p.k(), values, o, result, memory.view);
  };
  const BucketAttentionOptions good = p.options();
  BucketAttentionOptions bad = good;
  bad.num_buckets = 0;
  CHECK_THROWS_AS(std::invalid_argument, call(v, bad, out),
                  "[bucket_attention] num_buckets: expected a value in [1, 16777216], got 0");
  bad = good, bad.scale = std::numeric_limits<double>::infinity();
  CHECK_THROWS_AS(std::invalid_argument, call(v, bad, out), "[bucket_attention] scale: expected a finite");
  bad = good, bad.key_mask = make_tensor(reinterpret_cast<bool*>(p.key_mask.data()), {s.batch, s.seq_k - 1});
  CHECK_THROWS(call(v, bad, out), "[bucket_attention] key_mask: expected shape [B, M] = [2, 23], got [2, 22]");
  ConstTensor other = v;
  other.shape[1] = 1;
  CHECK_THROWS(call(other, good, out), "[bucket_attention] v: expected shape [B, Hkv, M, E], got [2, 1, 23, 16]");
  other = v, other.dtype = DType::i32;
  CHECK_THROWS_AS(TypeMismatch, call(other, good, out), "[bucket_attention] v: expected dtype float32");
  CHECK_THROWS(bucket_attention(queue, p.q(), p.k(), v, good, out, {memory.view.data, memory.view.bytes - 1}),
               "[bucket_attention] workspace: expected at least " + std::to_string(memory.view.bytes) + " bytes");
  CHECK_THROWS(bucket_attention_bwd(queue, v, p.q(), p.k(), good, p.of_keys(p.dv.data()), memory.view),
               "[bucket_attention_bwd] dout: expected shape [B, H, N, E], got [2, 2, 23, 16]");
  std::vector<float> shared(p.v.size() + p.out.size());
  CHECK_THROWS(call(p.of_keys(shared.data()), good, p.of_queries(shared.data() + 8)),
               "[bucket_attention] out: expected an output that shares no memory");
}

TEST(codes_outside_the_buckets_are_named) {
  Sizes s;
  s.num_buckets = 100;
  Problem<int32_t, float> p = make_problem<int32_t, float>(s);
  const Queue queue = Queue::cpu(1);
  const Tensor dout = p.of_queries(p.dout.data()), dv = p.of_keys(p.dv.data());
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
