#include <random>

#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "emulator/test_support.h"

using namespace emulator;
using namespace subquad;

namespace {

/// Copies in two groups and looks at the memory after 0, 1 and 2 waits.
void watch_copies(const float* source, float* out) {
  float* shared = reinterpret_cast<float*>(dyn_smem()) + 8 * threadIdx.x;
  cuda::copy_async16(shared, source, 16);
  cuda::copy_async_commit();
  cuda::copy_async16(shared + 4, source + 4, 8);
  cuda::copy_async_commit();
  float* seen = out + 6 * threadIdx.x;
  seen[0] = shared[3], seen[1] = shared[5];
  cuda::copy_async_wait<1>();
  seen[2] = shared[3], seen[3] = shared[5];
  cuda::copy_async_wait<0>();
  seen[4] = shared[3], seen[5] = shared[5] + shared[6] + shared[7];
}

struct Seen {
  std::vector<float> values = std::vector<float>(64 * 6);
  Seen(const char* order, const char* landing) {
    const UnderSchedule schedule(order, landing);
    alignas(16) const float source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    CHECK(!launch(watch_copies, dim3(1), dim3(64), 64 * 32, source, values.data()));
    // What has been waited for has landed, and zeros follow the 8 bytes.
    for (int t = 0; t < 64; ++t) CHECK(at(t, 2) == 4 && at(t, 4) == 4 && at(t, 5) == 6);
  }
  float at(int thread, int i) const { return values[size_t(thread * 6 + i)]; }
};

template <class T>
void check_product(unsigned seed) {
  alignas(16) T a[16][16], b[16][8], columns[8][16];
  float d[16][8], out[3][16][8];
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) from_float(normal(random), &a[i][j]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) from_float(normal(random), &b[i][j]), columns[j][i] = b[i][j], d[i][j] = normal(random);
  // Fragments by hand, by ldmatrix from [k][column], and by ldmatrix from [column][k].
  CHECK(!launch(
      +[](const T(*a)[16], const T(*b)[8], const T(*columns)[16], const float(*d)[8], float(*out)[16][8]) {
        const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
        const auto pair = [](T low, T high) { return cuda::pack(to_float(low), to_float(high), T{}); };
        uint32_t a_hand[4], b_hand[2], a_loaded[4], b_loaded[4], b_columns[4];
        for (int i = 0; i < 4; ++i) {
          const int row = g + 8 * (i & 1), k = 2 * t + 8 * (i >> 1);
          a_hand[i] = pair(a[row][k], a[row][k + 1]);
        }
        for (int i = 0; i < 2; ++i) b_hand[i] = pair(b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]);
        const int matrix = lane / 8, r = lane % 8;
        cuda::ldmatrix_x4<false>(a_loaded, &a[r + 8 * (matrix & 1)][8 * (matrix >> 1)]);
        cuda::ldmatrix_x4<true>(b_loaded, &b[r + 8 * (matrix & 1)][0]);
        cuda::ldmatrix_x4<false>(b_columns, &columns[r][8 * (matrix & 1)]);
        for (int way = 0; way < 3; ++way) {
          float sum[4];
          for (int i = 0; i < 4; ++i) sum[i] = d[g + 8 * (i >> 1)][2 * t + (i & 1)];
          const uint32_t(&right)[2] = *reinterpret_cast<uint32_t(*)[2]>(way == 0   ? b_hand
                                                                        : way == 1 ? b_loaded
                                                                                   : b_columns);
          cuda::mma_m16n8k16(sum, way ? a_loaded : a_hand, right, T{});
          for (int i = 0; i < 4; ++i) out[way][g + 8 * (i >> 1)][2 * t + (i & 1)] = sum[i];
        }
      },
      dim3(1), dim3(32), 0, a, b, columns, d, out));
  for (int way = 0; way < 3; ++way)
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        double exact = d[i][j], size = std::fabs(exact);
        for (int k = 0; k < 16; ++k) {
          const double term = double(to_float(a[i][k])) * to_float(b[k][j]);
          exact += term, size += std::fabs(term);
        }
        CHECK_NEAR(out[way][i][j], exact, 17 * 0x1p-24 * size);
      }
}

}  // namespace

TEST(copies_land_late) {
  const Seen seen("fwd", "late");
  for (int t = 0; t < 64; ++t)
    CHECK(std::isnan(seen.at(t, 0)) && std::isnan(seen.at(t, 1)) && std::isnan(seen.at(t, 3)));
}

TEST(copies_land_early) {
  const Seen seen("fwd", "early");
  for (int t = 0; t < 64; ++t) CHECK(seen.at(t, 0) == 4 && seen.at(t, 1) == 6 && seen.at(t, 3) == 6);
}

TEST(copies_land_at_random) {
  for (const char* order : {"rand:1", "rand:2"}) {
    const Seen seen(order, "rand");
    int landed = 0, first_only = 0, second_only = 0;
    for (int t = 0; t < 64; ++t) {
      const bool first = seen.at(t, 0) == 4, second = seen.at(t, 1) == 6;
      landed += first + second, first_only += first && !second, second_only += second && !first;
    }
    CHECK(landed > 32 && landed < 96 && first_only > 4 && second_only > 4);
  }
}

TEST(misaligned_copies_and_matrices_end_the_program) {
  const auto words = [](void (*kernel)(int)) { return last_words([=] { launch(kernel, dim3(1), dim3(32), 64, 0); }); };
  alignas(16) static float source[8];
  CHECK(has(words([](int) { cuda::copy_async16(dyn_smem() + 8, source, 16); }), {"not aligned to 16"}));
  CHECK(has(words([](int) { cuda::copy_async16(dyn_smem(), source + 1, 16); }), {"not aligned to 16"}));
  CHECK(has(words([](int) { cuda::copy_async16(dyn_smem(), source, 17); }), {"more than 16 bytes"}));
  CHECK(has(words([](int) {
              uint32_t r[4];
              cuda::ldmatrix_x4<false>(r, dyn_smem() + 4);
            }),
            {"ldmatrix: a row is not aligned"}));
  float out = 0;
  // Nothing is read for 0 bytes.
  CHECK(!launch(
      +[](float* out) {
        cuda::copy_async16(dyn_smem(), reinterpret_cast<const float*>(1), 0);
        cuda::copy_async_commit();
        cuda::copy_async_wait<0>();
        *out = 1 + reinterpret_cast<float*>(dyn_smem())[3];
      },
      dim3(1), dim3(1), 16, &out));
  CHECK(out == 1);
}

TEST(products_of_matrices) {
  under_every_schedule([] {
    for (unsigned seed = 1; seed <= 5; ++seed) check_product<bfloat16>(seed), check_product<half>(seed);
  });
}

TEST(bit_functions) {
  CHECK(__ffs(0) == 0 && __ffs(12) == 3 && __ffsll(1ll << 40) == 41 && __ffsll(0) == 0);
  CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(0) == 64 && __clzll(1) == 63);
  CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64);
  CHECK(__brev(1) == 0x80000000u && __brev(0x80000001u) == 0x80000001u && __brevll(2) == 1ull << 62);
  CHECK(__funnelshift_l(0x12345678u, 0x9abcdef0u, 8) == 0xbcdef012u);
  CHECK(__funnelshift_r(0x12345678u, 0x9abcdef0u, 8) == 0xf0123456u);
  CHECK(__funnelshift_l(1, 2, 32) == 2 && __funnelshift_r(1, 2, 32) == 1 && __funnelshift_r(0, 1, 63) == 2);
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7531) == 0x77553311u);
  CHECK(__byte_perm(0x00008000u, 0, 0x9901) == 0xffff0080u);
  CHECK(__umulhi(0x80000000u, 6) == 3 && __mulhi(-1, 1) == -1 && __umul64hi(1ull << 63, 6) == 3);
}

TEST(number_functions) {
  CHECK(max(NAN, 2.0f) == 2 && min(2.0f, NAN) == 2 && std::isnan(max(NAN, NAN)));
  CHECK(max(-1, 2) == 2 && min(int64_t(5), 3) == 3 && max(1u, 2u) == 2 && min(-1, 1u) == 1);
  CHECK(rsqrtf(4) == 0.5f && rsqrtf(0) == INFINITY && __frcp_rn(8) == 0.125f && __fsqrt_rn(9) == 3);
  CHECK(__uint_as_float(0x3f800000u) == 1 && __float_as_uint(-0.0f) == 0x80000000u && __float_as_int(1) == 0x3f800000);
  CHECK(__double_as_longlong(1) == 0x3ff0000000000000ll && __longlong_as_double(0x4000000000000000ll) == 2);
  CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 && __float2int_rz(-2.9f) == -2);
  CHECK(__float2int_rd(-2.1f) == -3 && __float2int_rn(NAN) == 0 && __float2int_rz(3e9f) == 2147483647);
  CHECK_NEAR(__expf(1), std::exp(1.0), 1e-6);
  CHECK_NEAR(__logf(10), std::log(10.0), 1e-6);
}
