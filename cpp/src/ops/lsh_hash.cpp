#include "subquad/lsh_hash.h"

#include "core/registry.h"

namespace subquad {
namespace {

const char* const kOp = "lsh_hash";

int64_t extent(const ConstTensor& t, int axis) { return t.rank == 4 ? t.shape[axis] : core::kAny; }

/// Checks x and gives the fields of Args that come from it.
LshHashArgs check_x(const Queue& queue, const ConstTensor& x) {
  using core::kAny;
  core::check_array(kOp, "x", queue, x, {{"B", kAny}, {"H", kAny}, {"N", kAny}, {"D", kAny}},
                    {DType::f32, DType::f16, DType::bf16});
  if (x.shape[3] < 1) core::invalid(kOp, "x", "a head_dim of at least 1", "0");
  LshHashArgs args = {};
  args.batch = x.shape[0], args.heads = x.shape[1], args.seq = x.shape[2], args.dim = x.shape[3];
  args.x = core::operand(x);
  return args;
}

/// Checks codes for num_hashes codes (any number if kAny) and adds their fields.
void check_codes(const Queue& queue, const ConstTensor& codes, int64_t num_hashes, int64_t hash_bits,
                 LshHashArgs& args) {
  core::check_range(kOp, "hash_bits", hash_bits, 1, 24);
  core::check_array(kOp, "codes", queue, codes,
                    {{"B", args.batch}, {"H", args.heads}, {"R", num_hashes}, {"N", args.seq}},
                    {DType::u16, DType::i32});
  core::check_range(kOp, "num_hashes", codes.shape[2], 1, INT32_MAX / 32);
  if (codes.dtype == DType::u16 && hash_bits > 16)
    core::mismatch(kOp, "codes", "dtype int32 for codes of " + std::to_string(hash_bits) + " bits", "uint16");
  args.num_hashes = int32_t(codes.shape[2]), args.hash_bits = int32_t(hash_bits);
  args.codes = core::operand(codes);
}

LshHashArgs check_planes(const Queue& queue, const ConstTensor& x, const ConstTensor& planes,
                         const ConstTensor& codes) {
  LshHashArgs args = check_x(queue, x);
  core::check_array(kOp, "planes", queue, planes,
                    {{"Hp", extent(planes, 0)}, {"R", extent(planes, 1)}, {"J", extent(planes, 2)}, {"D", args.dim}},
                    {DType::f32});
  core::check_groups(kOp, "planes", args.heads, planes.shape[0]);
  check_codes(queue, codes, planes.shape[1], planes.shape[2], args);
  core::check_output(kOp, "codes", codes, {&x, &planes});
  args.plane_heads = planes.shape[0];
  args.planes = core::operand(planes);
  return args;
}

LshHashArgs check_signs(const Queue& queue, const ConstTensor& x, const ConstTensor& signs, int64_t hash_bits,
                        Carving carving, const ConstTensor& codes) {
  LshHashArgs args = check_x(queue, x);
  check_codes(queue, codes, core::kAny, hash_bits, args);
  args.hadamard = true;
  args.strided = carving == Carving::strided;
  args.parts = int32_t(hadamard_parts(args.num_hashes, hash_bits, args.dim, carving));
  args.padded = int32_t(hadamard_padded(args.dim));
  core::check_array(kOp, "signs", queue, signs,
                    {{"Hp", extent(signs, 0)}, {"3", 3}, {"P", args.parts}, {"D2", args.padded}}, {DType::f32});
  core::check_groups(kOp, "signs", args.heads, signs.shape[0]);
  core::check_output(kOp, "codes", codes, {&x, &signs});
  args.plane_heads = signs.shape[0];
  args.signs = core::operand(signs);
  return args;
}

bool empty(const LshHashArgs& args) { return args.batch == 0 || args.heads == 0 || args.seq == 0; }

void launch(const Queue& queue, const LshHashArgs& args, const Workspace& workspace) {
  if (!empty(args)) core::launch(kOp, queue, &Kernels::lsh_hash, args, workspace);
}

int64_t workspace_bytes(const Queue& queue, const LshHashArgs& args) {
  return empty(args) ? 0 : core::workspace_bytes(kOp, queue, &Kernels::lsh_hash, args);
}

}  // namespace

int64_t hadamard_padded(int64_t dim) {
  int64_t padded = 64;
  while (padded < dim) padded *= 2;
  return padded;
}

int64_t hadamard_parts(int64_t num_hashes, int64_t hash_bits, int64_t dim, Carving carving) {
  core::check_range(kOp, "hash_bits", hash_bits, 1, 24);
  const int64_t padded = hadamard_padded(dim);
  if (carving == Carving::strided) return (num_hashes * hash_bits + padded - 1) / padded;
  const int64_t codes_a_part = padded / hash_bits;
  return (num_hashes + codes_a_part - 1) / codes_a_part;
}

void lsh_hash(const Queue& queue, ConstTensor x, ConstTensor planes, Tensor codes, Workspace workspace) {
  launch(queue, check_planes(queue, x, planes, codes), workspace);
}

int64_t lsh_hash_workspace_bytes(const Queue& queue, ConstTensor x, ConstTensor planes, Tensor codes) {
  return workspace_bytes(queue, check_planes(queue, x, planes, codes));
}

void lsh_hash_hadamard(const Queue& queue, ConstTensor x, ConstTensor signs, int64_t hash_bits, Carving carving,
                       Tensor codes, Workspace workspace) {
  launch(queue, check_signs(queue, x, signs, hash_bits, carving, codes), workspace);
}

int64_t lsh_hash_hadamard_workspace_bytes(const Queue& queue, ConstTensor x, ConstTensor signs, int64_t hash_bits,
                                          Carving carving, Tensor codes) {
  return workspace_bytes(queue, check_signs(queue, x, signs, hash_bits, carving, codes));
}

}  // namespace subquad
