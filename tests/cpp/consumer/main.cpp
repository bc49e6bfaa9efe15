#include <cstdio>
#include <vector>

#include "subquad/subquad.h"

int main() {
  const int64_t batch = 1, heads = 2, tokens = 300, dim = 32;
  const int64_t elements = batch * heads * tokens * dim;
  const subquad::Queue queue = subquad::Queue::cpu();
  const auto array = [&](std::vector<float>& data) {
    return subquad::make_tensor(data.data(), {batch, heads, tokens, dim});
  };

  std::vector<float> q(elements), k(elements), v(elements), out(elements);
  subquad::random_normal(queue, 1, 16, array(q));
  subquad::random_normal(queue, 2, 16, array(k));
  subquad::random_normal(queue, 3, 16, array(v));

  subquad::YosoOptions options;
  options.num_hashes = 8;
  options.hash_bits = 6;
  options.seed = 1;
  std::vector<char> scratch(
      subquad::yoso_attention_workspace_bytes(queue, array(q), array(k), array(v), options, array(out), {}));
  subquad::yoso_attention(queue, array(q), array(k), array(v), options, array(out), {},
                          {scratch.data(), int64_t(scratch.size())});

  // Rows of the output have length 1, so this is close to the number of rows.
  double squares = 0;
  for (float x : out) squares += double(x) * x;
  std::printf("%s, %d threads: checksum %.3f\n", subquad::cpu::isa().c_str(), queue.num_threads, squares);
}
