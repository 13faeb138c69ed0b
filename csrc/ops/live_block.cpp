// Bindings of live_block and spread_block: the live rows and columns of a convolution's weight, and back. gather_blocks and
// spread_blocks do so for several tensors of a weight's shape, in memory that is there.
#include <algorithm>

#include "binding.h"
#include "launch.h"

namespace lp {
namespace {

struct Block {
  ConvShape shape;  // of the whole weight
  std::optional<Tensor> rows, columns;
  IndexList ins, outs;
  DType dtype;
};

Block check(const char* op, const Tensor& weight, const std::optional<Tensor>& rows, const std::optional<Tensor>& columns) {
  if (weight.dim() != 4 || (weight.scalar_type() != ScalarType::Float && weight.scalar_type() != ScalarType::Double))
    fail(op, ": weight must be float32 or float64 of shape (O, C, kh, kw); got ", dtype_name(weight.scalar_type()),
         " of shape ", show_shape(weight));
  if (weight.is_cuda()) fail(op, ": runs on the CPU; use index_select");
  Block b{};
  b.shape.outputs = weight.size(0);
  b.shape.channels = weight.size(1);
  b.shape.kh = weight.size(2);
  b.shape.kw = weight.size(3);
  b.dtype = weight.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32;
  const auto list = [&](const char* name, const std::optional<Tensor>& index, int64_t size, std::optional<Tensor>& keep) {
    if (!index) return IndexList{nullptr, size};
    keep = index_argument(op, name, *index, size, Order::sorted, weight);
    return IndexList{static_cast<const int64_t*>(keep->data_ptr()), keep->size(0)};
  };
  b.outs = list("rows", rows, b.shape.outputs, b.rows);
  b.ins = list("columns", columns, b.shape.channels, b.columns);
  return b;
}

Sizes block_shape(const Block& b) { return {b.outs.count, b.ins.count, b.shape.kh, b.shape.kw}; }

void check_block(const char* op, const Block& b, const Tensor& block, const Tensor& whole) {
  const Sizes shape = block_shape(b);
  if (show_shape(block) != show(shape) || block.scalar_type() != whole.scalar_type() || block.is_cuda())
    fail(op, ": block must be ", dtype_name(whole.scalar_type()), " of shape ", show(shape), "; got ",
         dtype_name(block.scalar_type()), " of shape ", show_shape(block));
}

void spread(const char* op, const Block& b, const Tensor& block, const Tensor& out, bool clear) {
  check_block(op, b, block, out);
  if (!is_channels_last(out) && !out.is_contiguous()) fail(op, ": out must be contiguous or channels_last");
  Scratch scratch(out);
  const auto s = out.strides();
  const int64_t steps[4] = {s[0], s[1], s[2], s[3]};
  spread_block_cpu(b.dtype, b.shape, view_of(block), out.data_ptr(), steps, b.ins, b.outs, clear, scratch.env());
}

void gather(const Block& b, const Tensor& whole, const Tensor& block) {
  Scratch scratch(whole);
  live_block_cpu(b.dtype, b.shape, view_of(whole), view_of(block), b.ins, b.outs, scratch.env());
}

Tensor live_block(const Tensor& weight, const std::optional<Tensor>& rows, const std::optional<Tensor>& columns) {
  const Block b = check("live_block", weight, rows, columns);
  Tensor block = new_output(weight, block_shape(b));
  gather(b, weight, block);
  return block;
}

void spread_block(const Tensor& block, const Tensor& out, const std::optional<Tensor>& rows,
                  const std::optional<Tensor>& columns, bool clear) {
  spread("spread_block", check("spread_block", out, rows, columns), block, out, clear);
}

void gather_blocks(const std::vector<Tensor>& wholes, const std::vector<Tensor>& blocks, const std::optional<Tensor>& rows,
                   const std::optional<Tensor>& columns) {
  const char* op = "gather_blocks";
  if (wholes.size() != blocks.size()) fail(op, ": got ", wholes.size(), " tensors and blocks for ", blocks.size());
  for (size_t i = 0; i < wholes.size(); ++i) {
    const Block b = check(op, wholes[i], rows, columns);
    check_block(op, b, blocks[i], wholes[i]);
    gather(b, wholes[i], blocks[i]);
  }
}

void spread_blocks(const std::vector<Tensor>& blocks, const std::vector<Tensor>& wholes, const std::optional<Tensor>& rows,
                   const std::optional<Tensor>& columns) {
  const char* op = "spread_blocks";
  if (wholes.size() != blocks.size()) fail(op, ": got ", blocks.size(), " blocks and tensors for ", wholes.size());
  for (size_t i = 0; i < wholes.size(); ++i) spread(op, check(op, wholes[i], rows, columns), blocks[i], wholes[i], false);
}

// Whether a few elements of the block, not all of them zero, are those of the whole tensor: whoever has multiplied it since,
// or filled it, has changed them.
bool is_live_part(const Tensor& whole, const Tensor& block, const std::optional<Tensor>& rows,
                  const std::optional<Tensor>& columns) {
  const char* op = "is_live_part";
  const Block b = check(op, whole, rows, columns);
  check_block(op, b, block, whole);
  const View w = view_of(whole), v = view_of(block);
  const auto same = [&](auto zero) {
    using T = decltype(zero);
    bool any = false;
    for (int64_t i = 0, probes = 8; i < probes && block.numel() > 0; ++i) {
      const int64_t o = b.outs.count * i / probes;
      for (int64_t c = 0; c < std::min<int64_t>(b.ins.count, probes); ++c) {
        const T theirs = static_cast<const T*>(w.data)[b.outs[o] * w.n + b.ins[c] * w.c];
        const T ours = static_cast<const T*>(v.data)[o * v.n + c * v.c];
        if (!(theirs == ours)) return false;
        any |= ours != zero;
      }
    }
    return any;
  };
  return b.dtype == DType::f64 ? same(0.0) : same(0.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) {
  m.def("live_block(Tensor weight, Tensor? rows, Tensor? columns) -> Tensor");
  m.def("spread_block(Tensor block, Tensor(a!) out, Tensor? rows, Tensor? columns, bool clear=True) -> ()");
  m.def("is_live_part(Tensor whole, Tensor block, Tensor? rows, Tensor? columns) -> bool");
  m.def("gather_blocks(Tensor[] wholes, Tensor(a!)[] blocks, Tensor? rows, Tensor? columns) -> ()");
  m.def("spread_blocks(Tensor[] blocks, Tensor(a!)[] wholes, Tensor? rows, Tensor? columns) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CPU, m) {
  m.impl("live_block", TORCH_BOX(&live_block));
  m.impl("spread_block", TORCH_BOX(&spread_block));
  m.impl("is_live_part", TORCH_BOX(&is_live_part));
  m.impl("gather_blocks", TORCH_BOX(&gather_blocks));
  m.impl("spread_blocks", TORCH_BOX(&spread_blocks));
}

}  // namespace lp
