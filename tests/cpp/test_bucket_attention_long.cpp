// Sequences too long for comparing all pairs of tokens, which the CUDA backend does for short ones.
#include "bucket_attention_problem.h"

using namespace check;

namespace {

/// One head, and more pairs of tokens than 512 * 512.
Sizes long_sizes(int64_t seq_q = 700, int64_t seq_k = 400) {
  Sizes s;
  s.batch = s.heads_q = s.heads_kv = 1, s.num_hashes = 3, s.seq_q = seq_q, s.seq_k = seq_k, s.dim_v = 8;
  return s;
}

constexpr int64_t kBuckets[] = {1, 2, 37, 256, 513, 1024, 1025, 1 << 24};

}  // namespace

TEST(any_number_of_buckets) {
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : kBuckets)
      for (int mode = 0; mode < 4; ++mode) {
        Sizes s = long_sizes();
        s.num_buckets = num_buckets, s.causal = mode & 1, s.masked = mode & 2;
        check_problem<int32_t, float>(s);
        if (num_buckets <= 65536 && mode) check_problem<uint16_t, half>(s);
      }
  });
}

TEST(key_heads_without_query_heads_have_zero_gradients) {
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : kBuckets)
      for (bool causal : {false, true}) {
        Sizes s = long_sizes();
        s.heads_q = 0, s.num_buckets = num_buckets, s.causal = causal;
        check_problem<int32_t, float>(s);
      }
  });
}

TEST(any_lengths) {
  const int64_t lengths[][2] = {{513, 512}, {7, 38000}, {38000, 7}, {1025, 300}, {257, 1100}};
  for_each_isa([&](const std::string&) {
    for (const auto& [seq_q, seq_k] : lengths) {
      Sizes s = long_sizes(seq_q, seq_k);
      s.num_hashes = 2, s.num_buckets = 300, s.masked = seq_q != 513;
      check_problem<uint16_t, float>(s);
    }
  });
}

TEST(any_dim_v_and_dtype) {
  for_each_isa([](const std::string&) {
    for (int64_t dim_v : {1, 31, 32, 33, 40, 64, 65, 100, 130}) {
      Sizes s = long_sizes(610, 430);
      s.dim_v = dim_v, s.num_hashes = 2, s.num_buckets = 50;
      check_problem<uint16_t, bfloat16>(s);
      s.causal = dim_v == 33 || dim_v == 64, s.masked = true;
      check_problem<int32_t, float>(s);
    }
  });
}

TEST(many_heads_and_hashes) {
  // A large device is full of them: blocks take more columns, hashes and targets than those of small problems.
  for_each_isa([](const std::string&) {
    struct {
      int64_t batch, num_hashes, seq_q, seq_k, dim_v, num_buckets;
    } const cases[] = {{2, 70, 513, 512, 64, 20},
                       {8, 133, 513, 512, 34, 20},
                       {16, 2, 1530, 180, 256, 300},
                       {16, 2, 1020, 260, 250, 512}};
    for (const auto& c : cases) {
      Sizes s = long_sizes(c.seq_q, c.seq_k);
      s.batch = c.batch, s.num_hashes = c.num_hashes, s.dim_v = c.dim_v, s.num_buckets = c.num_buckets;
      s.masked = c.batch == 16;
      check_problem<uint16_t, bfloat16>(s);
    }
  });
}

TEST(more_tables_than_exist_at_the_same_time) {
  // 16 heads of 9.4 MB, at most 128 MB. Few keys and no gradient: what takes long is not the tables.
  Sizes s = long_sizes(2050, 128);
  s.batch = 8, s.heads_q = s.heads_kv = 2, s.num_hashes = 9, s.num_buckets = 1024, s.dim_v = 256;
  for_each_isa([&](const std::string&) {
    Problem<uint16_t, float> p = make_problem<uint16_t, float>(s);
    p.dout.assign(p.dout.size(), 0);
    p.dv.assign(p.dv.size(), 0);
    const Queue queue = Queue::cpu(1);
    const Tensor v = p.of_keys(p.v.data()), out = p.of_queries(p.out.data());
    const Memory scratch(bucket_attention_workspace_bytes(queue, p.q(), p.k(), v, p.options(), out));
    bucket_attention(queue, p.q(), p.k(), v, p.options(), out, scratch.view);
    CHECK(wrong(p) == 0);
  });
}

TEST(query_heads_share_key_heads) {
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : {30, 600, 1 << 20})
      for (int mode = 0; mode < 4; ++mode) {
        Sizes s = long_sizes(520, 510);
        s.batch = 2, s.heads_q = 6, s.heads_kv = 2, s.num_hashes = 2, s.num_buckets = num_buckets;
        s.causal = mode & 1, s.masked = mode & 2;
        check_problem<int32_t, float>(s);
      }
  });
}

TEST(one_bucket_or_runs_of_equal_codes) {
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : {1, 256, 1 << 20})
      for (int64_t run_length : {1, 7, 100, 1 << 20})
        for (bool causal : {false, true}) {
          Sizes s = long_sizes();
          s.num_buckets = num_buckets, s.causal = causal;
          Problem<int32_t, float> p = make_problem<int32_t, float>(s);
          int64_t next = 0;
          for (auto* codes : {&p.codes_q, &p.codes_k})
            for (int32_t& code : *codes) code = int32_t(num_buckets - 1 - next++ / run_length % num_buckets);
          run(p);
          CHECK(wrong(p) == 0);
        }
  });
}

TEST(not_a_number_stays_in_its_bucket) {
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : {40, 1024, 1 << 20}) {
      Sizes s = long_sizes();
      s.num_buckets = num_buckets;
      Problem<int32_t, float> p = make_problem<int32_t, float>(s), poisoned = p;
      poisoned.v[size_t(5 * s.dim_v)] = poisoned.dout[size_t(9 * s.dim_v)] = kNan;
      run(p), run(poisoned);
      const auto check_rows = [&](const std::vector<float>& before, const std::vector<float>& after, const auto& codes,
                                  int64_t tokens, const auto& other_codes, int64_t other_tokens, int64_t other) {
        int64_t poisoned_rows = 0;
        for (int64_t t = 0; t < tokens; ++t) {
          bool meets = false;
          for (int64_t r = 0; r < s.num_hashes; ++r)
            meets |= codes[size_t(r * tokens + t)] == other_codes[size_t(r * other_tokens + other)];
          poisoned_rows += meets;
          for (int64_t e = 0; e < s.dim_v; ++e) {
            const size_t i = size_t(t * s.dim_v + e);
            CHECK(meets && e == 0 ? std::isnan(after[i]) : after[i] == before[i]);
          }
        }
        CHECK(poisoned_rows > 0 && poisoned_rows < tokens);
      };
      check_rows(p.out, poisoned.out, p.codes_q, s.seq_q, p.codes_k, s.seq_k, 5);
      check_rows(p.dv, poisoned.dv, p.codes_k, s.seq_k, p.codes_q, s.seq_q, 9);
    }
  });
}

TEST(nothing_to_sum_gives_zero) {
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : {40, 1024, 1 << 20})
      for (bool causal : {false, true}) {
        Sizes s = long_sizes();
        s.num_hashes = 0, s.num_buckets = num_buckets, s.causal = causal;
        check_problem<int32_t, float>(s);
        s.num_hashes = 3, s.masked = true;
        Problem<int32_t, float> p = make_problem<int32_t, float>(s);
        p.key_mask.assign(p.key_mask.size(), 0);
        p.v.assign(p.v.size(), kNan);
        run(p);
        CHECK(wrong(p) == 0);
      }
  });
}

TEST(an_item_or_a_head_alone_has_the_same_bits) {
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : {40, 1024, 1 << 20})
      for (bool causal : {false, true}) {
        Sizes s = long_sizes();
        s.batch = 3, s.num_buckets = num_buckets, s.causal = causal, s.dim_v = 40;
        Problem<int32_t, float> all = rounding_problem<int32_t>(s), again = all, one = all;
        run(all), run(again, 2);
        CHECK(same_bits(all.out, again.out) && same_bits(all.dv, again.dv));
        one.s.batch = 1;
        const auto keep = [](auto& x) { x = {x.begin() + x.size() / 3, x.begin() + 2 * (x.size() / 3)}; };
        keep(one.codes_q), keep(one.codes_k), keep(one.v), keep(one.dout), keep(one.out), keep(one.dv);
        run(one);
        keep(all.out), keep(all.dv);
        CHECK(same_bits(all.out, one.out) && same_bits(all.dv, one.dv));
      }
  });
}

TEST(later_tokens_do_not_change_earlier_rows) {
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : {3, 256, 1 << 20}) {
      Sizes s = long_sizes(520, 520);
      s.causal = true, s.num_buckets = num_buckets;
      Problem<int32_t, float> before = rounding_problem<int32_t>(s), after = before;
      const int64_t changed = 301;
      for (int64_t r = 0; r < s.num_hashes; ++r)
        for (int64_t m = changed; m < s.seq_k; ++m) after.codes_k[size_t(r * s.seq_k + m)] = int32_t(m % num_buckets);
      for (size_t i = size_t(changed * s.dim_v); i < after.v.size(); ++i) after.v[i] = 3;
      run(before), run(after);
      CHECK(std::memcmp(before.out.data(), after.out.data(), size_t(changed * s.dim_v) * sizeof(float)) == 0);
      CHECK(!same_bits(before.out, after.out));
    }
  });
}

TEST(rows_need_only_the_alignment_of_their_elements) {
  // The same numbers at every distance from an address of 16 bytes, in rows with and without gaps, last row first.
  for_each_isa([](const std::string&) {
    for (int64_t num_buckets : {40, 1 << 20})
      for (int64_t gap : {0, 1, 8})
        for (int64_t offset : {0, 1, 4}) {
          Sizes s = long_sizes();
          s.dim_v = 36, s.num_hashes = 2, s.num_buckets = num_buckets;
          Problem<int32_t, bfloat16> p = make_problem<int32_t, bfloat16>(s);
          run(p);
          const int64_t pitch = s.dim_v + gap;
          std::vector<bfloat16> rows(size_t(s.seq_k * pitch + 16)), results(size_t(s.seq_q * pitch + 16));
          bfloat16 *v = rows.data() + offset, *out = results.data() + offset;
          for (int64_t m = 0; m < s.seq_k; ++m)
            std::memcpy(v + (s.seq_k - 1 - m) * pitch, &p.v[size_t(m * s.dim_v)], size_t(s.dim_v) * sizeof(bfloat16));
          ConstTensor given = p.of_keys(v + (s.seq_k - 1) * pitch);
          Tensor to = p.of_queries(out + (s.seq_q - 1) * pitch);
          given.stride[0] = given.stride[1] = to.stride[0] = to.stride[1] = 16;
          given.stride[2] = to.stride[2] = -pitch;
          const Queue queue = Queue::cpu(1);
          const Memory scratch(bucket_attention_workspace_bytes(queue, p.q(), p.k(), given, p.options(), to));
          bucket_attention(queue, p.q(), p.k(), given, p.options(), to, scratch.view);
          for (int64_t n = 0; n < s.seq_q; ++n)
            CHECK(std::memcmp(out + (s.seq_q - 1 - n) * pitch, &p.out[size_t(n * s.dim_v)],
                              size_t(s.dim_v) * sizeof(bfloat16)) == 0);
        }
  });
}
