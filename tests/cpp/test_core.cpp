#include <limits>
#include <stdexcept>

#include "check.h"
#include "core/check.h"
#include "core/operand.h"
#include "core/visit.h"
#include "subquad/subquad.h"

using namespace subquad;

namespace {

/// The value of binary16 or bfloat16 bits from the definition of the format.
double value_of(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

template <class T>
uint16_t rounded(float x) {
  T stored;
  from_float(x, &stored);
  return stored.bits;
}

bool is_nan_bits(uint16_t bits, uint16_t infinity) { return (bits & 0x7fff) > infinity; }

/// Every 16-bit pattern: exact to float, back to itself; and the float half way to the next one goes to the even one.
template <class T>
void check_format(int exponent_bits) {
  const uint16_t infinity = uint16_t(((1 << exponent_bits) - 1) << (15 - exponent_bits));
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const uint16_t bits = uint16_t(pattern);
    const double expected = value_of(bits, exponent_bits);
    const float value = to_float(T{bits});
    if (is_nan_bits(bits, infinity)) {
      CHECK(value != value);
      CHECK(is_nan_bits(rounded<T>(value), infinity));
      continue;
    }
    CHECK(double(value) == expected && std::signbit(value) == std::signbit(expected));
    CHECK(rounded<T>(value) == bits);
    if ((bits & 0x7fff) >= infinity) continue;
    // Half way to infinity is where the next number would be if the exponent went on.
    const bool last = (bits & 0x7fff) == infinity - 1;
    const double next = last ? 2 * expected - value_of(bits - 1, exponent_bits) : value_of(bits + 1, exponent_bits);
    const float middle = float((expected + next) / 2);
    const uint16_t even = bits & 1 ? bits + 1 : bits;
    CHECK(double(middle) == (expected + next) / 2);
    CHECK(rounded<T>(middle) == even);
    CHECK(rounded<T>(std::nextafter(middle, 0.0f)) == bits);
    CHECK(rounded<T>(std::nextafter(middle, middle < 0 ? -INFINITY : INFINITY)) == bits + 1);
  }
  CHECK(rounded<T>(std::numeric_limits<float>::max()) == infinity);
  CHECK(rounded<T>(std::numeric_limits<float>::denorm_min()) == 0);
}

const Queue kQueue = Queue::cpu(1);
float numbers[64];

}  // namespace

// First: a row is picked once, so each choice is made in a child before this process has picked its own.
TEST(row_is_chosen_by_the_environment) {
  for (const std::string& name : cpu::available()) {
    CHECK(check::passes_in_child([&] {
      setenv("SUBQUAD_ISA", name.c_str(), 1);
      CHECK(cpu::isa() == name);
    }));
  }
  CHECK(check::passes_in_child([] {
    setenv("SUBQUAD_ISA", "", 1);
    CHECK(cpu::isa() == cpu::available().back());
  }));
  CHECK(check::passes_in_child([] {
    setenv("SUBQUAD_ISA", "pdp11", 1);
    CHECK_THROWS_AS(std::invalid_argument, cpu::isa(), "[cpu] SUBQUAD_ISA: expected one of " + cpu::available()[0]);
    CHECK_THROWS_AS(std::invalid_argument, cpu::isa(), "got \"pdp11\"");
    cpu::set_isa(cpu::available()[0]);
    CHECK(cpu::isa() == cpu::available()[0]);
  }));
}

TEST(row_can_be_forced) {
  const std::vector<std::string> compiled = cpu::compiled(), available = cpu::available();
  CHECK(!available.empty());
  size_t at = 0;
  for (const std::string& name : available) {
    while (at < compiled.size() && compiled[at] != name) ++at;
    CHECK(at < compiled.size());
  }
  int visited = 0;
  check::for_each_isa([&](const std::string& name) {
    CHECK(cpu::isa() == name);
    ++visited;
  });
  CHECK(size_t(visited) == available.size());
  const std::string before = cpu::isa();
  CHECK_THROWS_AS(std::invalid_argument, cpu::set_isa("x86_64_v9"), "[cpu] isa: expected one of ");
  CHECK_THROWS(cpu::set_isa(""), "got \"\"");
  CHECK(cpu::isa() == before);
}

TEST(half_conversions) { check_format<half>(5); }

TEST(bfloat16_conversions) { check_format<bfloat16>(8); }

TEST(dtype_facts) {
  const int64_t sizes[] = {0, 4, 2, 2, 8, 4, 2, 1, 1};
  for (int i = 0; i <= int(DType::boolean); ++i) CHECK(dtype_bytes(DType(i)) == sizes[i]);
  CHECK(is_float(DType::bf16) && !is_float(DType::i32) && !is_float(DType::none));
  CHECK(dtype_of<const half>() == DType::f16 && dtype_of<bool>() == DType::boolean);
}

TEST(views) {
  const ConstTensor t = make_tensor(static_cast<const float*>(numbers), {2, 3, 4});
  CHECK(t.rank == 3 && t.stride[0] == 12 && t.stride[1] == 4 && t.stride[2] == 1 && t.numel() == 24);
  CHECK(t.dtype == DType::f32 && t.defined() && !ConstTensor().defined());
  const Operand o = core::operand(t);
  CHECK(o.data == numbers && o.stride[0] == 12 && o.stride[2] == 1 && o.dtype == DType::f32);
  CHECK(!core::operand(ConstTensor()).data);
}

TEST(arena_measures_and_places) {
  Arena measure = {nullptr, 0};
  CHECK(!take<float>(measure, 3) && !take<char>(measure, 65));
  CHECK(measure.used == 64 + 128);
  alignas(64) char block[512];
  Arena arena = arena_at(block + 1);
  float* first = take<float>(arena, 3);
  char* second = take<char>(arena, 65);
  CHECK(reinterpret_cast<char*>(first) == block + 64 && second == block + 128);
  CHECK(arena.used == measure.used);
}

TEST(visits) {
  int64_t seen = -1;
  visit_int<32, 64>(64, [&](auto v) { seen = v.value; });
  CHECK(seen == 64);
  visit_int<32, 64>(48, [&](auto v) { seen = v.value; });
  CHECK(seen == 0);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    DType visited = DType::none;
    visit_float(dtype, [&](auto tag) { visited = dtype_of<decltype(tag)>(); });
    CHECK(visited == dtype);
  }
}

TEST(array_errors) {
  const auto check = [](const ConstTensor& t) {
    core::check_array("op", "x", kQueue, t, {{"B", 2}, {"N", core::kAny}}, {DType::f32, DType::f16});
  };
  const ConstTensor good = make_tensor(numbers, {2, 8});
  check(good);
  CHECK_THROWS_AS(TypeMismatch, check(ConstTensor()), "[op] x: expected an array, got none");
  CHECK_THROWS_AS(TypeMismatch, check(make_tensor(reinterpret_cast<int32_t*>(numbers), {2, 8})),
                  "[op] x: expected dtype float32 or float16, got int32");
  CHECK_THROWS_AS(std::invalid_argument, check(make_tensor(numbers, {3, 8})),
                  "[op] x: expected shape [B, N], got [3, 8]");
  CHECK_THROWS(check(make_tensor(numbers, {2, 2, 2})), "got [2, 2, 2]");
  CHECK_THROWS(core::check_array("op", "x", kQueue, good, {{"B", 2}, {"N", 9}}, {DType::f32}),
               "expected shape [B, N] = [2, 9], got [2, 8]");
  ConstTensor elsewhere = good;
  elsewhere.device = {DeviceType::cuda, 1};
  CHECK_THROWS_AS(TypeMismatch, check(elsewhere), "[op] x: expected an array on cpu, got cuda:1");
  ConstTensor strided = good;
  strided.stride[1] = 2;
  CHECK_THROWS(check(strided), "[op] x: expected a contiguous last axis");
  ConstTensor unaligned = good;
  unaligned.data = reinterpret_cast<const char*>(numbers) + 1;
  CHECK_THROWS(check(unaligned), "[op] x: expected data aligned to its element size");
}

// One element in the last axis, or none at all, makes its stride meaningless.
TEST(strides_that_do_not_matter) {
  ConstTensor t = make_tensor(numbers, {2, 1});
  t.stride[1] = 7;
  core::check_array("op", "x", kQueue, t, {{"B", 2}, {"N", 1}}, {DType::f32});
  t = make_tensor(numbers, {0, 4});
  t.stride[1] = 0;
  t.data = nullptr;
  core::check_array("op", "x", kQueue, t, {{"B", 0}, {"N", 4}}, {DType::f32});
}

TEST(value_errors) {
  core::check_range("op", "bits", 1, 1, 24);
  core::check_range("op", "bits", 24, 1, 24);
  CHECK_THROWS_AS(std::invalid_argument, core::check_range("op", "bits", 25, 1, 24),
                  "[op] bits: expected a value in [1, 24], got 25");
  CHECK_THROWS(core::check_range("op", "bits", 0, 1, 24), "got 0");
  core::check_groups("op", "k", 8, 2);
  core::check_groups("op", "k", 0, 0);
  CHECK_THROWS(core::check_groups("op", "k", 8, 3),
               "[op] k: expected a number of heads that divides the 8 query heads");
  CHECK_THROWS(core::check_groups("op", "k", 8, 0), "got 0");
  core::check_workspace("op", {}, 0);
  core::check_workspace("op", {numbers, 64}, 64);
  CHECK_THROWS(core::check_workspace("op", {numbers, 63}, 64), "[op] workspace: expected at least 64 bytes, got 63");
  CHECK_THROWS(core::check_workspace("op", {nullptr, 64}, 64), "[op] workspace");
}

TEST(output_errors) {
  const Tensor out = make_tensor(numbers, {2, 8});
  const ConstTensor apart = make_tensor(numbers + 16, {2, 8}), touching = make_tensor(numbers + 15, {2, 8});
  core::check_output("op", "out", out, {&apart});
  CHECK_THROWS_AS(std::invalid_argument, core::check_output("op", "out", out, {&apart, &touching}),
                  "[op] out: expected an output that shares no memory with another argument");
  Tensor broadcast = out;
  broadcast.stride[0] = 0;
  CHECK_THROWS(core::check_output("op", "out", broadcast, {}),
               "[op] out: expected an output whose elements have memory of their own, got overlapping strides");
  Tensor backward = make_tensor(numbers + 8, {2, 8});
  backward.stride[0] = -8;
  core::check_output("op", "out", backward, {&apart});
  CHECK_THROWS(core::check_output("op", "out", backward, {&out}), "[op] out");
  const Tensor empty = make_tensor(numbers, {0, 8});
  core::check_output("op", "out", empty, {&empty});
  core::check_output("op", "out", Tensor(), {&out});
}

TEST(device_without_backend) {
  const Queue cuda = Queue::cuda(0, nullptr);
  Tensor out = make_tensor(numbers, {1, 2, 3}, cuda.device);
  CHECK_THROWS_AS(Unsupported, random_uniform(cuda, 1, 0, out),
                  "[random_uniform] this build has no backend for cuda:0 arrays");
}
