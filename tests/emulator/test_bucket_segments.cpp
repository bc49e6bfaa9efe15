// Values are small multiples of 1/8 and the scale is 1/4, so that every f32 sum is exact and results compare exactly
// with a brute-force sum in double. Problems are far smaller than those for which bucket_attention chooses segments.
#include <limits>
#include <memory>
#include <random>

#include "bucket_segments.cuh"
#include "emulator/test_support.h"

using namespace subquad;

namespace {

struct Sizes {
  int64_t batch = 2, heads_kv = 2, group = 1, num_hashes = 5, sources = 60, targets = 50, dim = 20, num_buckets = 6;
  bool causal = false, backward = false, masked = false;
  DType rows = DType::f32, out = DType::f32;
  bool equal_codes = false;  // of all tokens, but for the second hash
  int64_t gap = 0;           // elements behind every row
  int64_t first = 0;         // element of the memory where the first row begins
};

int64_t bytes_of(DType dtype) { return dtype_bytes(dtype); }

void store(double x, DType dtype, char* to) {
  if (dtype == DType::f32) from_float(float(x), reinterpret_cast<float*>(to));
  if (dtype == DType::f16) from_float(float(x), reinterpret_cast<half*>(to));
  if (dtype == DType::bf16) from_float(float(x), reinterpret_cast<bfloat16*>(to));
}

double load(DType dtype, const char* from) {
  if (dtype == DType::f32) return *reinterpret_cast<const float*>(from);
  if (dtype == DType::f16) return to_float(*reinterpret_cast<const half*>(from));
  return to_float(*reinterpret_cast<const bfloat16*>(from));
}

template <class Code>
struct Problem {
  Sizes s;
  int64_t source_group, target_group;  // heads of a kv head
  std::vector<Code> source_codes, target_codes;
  std::vector<uint8_t> source_mask, target_mask;
  std::vector<char> rows, out;

  explicit Problem(const Sizes& sizes, bool exact = true)
      : s(sizes), source_group(s.backward ? s.group : 1), target_group(s.backward ? 1 : s.group) {
    std::mt19937 random(3);
    const int64_t pairs = s.batch * s.heads_kv;
    const auto fill_codes = [&](std::vector<Code>& codes, int64_t heads, int64_t tokens) {
      for (int64_t i = 0; i < pairs * heads * s.num_hashes * tokens; ++i) {
        const int64_t any = random() % s.num_buckets, few = any % 3 * (s.num_buckets - 1) / 2;
        const bool is_equal = s.equal_codes && i / tokens % s.num_hashes != 1;
        const bool is_outside = sizeof(Code) == 4 && random() % 16 == 0;
        codes.push_back(Code(is_outside ? -1 : is_equal ? s.num_buckets / 2 : random() % 2 ? any : few));
      }
    };
    fill_codes(source_codes, source_group, s.sources), fill_codes(target_codes, target_group, s.targets);
    for (int64_t i = 0; i < s.batch * s.sources; ++i) source_mask.push_back(random() % 4 != 0);
    for (int64_t i = 0; i < s.batch * s.targets; ++i) target_mask.push_back(random() % 4 != 0);
    const int64_t row_count = pairs * source_group * s.sources, out_count = pairs * target_group * s.targets;
    rows.assign(size_t((row_count * (s.dim + s.gap) + s.first) * bytes_of(s.rows)), char(0xff));
    out.assign(size_t((out_count * (s.dim + s.gap) + s.first) * bytes_of(s.out)), char(0xff));
    for (int64_t i = 0; i < row_count; ++i)
      for (int64_t e = 0; e < s.dim; ++e) {
        const double x = exact ? (int(random() % 33) - 16) / 8.0 : int(random() % 100000) / 70000.0;
        const bool hidden =
            s.masked &&
            !source_mask[size_t(i / (pairs / s.batch * source_group * s.sources) * s.sources + i % s.sources)];
        store(hidden ? std::numeric_limits<double>::quiet_NaN() : x, s.rows, row(i) + e * bytes_of(s.rows));
      }
  }

  char* row(int64_t i) { return rows.data() + (s.first + i * (s.dim + s.gap)) * bytes_of(s.rows); }
  char* out_row(int64_t i) { return out.data() + (s.first + i * (s.dim + s.gap)) * bytes_of(s.out); }

  cuda::BucketSide side(std::vector<Code>& codes, std::vector<uint8_t>& mask, int64_t group, int64_t tokens) const {
    const int64_t head = s.num_hashes * tokens;
    const DType dtype = sizeof(Code) == 2 ? DType::u16 : DType::i32;
    return {{codes.data(), {s.heads_kv * group * head, head, tokens, 1}, dtype},
            {s.masked ? mask.data() : nullptr, {tokens, 1, 0, 0}, DType::boolean},
            group,
            tokens};
  }
  Operand operand(char* data, int64_t heads, int64_t tokens, DType dtype) const {
    const int64_t pitch = s.dim + s.gap;
    return {data, {heads * tokens * pitch, tokens * pitch, pitch, 1}, dtype};
  }

  cuda::BucketProblem problem() {
    cuda::BucketProblem p = {};
    p.batch = s.batch, p.heads_kv = s.heads_kv, p.num_hashes = s.num_hashes, p.dim = s.dim;
    p.num_buckets = s.num_buckets;
    p.sources = side(source_codes, source_mask, source_group, s.sources);
    p.targets = side(target_codes, target_mask, target_group, s.targets);
    p.rows = operand(row(0), s.heads_kv * source_group, s.sources, s.rows);
    p.out = operand(out_row(0), s.heads_kv * target_group, s.targets, s.out);
    p.scale = 0.25f, p.causal = s.causal, p.backward = s.backward;
    return p;
  }

  bool sees(int64_t b, int64_t target, int64_t source) const {
    if (s.masked && !(source_mask[size_t(b * s.sources + source)] && target_mask[size_t(b * s.targets + target)]))
      return false;
    if (!s.causal) return true;
    return s.backward ? target <= source + s.targets - s.sources : source <= target + s.sources - s.targets;
  }

  /// Elements of a target's row that differ from the definition.
  int64_t wrong_elements(int64_t pair, int64_t target_head, int64_t target) {
    const int64_t b = pair / s.heads_kv, head = pair * target_group + target_head;
    std::vector<double> sum(size_t(s.dim));
    for (int64_t source_head = pair * source_group; source_head < (pair + 1) * source_group; ++source_head)
      for (int64_t n = 0; n < s.sources; ++n) {
        int equal = 0;
        for (int64_t r = 0; sees(b, target, n) && r < s.num_hashes; ++r) {
          const Code code = source_codes[size_t((source_head * s.num_hashes + r) * s.sources + n)];
          const bool is_inside = int64_t(code) >= 0 && int64_t(code) < s.num_buckets;
          equal += is_inside && code == target_codes[size_t((head * s.num_hashes + r) * s.targets + target)];
        }
        const char* x = row(source_head * s.sources + n);
        for (int64_t e = 0; equal && e < s.dim; ++e)
          sum[size_t(e)] += 0.25 * equal * load(s.rows, x + e * bytes_of(s.rows));
      }
    int64_t wrong = 0;
    for (int64_t e = 0; e < s.dim + s.gap; ++e) {
      const double y = load(s.out, out_row(head * s.targets + target) + e * bytes_of(s.out));
      char rounded[4];
      store(e < s.dim ? sum[size_t(e)] : 0, s.out, rounded);
      wrong += e < s.dim ? !(y == load(s.out, rounded)) : y == y;  // gaps stay NaN
    }
    return wrong;
  }

  int64_t wrong() {
    int64_t count = 0;
    for (int64_t pair = 0; pair < s.batch * s.heads_kv; ++pair)
      for (int64_t head = 0; head < target_group; ++head)
        for (int64_t target = 0; target < s.targets; ++target) count += wrong_elements(pair, head, target);
    return count;
  }
};

template <class Code>
int64_t run(Problem<Code>& p, int64_t prefix_bytes = cuda::kPrefixBytes) {
  const cuda::BucketProblem problem = p.problem();
  Arena measure = {};
  cuda::take_segments(measure, problem, prefix_bytes);
  // At an odd address, of just the size, full of NaN.
  const size_t bytes = size_t(with_alignment(measure)) + 1;
  const std::unique_ptr<char[]> memory(new char[bytes]);
  std::memset(memory.get(), 0xff, bytes);
  Arena arena = arena_at(memory.get() + 1);
  CHECK(!cuda::run_segments(Queue::cpu(1), problem, cuda::take_segments(arena, problem, prefix_bytes)));
  return measure.used;
}

template <class Code>
void check_problem(const Sizes& s) {
  Problem<Code> p(s);
  run(p);
  const int64_t wrong = p.wrong();
  const int64_t numbers[] = {wrong,         s.group,  s.num_hashes, s.sources, s.targets,        s.dim,
                             s.num_buckets, s.causal, s.backward,   s.masked,  bytes_of(s.rows), bytes_of(s.out),
                             s.gap,         s.first};
  std::string text =
      "wrong, group, R, sources, targets, E, buckets, causal, backward, masked, bytes, bytes, gap, first:";
  for (const int64_t number : numbers) text += " " + std::to_string(number);
  if (wrong) check::fail(__FILE__, __LINE__, text);
}

template <class Code>
void check_each_pass(Sizes s) {
  for (int bits = 0; bits < 8; ++bits) {
    s.causal = bits & 1, s.backward = bits & 2, s.masked = bits & 4;
    check_problem<Code>(s);
  }
}

}  // namespace

TEST(segments_of_any_width_and_dtype) {
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  int turn = 0;
  for (const int64_t dim : {1, 3, 4, 7, 31, 32, 33, 36, 64, 65, 128, 129, 200, 253, 256}) {
    Sizes s;
    s.batch = 1, s.num_hashes = 3, s.sources = 37, s.targets = 21, s.num_buckets = 4;
    s.dim = dim, s.causal = turn % 2, s.backward = turn / 2 % 2;
    s.rows = dtypes[turn % 3], s.out = dtypes[turn / 2 % 3];
    check_problem<uint16_t>(s);
    s.gap = 3, s.first = 1, s.masked = true;
    check_problem<uint16_t>(s);
    // Vectors must be left alone where only the first row, or only the others, are not aligned to them.
    for (const int64_t first : {0, 1, 4}) {
      s.gap = first ? 4 : 3, s.first = first;
      check_problem<int32_t>(s);
    }
    ++turn;
  }
}

TEST(segments_of_any_number_of_tokens) {
  for (const int64_t sources : {0, 1, 7, 8, 9, 15, 16, 17, 127, 128, 129, 300}) {
    Sizes s;
    s.batch = s.heads_kv = 1, s.num_hashes = 2, s.dim = 5, s.sources = sources, s.targets = sources + 3;
    s.equal_codes = sources % 2;
    check_each_pass<uint16_t>(s);
    s.targets = sources > 5 ? sources - 5 : 40;
    check_each_pass<int32_t>(s);
  }
}

TEST(segments_of_any_number_of_hashes_and_buckets) {
  for (const int64_t num_hashes : {1, 7, 8, 9, 16, 17, 33}) {
    Sizes s;
    s.batch = 1, s.dim = num_hashes == 33 ? 100 : 40, s.num_hashes = num_hashes;
    check_problem<uint16_t>(s);
  }
  for (const int64_t num_buckets : {1, 2, 255, 65536, 1 << 24}) {
    Sizes s;
    s.num_hashes = 3, s.num_buckets = num_buckets, s.sources = 180;
    if (num_buckets <= 65536) check_each_pass<uint16_t>(s);
    check_each_pass<int32_t>(s);
  }
}

TEST(segments_of_groups_of_heads) {
  for (const int64_t group : {2, 3}) {
    Sizes s;
    s.group = group, s.dim = 40;
    check_each_pass<uint16_t>(s);
  }
}

TEST(segments_of_a_few_batch_items_at_a_time) {
  Sizes s;
  s.batch = 5, s.masked = true;
  const int64_t item = s.heads_kv * s.num_hashes * (s.sources / 8 + 1) * s.dim * int64_t(sizeof(float));
  int64_t before = 0;
  for (const int64_t items : {0, 2, 4, 5}) {
    Problem<uint16_t> p(s);
    const int64_t bytes = run(p, items * item + 3);
    CHECK(p.wrong() == 0);
    CHECK(bytes > before);
    before = bytes;
  }
}

TEST(segments_of_one_bucket) {
  emulator::under_every_schedule([] {
    Sizes s;
    s.equal_codes = true, s.batch = 1, s.sources = 400, s.targets = 90, s.dim = 12, s.num_hashes = 2;
    for (const bool causal : {false, true}) {
      s.causal = causal;
      check_problem<uint16_t>(s);
    }
  });
}

TEST(segments_under_every_schedule) {
  emulator::under_every_schedule([] {
    Sizes s;
    s.batch = 1, s.causal = s.masked = true, s.dim = 64, s.sources = s.targets = 130, s.num_hashes = 17;
    s.rows = s.out = DType::bf16;
    check_problem<uint16_t>(s);
    s.backward = true, s.dim = 30, s.group = 2;
    check_problem<uint16_t>(s);
  });
}

TEST(segments_see_nothing_of_later_tokens) {
  for (const bool backward : {false, true})
    for (const int64_t num_buckets : {1, 3, 20}) {
      Sizes s;
      s.batch = s.heads_kv = 1, s.sources = s.targets = 200, s.causal = true, s.backward = backward;
      s.num_buckets = num_buckets, s.num_hashes = 9, s.dim = 8;
      Problem<uint16_t> before(s, false), after(s, false);
      // Of the sources from 130 on, backward of those before 70, nothing stays: they move to other buckets, too.
      for (int64_t n = 0; n < s.sources; ++n) {
        if (backward ? n >= 70 : n < 130) continue;
        for (int64_t r = 0; r < s.num_hashes; ++r)
          after.source_codes[size_t(r * s.sources + n)] = uint16_t(n % (num_buckets > 1 ? num_buckets - 1 : 1));
        for (int64_t e = 0; e < s.dim; ++e) store(7.25, s.rows, after.row(n) + e * bytes_of(s.rows));
      }
      run(before), run(after);
      int64_t differing = 0;
      for (int64_t n = 0; n < s.targets; ++n) {
        const bool differs = std::memcmp(before.out_row(n), after.out_row(n), size_t(s.dim * bytes_of(s.out))) != 0;
        const bool may_differ = backward ? n < 70 : n >= 130;
        if (!may_differ) CHECK(!differs);
        differing += differs;
      }
      CHECK(differing > 0);
    }
}
